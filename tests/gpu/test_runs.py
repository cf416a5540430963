"""Whole runs on the device: under FSDP2 and ZeRO, killed and resumed, with a colocated vLLM that sleeps."""

import functools
import signal
import subprocess
import sys
import time
from importlib.util import find_spec

import pytest
import torch
from safetensors.torch import load_file

from tests.conftest import RECIPE, ROOT, digit_reward, flags, launch, small_run, tiny_data, tiny_model
from tests.gpu.conftest import DEVICE, NEEDS_CUDA, ON_REQUEST

WITH_DEEPSPEED = pytest.mark.skipif(find_spec("deepspeed") is None, reason="deepspeed is not installed")


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """What ``one_process.py`` wrote under a layout; each is launched once."""
    model = tmp_path_factory.mktemp("model")
    tiny_model().save_pretrained(model)

    @functools.cache
    def run(layout):
        directory = tmp_path_factory.mktemp(layout)
        command = ["-m", "tests.gpu.one_process"]
        if layout != "none":
            command = ["-m", "accelerate.commands.launch", "--num_processes=1", "--main_process_port=0"]
            command += ["--config_file", f"configs/accelerate/{layout}.yaml", "-m", "tests.gpu.one_process"]
        environment = {"CPPO_TEST_DEVICE": DEVICE.type} | ({"DS_ACCELERATOR": "cpu"} if DEVICE.type == "cpu" else {})
        result = launch(*command, layout, model, directory, **environment)
        assert result.returncode == 0, result.stderr[-3000:]
        return torch.load(directory / "results.pt")

    return run


@ON_REQUEST
@pytest.mark.parametrize(
    "layout", ["fsdp2", *(pytest.param(name, marks=WITH_DEEPSPEED) for name in ("zero2", "zero3"))]
)
def test_one_process_under_a_layout_trains_as_one_without(layout, trained):
    """In bf16, whose rounding differs by layout: the first update's numbers, and the direction of all four."""
    found, expected = trained(layout), trained("none")
    assert len(found["log"]) == len(expected["log"]) == 4
    for name in ("reward", "cppo/topk_mass"):
        assert found["log"][0][name] == pytest.approx(expected["log"][0][name], rel=0.02), name
    for update, name in ((0, "grad_norm"), (1, "cppo/divergence/mean")):
        assert found["log"][update][name] == pytest.approx(expected["log"][update][name], rel=0.2), name
    assert found["log"][1]["cppo/divergence/mean"] > 1e-3
    start = tiny_model().state_dict()
    moves = [
        torch.cat([(result["model"][name].float() - start[name]).flatten() for name in sorted(start)])
        for result in (found, expected)
    ]
    assert torch.nn.functional.cosine_similarity(*moves, dim=0) > 0.8
    assert moves[0].abs().max() > 1e-3


@ON_REQUEST
def test_kill_9_and_the_same_command_again_gives_the_same_weights(task):
    def command(out):
        fields = {"output_dir": task / out, "max_steps": 12, "save_strategy": "steps", "save_steps": 4}
        fields |= {"learning_rate": 1e-2, "warmup_steps": 0, "use_cpu": DEVICE.type == "cpu"}
        fields |= {"reward_funcs": "tests.conftest.digit_reward", "resume_from_checkpoint": "true"}
        return [ROOT / "scripts/train.py", "--config", RECIPE, *small_run(task), *flags(fields)]

    process = subprocess.Popen([sys.executable, *command("out")], cwd=ROOT, stdout=subprocess.DEVNULL)
    while not (task / "out/checkpoint-4/trainer_state.json").exists():
        assert process.poll() is None
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (task / "out/model.safetensors").exists()
    for out in ("out", "whole"):
        result = launch(*command(out))
        assert result.returncode == 0, result.stderr[-3000:]
    weights, expected = (load_file(task / out / "model.safetensors") for out in ("out", "whole"))
    start = load_file(task / "model/model.safetensors")
    exact = {"rtol": 0, "atol": 0} if DEVICE.type == "cpu" else {"rtol": 1e-3, "atol": 1e-4}  # atomics on a GPU
    for name, weight in expected.items():
        torch.testing.assert_close(weights[name], weight, **exact)
    assert max((weight - start[name]).abs().max() for name, weight in expected.items()) > 5e-3


@NEEDS_CUDA
@pytest.mark.parametrize("divergence", ["binary_tv", "topk_tv"])
def test_a_colocated_vllm_that_sleeps(make_on_device, task, divergence):
    pytest.importorskip("vllm")
    trainer = make_on_device(
        model=str(task / "model"),
        data=tiny_data(),
        reward=digit_reward,
        use_vllm=True,
        vllm_mode="colocate",
        vllm_enable_sleep_mode=True,
        vllm_gpu_memory_utilization=0.2,
        vllm_max_model_length=64,
        cppo_divergence=divergence,
        bf16=True,
        cast_lm_head_to_fp32=True,
        max_steps=4,
    )
    trainer.train()
    history = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert len(history) == 4
    assert history[0]["cppo/rollout_mismatch"] < 0.02  # bf16 noise; stale weights would show more
    assert history[2]["cppo/rollout_mismatch"] < 0.02  # after a sleep and a weight sync
