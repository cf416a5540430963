import math

import pytest
import torch

from cppo_trl.divergence import anchor_logps, binary_kl, binary_tv, topk_kl, topk_tv
from cppo_trl.metrics import loss_record
from cppo_trl.rules import RULES
from cppo_trl.trust_region import (
    cppo_mask,
    dppo_mask,
    masked_quantile,
    position_weights,
    prefix_budget,
    ratio_cap_weight,
)
from tests.conftest import parameters_of, random_rows
from tests.reference import algorithm_1, clipped_quantile

INF = math.inf


@pytest.mark.parametrize("width", [1, 2, 7, 33])
@pytest.mark.parametrize(
    ("delta", "delta_b", "w_min"),
    [(0.15, 0.02, 0.8), (0.05, 0.01, 0.8), (0.15, INF, 0.6), (0.2, 0.001, 1.0), (0.02, 0.002, 0.1), (INF, 0.02, 0.8)],
)
def test_cppo_mask_equals_algorithm_1(width, delta, delta_b, w_min):
    divergence, advantages, log_ratio, mask = random_rows(500, width, seed=width)
    keep = cppo_mask(divergence, advantages, log_ratio, mask, delta=delta, w_min=w_min, delta_b=delta_b)
    compared = rejected = 0
    for b in range(len(mask)):
        own = mask[b].nonzero().flatten().tolist()
        d, a, r = ([float(x) for x in row[b, own].double()] for row in (divergence, advantages, log_ratio.exp()))
        expected, _, margin = algorithm_1(r, a, d, delta, delta_b, w_min)
        if margin < 1e-6:
            continue  # on a threshold, where rounding decides
        assert keep[b, own].tolist() == expected
        assert not keep[b, ~mask[b]].any()
        compared += len(own) > 0
        rejected += expected.count(False)
    assert compared > 0.5 * len(mask) * (1 if width > 2 else 0.3)
    assert rejected > 0 or delta == INF


def test_cppo_mask_worked_by_hand():
    # T = 5, w = 1, .95, .9, .85, .8; delta = 0.1, delta_b = 0.02, all tokens move away
    # wD      = .05   .095   .09     .017     .16
    # S       = .05   .145   .235    .252     .412
    # limit_t = .1    .12    .139    .157     .174   (delta + delta_b W_{t-1})
    divergence = torch.tensor([[0.05, 0.1, 0.1, 0.02, 0.2]])
    ones = torch.ones(1, 5)
    torch.testing.assert_close(position_weights(ones, 0.8), torch.tensor([[1, 0.95, 0.9, 0.85, 0.8]]))
    keep = cppo_mask(divergence, ones[:, 0], ones, ones, delta=0.1, w_min=0.8, delta_b=0.02)
    assert keep.tolist() == [[True, False, False, False, False]]
    # with delta_b = 0.08 the limits are .1 .18 .256 .328 .396: only the last is out, by both clauses
    keep = cppo_mask(divergence, ones[:, 0], ones, ones, delta=0.1, w_min=0.8, delta_b=0.08)
    assert keep.tolist() == [[True, True, True, True, False]]
    # a token that moves toward the rollout policy is kept, and counts in the sums all the same
    toward = torch.tensor([[1.0, -1.0, 1.0, 1.0, -1.0]])
    keep = cppo_mask(divergence, ones[:, 0], toward, ones, delta=0.1, w_min=0.8, delta_b=0.02)
    assert keep.tolist() == [[True, True, False, False, True]]


def test_late_tokens_are_held_looser_than_early_ones():
    divergence = torch.full((1, 9), 0.11)
    keep = cppo_mask(divergence, torch.ones(1), torch.ones(1, 9), torch.ones(1, 9), delta=0.1, w_min=0.8, delta_b=INF)
    # w_t D <= 0.1 from w_t <= 0.909, t - 1 >= 0.4545 * 8 = 3.6
    assert keep.tolist() == [[False] * 4 + [True] * 5]


@pytest.mark.parametrize("shape", [(2,), (2, 1), (2, 4)])
def test_advantages_may_be_per_row_or_per_token(shape):
    advantages = torch.tensor([1.0, -1.0]).view(2, *[1] * (len(shape) - 1)).expand(shape)
    far, up, mask = torch.ones(2, 4), torch.ones(2, 4), torch.ones(2, 4)
    expected = [[False] * 4, [True] * 4]
    assert cppo_mask(far, advantages, up, mask, delta=0.1, w_min=0.8, delta_b=0.02).tolist() == expected
    assert dppo_mask(far, advantages, up, mask, delta=0.1).tolist() == expected


def test_no_position_weight_and_no_budget_is_dppo():
    divergence, advantages, log_ratio, mask = random_rows(2000, 40, seed=1)
    cppo = cppo_mask(divergence, advantages, log_ratio, mask, delta=0.05, w_min=1.0, delta_b=INF)
    dppo = dppo_mask(divergence, advantages, log_ratio, mask, delta=0.05)
    assert torch.equal(cppo, dppo)
    away = (advantages * (log_ratio.exp() - 1) > 0) & mask
    assert torch.equal(dppo, mask & ~(away & (divergence > 0.05)))
    assert 0 < dppo.sum() < mask.sum()


def test_nothing_is_masked_on_the_rollout_policy():
    _, advantages, _, mask = random_rows(200, 30, seed=2)
    zero = torch.zeros(200, 30)
    assert torch.equal(cppo_mask(zero, advantages, zero, mask, delta=1e-6, w_min=0.8, delta_b=1e-6), mask)
    # nor where the advantage is zero, however far the policy is
    far = torch.ones(200, 30)
    assert torch.equal(cppo_mask(far, 0 * advantages, far, mask, delta=0.1, w_min=0.8, delta_b=0.01), mask)


def test_infinite_limits_keep_everything():
    divergence, advantages, log_ratio, mask = random_rows(200, 30, seed=3)
    for delta_b in (0.02, INF, torch.full((200, 1), INF)):
        assert torch.equal(
            cppo_mask(divergence, advantages, log_ratio, mask, delta=INF, w_min=0.8, delta_b=delta_b), mask
        )


def test_budget_may_differ_by_row():
    divergence, advantages, log_ratio, mask = random_rows(300, 30, seed=4)
    budget = torch.rand(300, 1) * 0.05
    together = cppo_mask(divergence, advantages, log_ratio, mask, delta=0.1, w_min=0.8, delta_b=budget)
    for b in range(0, 300, 17):
        rows = slice(b, b + 1)
        alone = cppo_mask(
            *(x[rows] for x in (divergence, advantages, log_ratio, mask)),
            delta=0.1,
            w_min=0.8,
            delta_b=budget[b].item(),
        )
        assert torch.equal(together[rows], alone)


def test_mask_depends_on_the_own_tokens_only():
    divergence, advantages, log_ratio, mask = random_rows(64, 30, seed=5)
    rule = {"delta": 0.1, "w_min": 0.8}

    def masked(d, a, r, m):
        return cppo_mask(d, a, r, m, **rule, delta_b=prefix_budget(d, m, 0.01))

    keep = masked(divergence, advantages, log_ratio, mask)
    garbage = [torch.full((64, 30), x) for x in (torch.nan, torch.inf, -torch.inf)]
    # padding: any width, any content, on either side
    wide = [torch.cat([g, x, g], 1) for g, x in zip(garbage, (divergence, advantages, log_ratio), strict=True)]
    wide_mask = torch.cat([torch.zeros(64, 30), mask, torch.zeros(64, 30)], 1)
    assert torch.equal(masked(*wide, wide_mask)[:, 30:60], keep)
    # tool tokens: a response with holes is masked as the same response without them
    for b in range(64):
        own = mask[b]
        packed = [x[b : b + 1, own] for x in (divergence, advantages, log_ratio, mask)]
        if own.any():
            assert torch.equal(masked(*packed), keep[b : b + 1, own])
    # other rows
    assert torch.equal(masked(*(x[10:11] for x in (divergence, advantages, log_ratio, mask))), keep[10:11])
    # the dtype of the mask
    assert torch.equal(masked(divergence, advantages, log_ratio, mask.long()), keep)


def test_bf16_inputs_are_computed_in_fp32():
    divergence, advantages, log_ratio, mask = random_rows(128, 2000, seed=6)
    low = [x.bfloat16() for x in (divergence, advantages, log_ratio)]
    kept = cppo_mask(*low, mask, delta=0.1, w_min=0.8, delta_b=0.01)
    assert torch.equal(kept, cppo_mask(*(x.float() for x in low), mask, delta=0.1, w_min=0.8, delta_b=0.01))


def test_sign_is_that_of_the_log_ratio():
    # rho - 1 = 1e-9 rounds to 0 in fp32, and so does the product of two tiny numbers
    far, tiny, one = torch.ones(1, 1), torch.full((1, 1), 1e-9), torch.ones(1, 1)
    rule = {"delta": 0.1, "w_min": 0.8, "delta_b": 0.02}
    assert not cppo_mask(far, one, tiny, one, **rule)
    assert cppo_mask(far, one, -tiny, one, **rule)
    assert not cppo_mask(far, tiny**4, tiny**2, one, **rule)
    assert cppo_mask(far, one, torch.full((1, 1), torch.nan), one, **rule)  # unknown rollout log-prob: ratio 1


def test_prefix_sums_of_long_responses():
    # a budget crossed late: S_t = t D against delta + delta_b (t - 1), w = 1, at t = 30,000 where S is 300
    length, delta_b, delta = 32_768, 0.01, 0.15
    d = delta_b + (delta - delta_b) / 30_000
    ones = torch.ones(2, length)
    keep = cppo_mask(d * ones, torch.ones(2), ones, ones, delta=delta, w_min=1.0, delta_b=delta_b)
    drift = 1e-6 * 300 / (d - delta_b)  # tokens that an error of 1e-6 in a sum moves the crossing by
    assert 2 * drift < 200
    assert keep[:, :29_800].all()
    assert not keep[:, 30_200:].any()
    # and the sums themselves against fp64
    torch.manual_seed(0)
    values = torch.rand(4, length) * 0.05
    mask = torch.ones(4, length)
    exact = (position_weights(mask, 0.8).double() * values.double()).cumsum(-1)
    single = (position_weights(mask, 0.8) * values).cumsum(-1)
    assert ((single.double() - exact).abs() / exact).max() < 1e-6
    position = torch.arange(length, dtype=torch.float64)
    assert (position_weights(mask, 0.8)[0].double() - (1 - 0.2 * position / (length - 1))).abs().max() < 1e-6


def test_position_weights_of_short_and_empty_rows():
    mask = torch.tensor([[0, 1, 0, 0], [0, 0, 0, 0], [1, 0, 1, 0], [1, 1, 1, 1]])
    expected = torch.tensor([[0, 1, 0, 0], [0, 0, 0, 0], [1, 0, 0.7, 0], [1, 0.9, 0.8, 0.7]])
    torch.testing.assert_close(position_weights(mask, 0.7), expected)


@pytest.mark.parametrize("quantile", [0.0, 0.3, 0.9, 1.0])
def test_masked_quantile_equals_torch_on_the_valid_tokens(quantile):
    divergence, _, _, mask = random_rows(300, 50, seed=7)
    result = masked_quantile(divergence, mask, quantile)
    for b in range(300):
        if mask[b].any():
            torch.testing.assert_close(result[b, 0], torch.quantile(divergence[b, mask[b]], quantile))
        else:
            assert result[b].isnan()


def test_masked_quantile_takes_more_elements_than_torch_quantile():
    values = torch.rand(1025, 16_384)
    with pytest.raises(RuntimeError, match="too large"):
        torch.quantile(values.flatten(), 0.9)
    result = masked_quantile(values, torch.ones_like(values), 0.9)
    torch.testing.assert_close(result[7, 0], torch.quantile(values[7], 0.9))


def test_prefix_budget_equals_eq_22():
    divergence, _, _, mask = random_rows(300, 50, seed=8)
    budget = prefix_budget(divergence, mask, 0.02)
    assert budget.shape == (300, 1)
    expected = [clipped_quantile(divergence[b, mask[b]].tolist(), 0.02, 0.9, 2.0) for b in range(300)]
    torch.testing.assert_close(budget[:, 0], torch.tensor(expected))
    assert len(budget.unique()) > 10  # floor, ceiling and values between
    assert budget.min() == pytest.approx(0.02)
    assert budget.max() == pytest.approx(0.04)
    torch.testing.assert_close(prefix_budget(divergence, mask, 0.015, quantile=None), torch.full((300, 1), 0.015))
    assert (prefix_budget(divergence, mask, INF) == INF).all()


def test_ratio_cap():
    ratio = torch.tensor([[0.1, 1.0, 19.0, 20.0, 40.0]])
    capped = ratio * ratio_cap_weight(ratio.log(), 20.0)
    torch.testing.assert_close(capped, torch.tensor([[0.1, 1.0, 19.0, 20.0, 20.0]]))
    assert ratio_cap_weight(torch.tensor([[80.0]]), 20.0) * math.exp(80) == pytest.approx(20, rel=1e-4)


def test_rules_compile():
    divergence, advantages, log_ratio, mask = random_rows(16, 30, seed=9)

    def rule(d, a, r, m):
        return cppo_mask(d, a, r, m, delta=0.1, w_min=0.8, delta_b=prefix_budget(d, m, 0.01))

    compiled = torch.compile(rule, fullgraph=True, backend="aot_eager")
    args = (divergence, advantages, log_ratio, mask)
    assert torch.equal(compiled(*args), rule(*args))


def test_rules_never_wait_for_the_device():
    # the meta device holds no data: anything that reads a value from the tensors raises
    args = [x.to("meta") for x in random_rows(16, 30, seed=10)]
    _, _, log_ratio, mask = args
    for name, rule in RULES.items():
        parameters = parameters_of(name)
        if "shuffle_weights" in parameters:
            parameters |= {"shuffle_weights": True, "delta_b_quantile": 0.9}
        ids = torch.zeros(len(mask), dtype=torch.long, device="meta")
        verdict = rule.judge(*args, response_ids=ids, ratio_cap=2.0, **parameters)
        assert verdict.weight.shape == mask.shape, name
        assert loss_record(*args, verdict, topk_mass=log_ratio).dim() == 1
    for estimator in (binary_tv, binary_kl):
        assert estimator(anchor_logps(log_ratio, log_ratio), log_ratio).shape == mask.shape
    for estimator in (topk_tv, topk_kl):
        assert estimator(*[log_ratio.unsqueeze(-1)] * 2).shape == mask.shape
