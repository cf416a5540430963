"""One training step on the device against an fp64 reference; gradient checkpointing; waits for the device."""

import math
import warnings

import pytest
import torch
from trl import GRPOConfig, GRPOTrainer

from tests.conftest import COMPLETION, gradients, injected_batch, tiny_model, with_topk
from tests.gpu.conftest import NEEDS_CUDA, on_device
from tests.reference import algorithm_1, clipped_quantile, reduced

DELTA, K, WAITS_PER_UPDATE = 0.05, 4, 1


def reference_step(batch, mu, topk):
    """Loss, mask and gradients in fp64, from full logits and the plain loop of Algorithm 1."""
    model = tiny_model().double()
    ids = torch.cat([batch["prompt_ids"], batch["completion_ids"]], 1)
    attention = torch.cat([batch["prompt_mask"], batch["completion_mask"]], 1)
    prompt = batch["prompt_ids"].size(1)
    pi = model(input_ids=ids, attention_mask=attention).logits[:, prompt - 1 : -1].log_softmax(-1)
    sampled, advantages, mask = batch["completion_ids"], batch["advantages"], batch["completion_mask"]
    keep = torch.zeros(mask.shape, dtype=torch.double)
    for b, length in enumerate(mask.sum(1).tolist()):
        ratios, divergences = [], []
        for t, y in enumerate(sampled[b, :length].tolist()):
            p, q = pi[b, t].tolist(), mu[b, t].double().tolist()
            ratios.append(math.exp(p[y] - q[y]))
            divergences.append(reduced(p, q, y, K, "tv") if topk else abs(math.exp(p[y]) - math.exp(q[y])))
        delta_b = clipped_quantile(divergences, 0.02, 0.9, 2.0)
        row, _, margin = algorithm_1(ratios, [advantages[b].item()] * length, divergences, DELTA, delta_b, 0.8)
        assert margin > 1e-6
        keep[b, :length] = torch.tensor(row, dtype=torch.double)
    logps = pi.gather(-1, sampled[..., None])[..., 0]
    coefficient = -advantages[:, None].double() * (logps - batch["old_per_token_logps"]).exp().detach() * keep * mask
    (coefficient * logps).sum().div(mask.numel()).backward()
    return coefficient.sum() / mask.numel(), keep, {name: p.grad for name, p in model.named_parameters()}


@pytest.mark.parametrize("divergence", ["binary_tv", "topk_tv"])
def test_loss_mask_and_gradients_are_those_of_fp64(make_on_device, divergence):
    topk = divergence == "topk_tv"
    given, mu = with_topk(tiny_model(), injected_batch(tiny_model()), K)
    loss, keep, expected = reference_step(given, mu, topk)
    share = 1 - keep.sum() / given["completion_mask"].sum()
    assert 0.05 < share < 0.95
    if not topk:
        given = {name: value for name, value in given.items() if not name.startswith("topk")}
    fields = {"cppo_topk": K} if topk else {}
    trainer = make_on_device(cppo_divergence=divergence, cppo_delta=DELTA, loss_type="dr_grpo", **fields)
    weights, judge = [], trainer.get_off_policy_mask
    trainer.get_off_policy_mask = lambda **inputs: weights.append(judge(**inputs)) or weights[-1]
    value, found = gradients(trainer, on_device(given))
    assert torch.equal(weights[0].cpu().double(), keep)
    torch.testing.assert_close(value.cpu().double(), loss, rtol=1e-4, atol=1e-6)
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name].cpu().double(), gradient, rtol=1e-3, atol=5e-6)


def test_gradient_checkpointing_changes_no_gradient(make_on_device):
    given, _ = with_topk(tiny_model(), injected_batch(tiny_model()), K)
    trainer = make_on_device(cppo_divergence="topk_tv", cppo_topk=K, cppo_delta=DELTA)
    found, recomputed = [], []
    trainer.model.model.layers[0].input_layernorm.register_forward_hook(lambda *_: recomputed.append(1))
    for checkpointing in (False, True):
        if checkpointing:
            trainer.model.gradient_checkpointing_enable({"use_reentrant": False})
        found.append(gradients(trainer, on_device(given)))
    assert len(recomputed) == 1 + 2
    torch.testing.assert_close(found[0][0], found[1][0])
    for name, gradient in found[0][1].items():
        torch.testing.assert_close(found[1][1][name], gradient, rtol=1e-5, atol=1e-7)


@NEEDS_CUDA
@pytest.mark.parametrize("divergence", ["binary_tv", "topk_tv"])
def test_one_wait_for_the_device_per_update_more_than_grpo(make_on_device, divergence):
    """Waits as torch's debug mode counts them, over the losses and updates of a whole rollout."""
    fields = {"max_steps": 8, "steps_per_generation": 4, "scale_rewards": "none"}
    ours = make_on_device(cppo_divergence=divergence, **fields)
    theirs = make_on_device(GRPOTrainer, GRPOConfig, **fields)
    counts = []
    for trainer in (theirs, ours):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")
            try:
                trainer.train()
            finally:
                torch.cuda.set_sync_debug_mode("default")
        counts.append(sum("synchroniz" in str(warning.message) for warning in caught))
    assert counts[0] > 0
    assert counts[1] <= counts[0] + WAITS_PER_UPDATE * 8


def test_training_on_the_device_logs_what_the_rule_did(make_on_device):
    trainer = make_on_device(max_steps=4, steps_per_generation=4, cppo_divergence="topk_tv", learning_rate=1e-2)
    trainer.train()
    history = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert len(history) == 4
    assert history[0]["cppo/rollout_mismatch"] < 1e-5
    assert history[-1]["cppo/divergence/mean"] > 1e-4
    assert trainer._buffered_inputs[0]["topk_ids"].shape[1] <= COMPLETION
