"""Two processes over gloo against one, on the same injected rollouts and minibatches (`distributed_training`)."""

import functools
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from trl.trainer import grpo_trainer as host

from tests.conftest import tiny_model
from tests.distributed_training import CASES, run

ROOT = Path(__file__).parent.parent
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
WITH_DEEPSPEED = pytest.mark.skipif(find_spec("deepspeed") is None, reason="deepspeed is not installed")
LAYOUTS = ["ddp", "fsdp2", *(pytest.param(layout, marks=WITH_DEEPSPEED) for layout in ("zero2", "zero3"))]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    path = tmp_path_factory.mktemp("model")
    tiny_model().save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def two_processes(model, tmp_path_factory):
    """What two processes saw under a layout; each is launched once."""

    @functools.cache
    def launch(layout, mixed_precision="no"):
        directory = tmp_path_factory.mktemp(layout)
        command = [sys.executable, "-m", "accelerate.commands.launch", "--num_processes=2", "--main_process_port=0"]
        command += ["--config_file", f"configs/accelerate/{layout}.yaml", f"--mixed_precision={mixed_precision}"]
        command += ["-m", "tests.distributed_training", layout, str(model), str(directory)]
        subprocess.run(command, check=True, cwd=ROOT, env=ENVIRONMENT, timeout=290)
        return torch.load(directory / "results.pt")

    return launch


@pytest.fixture(scope="module")
def one_process(model, tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(host, "shuffle_sequence_dict", host.shuffle_sequence_dict)  # run() replaces it
        return {case: run(case, model, tmp_path_factory.mktemp(case), "one") for case in CASES}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_two_processes_train_as_one_does(layout, case, two_processes, one_process, model):
    two, one = two_processes(layout)[case], one_process[case]
    assert [entry.keys() for entry in two["log"]] == [entry.keys() for entry in one["log"]]
    assert len(one["log"]) == 4
    for name in set().union(*one["log"]) - {"step_time"}:  # losses, gradient norms, rewards, cppo/*
        values = [[entry[name] for entry in result["log"] if name in entry] for result in (two, one)]
        assert values[0] == pytest.approx(values[1], rel=1e-4, abs=1e-6), name
    assert len(two["weights"]) == len(one["weights"]) == 8
    for found, expected in zip(two["weights"], one["weights"], strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert two["model"].keys() == one["model"].keys()
    for name, parameter in one["model"].items():
        torch.testing.assert_close(two["model"][name], parameter, rtol=1e-5, atol=2e-6)
    # not for want of anything to differ in
    assert 0.1 < min(entry["cppo/weight"] for entry in one["log"]) < 0.9
    assert max(entry["grad_norm"] for entry in one["log"]) > 0.1  # clipped
    lengths = one["weights"][0][..., 1].sum(1)
    assert lengths.min() == 0
    assert len(lengths.unique()) > 3
    if "lora" not in case:
        moved = [
            (parameter - load_file(model / "model.safetensors")[name]).abs().max()
            for name, parameter in one["model"].items()
        ]
        assert max(moved) > 5e-3


@pytest.mark.parametrize("layout", LAYOUTS)
def test_under_bf16_log_probs_and_gradients_stay_fp32(layout, two_processes):
    """The log-probs are an fp32 head's on the pass's own hidden states; gradients are reduced in fp32."""
    result = two_processes(layout, "bf16")["bf16"]
    assert len(result["errors"]) > 100
    assert max(result["errors"]) < 1e-5
    assert sum(result["rounding"]) / len(result["rounding"]) > 1e-3  # what a rounded output would have shown
    assert len(result["log"]) == 4
    assert all(entry["cppo/divergence/mean"] > 0 and entry["grad_norm"] > 0 for entry in result["log"])
    if layout == "fsdp2":
        assert result["reduced_in"] == "torch.float32"


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_weight_that_is_not_finite_on_one_process_is_refused_on_all(layout, two_processes):
    refused = two_processes(layout)["refused"]
    assert len(refused) == 2
    assert all("After update 4 the weights are not finite" in message for message in refused)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_checkpoint_of_two_processes_goes_on_as_if_never_stopped(layout, two_processes):
    whole, resumed = two_processes(layout)["dapo-topk_tv"], two_processes(layout)["resumed"]
    assert len(resumed["weights"]) == 4
    for name, parameter in whole["model"].items():
        torch.testing.assert_close(resumed["model"][name], parameter, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_prompt_that_is_split_over_the_processes_is_skipped_whole(layout, two_processes):
    results = two_processes(layout)
    skipped, unskipped = (results[case]["weights"] for case in ("grpo-trm_max-topk_kl-policy-skip", "dapo-topk_tv"))
    for micro_batch in range(4):  # of the second rollout, where rows 8 to 15 score alike
        rows = torch.tensor([start + micro_batch * 3 + row for start in (0, 12) for row in range(3)])
        mask = unskipped[4 + micro_batch][..., 1] * ~((rows >= 8) & (rows < 16)).unsqueeze(1)
        assert torch.equal(skipped[4 + micro_batch][..., 1], mask)


def test_no_process_waits_for_the_reward_workers_of_another(two_processes):
    seen = two_processes("ddp")["rewards"]
    assert seen["other_was_first"] == [True, False]  # process 1 had its rewards while process 0 was stuck
    assert seen["rewards"] == [0.0, 1.0, 1.0, 1.0]  # the collective that follows gives both all
    first, second = seen["workers"]
    assert first
    assert second
    assert not first & second


def test_topk_sees_the_whole_of_a_sharded_head():
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    subprocess.run([*command, "-m", "tests.seam.sharded_head"], check=True, cwd=ROOT, env=ENVIRONMENT, timeout=120)
