"""Rollouts by a real vLLM against full logits of the trainer's own model, in fp32."""

import math

import pytest
import torch

pytest.importorskip("vllm")

import vllm._custom_ops
from trl import GRPOConfig, GRPOTrainer

from cppo_trl import CPPOTrainer
from tests.conftest import full_log_softmax
from tests.reference import reduced
from tests.seam.test_topk import LORA

TOLERANCE = 2e-5  # two fp32 implementations; bf16 would be off by 3e-2, stale weights by more


class Spy(CPPOTrainer):
    """Recomputes both policies in full and keeps the differences to what the engine said and the rule used."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.rollouts, self.divergences = [], []

    def full_logps(self, batch):
        """(B, T, V) log-softmax of the current policy at the completion tokens."""
        with torch.no_grad():
            return full_log_softmax(self.model, batch, self.temperature)

    def _generate_and_score_completions(self, inputs):
        output = super()._generate_and_score_completions(inputs)
        output["mu"] = self.full_logps(output)  # travels with its response through shuffle and split
        self.rollouts.append({**output, "lengths": self.lengths})
        return output

    def _generate(self, prompts):
        result = super()._generate(prompts)
        self.lengths = torch.tensor([len(tokens) for tokens in result[1]])
        return result

    def _compute_loss(self, model, inputs):
        self.batch = inputs
        return super()._compute_loss(model, inputs)

    def get_off_policy_mask(self, **inputs):
        divergence = self._loss.divergence
        pi, mu, ids = self.full_logps(self.batch), self.batch["mu"], self.batch["completion_ids"]
        k = self.args.cppo_topk if self.args.uses_topk else 0  # Binary: the sampled token and the rest
        kind = self.args.cppo_divergence.split("_")[1]
        expected = torch.zeros_like(divergence)
        for b, t in self.batch["completion_mask"].nonzero().tolist():
            both = pi[b, t].double().tolist(), mu[b, t].double().tolist()
            expected[b, t] = reduced(*both, ids[b, t].item(), k, kind)
        valid = self.batch["completion_mask"].bool()
        self.divergences.append((divergence[valid], expected[valid]))
        return super().get_off_policy_mask(**inputs)


def check_anchor(batch):
    """The engine's log-prob of each sampled token is the trainer's; returns the largest difference."""
    valid = batch["completion_mask"].bool()
    full = batch["mu"].gather(-1, batch["completion_ids"].unsqueeze(-1)).squeeze(-1)
    return check_close(batch["old_per_token_logps"][valid], full[valid])


def check_topk(batch, k):
    """The listed tokens are the K likeliest and the sampled one; returns the error, and how often it ranks beyond."""
    valid = batch["completion_mask"].bool()
    ids, logps = batch["topk_ids"].long(), batch["topk_logps"]
    assert ids.shape == logps.shape == (*valid.shape, k + 1)
    padding = torch.arange(valid.size(1)) >= batch["lengths"].unsqueeze(1)
    assert (logps[padding] == -torch.inf).all()
    ids, logps, mu = ids[valid], logps[valid], batch["mu"][valid]
    sampled = batch["completion_ids"][valid].unsqueeze(-1)
    known = logps > -torch.inf
    error = check_close(logps[known], mu.gather(-1, ids)[known])
    assert not ((ids == sampled) & known).any()  # listed apart
    count = torch.zeros_like(mu).scatter_add_(-1, ids, known.float()).scatter_add_(-1, sampled, torch.ones(len(mu), 1))
    assert count.max() == 1
    kth = mu.sort(-1, descending=True).values[:, k - 1 : k]  # ties with the K-th may fall either way
    assert (count[mu > kth + TOLERANCE] == 1).all()
    of_sampled = mu.gather(-1, sampled)
    assert (mu >= kth - TOLERANCE).scatter_(-1, sampled, True)[count == 1].all()
    beyond, within = (of_sampled < kth - TOLERANCE).squeeze(-1), (of_sampled > kth + TOLERANCE).squeeze(-1)
    assert (known.sum(-1)[beyond] == k).all()
    assert (known.sum(-1)[within] == k - 1).all()
    return error, beyond.sum().item()


def check_close(found, expected):
    error = (found - expected).abs().max().item()
    assert error < TOLERANCE
    return error


def logged(trainer):
    return [h for h in trainer.state.log_history if "cppo/divergence/mean" in h]


def check_run(trainer):
    """Train for some rollouts of several updates, then generate once more, and compare every number."""
    trainer.train()
    history = logged(trainer)
    assert len(history) == trainer.args.max_steps >= 6
    for h in history:
        right_after_rollout = (h["step"] - 1) % trainer.args.updates_per_rollout == 0
        assert ("cppo/rollout_mismatch" in h) == right_after_rollout
        assert h.get("cppo/rollout_mismatch", 0.0) < TOLERANCE
        assert math.isfinite(h["loss"] + h["grad_norm"])
    trainer._generate_and_score_completions(next(iter(trainer.get_train_dataloader())))
    assert len(trainer.rollouts) == 1 + trainer.args.max_steps / trainer.args.updates_per_rollout
    anchor = max(check_anchor(batch) for batch in trainer.rollouts)
    used, expected = (torch.cat(x) for x in zip(*trainer.divergences, strict=True))
    assert expected.max() > 0.02  # the policy did move
    divergence = check_close(used, expected)
    assert len(set(torch.cat([batch["lengths"] for batch in trainer.rollouts]).tolist())) > 1
    print(f"largest difference of the anchor {anchor:.1e}, of the divergence {divergence:.1e}")


SCHEDULE = {  # two passes of two updates, of two micro-batches each
    "per_device_train_batch_size": 4,
    "gradient_accumulation_steps": 2,
    "steps_per_generation": 4,
    "num_iterations": 2,
    "max_steps": 8,
}
BINARY_RUNS = {
    "tv": {},
    "kl": {"cppo_divergence": "binary_kl", **SCHEDULE},
    "temperature": {"temperature": 0.7},
    "tied": {"tied": True},
    "lora": {"peft": LORA},
}
TOPK_RUNS = {
    "1": {"cppo_topk": 1},
    "5": {"cppo_topk": 5},
    "20": {},
    "kl": {"cppo_divergence": "topk_kl", **SCHEDULE},
    "temperature": {"cppo_topk": 10, "temperature": 0.7},
    "tied": {"tied": True},
    "lora": {"peft": LORA},
    "policy": {"cppo_topk_source": "policy", "cppo_topk": 40, **SCHEDULE},
    "truncated": {
        "cppo_topk": 5,
        "mask_truncated_completions": True,
        "max_completion_length": 50,
        "per_device_train_batch_size": 16,
        "learning_rate": 3e-3,
    },
}


@pytest.mark.parametrize("fields", BINARY_RUNS.values(), ids=BINARY_RUNS)
def test_binary(colocate, fields):
    check_run(colocate(Spy, **fields))


@pytest.mark.parametrize("fields", TOPK_RUNS.values(), ids=TOPK_RUNS)
def test_topk(colocate, fields):
    trainer = colocate(Spy, **{"cppo_divergence": "topk_tv", **fields})
    check_run(trainer)
    if fields.get("cppo_topk_source"):
        assert trainer.vllm_generation.logprobs == 0  # nothing but the sampled token's is asked for
        return
    errors, beyond = zip(*(check_topk(batch, trainer.args.cppo_topk) for batch in trainer.rollouts), strict=True)
    assert sum(beyond) > 10
    print(f"largest difference of a listed log-prob {max(errors):.1e}; sampled beyond K: {sum(beyond)}")


def forward_passes(trainer):
    """Train, and count the passes of the model's layers."""
    passes = []
    trainer.model.model.register_forward_pre_hook(lambda *_: passes.append(1))
    trainer.train()
    assert trainer.state.global_step == 6
    return len(passes)


@pytest.mark.parametrize("micro_batches", [2, 4], ids=["on-policy", "off-policy"])
@pytest.mark.parametrize("kind", ["binary_tv", "topk_tv"])
def test_no_pass_but_the_losses(colocate, kind, micro_batches):
    fields = {"gradient_accumulation_steps": 2, "steps_per_generation": micro_batches}
    trainer = colocate(CPPOTrainer, cppo_divergence=kind, **fields)
    assert trainer.args.always_on_policy == (micro_batches == 2)
    assert forward_passes(trainer) == 12
    if micro_batches == 2:
        assert all(h["cppo/rollout_mismatch"] == h["cppo/divergence/mean"] < TOLERANCE for h in logged(trainer))


def test_trl_by_default_scores_each_rollout_again(colocate):
    trainer = colocate(GRPOTrainer, config_cls=GRPOConfig, gradient_accumulation_steps=2, bf16=False)
    assert trainer.args.steps_per_generation == 2
    assert forward_passes(trainer) == 24


def skip_head(engine):
    named = engine._iter_named_params
    engine._iter_named_params = lambda: ((name, value) for name, value in named() if "lm_head" not in name)


def reload_from_disk(engine):
    def sync_weights():
        directory = engine.model.name_or_path
        engine.model.save_pretrained(directory)
        engine.llm.collective_rpc("reload_weights", kwargs={"weights_path": directory})
        engine.llm.reset_prefix_cache()

    engine.sync_weights = sync_weights


@pytest.mark.parametrize("tied", [False, True])
def test_a_stale_head_stops_the_run(colocate, monkeypatch, tied):
    """Left out of the sync; or tied, packed by oneDNN, and then left as it was by vLLM 0.30's own reload_weights."""
    monkeypatch.setattr(vllm._custom_ops, "_supports_onednn", tied)
    trainer = colocate(CPPOTrainer, tied=tied, learning_rate=3e-2, max_steps=20)
    (reload_from_disk if tied else skip_head)(trainer.vllm_generation)
    with pytest.raises(RuntimeError, match="weights were not updated by the sync") as stopped:
        trainer.train()
    print(stopped.value)
    assert all(h.get("cppo/rollout_mismatch_nats", 0) < TOLERANCE for h in logged(trainer)[:2])
    assert trainer.state.global_step == trainer.args.updates_per_rollout


def test_more_than_the_engine_returns_is_refused(colocate, monkeypatch):
    import trl.generation.vllm_generation as host

    monkeypatch.setattr(host, "LLM", None)
    with pytest.raises(ValueError, match="cppo_topk must be <= 20"):
        colocate(Spy, cppo_divergence="topk_tv", cppo_topk=21)


def test_topk_training_raises_the_reward(colocate):
    fields = {"per_device_train_batch_size": 16, "learning_rate": 5e-3, "cppo_delta": 0.3, "cppo_delta_b": 0.1}
    trainer = colocate(CPPOTrainer, tied=True, cppo_divergence="topk_tv", max_steps=40, **fields)
    trainer.train()
    rewards = [h["reward"] for h in trainer.state.log_history if "reward" in h]
    mismatch = [h["cppo/rollout_mismatch"] for h in logged(trainer) if "cppo/rollout_mismatch" in h]
    assert max(mismatch) < TOLERANCE
    print(f"largest mismatch {max(mismatch):.1e}")
    assert sum(rewards[-5:]) > sum(rewards[:5]) + 1
