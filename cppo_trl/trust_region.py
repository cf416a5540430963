"""The trust-region rules: how much each token of a rollout may still move the policy.

Every method is a detached weight on the same surrogate -ρ_t Â_t: a hard mask is 0 or 1, the soft gate lies between,
a method that clips the ratio instead of masking weighs by clip(ρ_t) / ρ_t, and a regularizer by the share of the
gradient that it leaves, negative where it turns the step around. A rule is a function
``(divergence, advantages, log_ratio, mask, **parameters)`` that returns this weight, a mask, or a `Verdict`.

Pure functions on tensors of shape ``(B, T)``: B responses, T token positions, right- or left-padded, with holes
where the environment wrote a token. ``mask`` is 1 (or True) on the response's own tokens; everything outside it
carries no weight, no divergence and no position. Every rule takes the same four tensors, read or not. All arithmetic
is fp32 and without a gradient, each row stands for itself, and nothing waits for the device. Equation numbers are
those of CPPO (arXiv 2606.10968) unless another paper is named.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor


def zero_outside(values: Tensor, mask: Tensor) -> Tensor:
    """The values as fp32, 0 outside the mask whatever stands there, NaN too.

    On the bits, as ``torch.where`` takes three times as long on a CPU.

    Args:
        values: ``(B, T)``.
        mask: ``(B, T)``, 1 on the values that count.
    """
    return (values.float().view(torch.int32) * mask.int()).view(torch.float32)


@torch.no_grad()
def position_weights(mask: Tensor, w_min: float, order: Tensor | None = None) -> Tensor:
    """Position weights, Eq. (9): w_t = 1 - (1 - w_min) (t - 1) / (T - 1), t = 1..T.

    T is the response's own length, counted over the mask. A single token weighs 1.

    Args:
        mask: ``(B, T)``, 1 on the response's tokens.
        w_min: weight of the last token, in (0, 1]. 1 switches the position weight off.
        order: ``(B, T)`` keys by which the weights are dealt out instead of by position (the ablation with shuffled
            weights, section 4.3: the same weights at random positions).

    Returns:
        ``(B, T)`` fp32, falling from 1 to ``w_min`` over each response (or along ``order``), 0 outside the mask.
    """
    if order is None:
        position = mask.cumsum(-1).float().sub_(1)  # t - 1
    else:
        position = order.masked_fill(mask == 0, torch.inf).argsort(-1).argsort(-1).float()
    last = (mask.sum(-1, keepdim=True) - 1).clamp(min=1)  # T - 1; 0/0 for a single token is 0
    return position.mul_((w_min - 1) / last).add_(1).mul_(mask.float())


@torch.no_grad()
def masked_quantile(values: Tensor, mask: Tensor, quantile: float) -> Tensor:
    """Quantile of each row over its masked-in values, interpolated as ``torch.quantile`` does; NaN for empty rows.

    Unlike ``torch.quantile`` it takes rows of different length and has no limit on the number of elements. NaN counts
    as infinite.

    Args:
        values: ``(B, T)``, >= 0.
        mask: ``(B, T)``, 1 on the values that count.
        quantile: in [0, 1].

    Returns:
        ``(B, 1)`` fp32.
    """
    count = mask.sum(-1, keepdim=True)
    rank = (count - 1).clamp(min=0).float() * quantile
    values = zero_outside(values.nan_to_num(torch.inf, torch.inf), mask)
    # the value at the rank is the largest number that enough values reach: found bit by bit, highest first, as numbers
    # >= 0 are ordered like their bits. Beyond infinity stand NaNs, which no value reaches.
    reached, enough = torch.empty_like(values), count - rank.floor()
    low = torch.zeros_like(count, dtype=torch.int32)
    for bit in reversed(range(31)):
        trial = low + 2**bit
        torch.ge(values, trial.view(torch.float32), out=reached)  # fp32: a comparison into bool is slow on a CPU
        low = trial.where(reached.sum(-1, keepdim=True) >= enough, low)
    low = low.view(torch.float32)
    below = torch.le(values, low, out=reached)
    repeated = values.size(-1) - below.sum(-1, keepdim=True) < enough - 1
    high = low.where(repeated | (rank.frac() == 0), values.add(below, alpha=1e38).amin(-1, keepdim=True))
    return low.lerp(high, rank.frac()).masked_fill(count == 0, torch.nan)


@torch.no_grad()
def prefix_budget(
    divergence: Tensor,
    mask: Tensor,
    delta_b: float,
    quantile: float | None = 0.9,
    max_multiple: float = 2.0,
) -> Tensor:
    """Prefix budget of each response, Eq. (22): δ_b^seq = clamp(Quantile(D_1:T, q), δ_b, m δ_b).

    The quantile is over the unweighted divergences of the response's own tokens.

    Args:
        divergence: ``(B, T)`` D_t.
        mask: ``(B, T)``, 1 on the response's tokens.
        delta_b: the floor δ_b^min, in units of the divergence.
        quantile: q in [0, 1], or None for the fixed budget ``delta_b``.
        max_multiple: m >= 1, the ceiling in multiples of the floor.

    Returns:
        ``(B, 1)`` fp32; the floor for empty rows.
    """
    if quantile is None:
        return divergence.new_full((divergence.size(0), 1), delta_b, dtype=torch.float32)
    return masked_quantile(divergence, mask, quantile).nan_to_num(nan=delta_b).clamp(delta_b, max_multiple * delta_b)


@torch.no_grad()
def moves_away(advantages: Tensor, log_ratio: Tensor) -> Tensor:
    """Tokens whose gradient step leads away from the rollout policy: Â_t (ρ_t - 1) > 0, Eq. (3) and (10).

    Args:
        advantages: ``(B,)``, ``(B, 1)`` or ``(B, T)``.
        log_ratio: ``(B, T)`` log ρ_t = log π - log μ. Its sign is exact where that of ρ_t - 1 rounds to 0.
            NaN counts as ρ_t = 1.

    Returns:
        ``(B, T)`` bool.
    """
    return _away(advantages, log_ratio) > 0


class Prefix(NamedTuple):
    """The two sides of Eq. (8) over a response; ``(B, T)`` fp32 each."""

    weights: Tensor
    """w_t"""
    weighted: Tensor
    """w_t D_t"""
    left: Tensor
    """δ_b W_t - S_t, what is left of the budget, with S_t = Σ_{j<=t} w_j D_j over every token of the response, kept or
    masked: negative where the prefix average S_t / W_t exceeds δ_b"""
    threshold: Tensor
    """c_t = min(δ, δ + δ_b W_{t-1} - S_{t-1}), what w_t D_t is held against"""

    def spent(self) -> Tensor:
        """S_t."""
        return self.weighted.cumsum(-1)

    def weight_sum(self) -> Tensor:
        """W_t = Σ_{j<=t} w_j."""
        return self.weights.cumsum(-1)

    def average(self, delta_b: Tensor, mask: Tensor) -> Tensor:
        """S_t / W_t, the prefix average that the budget ``delta_b`` is held against; 0 outside the mask."""
        return torch.addcdiv(delta_b, self.left, self.weight_sum().clamp_(min=1e-30), value=-1).mul_(mask)


class Verdict(NamedTuple):
    """What a rule decides over a batch, and why."""

    weight: Tensor
    """``(B, T)`` fp32 or bool, the detached weight of each token's -ρ_t Â_t; 0 outside the mask"""
    within_threshold: Tensor | None = None
    """``(B, T)`` bool, w_t D_t <= δ: where a token of weight 0 is masked by the budget; None for a rule without one"""
    delta_b: Tensor | None = None
    """``(B, 1)`` fp32, the prefix budget in force; None where there is none"""
    prefix: Prefix | None = None
    """Position weights and prefix sums, of a rule that has them"""
    at_bound: Tensor | None = None
    """``(B, T)`` bool, tokens whose ratio is beyond a bound, of a rule that bounds the ratio"""


@torch.no_grad()
def prefix_sums(
    divergence: Tensor,
    mask: Tensor,
    *,
    delta: float,
    w_min: float,
    delta_b: float | Tensor,
    order: Tensor | None = None,
) -> Prefix:
    """What Eq. (8) compares. Arguments as in `cppo_mask`."""
    weights = position_weights(mask, w_min, order)
    weighted = zero_outside(divergence, mask).mul_(weights)
    left = (weights * _finite(delta_b)).sub_(weighted).cumsum_(-1)
    threshold = left.roll(1, -1)
    threshold[..., :1] = 0.0
    return Prefix(weights, weighted, left, threshold.clamp_(max=0.0).add_(delta))


@torch.no_grad()
def cppo_mask(
    divergence: Tensor,
    advantages: Tensor,
    log_ratio: Tensor,
    mask: Tensor,
    *,
    delta: float,
    w_min: float,
    delta_b: float | Tensor,
    order: Tensor | None = None,
) -> Tensor:
    """The CPPO mask, Eq. (8) to (10): M_t = 1[Â_t (ρ_t - 1) <= 0 or I_t].

    I_t holds where w_t D_t <= c_t = min(δ, δ + δ_b W_{t-1} - S_{t-1}): within the threshold, w_t D_t <= δ, and within
    the budget, S_t <= δ + δ_b W_{t-1}, where S_t = Σ_{j<=t} w_j D_j and W_t = Σ_{j<=t} w_j. The sums run over every
    token of the response, kept or masked.

    Args:
        divergence: ``(B, T)`` D_t >= 0, finite on the response's tokens.
        advantages: ``(B,)``, ``(B, 1)`` or ``(B, T)``.
        log_ratio: ``(B, T)`` log ρ_t.
        mask: ``(B, T)``, 1 on the response's tokens.
        delta: threshold δ; inf switches both limits off, as δ is also the slack of the budget.
        w_min: weight of the last token, in (0, 1]; 1 switches the position weight off.
        delta_b: budget δ_b, a float or ``(B, 1)`` as from `prefix_budget`; inf switches the budget off.
        order: as in `position_weights`.

    Returns:
        ``(B, T)`` bool, True = kept; False outside the mask.
    """
    prefix = prefix_sums(divergence, mask, delta=delta, w_min=w_min, delta_b=delta_b, order=order)
    return _kept(prefix.weighted <= prefix.threshold, advantages, log_ratio, mask)


@torch.no_grad()
def cppo(
    divergence: Tensor,
    advantages: Tensor,
    log_ratio: Tensor,
    mask: Tensor,
    *,
    delta: float,
    w_min: float,
    delta_b: float,
    delta_b_quantile: float | None,
    delta_b_max_multiple: float,
    shuffle_weights: bool = False,
    response_ids: Tensor | None = None,
) -> Verdict:
    """CPPO: `cppo_mask` with the budget of each response, `prefix_budget`.

    Args:
        divergence: as in `cppo_mask`, like the other tensors.
        advantages: as in `cppo_mask`.
        log_ratio: as in `cppo_mask`.
        mask: as in `cppo_mask`.
        delta: as in `cppo_mask`.
        w_min: as in `cppo_mask`.
        delta_b: as in `prefix_budget`.
        delta_b_quantile: its ``quantile``.
        delta_b_max_multiple: its ``max_multiple``.
        shuffle_weights: deal the position weights out in a random order (the ablation of section 4.3).
        response_ids: ``(B,)`` as in `random_order`, read only with ``shuffle_weights``.
    """
    budget = prefix_budget(divergence, mask, delta_b, delta_b_quantile, delta_b_max_multiple)
    order = random_order(response_ids, mask) if shuffle_weights and response_ids is not None else None
    prefix = prefix_sums(divergence, mask, delta=delta, w_min=w_min, delta_b=budget, order=order)
    keep = _kept(prefix.weighted <= prefix.threshold, advantages, log_ratio, mask)
    return _verdict(keep, prefix, budget, delta, delta_b)


@torch.no_grad()
def cppo_soft(
    divergence: Tensor,
    advantages: Tensor,
    log_ratio: Tensor,
    mask: Tensor,
    *,
    delta: float,
    w_min: float,
    delta_b: float,
    delta_b_quantile: float | None,
    delta_b_max_multiple: float,
    shuffle_weights: bool = False,
    response_ids: Tensor | None = None,
) -> Verdict:
    """The soft gate, Eq. (19) and (20): 1 toward the rollout policy, else min(1, 1/x_t).

    x_t = max(w_t D_t / δ, S_t / (δ + δ_b W_{t-1})), which is at most 1 where `cppo` keeps the token, up to rounding.
    Arguments as in `cppo`; the weight is fp32, in [0, 1].
    """
    budget = prefix_budget(divergence, mask, delta_b, delta_b_quantile, delta_b_max_multiple)
    order = random_order(response_ids, mask) if shuffle_weights and response_ids is not None else None
    prefix = prefix_sums(divergence, mask, delta=delta, w_min=w_min, delta_b=budget, order=order)
    limit = delta + _finite(budget) * (prefix.weight_sum() - prefix.weights)  # δ + δ_b W_{t-1}
    excess = torch.maximum(prefix.weighted / delta, prefix.spent() / limit)  # x_t
    gate = excess.clamp(min=1.0).reciprocal().masked_fill(~moves_away(advantages, log_ratio), 1.0) * mask.bool()
    return _verdict(gate, prefix, budget, delta, delta_b)


@torch.no_grad()
def random_order(response_ids: Tensor, mask: Tensor) -> Tensor:
    """Pseudo-random keys that depend on a response's id and a token's position alone, for `position_weights`.

    A hash (the finalizer of SplitMix64) rather than a random generator, so that a response keeps its order over all
    updates of its rollout, in whatever micro-batch it stands.

    Args:
        response_ids: ``(B,)`` int64, another number for each response.
        mask: ``(B, T)``; its shape alone is read.

    Returns:
        ``(B, T)`` fp64.
    """
    position = torch.arange(1, mask.size(-1) + 1, device=mask.device)
    key = response_ids.unsqueeze(-1) + position * -0x61C8864680B583EB
    key = (key ^ (key >> 30)) * -0x40A7B892E31B1A47
    key = (key ^ (key >> 27)) * -0x6B2FB644ECCEEE15
    return (key ^ (key >> 31)).double()


@torch.no_grad()
def dppo_mask(divergence: Tensor, advantages: Tensor, log_ratio: Tensor, mask: Tensor, *, delta: float) -> Tensor:
    """The DPPO mask, Eq. (3): M_t = 1[Â_t (ρ_t - 1) <= 0 or D_t <= δ]. Arguments and result as in `cppo_mask`."""
    return _kept(divergence.float() <= delta, advantages, log_ratio, mask)


@torch.no_grad()
def ratio_cap_weight(log_ratio: Tensor, cap: float) -> Tensor:
    """Detached weight min(1, C / ρ_t) that caps the ratio of a surrogate -ρ_t Â_t at C, gradient included.

    Args:
        log_ratio: ``(B, T)`` log ρ_t.
        cap: C >= 1.

    Returns:
        ``(B, T)`` fp32 in (0, 1].
    """
    return (math.log(cap) - log_ratio.float()).clamp(max=0.0).exp()


@torch.no_grad()
def trm_max_mask(divergence: Tensor, advantages: Tensor, log_ratio: Tensor, mask: Tensor, *, delta: float) -> Tensor:
    """TRM-Max (arXiv 2512.23075): M(y) = 1[max_t D_t <= δ], one verdict for all tokens of a response.

    Tensors as in `cppo_mask`; returns ``(B, T)`` bool, False outside the mask.
    """
    mask = mask.bool()
    return mask & (divergence.float().masked_fill(~mask, 0.0).amax(-1, keepdim=True) <= delta)


@torch.no_grad()
def trm_avg_mask(divergence: Tensor, advantages: Tensor, log_ratio: Tensor, mask: Tensor, *, delta: float) -> Tensor:
    """TRM-Avg (arXiv 2512.23075): M(y) = 1[(1/T) Σ_t D_t <= δ]. Arguments and result as in `trm_max_mask`."""
    mask = mask.bool()
    total = divergence.float().masked_fill(~mask, 0.0).sum(-1, keepdim=True)
    return mask & (total <= delta * mask.sum(-1, keepdim=True))


@torch.no_grad()
def grpo_mask(
    divergence: Tensor, advantages: Tensor, log_ratio: Tensor, mask: Tensor, *, ratio_min: float, ratio_max: float
) -> Verdict:
    """The mask of PPO's and GRPO's clip, Eq. (2): 0 where min(ρ_t Â_t, clip(ρ_t) Â_t) has no gradient.

    That is where Â_t > 0 and ρ_t > 1 + ε_high, or Â_t < 0 and ρ_t < 1 - ε_low.

    Args:
        divergence: not read.
        advantages: ``(B,)``, ``(B, 1)`` or ``(B, T)``.
        log_ratio: ``(B, T)`` log ρ_t.
        mask: ``(B, T)``, 1 on the response's tokens.
        ratio_min: 1 - ε_low, in [0, 1].
        ratio_max: 1 + ε_high, >= 1.

    Returns:
        The mask, and where the ratio is outside the bounds.
    """
    outside = (log_ratio.float() > _log(ratio_max)) | (log_ratio.float() < _log(ratio_min))
    return Verdict(_kept(~outside, advantages, log_ratio, mask), at_bound=outside)


@torch.no_grad()
def cispo_weight(
    divergence: Tensor, advantages: Tensor, log_ratio: Tensor, mask: Tensor, *, ratio_min: float, ratio_max: float
) -> Verdict:
    """CISPO (arXiv 2506.13585): sg[clip(ρ_t)] Â_t log π, as the weight clip(ρ_t) / ρ_t on ρ_t Â_t.

    Arguments as in `grpo_mask`; the weight is positive on the response's tokens.
    """
    log_ratio = log_ratio.float().masked_fill(~mask.bool(), 0.0)
    return _bounded(log_ratio, log_ratio, mask, ratio_min, ratio_max)


@torch.no_grad()
def minpro_weight(
    divergence: Tensor, advantages: Tensor, log_ratio: Tensor, mask: Tensor, *, ratio_min: float, ratio_max: float
) -> Verdict:
    """MinPRO (arXiv 2601.22718): sg[clip(m_t ρ_t)] Â_t log π, as the weight clip(m_t ρ_t) / ρ_t on ρ_t Â_t.

    m_t = min(1, ρ_1, ..., ρ_{t-1}) is the running minimum of the ratios before t; it starts at 1. Arguments and result
    as in `cispo_weight`. m_t falls with the length of the response, so that any lower bound is soon reached by every
    token and the weight a constant: ``Verdict.at_bound`` shows it.
    """
    log_ratio = log_ratio.float().masked_fill(~mask.bool(), 0.0)  # a hole lowers no minimum: m_t <= 1 anyway
    running = torch.cat([torch.zeros_like(log_ratio[..., :1]), log_ratio[..., :-1]], -1).cummin(-1).values
    return _bounded(running + log_ratio, log_ratio, mask, ratio_min, ratio_max)


@torch.no_grad()
def drpo_weight(divergence: Tensor, advantages: Tensor, log_ratio: Tensor, mask: Tensor, *, delta: float) -> Tensor:
    """DRPO (arXiv 2606.09821, Eq. 8 and 9, Table 1): the weight 1 - sign(Â_t (ρ_t - 1)) D_t / δ on ρ_t Â_t.

    It gives the gradient of ``ρ_t Â_t - |Â_t| μ_t (ρ_t - 1)² / (2δ)``, where ``μ_t |ρ_t - 1| = |π_t - μ_t|`` is the
    Binary TV: exact for this D_t alone. Where the step leads away from the rollout policy, the weight falls to 0 at
    D_t = δ and is negative beyond, so that the step leads back; elsewhere it is at least 1. Source, with the default:
    ``_drpo_loss`` of https://github.com/Tencent-Hunyuan/UniRL/blob/main/unirl/algorithms/drpo.py.

    Args:
        divergence: ``(B, T)`` D_t, the Binary TV.
        advantages: as in `cppo_mask`.
        log_ratio: ``(B, T)`` log ρ_t; its sign is read.
        mask: as in `cppo_mask`.
        delta: δ > 0, a probability. At the authors' 12.5, which no D_t reaches, the weight lies in [0.92, 1.08].

    Returns:
        ``(B, T)`` fp32 in [1 - 1/δ, 1 + 1/δ].
    """
    return zero_outside(1 - _away(advantages, log_ratio).sign() * divergence.float() / delta, mask)


@torch.no_grad()
def ipo_mask(divergence: Tensor, advantages: Tensor, log_ratio: Tensor, mask: Tensor, *, delta: float) -> Tensor:
    """The mask of prime-rl's IPO loss: M_t = 1[D_t <= δ], whichever way the step leads; there D_t is the Binary TV.

    Only the mask: the loss's term in (log ρ_t)² is no part of it, nor its cap, ``ratio_cap_weight(log_ratio, 1e4)``.
    Source: https://github.com/PrimeIntellect-ai/prime-rl/pull/3418, and 3586 for δ = 0.3. Arguments and result as in
    `cppo_mask`.
    """
    return mask.bool() & (divergence.float() <= delta)


@torch.no_grad()
def vaco_mask(divergence: Tensor, advantages: Tensor, log_ratio: Tensor, mask: Tensor, *, delta: float) -> Tensor:
    """VACO's filter (arXiv 2603.01365) by response: ``M_t = 1[Â_t (ρ_t - 1) <= 0 or (1/T) Σ_j |ρ_j - 1| <= δ]``.

    The form for language models that an author of the paper gave open-instruct, ``compute_rho_correction`` of
    https://github.com/allenai/open-instruct/pull/1681, as of the current policy; VACO's realignment of the advantages
    is no part of it. No δ is given there.

    Args:
        divergence: not read.
        advantages: as in `cppo_mask`.
        log_ratio: ``(B, T)`` log ρ_t.
        mask: as in `cppo_mask`.
        delta: δ > 0, in units of ``|ρ - 1|``, whose mean under the rollout policy is twice the total variation.

    Returns:
        ``(B, T)`` bool, True = kept; False outside the mask.
    """
    shift = log_ratio.float().masked_fill(~mask.bool(), 0.0).expm1().abs()
    within = shift.sum(-1, keepdim=True) <= delta * mask.sum(-1, keepdim=True)
    return _kept(within, advantages, log_ratio, mask)


@torch.no_grad()
def no_mask(divergence: Tensor, advantages: Tensor, log_ratio: Tensor, mask: Tensor) -> Tensor:
    """No trust region: every token of the response is kept. Arguments and result as in `cppo_mask`."""
    return mask.bool()


class Bound(NamedTuple):
    """What Theorem 1 certifies: J(π) - J(μ) >= L'_μ(π) - ``deduction``."""

    deduction: float
    """in units of the reward"""
    ratio: float
    """of its budget's term to the deduction of one threshold for all positions"""


def improvement_bound(delta_b: float, length: float, xi: float, *, delta: float, w_min: float) -> Bound:
    """The deduction of Theorem 1, Eq. (7), with the initial slack of Proposition 8.

    The deduction is 2ξ T (T-1) δ δ_b / w_min + 4ξ (T-1) δ² / w_min, and the ratio δ_b / (δ w_min) that of its first
    term to the deduction 2ξ T (T-1) δ² of one threshold for all positions (Corollary 7). As J(π) - J(μ) >= -2ξ in any
    case, a deduction above 2ξ certifies nothing.

    Args:
        delta_b: the largest budget in force.
        length: T, tokens of the longest response.
        xi: ξ, the largest absolute reward.
        delta: threshold δ.
        w_min: weight of the last token.
    """
    deduction = 2 * xi * (length - 1) * delta / w_min * (length * delta_b + 2 * delta)
    return Bound(deduction, delta_b / (delta * w_min))


def _away(advantages: Tensor, log_ratio: Tensor) -> Tensor:
    """sign(Â_t) log ρ_t: how far the token has moved along its gradient step. Arguments as in `moves_away`."""
    if advantages.dim() == 1:
        advantages = advantages.unsqueeze(1)
    return advantages.float().sign() * log_ratio.float()


def _kept(within: Tensor, advantages: Tensor, log_ratio: Tensor, mask: Tensor) -> Tensor:
    """The response's tokens that are within the limits, or whose step leads toward the rollout policy."""
    return mask.bool() & (within | ~moves_away(advantages, log_ratio))


def _verdict(weight: Tensor, prefix: Prefix, budget: Tensor, delta: float, delta_b: float) -> Verdict:
    """The verdict of a rule with both limits; an infinite δ switches the budget off too, as δ is its slack."""
    in_force = budget if max(delta, delta_b) < math.inf else None
    return Verdict(weight, prefix.weighted <= delta, in_force, prefix)


def _bounded(log_value: Tensor, log_ratio: Tensor, mask: Tensor, low: float, high: float) -> Verdict:
    """The weight clip(value, low, high) / ρ_t, and where the value is at a bound."""
    clipped = log_value.clamp(_log(low), _log(high))
    return Verdict((clipped - log_ratio).exp() * mask.bool(), at_bound=clipped != log_value)


def _finite(budget: float | Tensor) -> float | Tensor:
    """A budget that multiplies a weight of 0 to 0: inf becomes 1e30, which no response spends."""
    return budget.clamp(max=1e30) if isinstance(budget, Tensor) else min(budget, 1e30)


def _log(ratio: float) -> float:
    return math.log(ratio) if ratio > 0 else -math.inf
