"""What the trust region did in a loss call, as one vector that adds up over micro-batches and processes."""

from bisect import bisect_right
from collections.abc import Callable
from itertools import accumulate

import torch
from torch import Tensor

from cppo_trl.trust_region import moves_away

_BINS_PER_OCTAVE, _LOWEST_OCTAVE, _OCTAVES = 32, -24, 32  # divergences from 2^-24 to 2^8, to 1.1 %
_SUMS = (
    "tokens",
    "divergence",
    "ratio",
    "nonfinite_losses",
    "away_positive",
    "away_negative",
    "masked_positive",
    "masked_negative",
    "masked_by_threshold",
    "positive",
    "negative",
    "budgeted",
    "delta_b",
    "listed",
    "topk_mass",
)


@torch.no_grad()
def loss_record(
    divergence: Tensor,
    advantages: Tensor,
    log_ratio: Tensor,
    mask: Tensor,
    keep: Tensor,
    over_threshold: Tensor,
    delta_b: Tensor | None,
    topk_mass: Tensor | None = None,
) -> Tensor:
    """Sums and maxima of one loss call, without waiting for the device.

    Args:
        divergence: ``(B, T)`` D_t.
        advantages: ``(B, 1)`` or ``(B, T)``.
        log_ratio: ``(B, T)`` log ρ_t.
        mask: ``(B, T)``, 1 on the responses' tokens.
        keep: ``(B, T)`` bool, the rule's mask.
        over_threshold: ``(B, T)`` bool, w_t D_t > δ.
        delta_b: ``(B, 1)`` the budget in force, or None where there is none.
        topk_mass: ``(B, T)`` rollout probability of the tokens that a Top-K estimator lists, or None.

    Returns:
        A vector: the sums named in ``_SUMS``, a histogram of log2 D_t over tokens, then max D_t and max ρ_t.
    """
    valid = mask.bool()
    divergence = divergence.float().masked_fill(~valid, 0.0)
    ratio = log_ratio.float().exp().masked_fill(~valid, 0.0)
    masked, away = valid & ~keep, moves_away(advantages, log_ratio)
    positive, negative = valid & (advantages > 0), valid & (advantages < 0)
    budgeted = valid.any(-1, keepdim=True) & (delta_b is not None)
    budget = budgeted if delta_b is None else delta_b.where(budgeted, 0.0)
    listed = valid & (topk_mass is not None)
    sums = (
        valid,
        divergence,
        ratio,
        valid.new_zeros(()),  # counted by count_nonfinite_loss
        away & positive,
        away & negative,
        masked & positive,
        masked & negative,
        masked & over_threshold,
        positive,
        negative,
        budgeted,
        budget,
        listed,
        listed if topk_mass is None else topk_mass.where(listed, 0.0),
    )
    octave = divergence.clamp(min=2.0**_LOWEST_OCTAVE).log2() - _LOWEST_OCTAVE
    index = (octave * _BINS_PER_OCTAVE).long().clamp(0, _OCTAVES * _BINS_PER_OCTAVE - 1)
    histogram = divergence.new_zeros(_OCTAVES * _BINS_PER_OCTAVE)
    histogram.scatter_add_(0, index.flatten(), valid.flatten().float())
    return torch.cat(
        [torch.stack([x.sum().float() for x in sums]), histogram, divergence.max()[None], ratio.max()[None]]
    )


def count_nonfinite_loss(record: Tensor, loss: Tensor) -> None:
    """Count a loss that is NaN or infinite in a record, in place and without waiting for the device."""
    record[_SUMS.index("nonfinite_losses")] += ~loss.detach().isfinite()


def add_records(total: Tensor | None, record: Tensor) -> Tensor:
    """The record of two disjoint sets of tokens: sums add, the two maxima at the end do not."""
    if total is None:
        return record
    return torch.cat([total[:-2] + record[:-2], total[-2:].maximum(record[-2:])])


def summarize(record: Tensor, gather: Callable[[Tensor], Tensor]) -> dict[str, float]:
    """Named scalars over all processes: one collective, one wait for the device.

    Shares are over tokens with non-zero advantage. A scalar with nothing to average over is left out.

    Args:
        record: this process's record, as from `loss_record` and `add_records`.
        gather: concatenates a tensor over processes along dimension 0, as ``Accelerator.gather``.
    """
    per_process = gather(record.unsqueeze(0))
    total = torch.cat([per_process[:, :-2].sum(0), per_process[:, -2:].amax(0)]).tolist()
    n = dict(zip(_SUMS, total, strict=False))
    masked = n["masked_positive"] + n["masked_negative"]
    active = n["positive"] + n["negative"]
    away = n["away_positive"] + n["away_negative"]
    fractions = {
        "masked": (masked, active),
        "masked_by_threshold": (n["masked_by_threshold"], active),
        "masked_by_budget": (masked - n["masked_by_threshold"], active),
        "masked_positive": (n["masked_positive"], n["positive"]),
        "masked_negative": (n["masked_negative"], n["negative"]),
        "toward_rollout": (active - away, active),
        "delta_b": (n["delta_b"], n["budgeted"]),
        "topk_mass": (n["topk_mass"], n["listed"]),
        "divergence/mean": (n["divergence"], n["tokens"]),
        "ratio/mean": (n["ratio"], n["tokens"]),
    }
    scalars = {name: part / whole for name, (part, whole) in fractions.items() if whole > 0}
    if n["nonfinite_losses"] > 0:
        scalars["nonfinite_losses"] = n["nonfinite_losses"]
    if n["tokens"] > 0:
        scalars["divergence/p90"] = _histogram_quantile(total[len(_SUMS) : -2], 0.9)
        scalars["divergence/max"], scalars["ratio/max"] = total[-2:]
    return {f"cppo/{name}": value for name, value in scalars.items()}


def _histogram_quantile(counts: list[float], quantile: float) -> float:
    """Quantile of D_t from the histogram of log2 D_t: the middle of its bin, 0 for the lowest bin."""
    reached = bisect_right(list(accumulate(counts)), quantile * (sum(counts) - 1))
    return 2.0 ** (_LOWEST_OCTAVE + (reached + 0.5) / _BINS_PER_OCTAVE) if reached else 0.0
