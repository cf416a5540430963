import math

import pytest
import torch

from cppo_trl.divergence import anchor_logps, binary_kl, binary_tv, topk_kl, topk_tv
from cppo_trl.metrics import loss_record
from cppo_trl.rules import RULES
from cppo_trl.trust_region import (
    cppo,
    cppo_mask,
    cppo_soft,
    dppo_mask,
    masked_quantile,
    position_weights,
    prefix_budget,
    prefix_sums,
    random_order,
    ratio_cap_weight,
    trm_avg_mask,
    trm_max_mask,
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


def test_a_token_at_its_limit_is_kept():
    # exact in fp32: w = 1; the budget leaves .5 + .25 - .5 = .25 to the second token
    up, one = torch.ones(1, 2), torch.ones(1, 1)
    for second, kept in ((0.25, True), (0.25 + 2**-20, False)):
        divergence = torch.tensor([[0.5, second]])
        rule = {"delta": 0.5, "w_min": 1.0, "delta_b": 0.25}
        assert cppo_mask(divergence, one, up, up, **rule).tolist() == [[True, kept]]
        verdict = cppo(divergence, one, up, up, **rule, delta_b_quantile=None, delta_b_max_multiple=2.0)
        assert verdict.weight.tolist() == [[True, kept]]
    # the second is out by the budget alone: its w_t D_t is the threshold itself
    for rule in (cppo, cppo_soft):
        fields = {"delta": 0.5, "w_min": 1.0, "delta_b": 0.25, "delta_b_quantile": None, "delta_b_max_multiple": 2.0}
        verdict = rule(torch.tensor([[0.5, 0.5]]), one, up, up, **fields)
        assert verdict.weight[0, 0] == 1
        assert verdict.weight[0, 1] < 1
        assert verdict.within_threshold.all()
    at_delta = torch.tensor([[0.5, 0.5]])
    for rule in (dppo_mask, trm_max_mask, trm_avg_mask):
        assert rule(at_delta, one, up, up, delta=0.5).all()
        assert not rule(at_delta + 2**-20, one, up, up, delta=0.5).any()


@pytest.mark.parametrize("rule", [cppo, cppo_soft])
def test_the_verdict_of_cppo_by_hand(rule):
    # w = 1, .75, .5, all of it exact in fp32; one token before the response is not its own
    divergence = torch.tensor([[9.0, 0.5, 0.25, 1.0], [9.0, 9.0, 9.0, 9.0]])
    mask = torch.tensor([[0, 1, 1, 1], [0, 0, 0, 0]])
    rows = (divergence, torch.ones(2), torch.ones(2, 4), mask)
    fields = {"delta": 0.5, "w_min": 0.5, "delta_b": 0.25, "delta_b_max_multiple": 3.0}
    verdict = rule(*rows, **fields, delta_b_quantile=None)
    prefix = verdict.prefix
    assert verdict.delta_b.tolist() == [[0.25], [0.25]]
    assert prefix.weights.tolist() == [[0, 1, 0.75, 0.5], [0] * 4]
    assert prefix.weighted.tolist() == [[0, 0.5, 0.1875, 0.5], [0] * 4]
    assert prefix.spent().tolist() == [[0, 0.5, 0.6875, 1.1875], [0] * 4]
    assert prefix.weight_sum().tolist() == [[0, 1, 1.75, 2.25], [0] * 4]
    average = torch.tensor([[0, 0.5, 0.6875 / 1.75, 1.1875 / 2.25], [0] * 4])
    torch.testing.assert_close(prefix.average(verdict.delta_b, mask), average)
    assert prefix.left.tolist() == [[0, -0.25, -0.25, -0.625], [0] * 4]
    assert prefix.threshold.tolist() == [[0.5, 0.5, 0.25, 0.25], [0.5] * 4]
    assert verdict.within_threshold[0].tolist() == [True] * 4
    # x = 1, max(.375, .6875 / .75), max(1, 1.1875 / .9375)
    kept = [[0, 1, 1, 0.0 if rule is cppo else 0.9375 / 1.1875], [0] * 4]
    torch.testing.assert_close(verdict.weight.float(), torch.tensor(kept))
    # the median of .5, .25, 1 is .5; a single value of 1 is cut at three times the floor, which an empty row gets
    assert rule(*rows, **fields, delta_b_quantile=0.5).delta_b.tolist() == [[0.5], [0.25]]
    assert rule(*rows, **fields, delta_b_quantile=1.0).delta_b.tolist() == [[0.75], [0.25]]
    for off in ({"delta": INF}, {"delta_b": INF}):  # delta is the slack of the budget
        assert rule(*rows, **(fields | off), delta_b_quantile=None).delta_b is None


def test_order_deals_the_weights_out():
    # keys 3, 2, 1: w = .5, .75, 1 instead of 1, .75, .5; wD = .45, .45, .55 instead of .9, .45, .275
    order, ones = torch.tensor([[3.0, 2.0, 1.0]]), torch.ones(1, 3)
    rows = (torch.tensor([[0.9, 0.6, 0.55]]), ones[:, 0], ones, ones)
    rule = {"delta": 0.5, "w_min": 0.5, "delta_b": INF}
    assert cppo_mask(*rows, **rule).tolist() == [[False, True, True]]
    assert cppo_mask(*rows, **rule, order=order).tolist() == [[True, True, False]]
    prefix = prefix_sums(rows[0], ones, delta=0.5, w_min=0.5, delta_b=0.1, order=order)
    torch.testing.assert_close(
        prefix.average(torch.tensor([[0.1]]), ones), torch.tensor([[0.9, 0.9 / 1.25, 1.45 / 2.25]])
    )


@pytest.mark.parametrize("rule", [cppo, cppo_soft])
def test_shuffled_weights_are_those_of_the_response_s_own_order(rule):
    divergence, advantages, log_ratio, mask = random_rows(40, 30, seed=15)
    rows, ids = (divergence, advantages, log_ratio, mask), torch.arange(100, 140)
    fields = {"delta": 0.05, "w_min": 0.2, "delta_b": 0.01, "delta_b_quantile": None, "delta_b_max_multiple": 2.0}
    order = random_order(ids, mask)
    shuffled = rule(*rows, **fields, shuffle_weights=True, response_ids=ids)
    torch.testing.assert_close(shuffled.prefix.weights, position_weights(mask, 0.2, order))
    kept = cppo_mask(*rows, delta=0.05, w_min=0.2, delta_b=0.01, order=order)
    assert torch.equal(shuffled.weight == 1, kept)
    in_order = position_weights(mask, 0.2)
    assert not torch.equal(shuffled.prefix.weights, in_order)
    for plain in (rule(*rows, **fields, response_ids=ids), rule(*rows, **fields, shuffle_weights=True)):
        torch.testing.assert_close(plain.prefix.weights, in_order)


def test_the_random_order_is_a_hash_of_id_and_position():
    """SplitMix64 with signed shifts, by Python's integers: an order that a resume on another machine finds again."""

    def signed(x):
        return (x + 2**63) % 2**64 - 2**63

    def key(response, position):
        x = signed(response + position * 0x9E3779B97F4A7C15)
        x = signed((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9)
        x = signed((x ^ (x >> 27)) * 0x94D049BB133111EB)
        return float(x ^ (x >> 31))

    ids = [0, 1, 2**61 + 12345]
    keys = random_order(torch.tensor(ids), torch.ones(3, 6))
    assert keys.dtype == torch.float64
    assert keys.tolist() == [[key(response, t) for t in range(1, 7)] for response in ids]


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


def test_masked_quantile_takes_more_elements_than_torch_quantile_up_to_2_14():
    values = torch.rand(1025, 16_384)  # more than 2^24 in all
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
    for quantile in (None, 0.9):
        assert prefix_budget(divergence.bfloat16(), mask, 0.02, quantile).dtype == torch.float32


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
    with torch.device("meta"):  # nor anything made where the tensors are made
        assert masked_quantile(log_ratio, mask, 0.9).shape == (16, 1)
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
