"""Per-token divergences between the rollout policy μ and the current policy π, and the anchor they start from.

Every function maps log-probs of shape ``(B, T)`` (any float dtype, in nats) to ``(B, T)`` fp32, without a
gradient. Equation numbers are those of DPPO (arXiv 2602.04879), whose estimators CPPO (arXiv 2606.10968) uses.
"""

import torch
from torch import Tensor

MAX_LOG_RATIO = 20.0
"""Largest log-ratio log(π/μ) that reaches the loss, as in the authors' UniRL code; beyond it only overflow waits."""

_MIN_REST = 1e-12  # floor of 1 - p: a log-prob that fp32 rounds to 0 still leaves some probability to the others
_MIN_LOGP = -87.0  # floor of log p: e^-87 is about the smallest normal fp32 number


@torch.no_grad()
def anchor_logps(logps: Tensor, rollout_logps: Tensor | None) -> Tensor:
    """Rollout log-probs that are safe to divide by: the anchor log μ of ratio and divergence.

    Where the engine gave none (NaN, or None for the whole batch) the current policy stands in, so the ratio is 1
    and the divergence 0. Elsewhere log μ is raised where needed to keep log(π/μ) <= ``MAX_LOG_RATIO``, so that a
    weight of 0 times the ratio is 0 and never NaN.

    Args:
        logps: ``(B, T)`` log π(y_t|s_t).
        rollout_logps: ``(B, T)`` log μ(y_t|s_t) with NaN where unknown, or None.
    """
    current = logps.float()
    if rollout_logps is None:
        return current.clone()
    rollout = rollout_logps.float()
    return torch.where(rollout.isnan(), current, rollout).maximum(current - MAX_LOG_RATIO)


@torch.no_grad()
def binary_tv(logps: Tensor, rollout_logps: Tensor) -> Tensor:
    """Binary total variation, DPPO Eq. (13): ``D_t = |μ(y_t|s_t) - π(y_t|s_t)|``, in [0, 1].

    A lower bound of the exact total variation that needs the sampled token's log-probs only.
    NaN rollout log-probs give 0.
    """
    rollout = rollout_logps.float()
    return (rollout.exp() - logps.float().exp()).abs().masked_fill(rollout.isnan(), 0.0)


@torch.no_grad()
def binary_kl(logps: Tensor, rollout_logps: Tensor) -> Tensor:
    """Binary Kullback-Leibler divergence KL(μ‖π), DPPO Eq. (14), in nats, finite and >= 0.

    D_t = μ log(μ/π) + (1-μ) log((1-μ)/(1-π)) at the sampled token y_t. 1-p is exact where p is near 0 or 1, and
    floored at 1e-12. NaN rollout log-probs give 0.
    """
    rollout, current = rollout_logps.float(), logps.float()
    kl = rollout.exp() * (rollout.clamp(min=_MIN_LOGP) - current.clamp(min=_MIN_LOGP))
    kl -= torch.expm1(rollout) * (_log_rest(rollout) - _log_rest(current))
    return kl.clamp(min=0.0).masked_fill(rollout.isnan(), 0.0)


def _log_rest(logp: Tensor) -> Tensor:
    """log(1 - p) from log p, exact near p = 0 and p = 1, and at least log 1e-12."""
    small = torch.log1p(-logp.exp())
    large = (-torch.expm1(logp)).clamp(min=_MIN_REST).log()
    return torch.where(logp < -0.7, small, large)


@torch.no_grad()
def topk_tv(logps: Tensor, rollout_logps: Tensor) -> Tensor:
    """Top-K reduced total variation, DPPO Eq. (15): ``D_t = ½ Σ_{a in A''} |p^μ(a) - p^π(a)|``, in [0, 1].

    A'' holds the listed tokens (the top-K of μ and the sampled token) and one bucket "other" for the rest of the
    vocabulary. Binary <= Top-K <= exact total variation, and exact where every token is listed.

    Args:
        logps: ``(B, T, K')`` log π at K' distinct token ids.
        rollout_logps: ``(B, T, K')`` log μ at the same ids; -inf marks a padding slot, whose id is ignored.

    Returns:
        ``(B, T)`` fp32; 0 where a rollout log-prob is NaN.
    """
    mu, pi, mu_other, pi_other, unknown = _buckets(logps, rollout_logps)
    return (0.5 * ((mu - pi).abs().sum(-1) + (mu_other - pi_other).abs())).clamp(max=1.0).masked_fill(unknown, 0.0)


@torch.no_grad()
def topk_kl(logps: Tensor, rollout_logps: Tensor) -> Tensor:
    """Top-K reduced KL(μ‖π), DPPO Eq. (16): D_t = Σ_{a in A''} p^μ(a) log(p^μ(a) / p^π(a)), in nats, finite, >= 0.

    Arguments and result as in `topk_tv`; the bucket "other" is floored at 1e-12.
    """
    mu, _, mu_other, pi_other, unknown = _buckets(logps, rollout_logps)
    log_ratio = rollout_logps.float().clamp(min=_MIN_LOGP) - logps.float().clamp(min=_MIN_LOGP)
    kl = (mu * log_ratio.masked_fill(mu == 0, 0.0)).sum(-1) + mu_other * (mu_other / pi_other).log()
    return kl.clamp(min=0.0).masked_fill(unknown, 0.0)


def _buckets(logps: Tensor, rollout_logps: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Probabilities of the listed tokens and of the rest under μ and π, and where μ is unknown."""
    rollout = rollout_logps.float()
    mu = rollout.exp()
    pi = logps.float().exp().masked_fill(rollout == -torch.inf, 0.0)
    mu_other, pi_other = ((1 - p.sum(-1)).clamp(min=_MIN_REST) for p in (mu, pi))
    return mu, pi, mu_other, pi_other, rollout.isnan().any(-1)


ESTIMATORS = {"binary_tv": binary_tv, "binary_kl": binary_kl, "topk_tv": topk_tv, "topk_kl": topk_kl}
"""Every value of ``cppo_divergence``. The Top-K estimators take ``(B, T, K')`` log-probs, the others ``(B, T)``."""
