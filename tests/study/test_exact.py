"""The enumerated quantities against plain loops over all responses."""

import itertools
import math

import pytest
import torch

import exact


def probabilities(levels, response):
    """π(y_t | s_t) along a response, by walking the tree."""
    state, found = 0, []
    for level, token in zip(levels, response, strict=True):
        found.append(float(level[state, token].double().exp()))
        state = state * exact.TOKENS + token
    return found


def test_everything_is_that_of_a_loop_over_all_responses():
    torch.manual_seed(0)
    mu, pi = ([level.detach() for level in exact.Policy(4).tree()] for _ in range(2))
    responses = list(itertools.product(range(exact.TOKENS), repeat=4))
    rewards = exact.reward(torch.tensor(responses)).double()
    assert 0 < rewards.sum() < len(responses)
    improvement = surrogate = error = tv = 0.0
    for response, reward in zip(responses, rewards.tolist(), strict=True):
        p, q = probabilities(mu, response), probabilities(pi, response)
        ratios = [b / a for a, b in zip(p, q, strict=True)]
        improvement += reward * (math.prod(q) - math.prod(p))
        surrogate += math.prod(p) * reward * sum(r - 1 for r in ratios)
        # Δ as the paper states it: E[R Σ (ρ_t - 1)(1 - ρ_{t+1:T})]
        error += math.prod(p) * reward * sum((r - 1) * (1 - math.prod(ratios[t + 1 :])) for t, r in enumerate(ratios))
        tv += abs(math.prod(p) - math.prod(q)) / 2
    found = exact.compare(mu, pi, rewards)
    assert found.improvement == pytest.approx(improvement, abs=1e-9)
    assert found.surrogate == pytest.approx(surrogate, abs=1e-9)
    assert found.error == pytest.approx(abs(error), abs=1e-9)
    assert found.tv == pytest.approx(tv, abs=1e-9)
    drift = 0.0  # of the second token
    for first in range(exact.TOKENS):
        one, other = mu[1][first].double().exp(), pi[1][first].double().exp()
        drift += float(mu[0][0, first].double().exp() * (one - other).abs().sum() / 2)
    assert found.drift[1] == pytest.approx(drift, abs=1e-9)
    assert found.error <= found.bound <= found.theorem


def test_responses_are_sampled_and_scored_as_the_tree_says():
    torch.manual_seed(0)
    policy = exact.Policy(4)
    responses = policy.sample(5, torch.Generator().manual_seed(0))
    levels = policy.tree()
    for response, along in zip(responses.tolist(), policy.along(responses), strict=True):
        walked = probabilities(levels, response)
        assert [float(along[t, token].exp()) for t, token in enumerate(response)] == pytest.approx(walked, abs=1e-6)


def test_equal_drift_is_interpolated_within_a_unit_and_never_extrapolated():
    def arm(tv, improvement):
        return list(exact.Exact(improvement, 0.0, 0.0, tv, (0.0,), 0.0, 0.0, 0.0))

    rows = [
        {"length": 4, "seed": seed, "arms": {"cppo 1": arm(0.0, 0.0), "cppo 2": arm(1.0, 1.0 + 0.1 * seed)}}
        for seed in range(3)
    ]
    for row in rows:
        row["arms"] |= {"dppo 1": arm(0.0, 0.0), "dppo 2": arm(0.5, 0.25), "grpo 1": arm(0.9, 1.0)}
    table = exact.at_equal_drift(rows, 4, 0.25)
    assert set(table) == {"cppo"}
    assert table["cppo"][0] == pytest.approx(0.25 * 1.1 - 0.125)
    assert table["cppo"][2] == 3
    assert exact.at_equal_drift(rows, 4, 0.75) == {}  # DPPO's ladder ends before
