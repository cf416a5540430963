import math

import pytest
import torch

from cppo_trl.divergence import MAX_LOG_RATIO, anchor_logps, binary_kl, binary_tv
from tests.reference import bernoulli_kl


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
