"""Every rule against an independent loop, by weight and by gradient; GRPO and CISPO against TRL's own losses."""

import math
import sys

import pytest
import torch
from trl import GRPOConfig, GRPOTrainer

from cppo_trl.divergence import ESTIMATORS, binary_tv
from cppo_trl.rules import RULES, Rule, find_rule
from cppo_trl.trust_region import (
    cispo_weight,
    cppo_mask,
    drpo_weight,
    grpo_mask,
    ipo_mask,
    minpro_weight,
    position_weights,
    random_order,
    vaco_mask,
)
from tests.conftest import (
    COMPLETION,
    FIELDS,
    LIMITS,
    full_logps,
    gradients,
    injected_batch,
    parameters_of,
    random_rows,
)
from tests.reference import (
    algorithm_1,
    clipped_surrogate_slope,
    drpo_slope,
    minpro_coefficients,
    soft_gate,
    tv_filter,
)


def weights_of_one_response(rule, ratios, advantages, divergences):  # noqa: PLR0911 (a table)
    """The weights by a plain loop, with the parameters of FIELDS."""
    n = len(ratios)
    if rule == "cppo":
        return [float(k) for k in algorithm_1(ratios, advantages, divergences, **LIMITS)[0]]
    if rule == "cppo_soft":
        return soft_gate(ratios, advantages, divergences, **LIMITS)
    if rule == "dppo":
        return [float(a * (r - 1) <= 0 or d <= 0.05) for r, a, d in zip(ratios, advantages, divergences, strict=True)]
    if rule == "trm_max":
        return [float(max(divergences, default=0) <= 0.05)] * n
    if rule == "trm_avg":
        return [float(sum(divergences) / n <= 0.01)] * n if n else []
    if rule == "minpro":
        return [c / r for c, r in zip(minpro_coefficients(ratios, 0.8, 1.1), ratios, strict=True)]
    if rule == "cispo":
        return [min(max(r, 0.9), 1.2) / r for r in ratios]
    if rule == "grpo":
        return [
            clipped_surrogate_slope(r, a or 1.0, 0.9, 1.2) if a else 1.0
            for r, a in zip(ratios, advantages, strict=True)
        ]
    if rule == "drpo":
        return [
            drpo_slope(r, a, d / abs(r - 1), 0.1) if a and r != 1 else 1.0
            for r, a, d in zip(ratios, advantages, divergences, strict=True)
        ]
    if rule == "ipo":
        return [float(d <= 0.05) for d in divergences]
    if rule == "vaco":
        return [float(k) for k in tv_filter(ratios, advantages, 0.07)]
    return [1.0] * n


def test_every_rule_is_compared():
    assert set(FIELDS) == set(RULES)


@pytest.mark.parametrize("rule", FIELDS)
def test_weights_equal_the_loop(rule):
    divergence, advantages, log_ratio, mask = random_rows(600, 24, seed=3)
    log_ratio = log_ratio * 3
    weight = RULES[rule].judge(divergence, advantages, log_ratio, mask, **parameters_of(rule)).weight
    assert weight.dtype == torch.float32
    assert not weight[~mask].any()
    changed = 0
    for b in range(len(mask)):
        own = mask[b].nonzero().flatten()
        r, a, d = (x[b, own].double().tolist() for x in (log_ratio.double().exp(), advantages, divergence))
        if algorithm_1(r, a, d, **LIMITS)[2] < 1e-6:
            continue  # on a threshold, where rounding decides
        expected = weights_of_one_response(rule, r, a, d)
        assert weight[b, own].tolist() == pytest.approx(expected, rel=1e-4)
        changed += any(abs(w - 1) > 1e-3 for w in expected)
    assert changed > 50 or rule == "none"


@pytest.mark.parametrize("rule", FIELDS)
def test_gradient_is_the_analytic_one(make_trainer, rule):
    trainer = make_trainer(trust_region=rule, loss_type="dapo", **FIELDS[rule])
    batch = injected_batch(trainer.model)
    logps, mu, mask = full_logps(trainer.model, batch), batch["old_per_token_logps"], batch["completion_mask"]
    p, q = logps.detach().double().exp(), mu.double().exp()
    kl = q * (q / p).log() + (1 - q) * ((1 - q) / (1 - p)).log()
    divergence = kl if rule.startswith("trm") else (p - q).abs()
    weight = torch.zeros(8, COMPLETION)
    for b, length in enumerate(mask.sum(1).tolist()):
        ratios = (p / q)[b, :length].tolist()
        advantages = [batch["advantages"][b].item()] * length
        weight[b, :length] = torch.tensor(
            weights_of_one_response(rule, ratios, advantages, divergence[b, :length].tolist())
        )
    own = mask.bool()
    assert (weight[own] - 1).abs().max() > 0.05 or rule == "none"
    assert weight[own].max() > 0  # not all is rejected
    assert (weight[own].min() < 0) == (rule == "drpo")
    coefficient = -batch["advantages"][:, None] * (logps - mu).exp().detach() * weight
    trainer.model.zero_grad()
    # rejected tokens and responses stay in the denominator
    normalizer = batch["num_items_in_batch"] / trainer.args.steps_per_generation
    ((coefficient * logps * mask).sum() / normalizer).backward()
    expected = {n: x.grad.clone() for n, x in trainer.model.named_parameters()}
    _, found = gradients(trainer, batch)
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        ({"trust_region": "grpo", "loss_type": "dapo"}, {"loss_type": "dapo", "epsilon": 0.2, "epsilon_high": 0.28}),
        ({"trust_region": "grpo", "loss_type": "grpo"}, {"loss_type": "grpo", "epsilon": 0.2, "epsilon_high": 0.28}),
        # TRL's cispo clamps at epsilon_high itself, and divides as dapo does
        ({"trust_region": "cispo", "loss_type": "dapo"}, {"loss_type": "cispo", "epsilon_high": 1.2}),
    ],
)
def test_gradients_equal_those_of_trl_s_own_losses(make_trainer, ours, theirs):
    trainer = make_trainer(**ours)
    batch = injected_batch(trainer.model)
    ratio = (full_logps(trainer.model, batch) - batch["old_per_token_logps"]).exp()[batch["completion_mask"].bool()]
    assert (ratio > 1.28).any()
    assert (ratio < 0.8).any()
    host = make_trainer(GRPOTrainer, GRPOConfig, model=trainer.model, steps_per_generation=2, **theirs)
    assert host.args.steps_per_generation == trainer.args.steps_per_generation
    _, expected = gradients(host, dict(batch))
    _, found = gradients(trainer, batch)
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=2e-7)


def test_a_judgment_holds_one_fp32_weight_for_each_token():
    def kept(divergence, advantages, log_ratio, mask, *, shape):
        return torch.ones(shape, dtype=torch.bool)

    rows = (torch.zeros(2, 3), torch.ones(2), torch.tensor([[1.0, 2.0, 4.0]] * 2).log(), torch.ones(2, 3))
    weight = Rule(kept, "own.kept").judge(*rows, shape=(2, 3), ratio_cap=2.0).weight
    torch.testing.assert_close(weight, torch.tensor([[1.0, 1.0, 0.5]] * 2))
    with pytest.raises(ValueError, match=r"own\.kept returns a weight of shape \(2, 1\), expected \(2, 3\)"):
        Rule(kept, "own.kept").judge(*rows, shape=(2, 1))


def test_a_rule_that_takes_response_ids_gets_them():
    divergence, advantages, log_ratio, mask = random_rows(8, 30, seed=6)
    ids = torch.arange(50, 58)
    for rule in ("cppo", "cppo_soft"):
        parameters = parameters_of(rule) | {"shuffle_weights": True}
        verdict = RULES[rule].judge(divergence, advantages, log_ratio, mask, response_ids=ids, **parameters)
        expected = position_weights(mask, parameters["w_min"], random_order(ids, mask))
        torch.testing.assert_close(verdict.prefix.weights, expected)
    assert "response_ids" not in RULES["cppo"].parameters


def test_parameters_in_words():
    words = RULES["cppo"].words
    numbers = {"delta": 0.1 + 0.2, "w_min": 0.8, "delta_b": 0.02, "delta_b_max_multiple": 3.0}
    ranged = words(**numbers, delta_b_quantile=0.9, shuffle_weights=False)
    assert ranged == ["delta 0.3", "w_min 0.8", "delta_b 0.02 to 0.06 (quantile 0.9 of each response)"]
    fixed = words(**numbers, delta_b_quantile=None, shuffle_weights=True)
    assert fixed == ["delta 0.3", "w_min 0.8", "delta_b 0.02 (fixed)", "weights shuffled"]
    for limit in ("delta", "delta_b"):
        assert words(**numbers | {limit: math.inf}, delta_b_quantile=0.9, shuffle_weights=False)[2] == "delta_b off"
    assert RULES["none"].words(start=12345678, end=0.1 + 0.2, name="late") == [
        "start 12345678",
        "end 0.3",
        "name late",
    ]


def test_a_rule_of_one_s_own_is_found_by_its_path(tmp_path, monkeypatch):
    for folder in ("elsewhere", "here"):
        (tmp_path / folder / "shelf").mkdir(parents=True)
        (tmp_path / folder / "shelf" / "found_rules.py").write_text(
            f"def late(divergence, advantages, log_ratio, mask, *, start, end=9):\n    return {folder!r}\n"
        )
    monkeypatch.syspath_prepend(tmp_path / "elsewhere")
    monkeypatch.chdir(tmp_path / "here")  # the working directory comes first
    path = list(sys.path)
    rule = find_rule("shelf.found_rules.late", {"start": 3})
    assert sys.path == path
    assert rule.function(None, None, None, None, start=3) == "here"
    assert (rule.source, rule.parameters) == ("shelf.found_rules.late", ("start", "end"))
    assert rule.estimators == tuple(ESTIMATORS)
    for given, named in (({}, r"unknown: \[\], missing: \['start'\]"), ({"start": 1, "x": 2}, r"unknown: \['x'\]")):
        with pytest.raises(ValueError, match=named):
            find_rule("shelf.found_rules.late", given)
    assert sys.path == path


def test_a_name_that_is_no_rule_is_refused_with_the_closest_one():
    for name, hint in (("cppo_sot", " Did you mean 'cppo_soft'?"), ("xyz", "")):
        with pytest.raises(ValueError, match="trust_region must be one of") as refused:
            find_rule(name, {})
        assert str(refused.value).endswith(f"got {name!r}.{hint}")
    with pytest.raises(ValueError, match=r"^trust_region: cannot import 'no_such_module\.rule'"):
        find_rule("no_such_module.rule", {})


def test_grpo_worked_by_hand():
    # on a bound nothing is clipped; beyond it, where the advantage pulls further out
    log_ratio = torch.tensor([[math.log(r) for r in (1.28, 1.29, 0.8, 0.79, 1.29, 0.79, 1.0)]])
    advantages = torch.tensor([[1.0, 1.0, -1.0, -1.0, -1.0, 1.0, 1.0]])
    verdict = grpo_mask(log_ratio, advantages, log_ratio, torch.ones(1, 7), ratio_min=0.8, ratio_max=1.28)
    assert verdict.weight.tolist() == [[True, False, True, False, True, True, True]]
    assert verdict.at_bound.tolist() == [[False, True, False, True, True, True, False]]


def test_minpro_and_cispo_worked_by_hand():
    # ρ = 2, 0.5, 1.5, 1 around a token of the environment: m = 1, 1, 0.5, 0.5, so that clip(m ρ, 0.6, 1.2) is
    # 1.2, 0.6, 0.75, 0.6 and clip(ρ, 0.6, 1.2) is 1.2, 0.6, 1.2, 1
    ratio, mask = torch.tensor([[2.0, 0.1, 0.5, 1.5, 1.0]]), torch.tensor([[1, 0, 1, 1, 1]])
    for rule, coefficients, at_bound in (
        (minpro_weight, [1.2, 0.0, 0.6, 0.75, 0.6], [True, False, True, False, True]),
        (cispo_weight, [1.2, 0.0, 0.6, 1.2, 1.0], [True, False, True, True, False]),
    ):
        verdict = rule(ratio, ratio, ratio.log(), mask, ratio_min=0.6, ratio_max=1.2)
        torch.testing.assert_close(verdict.weight * ratio, torch.tensor([coefficients]))
        assert verdict.at_bound.tolist() == [at_bound]


@pytest.mark.parametrize("delta", [0.15, 12.5, math.inf])
def test_drpo_has_the_gradient_of_its_own_loss(delta):
    g = torch.Generator().manual_seed(0)
    mu, logps = (torch.randn(400, 6, generator=g, dtype=torch.double).log_softmax(-1) for _ in range(2))
    mu, logps = mu[:, 0].reshape(20, 20), logps[:, 0].reshape(20, 20).requires_grad_()
    advantages = torch.randn(20, 1, generator=g, dtype=torch.double)
    ratio = (logps - mu).exp()
    (-advantages * ratio + advantages.abs() * mu.exp() * (ratio - 1) ** 2 / (2 * delta)).sum().backward()
    ours = logps.detach().requires_grad_()
    weight = drpo_weight(binary_tv(ours, mu), advantages, (ours - mu).detach(), torch.ones_like(mu), delta=delta)
    (-(ours - mu).exp() * advantages * weight).sum().backward()
    torch.testing.assert_close(ours.grad, logps.grad, rtol=1e-5, atol=1e-6)
    assert (weight < 0).any() == (delta == 0.15)  # beyond the threshold the step leads back


def test_drpo_ipo_and_vaco_worked_by_hand():
    # steps away, toward, away, toward, then no advantage, no movement, and a token of the environment
    divergence = torch.tensor([[0.2, 0.2, 0.3, 0.3, 0.5, 0.0, math.nan]])
    ratio = torch.tensor([[1.5, 1.5, 0.5, 0.5, 1.5, 1.0, 9.0]])
    advantages, mask = torch.tensor([[1.0, -1.0, -2.0, 2.0, 0.0, 1.0, 1.0]]), torch.tensor([[1, 1, 1, 1, 1, 1, 0]])
    rows = (divergence, advantages, ratio.log(), mask)
    torch.testing.assert_close(
        drpo_weight(*rows, delta=0.2), torch.tensor([[0.0, 2.0, -0.5, 2.5, 1.0, 1.0, 0.0]]), rtol=0, atol=1e-6
    )
    keep = [True, True, False, False, False, True, False]  # whichever way the step leads
    assert ipo_mask(*rows, delta=0.2).tolist() == [keep]
    # the mean of |ρ - 1| is 2.5 / 6 = 0.4167; the token of the environment is no part of it
    away = [False, True, False, True, True, True, False]
    assert vaco_mask(*rows, delta=0.416).tolist() == [away]
    assert vaco_mask(*rows, delta=0.417).tolist() == mask.bool().tolist()


def test_vaco_on_the_rows_of_open_instruct():
    # test_rho_mask_tv_divergence there: means of 1.25, kept under a bound of 2, and 3.0, dropped
    ratio = torch.tensor([[0.25, 1.0, 4.0], [4.0, 4.0, 4.0]])
    ones = torch.ones_like(ratio)
    assert vaco_mask(ratio, ones, ratio.log(), ones, delta=2.0).tolist() == [[True] * 3, [False] * 3]
    assert vaco_mask(ratio, -ones, ratio.log(), ones, delta=2.0).all()


def test_the_soft_gate_is_open_exactly_where_the_mask_keeps():
    rows = random_rows(500, 30, seed=4)
    gate = RULES["cppo_soft"].judge(*rows, **parameters_of("cppo_soft")).weight
    keep = cppo_mask(*rows, **LIMITS)
    assert torch.equal(gate == 1, keep)
    assert ((gate > 0) == rows[3]).all()
    assert gate[rows[3]].min() < 0.2
    off = parameters_of("cppo_soft") | {"delta": math.inf, "delta_b": math.inf}
    assert torch.equal(RULES["cppo_soft"].judge(*rows, **off).weight.bool(), rows[3])


def test_shuffled_weights_are_the_same_weights_elsewhere(make_trainer):
    _, _, order, mask = random_rows(200, 30, seed=5)
    order = torch.rand(order.shape)
    ordered, shuffled = position_weights(mask, 0.6), position_weights(mask, 0.6, order)
    torch.testing.assert_close(ordered.sort(-1).values, shuffled.sort(-1).values)
    assert not shuffled[~mask].any()
    for b in range(0, 200, 11):  # by a loop: the k-th smallest key gets the k-th weight
        own = mask[b].nonzero().flatten().tolist()
        by_key = sorted(own, key=lambda t: order[b, t])
        torch.testing.assert_close(shuffled[b, by_key], ordered[b, own])
    trainer = make_trainer(cppo_shuffle_weights=True, cppo_w_min=0.1, learning_rate=5e-3)
    trainer.train()
    assert trainer.state.log_history[1]["cppo/divergence/mean"] > 0


def test_the_random_order_of_a_response_is_its_own_and_a_uniform_one():
    ids, mask = torch.arange(4000), torch.ones(4000, 5)
    keys = random_order(ids, mask)
    assert torch.equal(keys[[7]], random_order(ids[[7]], mask[[7]]))  # in any micro-batch
    ranks = keys.argsort(-1).argsort(-1)
    for position in range(5):  # each place is as likely for each token: 800 of 4,000, five standard deviations
        counts = ranks[:, position].bincount(minlength=5)
        assert (counts - 800).abs().max() < 5 * (4000 * 0.2 * 0.8) ** 0.5
    assert len({tuple(row) for row in ranks.tolist()}) == 120  # every permutation
