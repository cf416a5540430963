"""The trust-region rules: which tokens of a rollout may still move the policy.

Pure functions on tensors of shape ``(B, T)``: B responses, T token positions, right- or left-padded, with holes
where the environment wrote a token. ``mask`` is 1 (or True) on the response's own tokens; everything outside it
carries no weight, no divergence and no position. All arithmetic is fp32 and without a gradient, each row stands
for itself, and nothing waits for the device. Equation numbers are those of CPPO (arXiv 2606.10968).
"""

import math

import torch
from torch import Tensor


@torch.no_grad()
def position_weights(mask: Tensor, w_min: float) -> Tensor:
    """Position weights, Eq. (9): w_t = 1 - (1 - w_min) (t - 1) / (T - 1), t = 1..T.

    T is the response's own length, counted over the mask. A single token weighs 1.

    Args:
        mask: ``(B, T)``, 1 on the response's tokens.
        w_min: weight of the last token, in (0, 1]. 1 switches the position weight off.

    Returns:
        ``(B, T)`` fp32, falling from 1 to ``w_min`` over each response, 0 outside the mask.
    """
    mask = mask.float()
    position = mask.cumsum(-1) - 1  # t - 1
    last = (mask.sum(-1, keepdim=True) - 1).clamp(min=1)  # T - 1; 0/0 for a single token is 0
    return (1 - (1 - w_min) * position / last) * mask


@torch.no_grad()
def masked_quantile(values: Tensor, mask: Tensor, quantile: float) -> Tensor:
    """Quantile of each row over its masked-in values, interpolated as ``torch.quantile`` does; NaN for empty rows.

    Unlike ``torch.quantile`` it takes rows of different length and has no limit on the number of elements.

    Args:
        values: ``(B, T)``.
        mask: ``(B, T)``, 1 on the values that count.
        quantile: in [0, 1].

    Returns:
        ``(B, 1)`` fp32.
    """
    mask = mask.bool()
    ordered = values.float().masked_fill(~mask, torch.inf).sort(-1).values
    count = mask.sum(-1, keepdim=True)
    rank = quantile * (count - 1).clamp(min=0).float()
    low, high = ordered.gather(-1, rank.floor().long()), ordered.gather(-1, rank.ceil().long())
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
    if advantages.dim() == 1:
        advantages = advantages.unsqueeze(1)
    return advantages.float().sign() * log_ratio.float().sign() > 0


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
) -> Tensor:
    """The CPPO mask, Eq. (8) to (10): M_t = 1[Â_t (ρ_t - 1) <= 0 or I_t].

    I_t holds where w_t D_t <= δ and S_t <= δ + δ_b W_{t-1}, with S_t = Σ_{j<=t} w_j D_j and W_t = Σ_{j<=t} w_j.
    The sums run over every token of the response, kept or masked.

    Args:
        divergence: ``(B, T)`` D_t >= 0.
        advantages: ``(B,)``, ``(B, 1)`` or ``(B, T)``.
        log_ratio: ``(B, T)`` log ρ_t.
        mask: ``(B, T)``, 1 on the response's tokens.
        delta: threshold δ; inf switches both limits off, as δ is also the slack of the budget.
        w_min: weight of the last token, in (0, 1]; 1 switches the position weight off.
        delta_b: budget δ_b, a float or ``(B, 1)`` as from `prefix_budget`; inf switches the budget off.

    Returns:
        ``(B, T)`` bool, True = kept; False outside the mask.
    """
    mask = mask.bool()
    weights = position_weights(mask, w_min)
    weighted = weights * divergence.float().masked_fill(~mask, 0.0)  # w_t D_t
    prefix_divergence = weighted.cumsum(-1)  # S_t
    prefix_weight = weights.cumsum(-1).roll(1, -1)  # W_{t-1}
    prefix_weight[..., :1] = 0.0
    allowance = (delta_b * prefix_weight).nan_to_num(nan=0.0, posinf=torch.inf)  # inf * W_0 is 0: no prefix yet
    inside = (weighted <= delta) & (prefix_divergence <= delta + allowance)
    return mask & (inside | ~moves_away(advantages, log_ratio))


@torch.no_grad()
def dppo_mask(divergence: Tensor, advantages: Tensor, log_ratio: Tensor, mask: Tensor, *, delta: float) -> Tensor:
    """The DPPO mask, Eq. (3): M_t = 1[Â_t (ρ_t - 1) <= 0 or D_t <= δ]. Arguments and result as in `cppo_mask`."""
    return mask.bool() & ((divergence.float() <= delta) | ~moves_away(advantages, log_ratio))


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
