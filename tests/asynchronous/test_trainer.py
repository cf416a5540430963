"""The asynchronous trainer against TRL's own clip, and against Algorithm 1 on unpacked rows."""

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from trl.experimental.async_grpo import AsyncGRPOTrainer

from cppo_trl import AsyncCPPOTrainer, CPPOConfig
from cppo_trl.asynchronous import trainer as module
from cppo_trl.output.callbacks import SHOWN
from cppo_trl.output.checkpoints import TrainingFinished
from cppo_trl.seam import checks
from tests.asynchronous.conftest import make_trainer

ROOT = Path(__file__).parents[2]


def weights(trainer):
    return torch.cat([parameter.detach().flatten() for parameter in trainer.model.parameters()])


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 8},
        {"token_budget": 60},
        {"gradient_checkpointing": True, "max_steps": 2},
        {"weight_sync_steps": 2},
    ],
    ids=["plain", "accumulation", "token budget", "gradient checkpointing", "weight sync"],
)
def test_the_rule_grpo_is_trl_s_own_clip_to_the_bit(tmp_path, fields):
    host = make_trainer(tmp_path / "host", AsyncGRPOTrainer, **fields)
    start = weights(host)
    ours = make_trainer(tmp_path / "ours", trust_region="grpo", cppo_ratio_min=0.8, cppo_ratio_max=1.2, **fields)
    host.train()
    ours.train()
    assert torch.equal(weights(host), weights(ours))
    assert (weights(host) - start).abs().max() > 5e-3
    logged = [[row[name] for row in ours.state.log_history[:-1]] for name in ("cppo/masked", "cppo/at_bound")]
    assert max(logged[0]) > 0.02  # the clip did something
    if not fields:
        norms = [[row["grad_norm"] for row in trainer.state.log_history[:-1]] for trainer in (host, ours)]
        assert norms[0] == norms[1]


def test_the_arguments_are_checked(tmp_path):
    with pytest.raises(TypeError, match=r"args must be a cppo_trl\.AsyncCPPOConfig; got CPPOConfig"):
        AsyncCPPOTrainer("model", len, CPPOConfig("out", bf16=False))


class Server:
    """Answers as a vLLM server that an earlier run left two adapters on."""

    def __init__(self, alive=True):
        self.alive = alive

    def get(self, url, timeout):
        if not self.alive:
            raise module.requests.ConnectionError
        names = ["base", "trl-policy-v3", "trl-policy-v4"]
        return type(
            "Reply",
            (),
            {"ok": True, "raise_for_status": lambda _: None, "json": lambda _: {"data": [{"id": n} for n in names]}},
        )()


def test_adapters_of_an_earlier_run_are_unloaded_before_the_first_sync(tmp_path, monkeypatch):
    trainer, unloaded = make_trainer(tmp_path), []
    monkeypatch.setattr(module.requests, "get", Server().get)
    monkeypatch.setattr(trainer.vllm_client, "unload_lora_adapter", unloaded.append)
    monkeypatch.setattr(trainer, "_sync_weight_lora", lambda t0: (t0, t0, t0))
    trainer._lora_sync = True
    trainer._sync_weight()
    trainer._sync_weight()
    assert unloaded == ["trl-policy-v3", "trl-policy-v4"]


def test_what_it_shares_with_the_synchronous_trainer(tmp_path, monkeypatch, capsys):
    accelerators = []
    monkeypatch.setattr(checks, "keep_fp32_outputs", accelerators.append)
    fields = {"save_strategy": "steps", "save_steps": 2, "max_steps": 2}
    trainer = make_trainer(tmp_path, **fields)
    assert accelerators == [trainer.accelerator]
    trainer.train()
    printed = [ast.literal_eval(line) for line in capsys.readouterr().out.splitlines() if line.startswith("{'loss'")]
    assert len(printed) == 2
    assert all("cppo/masked" in row and row.keys() <= SHOWN for row in printed)
    with pytest.raises(TrainingFinished, match="All 2 updates are made"):
        make_trainer(tmp_path, **fields).train(resume_from_checkpoint=str(tmp_path / "out/checkpoint-2"))


def test_two_processes_train_as_one_does(tmp_path):
    results = []
    for processes in (1, 2):
        directory = tmp_path / str(processes)
        directory.mkdir()
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
        command += ["-m", "tests.asynchronous.two_processes", str(directory)]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
        subprocess.run(command, check=True, cwd=ROOT, env=environment, timeout=120, capture_output=True)
        results.append(torch.load(directory / "results.pt", weights_only=False))
    one, two = results
    for name, parameter in one["model"].items():
        torch.testing.assert_close(two["model"][name], parameter, rtol=1e-4, atol=1e-5)
    assert len(one["log"]) == len(two["log"]) == 6
    for expected, found in zip(one["log"], two["log"], strict=True):
        assert found == pytest.approx(expected, rel=1e-3, abs=1e-5)
    assert max(row["cppo/masked"] for row in one["log"]) > 0.05
