"""The rule on packed rows."""

import math

import pytest
import torch
from transformers import AutoModelForCausalLM
from trl.experimental.async_grpo import AsyncGRPOTrainer
from trl.experimental.async_grpo.async_grpo_trainer import DataCollatorForRollout
from trl.experimental.async_grpo.packing import TreeRow

from cppo_trl.asynchronous.samples import StampedCollator
from tests import reference
from tests.asynchronous.conftest import PROMPT, make_trainer


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
