"""TRL's asynchronous trainer on a CPU: attention without FlashAttention-3, and rollouts from the start-up weights."""

import queue
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from datasets import Dataset
from torch.nn.functional import scaled_dot_product_attention
from trl.experimental.async_grpo import async_grpo_trainer, packing
from trl.experimental.async_grpo.async_rollout_worker import RolloutSample

from cppo_trl import AsyncCPPOConfig, AsyncCPPOTrainer
from cppo_trl.data import arithmetic
from tests.conftest import VOCABULARY, tiny_model

PROMPT = 6  # tokens


def varlen_attention(q, k, v, cu_q, cu_k, max_q, max_k, softmax_scale=None, causal=True, window_size=(-1, -1)):
    """What the Hub's FlashAttention-3 kernel computes, one segment at a time."""
    assert causal
    assert window_size == (-1, -1)
    groups, out = q.size(1) // k.size(1), []
    for a, b, c, d in zip(cu_q[:-1], cu_q[1:], cu_k[:-1], cu_k[1:], strict=True):
        query = q[a:b].transpose(0, 1)
        key, value = (x[c:d].repeat_interleave(groups, 1).transpose(0, 1) for x in (k, v))
        row = torch.arange(d - c - (b - a), d - c)[:, None]
        mask = torch.arange(d - c)[None] <= row  # causal, aligned at the end
        out.append(
            scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=softmax_scale).transpose(0, 1)
        )
    return torch.cat(out)


def run_on_the_cpu(patch):
    """Replace what TRL's trainer has for CUDA alone: the kernel, and the name of the device."""
    patch(packing, "_flash_attn", lambda: SimpleNamespace(flash_attn_varlen_func=varlen_attention))
    patch(async_grpo_trainer, "get_peak_flops_per_device", lambda *_: None)


@pytest.fixture(autouse=True)
def _on_the_cpu(monkeypatch):
    run_on_the_cpu(monkeypatch.setattr)


class Rollouts:
    """A worker that has all its samples at once, from the weights that it was made with."""

    def __init__(self, model, groups=64, generations=4, seed=0):
        self.rollout_buffer, self.metrics_queue = queue.Queue(), queue.Queue()
        self.model, self.groups, self.generations = model, groups, generations
        self.generator = torch.Generator().manual_seed(seed)

    @torch.no_grad()
    def start(self):
        for group in range(self.groups):
            prompt = torch.randint(2, VOCABULARY, (PROMPT,), generator=self.generator).tolist()
            ids = torch.tensor([prompt] * self.generations)
            for _ in range(int(torch.randint(3, 12, (1,), generator=self.generator))):
                probabilities = self.model(ids).logits[:, -1].float().softmax(-1)
                ids = torch.cat([ids, torch.multinomial(probabilities, 1, generator=self.generator)], 1)
            logps = self.model(ids).logits[:, :-1].float().log_softmax(-1).gather(-1, ids[:, 1:, None])[..., 0]
            reward = (ids[:, PROMPT:] < 10).float().mean(1)
            advantage = (reward - reward.mean()) / (reward.std(unbiased=False) + 1e-8)
            mask = np.array([0] * PROMPT + [1] * (ids.size(1) - PROMPT))
            for i in range(self.generations):
                old = np.concatenate([[0.0], logps[i].numpy()]).astype(np.float32) * mask
                metrics = {"reward": float(reward[i])}
                sample = RolloutSample([], [], ids[i].numpy(), mask, old, float(advantage[i]), 1, group, metrics)
                self.rollout_buffer.put(sample)

    def stop(self):
        pass

    def check_health(self, stale_after_s):
        pass

    def update_model_version(self, version):
        pass


class NoTransfer:
    """Leaves the rollout weights as they are."""

    def init_weight_transfer(self):
        pass

    def pause(self):
        pass

    def send_weights(self, iterator):
        list(iterator)

    def resume(self):
        pass

    def destroy(self):
        pass


def make_trainer(directory, trainer=AsyncCPPOTrainer, **fields):
    """A trainer of six updates on 16 samples each, from a tiny model's own rollouts."""
    model = tiny_model()
    model.save_pretrained(directory / "model")
    arithmetic.tokenizer().save_pretrained(directory / "model")
    defaults = {"use_cpu": True, "bf16": False, "gradient_checkpointing": False, "report_to": [], "disable_tqdm": True}
    defaults |= {"save_strategy": "no", "learning_rate": 3e-3, "max_steps": 6, "per_device_train_batch_size": 16}
    defaults |= {"num_generations": 4, "max_staleness": 100, "token_budget": 0}
    return trainer(
        str(directory / "model"),
        len,
        AsyncCPPOConfig(str(directory / "out"), **{**defaults, **fields}),
        Dataset.from_dict({"prompt": ["x"] * 8}),
        arithmetic.tokenizer(),
        rollout_worker=Rollouts(model),
        weight_transfer=NoTransfer(),
    )
