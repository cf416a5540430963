import math

import pytest
import torch

from cppo_trl.divergence import MAX_LOG_RATIO, anchor_logps, binary_kl, binary_tv, topk_kl, topk_tv
from tests.reference import bernoulli_kl, reduced


def test_binary_tv_by_hand():
    pi, mu = torch.tensor([[0.5, 0.9, 0.2]]).log(), torch.tensor([[0.25, 0.9, 0.7]]).log()
    torch.testing.assert_close(binary_tv(pi, mu), torch.tensor([[0.25, 0.0, 0.5]]))


@pytest.mark.parametrize("p", [1e-30, 1e-6, 0.1, 0.5, 1 - 1e-4, 1 - 1e-7, 1 - 1e-10])
@pytest.mark.parametrize("q", [1e-30, 1e-6, 0.1, 0.5, 1 - 1e-4, 1 - 1e-7, 1 - 1e-10])
def test_binary_kl_equals_the_coin_formula_near_zero_and_one(p, q):
    # the true probabilities are those of the fp32 log-probs
    rollout, current = torch.tensor([[math.log(p)]]), torch.tensor([[math.log(q)]])
    expected = bernoulli_kl(math.exp(rollout.double()), math.exp(current.double()))
    assert binary_kl(current, rollout).item() == pytest.approx(expected, rel=2e-4, abs=1e-9)


def test_binary_kl_is_directed_from_the_rollout_policy():
    pi, mu = torch.tensor([[0.2]]).log(), torch.tensor([[0.7]]).log()
    assert binary_kl(pi, mu).item() == pytest.approx(0.7 * math.log(3.5) + 0.3 * math.log(0.3 / 0.8), rel=1e-5)


@pytest.mark.parametrize("estimator", [binary_tv, binary_kl])
def test_estimators_are_finite_whatever_the_inputs_and_zero_without_rollout_logps(estimator):
    values = torch.tensor([0.0, -1e-9, -1e-3, -1.0, -100.0, -1e4, -torch.inf])
    pi, mu = (x.reshape(1, -1) for x in torch.meshgrid(values, values, indexing="ij"))
    assert estimator(pi, mu).isfinite().all()
    assert (estimator(pi, pi) == 0).all()
    assert estimator(pi, torch.full_like(pi, torch.nan)).eq(0).all()


@pytest.mark.parametrize("estimator", [binary_tv, binary_kl])
def test_estimators_compute_in_fp32_without_a_gradient(estimator):
    pi = torch.tensor([[-0.5, -1.5]], dtype=torch.bfloat16, requires_grad=True)
    mu = torch.tensor([[-0.75, -1.0]], dtype=torch.bfloat16)
    result = estimator(pi, mu)
    assert result.dtype == torch.float32
    assert not result.requires_grad
    torch.testing.assert_close(result, estimator(pi.float(), mu.float()), rtol=0, atol=0)


def test_anchor_replaces_what_is_unknown_and_bounds_the_ratio():
    logps = torch.tensor([[-1.0, -2.0, -3.0, -0.5]], requires_grad=True)
    rollout = torch.tensor([[-1.5, torch.nan, -torch.inf, -500.0]])
    anchored = anchor_logps(logps, rollout)
    expected = torch.tensor([[-1.5, -2.0, -3.0 - MAX_LOG_RATIO, -0.5 - MAX_LOG_RATIO]])
    torch.testing.assert_close(anchored, expected, rtol=0, atol=0)
    assert not anchored.requires_grad
    assert (logps - anchored).exp().isfinite().all()
    torch.testing.assert_close(anchor_logps(logps, None), logps.detach(), rtol=0, atol=0)


def two_policies(seed, rows=4, length=6, vocabulary=40, distance=1.0):
    g = torch.Generator().manual_seed(seed)
    mu = (torch.randn(rows, length, vocabulary, generator=g) * 2).log_softmax(-1)
    pi = (mu + torch.randn(rows, length, vocabulary, generator=g) * distance).log_softmax(-1)
    sampled = torch.randint(0, vocabulary, (rows, length, 1), generator=g)
    return pi, mu, sampled


def listed(pi, mu, sampled, k):
    """The sampled token, then the k likeliest of μ, the sampled one padded out where it is among them."""
    top = mu.topk(k).indices
    ids = torch.cat([sampled, top], -1)
    mu_listed = mu.gather(-1, ids)
    mu_listed[..., 1:].masked_fill_(top == sampled, -torch.inf)
    return pi.gather(-1, ids), mu_listed


def test_topk_worked_by_hand():
    # listed: .5 .2 of mu against .3 .3 of pi; other: .3 against .4; one padding slot
    mu = torch.tensor([[[0.5, 0.2, 0.9]]]).log()
    mu[..., 2] = -torch.inf
    pi = torch.tensor([[[0.3, 0.3, 0.9]]]).log()
    assert topk_tv(pi, mu).item() == pytest.approx(0.5 * (0.2 + 0.1 + 0.1))
    expected = 0.5 * math.log(5 / 3) + 0.2 * math.log(2 / 3) + 0.3 * math.log(3 / 4)
    assert topk_kl(pi, mu).item() == pytest.approx(expected, rel=1e-5)
    pi[..., 2] = torch.nan  # nothing is read at a padding slot
    assert topk_tv(pi, mu).item() == pytest.approx(0.5 * (0.2 + 0.1 + 0.1))
    assert topk_kl(pi, mu).item() == pytest.approx(expected, rel=1e-5)


def test_topk_of_a_certain_token_by_hand():
    mu, pi = torch.tensor([[[1.0, 0.0]]]).log(), torch.tensor([[[0.25, 0.5]]]).log()
    assert topk_tv(pi, mu).item() == pytest.approx(0.75)
    assert topk_kl(pi, mu).item() == pytest.approx(math.log(4), rel=1e-5)


@pytest.mark.parametrize("estimator", [topk_tv, topk_kl])
def test_an_unknown_log_prob_silences_its_own_token_alone(estimator):
    pi, mu, sampled = two_policies(7)
    pi, mu = listed(pi, mu, sampled, 5)
    unknown = mu.clone()
    unknown[1, 2, 3] = torch.nan
    expected = estimator(pi, mu)
    assert expected.min() > 0
    expected[1, 2] = 0.0
    assert torch.equal(estimator(pi, unknown), expected)


@pytest.mark.parametrize("k", [1, 5, 20, 39])
def test_topk_equals_the_sum_over_a_plain_set(k):
    pi, mu, sampled = two_policies(k)
    args = listed(pi, mu, sampled, k)
    tv, kl = topk_tv(*args), topk_kl(*args)
    for b in range(4):
        for t in range(6):
            at = (pi[b, t].double().tolist(), mu[b, t].double().tolist(), sampled[b, t].item(), k)
            assert tv[b, t].item() == pytest.approx(reduced(*at, "tv"), abs=2e-6)
            assert kl[b, t].item() == pytest.approx(reduced(*at, "kl"), abs=2e-6, rel=1e-4)


def test_binary_is_below_topk_is_below_exact():
    pi, mu, sampled = two_policies(0, rows=50)
    exact_tv, exact_kl = 0.5 * (pi.exp() - mu.exp()).abs().sum(-1), (mu.exp() * (mu - pi)).sum(-1)
    at = sampled[..., 0:1]
    binary = [f(pi.gather(-1, at)[..., 0], mu.gather(-1, at)[..., 0]) for f in (binary_tv, binary_kl)]
    for estimator, lower, upper in ((topk_tv, binary[0], exact_tv), (topk_kl, binary[1], exact_kl)):
        for k in (1, 3, 10, 20):
            value = estimator(*listed(pi, mu, sampled, k))
            assert (lower <= value + 1e-6).all()
            assert (value <= upper + 1e-6).all()
            lower = value  # noqa: PLW2901
        torch.testing.assert_close(estimator(*listed(pi, mu, sampled, 40)), upper, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("estimator", [topk_tv, topk_kl])
def test_topk_is_finite_whatever_the_inputs(estimator):
    values = torch.tensor([0.0, -1e-9, -1.0, -100.0, -1e4, -torch.inf])
    pi = torch.cartesian_prod(values, values, values).unsqueeze(0)
    for mu in (pi.flip(1), pi, torch.full_like(pi, -torch.inf)):
        result = estimator(pi, mu)
        assert result.isfinite().all()
        assert (result >= 0).all()
        assert estimator is topk_kl or (result <= 1).all()
        assert result.dtype == torch.float32
    unknown = pi.clone()
    unknown[:, ::2, 1] = torch.nan
    assert (estimator(pi, unknown)[:, ::2] == 0).all()
    assert estimator(pi.bfloat16(), pi.bfloat16()).dtype == torch.float32
