"""The asynchronous trainer against TRL's own clip, and against Algorithm 1 on unpacked rows."""

import ast
import json
import math
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM
from trl.experimental.async_grpo import AsyncGRPOTrainer
from trl.experimental.async_grpo.async_grpo_trainer import DataCollatorForRollout
from trl.experimental.async_grpo.packing import TreeRow

from cppo_trl import AsyncCPPOConfig, AsyncCPPOTrainer, CPPOConfig
from cppo_trl.asynchronous import trainer as module
from cppo_trl.asynchronous.samples import StampedCollator, seeded
from cppo_trl.output.callbacks import SHOWN
from cppo_trl.output.checkpoints import TrainingFinished
from cppo_trl.seam import checks
from tests import reference
from tests.asynchronous.conftest import PROMPT, make_trainer

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


def packed_batch(trainer, samples):
    """The samples as TRL packs them into one row, with the padding of a longer row of another process."""
    rows = []
    for sample in samples:
        names = ("input_ids", "completion_mask", "old_log_probs", "advantage", "group_id")
        row = {name: getattr(sample, name) for name in names}
        rows.append({**row, "metrics": {**sample.metrics, "sampled_at": sample.group_id % 3}})
    short, long = TreeRow(), TreeRow()
    for row in rows:
        short.add(row)
    for row in [*rows, *rows[:4]]:
        long.add({**row, "input_ids": row["input_ids"] + 0, "metrics": dict(row["metrics"])})
    batch = StampedCollator(DataCollatorForRollout(0, num_processes=2))([[short, long]])
    return {name: value[:1] for name, value in batch.items()}


def test_the_gradient_is_that_of_algorithm_1_on_unpacked_rows(tmp_path):
    trainer = make_trainer(tmp_path, cppo_delta=0.1, cppo_delta_b=0.01)
    trainer.accelerator.gradient_state._set_sync_gradients(True)
    trainer.current_gradient_accumulation_steps = 1
    trainer.state.global_step = 3
    trainer.rollout_worker.start()
    samples = [trainer.rollout_worker.rollout_buffer.get() for _ in range(24)]
    torch.manual_seed(1)
    with torch.no_grad():  # the policy has moved
        for parameter in trainer.model.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    samples[3].old_log_probs[PROMPT + 2] = math.nan
    samples[5].old_log_probs[PROMPT + 1] = -60.0
    batch = packed_batch(trainer, samples)
    terms = int((batch["token_index"] >= 0).sum())
    assert batch["input_ids"].numel() < 0.8 * sum(len(sample.input_ids) for sample in samples)  # prefixes are shared
    batch["global_n_tokens"] = torch.tensor([float(terms)])
    loss = trainer.compute_loss(trainer.model, batch)
    loss.backward()

    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float32)
    plain.load_state_dict(trainer.model.state_dict())
    total, kept = 0.0, []
    for sample in samples:
        ids = torch.tensor(sample.input_ids)[None]
        logps = plain(ids).logits[0, PROMPT - 1 : -1].float().log_softmax(-1)
        logps = logps.gather(-1, ids[0, PROMPT:, None])[:, 0]
        now = logps.tolist()
        mu = [
            current if math.isnan(old) else max(old, current - 20)
            for old, current in zip(sample.old_log_probs[PROMPT:].tolist(), now, strict=True)
        ]
        divergence = [abs(math.exp(p) - math.exp(m)) for p, m in zip(now, mu, strict=True)]
        log_ratio = [p - m for p, m in zip(now, mu, strict=True)]
        budget = reference.clipped_quantile(divergence, 0.01, 0.9, 2.0)
        advantages = [sample.advantage] * len(now)
        mask, *_ = reference.algorithm_1(list(map(math.exp, log_ratio)), advantages, divergence, 0.1, budget, 0.8)
        kept += mask
        for token, (weight, m) in enumerate(zip(mask, mu, strict=True)):
            total = total - weight * (logps[token] - m).exp() * sample.advantage
    assert 0.1 < sum(kept) / len(kept) < 0.9
    (total / terms).backward()
    assert loss.item() == pytest.approx(total.item() / terms, rel=1e-4)
    gradients = dict(trainer.model.named_parameters())
    for name, parameter in plain.named_parameters():
        torch.testing.assert_close(gradients[name].grad, parameter.grad, rtol=1e-3, atol=2e-6)


def test_metrics_by_staleness(tmp_path):
    trainer = make_trainer(tmp_path, max_steps=4, cppo_delta=0.02, cppo_delta_b=0.002)
    trainer.train()
    rows = trainer.state.log_history[:-1]
    for step, row in enumerate(rows):
        stale = [name for name in row if name.startswith("cppo/staleness_")]
        assert len(stale) == 2  # every sample is of version 1, published before the first update
        assert row[f"cppo/staleness_{step}/divergence"] == pytest.approx(row["cppo/divergence/mean"])
        assert row[f"cppo/staleness_{step}/masked"] == pytest.approx(row["cppo/masked"])
    assert rows[0]["cppo/rollout_mismatch"] < 1e-6
    assert rows[0]["cppo/rollout_mismatch_nats"] < 1e-5
    assert "cppo/rollout_mismatch" not in rows[1]
    assert rows[3]["cppo/divergence/mean"] > 10 * rows[0]["cppo/divergence/mean"]
    assert rows[3]["cppo/masked"] > 0
    assert rows[0]["sample/kept_length"] > 3
    profile = [json.loads(line) for line in (tmp_path / "out" / "trust_region.jsonl").read_text().splitlines()]
    assert [row["step"] for row in profile] == list(range(1, len(rows) + 1))
    assert not [name for row in rows for name in row if name.startswith("clip_ratio")]
    assert (tmp_path / "out" / "run.json").exists()


def test_a_changed_loss_of_trl_is_loud(tmp_path, monkeypatch):
    def other(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        return 1.5 * compute_loss(self, model, inputs)

    compute_loss = AsyncGRPOTrainer.compute_loss
    trainer = make_trainer(tmp_path)
    monkeypatch.setattr(AsyncGRPOTrainer, "compute_loss", other)
    with pytest.raises(RuntimeError, match="differs from the surrogate by"):
        trainer.train()
    monkeypatch.setattr(AsyncGRPOTrainer, "compute_loss", lambda self, model, batch: None)
    with pytest.raises(RuntimeError, match="compute_loss of the installed TRL takes"):
        make_trainer(tmp_path)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"cppo_divergence": "topk_tv"}, "Set cppo_divergence to binary_tv or binary_kl"),
        ({"trust_region": "trm_max"}, "Set cppo_divergence to binary_tv or binary_kl"),
        ({"epsilon": 0.3}, "epsilon=0.3 contradicts the trust region"),
        ({"top_p": 0.9}, "top_p=0.9 contradicts the trust region"),
        ({"min_p": 0.1}, "min_p=0.1 contradicts the trust region"),
        ({"temperature": 0.0}, "temperature must be > 0"),
        ({"cppo_delta": -1.0}, "cppo_delta must be > 0"),
        ({"trust_region": "dppo", "cppo_delta_b": 0.1}, "does not read it"),
    ],
)
def test_refusals_name_the_field(fields, message):
    with pytest.raises(ValueError, match=message):
        AsyncCPPOConfig("out", bf16=False, **fields)


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


def test_the_seeds_of_the_requests_are_those_of_the_run_and_of_its_place():
    def drawn(seed, place):
        return seeded(lambda dataset_start_index: random.getrandbits(63), seed, dataset_start_index=place)

    assert drawn(3, 0) == drawn(3, 0)
    assert len({drawn(3, 0), drawn(3, 5), drawn(4, 0), drawn(30, 0)}) == 4


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
