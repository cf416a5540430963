"""What the trust region did in a loss call, as one vector that adds up over micro-batches and processes."""

from bisect import bisect_right
from collections.abc import Callable
from itertools import accumulate
from typing import NamedTuple

import torch
from torch import Tensor

from cppo_trl.trust_region import Bound, Verdict, moves_away

POSITION_BINS = 20
"""Equal parts of a response, first to last token, that `position_profile` tells apart."""

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
    "bounded",
    "at_bound",
    "listed",
    "topk_mass",
    "weight",
    "theorem_prefixes",
    "theorem_responses",
    "unmoved",
    "unmoved_divergence",
    "unmoved_log_ratio",
)
_MAXIMA = ("divergence", "ratio", "delta_b", "length", "advantage")
_PROFILE_START = len(_SUMS) + _OCTAVES * _BINS_PER_OCTAVE
_PROFILE = ("tokens", "divergence", "active", "masked_by_threshold", "masked_by_budget", "prefix_average")


class Fates(NamedTuple):
    """What became of each token; ``(B, T)`` bool, False outside the mask and where the advantage is zero."""

    active: Tensor
    """with non-zero advantage"""
    away: Tensor
    """of these, the step leads away from the rollout policy"""
    by_threshold: Tensor
    """masked, and not by the budget"""
    by_budget: Tensor
    """masked although within the threshold"""


@torch.no_grad()
def fates(advantages: Tensor, log_ratio: Tensor, mask: Tensor, verdict: Verdict) -> Fates:
    """The fate of each token under a rule's verdict. Arguments as in `loss_record`."""
    active = mask.bool() & (advantages != 0)
    masked = active & (verdict.weight == 0)
    by_budget = masked & (verdict.within_threshold if verdict.within_threshold is not None else False)
    return Fates(active, active & moves_away(advantages, log_ratio), masked & ~by_budget, by_budget)


@torch.no_grad()
def loss_record(
    divergence: Tensor,
    advantages: Tensor,
    log_ratio: Tensor,
    mask: Tensor,
    verdict: Verdict,
    topk_mass: Tensor | None = None,
    weights_unmoved: bool = False,
) -> Tensor:
    """Sums and maxima of one loss call, without waiting for the device.

    Args:
        divergence: ``(B, T)`` D_t.
        advantages: ``(B, 1)`` or ``(B, T)``.
        log_ratio: ``(B, T)`` log ρ_t.
        mask: ``(B, T)``, 1 on the responses' tokens.
        verdict: the rule's.
        topk_mass: ``(B, T)`` rollout probability of the tokens that a Top-K estimator lists, or None.
        weights_unmoved: whether the policy still has the weights that the responses were sampled with.

    Returns:
        The sums named in ``_SUMS``, a histogram of log2 D_t over tokens, the sums named in ``_PROFILE`` for each of
        `POSITION_BINS`, then the maxima named in ``_MAXIMA``, as one vector.
    """
    valid = mask.bool()
    divergence = divergence.float().where(valid, 0.0)
    ratio = log_ratio.float().exp().where(valid, 0.0)
    position = valid.float().cumsum(-1)
    fate = fates(advantages, log_ratio, mask, verdict)
    sums = _counts(valid, advantages, fate) | _rule_sums(valid, position, fate.active, verdict)
    sums |= {"divergence": divergence.sum(), "ratio": ratio.sum()}
    if topk_mass is not None:
        sums |= {"listed": sums["tokens"], "topk_mass": topk_mass.where(valid, 0.0).sum()}
    if weights_unmoved:
        sums |= {"unmoved": sums["tokens"], "unmoved_divergence": sums["divergence"]}
        sums["unmoved_log_ratio"] = log_ratio.abs().where(valid, 0.0).sum()
    zero = divergence.new_zeros(())  # "nonfinite_losses" waits for count_nonfinite_loss
    budgeted = None if verdict.delta_b is None else verdict.prefix
    average = zero if budgeted is None else budgeted.average().where(valid, 0.0)
    rows = (divergence, fate.active, fate.by_threshold, fate.by_budget, average)
    maxima = {
        "divergence": divergence.max(),
        "ratio": ratio.max(),
        "delta_b": zero if verdict.delta_b is None else verdict.delta_b.max(),
        "length": position.max(),
        "advantage": advantages.abs().where(valid, 0.0).max(),
    }
    return torch.cat(
        [
            torch.stack([sums.get(name, zero).float() for name in _SUMS]),
            _histogram(divergence, valid),
            _profile(position, *rows).flatten(),
            torch.stack([maxima[name].float() for name in _MAXIMA]),
        ]
    )


def _counts(valid: Tensor, advantages: Tensor, fate: Fates) -> dict[str, Tensor]:
    """Tokens by advantage and fate."""
    positive, negative = valid & (advantages > 0), valid & (advantages < 0)
    masked = fate.by_threshold | fate.by_budget
    counted = {
        "tokens": valid,
        "positive": positive,
        "negative": negative,
        "away_positive": fate.away & positive,
        "away_negative": fate.away & negative,
        "masked_positive": masked & positive,
        "masked_negative": masked & negative,
        "masked_by_threshold": fate.by_threshold,
    }
    return {name: tokens.count_nonzero() for name, tokens in counted.items()}


def _rule_sums(valid: Tensor, position: Tensor, active: Tensor, verdict: Verdict) -> dict[str, Tensor]:
    """What the rule itself did: weights, budgets, and where Theorem 1's constraints hold.

    They are Eq. (5): w_t D_t <= δ, and S_t <= δ_b W_t before the last token.
    """
    sums = {"weight": verdict.weight.where(active, 0.0).sum()}
    if verdict.at_bound is not None:
        sums |= {"bounded": active.count_nonzero(), "at_bound": (verdict.at_bound & active).count_nonzero()}
    if verdict.prefix is None or verdict.within_threshold is None or verdict.delta_b is None:
        return sums
    answered = valid.any(-1, keepdim=True)
    held = verdict.within_threshold & ((verdict.prefix.left >= 0) | (position == position[..., -1:]))
    return sums | {
        "budgeted": answered.count_nonzero(),
        "delta_b": verdict.delta_b.where(answered, 0.0).sum(),
        "theorem_prefixes": (held & valid).count_nonzero(),
        "theorem_responses": ((held | ~valid).all(-1, keepdim=True) & answered).count_nonzero(),
    }


def _histogram(divergence: Tensor, valid: Tensor) -> Tensor:
    """Tokens by log2 D_t."""
    octave = divergence.nan_to_num().clamp_(min=2.0**_LOWEST_OCTAVE).log2_().sub_(_LOWEST_OCTAVE)
    index = octave.mul_(_BINS_PER_OCTAVE).clamp_(max=_OCTAVES * _BINS_PER_OCTAVE - 1).long()
    histogram = divergence.new_zeros(_OCTAVES * _BINS_PER_OCTAVE)
    return histogram.scatter_add_(0, index.flatten(), valid.flatten().float())


def count_nonfinite_loss(record: Tensor, loss: Tensor) -> None:
    """Count a loss that is NaN or infinite in a record, in place and without waiting for the device."""
    record[_SUMS.index("nonfinite_losses")] += ~loss.detach().isfinite()


def _profile(position: Tensor, *rows: Tensor) -> Tensor:
    """Sums of tokens and of each row, ``(B, T)``, over each of `POSITION_BINS` parts of the responses.

    ``position`` is t on the responses' tokens and stays there behind them, so each part is a stretch of its row, and
    its sum a difference of two prefix sums.
    """
    length = position[..., -1:]
    part = torch.arange(1, POSITION_BINS + 1, device=position.device)
    tokens = (part * length / POSITION_BINS).ceil()  # of this part and those before it
    ends = torch.searchsorted(position, tokens)
    sums = [row.expand_as(position).cumsum(-1, dtype=torch.float32).gather(-1, ends) for row in rows]
    before = position.new_zeros(len(rows) + 1, len(position), 1)
    return torch.stack([tokens, *sums]).diff(dim=-1, prepend=before).sum(1)


def add_records(total: Tensor | None, record: Tensor) -> Tensor:
    """The record of two disjoint sets of tokens: sums add, the maxima at the end do not."""
    if total is None:
        return record
    sums, maxima = slice(-len(_MAXIMA)), slice(-len(_MAXIMA), None)
    return torch.cat([total[sums] + record[sums], total[maxima].maximum(record[maxima])])


def total_over_processes(record: Tensor, gather: Callable[[Tensor], Tensor]) -> list[float]:
    """The record of all processes: one collective, one wait for the device.

    Args:
        record: this process's record, as from `loss_record` and `add_records`.
        gather: concatenates a tensor over processes along dimension 0, as ``Accelerator.gather``.
    """
    per_process = gather(record.unsqueeze(0))
    sums, maxima = per_process.tensor_split([-len(_MAXIMA)], dim=-1)
    return torch.cat([sums.sum(0), maxima.amax(0)]).tolist()


def summarize(
    total: list[float], bound: Callable[[float, float, float], Bound | None] | None = None
) -> dict[str, float]:
    """Named scalars of a record. Shares are over tokens with non-zero advantage.

    A scalar with nothing to average over is left out.

    Args:
        total: as from `total_over_processes`.
        bound: Theorem 1 for a budget, a length T and a largest absolute reward ξ, as `CPPOConfig.theorem_bound`; None
            to leave the theorem out. ξ is the largest absolute advantage: the surrogate's reward is Â.
    """
    n = dict(zip(_SUMS, total, strict=False))
    largest = dict(zip(_MAXIMA, total[-len(_MAXIMA) :], strict=True))
    masked = n["masked_positive"] + n["masked_negative"]
    active = n["positive"] + n["negative"]
    away = n["away_positive"] + n["away_negative"]
    fractions = {
        "masked": (masked, active),
        "masked_by_threshold": (n["masked_by_threshold"], active),
        "masked_by_budget": (masked - n["masked_by_threshold"], active),
        "masked_positive": (n["masked_positive"], n["positive"]),
        "masked_negative": (n["masked_negative"], n["negative"]),
        "weight": (n["weight"], active),
        "toward_rollout": (active - away, active),
        "at_bound": (n["at_bound"], n["bounded"]),
        "delta_b": (n["delta_b"], n["budgeted"]),
        "topk_mass": (n["topk_mass"], n["listed"]),
        "divergence/mean": (n["divergence"], n["tokens"]),
        "ratio/mean": (n["ratio"], n["tokens"]),
        "rollout_mismatch": (n["unmoved_divergence"], n["unmoved"]),
        "rollout_mismatch_nats": (n["unmoved_log_ratio"], n["unmoved"]),
    }
    certified = bound(largest["delta_b"], largest["length"], largest["advantage"]) if bound else None
    if certified is not None:
        fractions["theorem/prefixes"] = (n["theorem_prefixes"], n["tokens"])
        fractions["theorem/responses"] = (n["theorem_responses"], n["budgeted"])
        fractions["theorem/deduction"] = (certified.deduction, float(n["budgeted"] > 0))
        fractions["theorem/bound_ratio"] = (certified.ratio, float(n["budgeted"] > 0))
    scalars = {name: part / whole for name, (part, whole) in fractions.items() if whole > 0}
    if n["nonfinite_losses"] > 0:
        scalars["nonfinite_losses"] = n["nonfinite_losses"]
    if n["tokens"] > 0:
        scalars["divergence/p90"] = _histogram_quantile(total[len(_SUMS) : _PROFILE_START], 0.9)
        scalars |= {f"{name}/max": largest[name] for name in ("divergence", "ratio")}
    return {f"cppo/{name}": value for name, value in scalars.items()}


def position_profile(total: list[float]) -> dict[str, list[float]]:
    """Sums over the tokens of each twentieth of the responses, by relative position.

    Args:
        total: as from `total_over_processes`.

    Returns:
        `POSITION_BINS` values each of ``tokens``, ``divergence`` (sum of D_t), ``active`` (tokens with non-zero
        advantage), ``masked_by_threshold`` and ``masked_by_budget`` (of the active ones), and ``prefix_average`` (sum
        of S_t / W_t; 0 without a budget).
    """
    rows = total[_PROFILE_START : -len(_MAXIMA)]
    return {name: rows[i * POSITION_BINS : (i + 1) * POSITION_BINS] for i, name in enumerate(_PROFILE)}


def _histogram_quantile(counts: list[float], quantile: float) -> float:
    """Quantile of D_t from the histogram of log2 D_t: the middle of its bin, 0 for the lowest bin."""
    reached = bisect_right(list(accumulate(counts)), quantile * (sum(counts) - 1))
    return 2.0 ** (_LOWEST_OCTAVE + (reached + 0.5) / _BINS_PER_OCTAVE) if reached else 0.0
