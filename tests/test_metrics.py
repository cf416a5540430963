import math
from functools import partial

import pytest
import torch

from cppo_trl.metrics import (
    add_records,
    count_nonfinite_loss,
    loss_record,
    position_profile,
    summarize,
    total_over_processes,
)
from cppo_trl.rules import RULES
from cppo_trl.trust_region import Verdict, improvement_bound
from tests.conftest import random_rows

INF = math.inf


def record_of(divergence, advantages, log_ratio, mask, rule="cppo", unmoved=False, **parameters):
    if rule.startswith("cppo"):
        fixed = {"delta_b": 0.01, "delta_b_quantile": None, "delta_b_max_multiple": 2.0}
        parameters = {"shuffle_weights": False, "delta": 0.05, "w_min": 0.8, **fixed, **parameters}
    verdict = RULES[rule].judge(divergence, advantages, log_ratio, mask, **parameters)
    return loss_record(divergence, advantages, log_ratio, mask, verdict, weights_unmoved=unmoved)


def scalars(record, gather=lambda x: x, bound=None):
    return summarize(total_over_processes(record, gather), bound)


def test_metrics_by_hand():
    # wD = .2 (out: threshold), .02 (out: S = .22 > .1 + .01), .01 (toward), and a row without advantage
    divergence = torch.tensor([[0.2, 0.02 / 0.9, 0.01 / 0.8, 9.0], [0.1, 0.1, 9.0, 9.0], [9.0, 9.0, 9.0, 9.0]])
    advantages = torch.tensor([[1.0], [0.0], [-1.0]])
    log_ratio = torch.tensor([[0.5, 0.5, -0.5, 9.0], [0.5, 0.5, 9.0, 9.0], [9.0, 9.0, 9.0, 9.0]])
    mask = torch.tensor([[1, 1, 1, 0], [1, 1, 0, 0], [0, 0, 0, 0]])
    metrics = scalars(record_of(divergence, advantages, log_ratio, mask, delta=0.1))
    up, down = math.exp(0.5), math.exp(-0.5)
    expected = {
        "cppo/masked": 2 / 3,
        "cppo/masked_by_threshold": 1 / 3,
        "cppo/masked_by_budget": 1 / 3,
        "cppo/masked_positive": 2 / 3,
        "cppo/weight": 1 / 3,
        "cppo/toward_rollout": 1 / 3,
        "cppo/delta_b": 0.01,
        "cppo/divergence/mean": (0.2 + 0.02 / 0.9 + 0.01 / 0.8 + 0.2) / 5,
        "cppo/divergence/max": 0.2,
        "cppo/ratio/mean": (4 * up + down) / 5,
        "cppo/ratio/max": up,
    }
    p90 = metrics.pop("cppo/divergence/p90")
    assert p90 == pytest.approx(0.1, rel=0.008)
    assert metrics == pytest.approx(expected, rel=1e-5)  # masked_negative is left out: no such token


def test_metrics_of_both_signs_by_hand():
    # w = 1, delta = .1, A < 0: .2 falls (masked), .3 rises, .4 falls (masked); A > 0: .5 rises (masked), .6 falls
    divergence = torch.tensor([[0.2, 0.3, 0.4], [0.5, 0.6, 9.0]])
    advantages, mask = torch.tensor([[-2.0], [1.0]]), torch.tensor([[1, 1, 1], [1, 1, 0]])
    log_ratio = torch.tensor([[-0.5, 0.5, -0.5], [0.5, -0.5, 9.0]])
    metrics = scalars(record_of(divergence, advantages, log_ratio, mask, "dppo", delta=0.1))
    assert metrics["cppo/masked"] == pytest.approx(3 / 5)
    assert metrics["cppo/masked_negative"] == pytest.approx(2 / 3)
    assert metrics["cppo/masked_positive"] == pytest.approx(1 / 2)
    assert metrics["cppo/toward_rollout"] == pytest.approx(2 / 5)
    assert metrics["cppo/weight"] == pytest.approx(2 / 5)


def test_the_mass_of_topk_is_averaged_over_the_tokens():
    divergence, ones, mask = torch.zeros(1, 3), torch.ones(1, 3), torch.tensor([[1, 1, 0]])
    verdict = RULES["none"].judge(divergence, ones, ones, mask)
    record = loss_record(divergence, ones, ones, mask, verdict, topk_mass=torch.tensor([[0.5, 0.75, torch.nan]]))
    metrics = scalars(record)
    assert metrics["cppo/topk_mass"] == pytest.approx(0.625)
    assert metrics["cppo/divergence/mean"] == 0.0
    assert not any("mismatch" in name for name in metrics)
    assert "cppo/topk_mass" not in scalars(loss_record(divergence, ones, ones, mask, verdict))


def test_a_budget_without_prefix_sums_is_recorded_as_far_as_it_goes():
    ones = torch.ones(1, 2)
    verdict = Verdict(ones, within_threshold=ones.bool(), delta_b=torch.full((1, 1), 0.5))
    metrics = scalars(loss_record(ones, ones, ones, ones, verdict))
    assert metrics["cppo/weight"] == 1.0
    assert "cppo/delta_b" not in metrics


def test_losses_that_are_not_finite_are_counted():
    record = record_of(*random_rows(4, 5, seed=16))
    assert "cppo/nonfinite_losses" not in scalars(record)
    count_nonfinite_loss(record, torch.tensor(0.5))
    assert "cppo/nonfinite_losses" not in scalars(record)
    for count, loss in enumerate((math.nan, math.inf), 1):
        count_nonfinite_loss(record, torch.tensor(loss, requires_grad=True))
        assert scalars(record)["cppo/nonfinite_losses"] == count


def test_records_of_many_micro_batches_add_up():
    rows = random_rows(40, 30, seed=17)
    whole, total = record_of(*rows), None
    for i in range(0, 40, 10):
        total = add_records(total, record_of(*(x[i : i + 10] for x in rows)))
    torch.testing.assert_close(total, whole, rtol=1e-5, atol=1e-5)


def test_divergences_that_are_not_finite_are_recorded_not_raised():
    divergence = torch.tensor([[math.nan, math.inf, 0.1, 0.2]])
    advantages, mask = torch.ones(1, 1), torch.ones(1, 4).long()
    metrics = scalars(record_of(divergence, advantages, torch.zeros(1, 4), mask))
    assert math.isnan(metrics["cppo/divergence/mean"])


def test_the_mismatch_is_over_the_tokens_of_unmoved_weights():
    divergence, log_ratio = torch.tensor([[0.1, 0.3, 9.0]]), torch.tensor([[-0.2, 0.4, torch.nan]])
    mask, advantages = torch.tensor([[1, 1, 0]]), torch.ones(1, 1)
    old = record_of(5 * divergence, advantages, log_ratio, mask)
    assert not any("mismatch" in name for name in scalars(old))
    metrics = scalars(add_records(old, record_of(divergence, advantages, log_ratio, mask, unmoved=True)))
    assert metrics["cppo/rollout_mismatch"] == pytest.approx(0.2)
    assert metrics["cppo/rollout_mismatch_nats"] == pytest.approx(0.3)
    assert metrics["cppo/divergence/mean"] == pytest.approx(0.6)


def test_p90_is_that_of_all_tokens_to_one_percent():
    divergence, advantages, log_ratio, mask = random_rows(400, 60, seed=11)
    divergence = divergence * 10 ** -torch.rand(400, 60)
    metrics = scalars(record_of(divergence, advantages, log_ratio, mask))
    exact = torch.quantile(divergence[mask], 0.9, interpolation="lower").item()
    assert metrics["cppo/divergence/p90"] == pytest.approx(exact, rel=0.008)
    zero = scalars(record_of(0 * divergence, advantages, log_ratio, mask))
    assert zero["cppo/divergence/p90"] == 0.0


@pytest.mark.parametrize(
    ("values", "middle"),
    [
        ([1.0], 1 + 1 / 128),  # of the bin from 1 to 1 + 1/64
        ([1.99], 2 - 1 / 128),
        ([300.0], 2**8 * (1 - 1 / 256)),  # all from 2^8 on stand in the last bin
        ([2.0**-20] * 9 + [1.0], 2**-20 * (1 + 1 / 128)),  # rank 8.1 of 0 to 9
        ([2.0**-20] * 8 + [1.0] * 2, 1 + 1 / 128),
    ],
)
def test_p90_by_hand(values, middle):
    divergence, ones = torch.tensor([values]), torch.ones(1, len(values))
    metrics = scalars(record_of(divergence, ones, ones, ones, "none"))
    assert metrics["cppo/divergence/p90"] == pytest.approx(middle, rel=1e-6)


def test_metrics_do_not_depend_on_the_split_into_micro_batches_and_processes():
    rows = random_rows(96, 40, seed=12)
    whole = scalars(record_of(*rows))
    parts = [record_of(*(x[i : i + 24] for x in rows)) for i in range(0, 96, 24)]
    ranks = [add_records(add_records(None, parts[0]), parts[1]), add_records(add_records(None, parts[2]), parts[3])]
    gathered = scalars(ranks[0], lambda x: torch.cat([x, ranks[1][None]]))
    assert gathered == pytest.approx(whole, rel=1e-5)
    assert 0.01 < whole["cppo/masked_by_budget"] < whole["cppo/masked"] < 0.99


def test_empty_batch_gives_no_scalars():
    divergence, advantages, log_ratio, mask = random_rows(8, 5, seed=13)
    assert scalars(record_of(divergence, advantages, log_ratio, 0 * mask.long())) == {}


def test_effective_weight_of_rules_that_mask_nothing():
    ones, up = torch.ones(1, 2), torch.tensor([[2.0, 0.5]]).log()
    cispo = scalars(record_of(ones, ones[:, :1], up, ones, "cispo", ratio_min=0.0, ratio_max=1.2))
    assert cispo["cppo/weight"] == pytest.approx((1.2 / 2 + 1) / 2)
    assert cispo["cppo/masked"] == 0.0
    assert "cppo/delta_b" not in cispo


def test_theorem_1_by_hand():
    # w = 1, .9, .8; delta .1, delta_b .05: the first row breaks the prefix constraint at m = 1 (.06 > .05) and 2
    # (.096 > .095), where the last token, .08 of .1, is held to the threshold alone; the second breaks the threshold
    # at t = 2 and so the prefix constraint (.11 > .095); the third keeps all of it
    divergence = torch.tensor([[0.06, 0.04, 0.1], [0.0, 0.11 / 0.9, 0.0], [0.049, 0.049, 0.12], [9.0, 9.0, 9.0]])
    mask = torch.tensor([[1, 1, 1], [1, 1, 1], [1, 1, 1], [0, 0, 0]])
    rows = (divergence, torch.ones(4, 1), torch.zeros(4, 3), mask)  # it is about D alone: nothing moves away here
    bound = partial(improvement_bound, delta=0.1, w_min=0.8)
    metrics = scalars(record_of(*rows, delta=0.1, delta_b=0.05), bound=bound)
    assert metrics["cppo/theorem/prefixes"] == pytest.approx(6 / 9)
    assert metrics["cppo/theorem/responses"] == pytest.approx(1 / 3)
    assert metrics["cppo/theorem/bound_ratio"] == pytest.approx(0.05 / 0.08)
    # T = 3, xi = 1: 2 x 3 x 2 x .1 x .05 / .8 = .075, and the slack 4 x 2 x .01 / .8 = .1
    assert metrics["cppo/theorem/deduction"] == pytest.approx(0.175)
    assert metrics["cppo/theorem/range"] == 2.0
    # no response, no theorem
    empty = (divergence, torch.ones(4, 1), torch.zeros(4, 3), 0 * mask)
    assert not any("theorem" in name for name in scalars(record_of(*empty, delta=0.1, delta_b=0.05), bound=bound))
    assert not any("theorem" in name for name in scalars(record_of(*rows)))


def test_theorem_1_equals_a_loop_over_rows():
    divergence, advantages, log_ratio, mask = random_rows(64, 50, seed=3)
    delta, delta_b, w_min = 0.08, 0.03, 0.5
    held = tokens = whole = 0
    for row, own in zip(divergence.double().tolist(), mask.bool().tolist(), strict=True):
        values = [value for value, is_own in zip(row, own, strict=True) if is_own]
        spent = budget = 0.0
        kept = 0
        for t, value in enumerate(values, 1):
            weight = 1 - (1 - w_min) * (t - 1) / max(len(values) - 1, 1)
            spent, budget = spent + weight * value, budget + weight * delta_b
            kept += weight * value <= delta and (t == len(values) or spent <= budget)
        held, tokens, whole = held + kept, tokens + len(values), whole + (0 < kept == len(values))
    limits = {"delta": delta, "delta_b": delta_b, "w_min": w_min}
    bound = partial(improvement_bound, delta=delta, w_min=w_min)
    metrics = scalars(record_of(divergence, advantages, log_ratio, mask, **limits), bound=bound)
    assert metrics["cppo/theorem/prefixes"] == pytest.approx(held / tokens)
    assert metrics["cppo/theorem/responses"] == pytest.approx(whole / mask.bool().any(-1).sum().item())
    assert 0.05 < held / tokens < 0.95


@pytest.mark.parametrize("each", [False, True])
def test_the_largest_advantage_is_that_of_a_response_s_own_tokens(each):
    mask = torch.tensor([[1, 1, 0], [0, 0, 0]])
    advantages = torch.tensor([[0.25, -0.5, 9.0], [9.0, 9.0, 9.0]]) if each else torch.tensor([[-0.5], [9.0]])
    zeros = torch.zeros(2, 3)
    bound = partial(improvement_bound, delta=0.1, w_min=0.8)
    assert scalars(record_of(zeros, advantages, zeros, mask), bound=bound)["cppo/theorem/range"] == 1.0


def test_what_is_recorded_beside_leaves_the_rest_as_it_is():
    rows = random_rows(16, 20, seed=4)
    fields = {"shuffle_weights": False, "delta": 0.05, "w_min": 0.8, "delta_b": 0.01, "delta_b_quantile": None}
    verdict = RULES["cppo"].judge(*rows, delta_b_max_multiple=2.0, **fields)
    alone = scalars(loss_record(*rows, verdict))
    more = scalars(loss_record(*rows, verdict, torch.full(rows[0].shape, 0.5), weights_unmoved=True))
    assert {name: more[name] for name in alone} == alone
    assert more.keys() - alone.keys() == {
        f"cppo/{n}" for n in ("topk_mass", "rollout_mismatch", "rollout_mismatch_nats")
    }


def test_theorem_1_holds_at_its_limits():
    # exact in fp32: S_t = .25 t = delta_b W_t, with |A| below 1 and a token that is not the response's own
    divergence, mask = torch.tensor([[0.25, 0.25, 0.25, 9.0]]), torch.tensor([[1, 1, 1, 0]])
    rows = (divergence, torch.tensor([[-0.5]]), torch.zeros(1, 4), mask)
    bound = partial(improvement_bound, delta=0.5, w_min=1.0)
    metrics = scalars(record_of(*rows, delta=0.5, delta_b=0.25, w_min=1.0), bound=bound)
    assert metrics["cppo/theorem/prefixes"] == metrics["cppo/theorem/responses"] == 1.0
    assert metrics["cppo/theorem/bound_ratio"] == pytest.approx(0.5)
    # T = 3, xi = 1/2: 2 x .5 x 3 x 2 x .5 x .25, and the slack 4 x .5 x 2 x .25
    assert metrics["cppo/theorem/deduction"] == pytest.approx(0.75 + 1.0)


def test_theorem_1_of_a_single_token():
    one = torch.full((1, 1), 0.04)  # T = 1: no prefix, nothing to deduct
    bound = partial(improvement_bound, delta=0.1, w_min=0.8)
    metrics = scalars(record_of(one, torch.ones(1, 1), 0 * one, torch.ones(1, 1), delta=0.1), bound=bound)
    assert metrics["cppo/theorem/responses"] == metrics["cppo/theorem/prefixes"] == 1.0
    assert metrics["cppo/theorem/deduction"] == 0.0
    assert metrics["cppo/theorem/range"] == 2.0


def test_theorem_1_counts_with_the_largest_budget_response_and_advantage():
    # quantiles of D: .02 and .04 of two responses, the longer of which has 4 tokens; |A| up to 3
    divergence = torch.tensor([[0.02, 0.02, 0.0, 0.0], [0.04, 0.04, 0.04, 0.04]])
    mask = torch.tensor([[1, 1, 0, 0], [1, 1, 1, 1]])
    advantages = torch.tensor([[-3.0], [2.0]])
    parameters = {"delta": 0.1, "delta_b": 0.02, "delta_b_quantile": 0.5}
    record = record_of(divergence, advantages, torch.zeros(2, 4), mask, **parameters)
    metrics = scalars(add_records(None, record), bound=partial(improvement_bound, delta=0.1, w_min=0.8))
    assert metrics["cppo/delta_b"] == pytest.approx(0.03)
    assert metrics["cppo/theorem/bound_ratio"] == pytest.approx(0.04 / 0.08)
    assert metrics["cppo/theorem/deduction"] == pytest.approx(
        2 * 3 * 4 * 3 * 0.1 * 0.04 / 0.8 + 4 * 3 * 3 * 0.01 / 0.8
    )
    assert metrics["cppo/theorem/range"] == 6.0


def test_tokens_at_a_bound_are_counted():
    # m rho = 2, 0.5, 0.5 x 1.5 against [0.8, 1.28]: all three at a bound; without the lower one the first alone
    ratio, ones = torch.tensor([[2.0, 0.5, 1.5]]), torch.ones(1, 3)
    for low, share in ((0.8, 1.0), (0.0, 1 / 3)):
        record = record_of(ones, ones[:, :1], ratio.log(), ones, "minpro", ratio_min=low, ratio_max=1.28)
        assert scalars(record)["cppo/at_bound"] == pytest.approx(share)
    assert "cppo/at_bound" not in scalars(record_of(ones, ones[:, :1], ratio.log(), ones))


def test_position_profile_by_hand():
    # 40 tokens, two in each twentieth; the first two are out by the threshold, the next four by the budget
    divergence = torch.zeros(2, 40)
    divergence[0, :2], divergence[0, 2:6] = 1.0, 0.01
    mask = torch.ones(2, 40)
    mask[1, 1:] = 0  # a single token is in the first twentieth
    advantages, up = torch.tensor([[1.0], [0.0]]), torch.ones(2, 40)
    record = record_of(divergence, advantages, up, mask, delta=0.1, delta_b=0.5 / 40)
    profile = position_profile(total_over_processes(record, lambda x: x))
    assert profile["tokens"] == [3.0] + [2.0] * 19
    assert profile["active"] == [2.0] * 20
    assert profile["divergence"] == pytest.approx([2.0, 0.02, 0.02] + [0.0] * 17)
    assert profile["masked_by_threshold"] == [2.0] + [0.0] * 19
    # S = 2.03 against 0.1 + 0.0125 W: never recovers
    assert profile["masked_by_budget"] == [0.0] + [2.0] * 19
    weights = [1 - 0.2 * t / 39 for t in range(40)]
    spent = [sum(w * d for w, d in zip(weights[:t], divergence[0].tolist(), strict=False)) for t in range(1, 41)]
    average = [s / sum(weights[: t + 1]) for t, s in enumerate(spent)]
    assert profile["prefix_average"] == pytest.approx([sum(average[t : t + 2]) for t in range(0, 40, 2)], rel=1e-5)
    dppo = total_over_processes(record_of(divergence, advantages, up, mask, "dppo", delta=0.1), lambda x: x)
    assert position_profile(dppo)["prefix_average"] == [0.0] * 20
    off = total_over_processes(record_of(divergence, advantages, up, mask, delta=0.1, delta_b=INF), lambda x: x)
    assert position_profile(off)["prefix_average"] == [0.0] * 20


def test_prefix_averages_of_a_response_with_holes():
    # tokens at 1 and 3 of D = .5 and .25: S / W = .5, then (.5 + .8 x .25) / 1.8, which begin its two halves
    divergence, mask = torch.tensor([[9.0, 0.5, 9.0, 0.25, 9.0]]), torch.tensor([[0, 1, 0, 1, 0]])
    record = record_of(divergence, torch.ones(1, 1), torch.zeros(1, 5), mask)
    profile = position_profile(total_over_processes(record, lambda x: x))
    expected = [0.5] + [0.0] * 9 + [0.7 / 1.8] + [0.0] * 9
    assert profile["tokens"] == [float(x > 0) for x in expected]
    assert profile["prefix_average"] == pytest.approx(expected)


@pytest.mark.parametrize("width", [50, 300])
def test_position_profile_equals_a_loop_over_rows_with_holes(width):
    divergence, advantages, log_ratio, mask = random_rows(60, width, seed=14)
    record = record_of(divergence, advantages, log_ratio, mask, "dppo", delta=0.02)
    profile = position_profile(total_over_processes(record, lambda x: x))
    expected = {name: [0.0] * 20 for name in ("tokens", "divergence", "active", "masked_by_threshold")}
    positive = masked_positive = 0
    for b, valid in enumerate(mask.tolist()):
        own = [t for t, is_own in enumerate(valid) if is_own]
        for place, t in enumerate(own):
            d, a = divergence[b, t].item(), advantages[b, t].item()
            masked = d > 0.02 and a * log_ratio[b, t].item() > 0
            for name, value in zip(expected, (1.0, d, a != 0, masked), strict=True):
                expected[name][place * 20 // len(own)] += value
            positive, masked_positive = positive + (a > 0), masked_positive + (masked and a > 0)
    for name, values in expected.items():
        assert profile[name] == pytest.approx(values, rel=1e-4, abs=1e-6), name
    assert min(profile["masked_by_threshold"]) > 0
    assert scalars(record)["cppo/masked_positive"] == pytest.approx(masked_positive / positive)
