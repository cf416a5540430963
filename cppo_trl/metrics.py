"""What the trust region did in a loss call, as one vector that adds up over micro-batches and processes."""

import math
from bisect import bisect_right
from collections.abc import Callable
from itertools import accumulate
from typing import NamedTuple

import torch
from torch import Tensor

from cppo_trl.trust_region import Bound, Prefix, Verdict, zero_outside

POSITION_BINS = 20
"""Equal parts of a response, first to last token, that `position_profile` tells apart."""

_BLOCK = 64  # tokens that a prefix sum adds at once
_MANTISSA, _LOWEST_OCTAVE, _OCTAVES = 6, -24, 32  # bits by which a divergence of 2^-24 to 2^8 is told apart: to 0.8 %
_SUMS = (
    "ratio nonfinite_losses away positive masked_positive budgeted delta_b bounded at_bound listed topk_mass weight "
    "theorem_prefixes theorem_responses unmoved unmoved_divergence unmoved_log_ratio"
).split()
_MAXIMA = ("divergence", "ratio", "delta_b", "length", "advantage")
_PROFILE_START = len(_SUMS) + (_OCTAVES << _MANTISSA)
_PROFILE = ("tokens", "divergence", "active", "masked_by_threshold", "masked_by_budget", "prefix_average")


class Fates(NamedTuple):
    """What became of each token; ``(B, T)`` fp32, 1 or 0, and 0 outside the mask and where the advantage is zero."""

    active: Tensor
    """with non-zero advantage"""
    away: Tensor
    """of these, the step leads away from the rollout policy, as in `trust_region.moves_away`"""
    by_threshold: Tensor
    """masked, and not by the budget"""
    by_budget: Tensor
    """masked although within the threshold"""


@torch.no_grad()
def fates(advantages: Tensor, log_ratio: Tensor, mask: Tensor, verdict: Verdict) -> Fates:
    """The fate of each token under a rule's verdict. Arguments as in `loss_record`."""
    sign = advantages.float().sign() * mask.float()
    active = sign.abs()
    masked = torch.eq(verdict.weight, 0, out=torch.empty_like(sign)).mul_(active)  # fp32: bool is slow on a CPU
    within = verdict.within_threshold
    by_budget = torch.zeros_like(sign) if within is None else _to_float(within).mul_(masked)
    return Fates(active, sign.mul_(log_ratio).gt_(0), masked.sub_(by_budget), by_budget)


def _to_float(flags: Tensor) -> Tensor:
    """Bool as fp32, from bytes: torch converts bool itself ten times as slowly on a CPU."""
    return flags.view(torch.uint8).float()


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
        verdict: verdict of the rule.
        topk_mass: ``(B, T)`` rollout probability of the tokens that a Top-K estimator lists, or None.
        weights_unmoved: whether the policy still has the weights that the responses were sampled with.

    Returns:
        The sums named in ``_SUMS``, a histogram of D_t, the sums named in ``_PROFILE`` for each of
        `POSITION_BINS`, then the maxima named in ``_MAXIMA``, as one vector.
    """
    own = mask.int()
    tokens, (parts, ends) = own.float(), _parts(own.cumsum(-1, dtype=torch.int32))
    length = parts[:, -1:]
    ratio = (log_ratio.float() * math.log2(math.e)).exp2_()  # exp takes three times as long on a CPU
    ratio.view(torch.int32).mul_(own)  # as `zero_outside`, in place
    sums, maxima = {"ratio": ratio.sum()}, {"ratio": ratio.amax(), "length": length.amax()}
    histogram = _histogram(divergence.float(), tokens)
    divergence = zero_outside(divergence, own)
    fate = fates(advantages, log_ratio, tokens, verdict)
    positive = advantages > 0
    sums |= {"away": fate.away.sum(), "weight": _dot(verdict.weight.float(), fate.active)}
    sums["positive"] = _count(fate.active, positive)
    sums["masked_positive"] = _count(fate.by_threshold, positive) + _count(fate.by_budget, positive)
    if verdict.at_bound is not None:
        sums |= {"bounded": fate.active.sum(), "at_bound": _dot(_to_float(verdict.at_bound), fate.active)}
    if topk_mass is not None:
        sums |= {"listed": length.sum(), "topk_mass": zero_outside(topk_mass, own).sum()}
    if weights_unmoved:
        sums |= {"unmoved": length.sum(), "unmoved_divergence": divergence.sum()}
        sums["unmoved_log_ratio"] = zero_outside(log_ratio, own).abs().sum()
    rows = [divergence, fate.active, fate.by_threshold, fate.by_budget]
    if verdict.prefix is not None and verdict.within_threshold is not None and verdict.delta_b is not None:
        sums |= _theorem_sums(tokens, length, ends[:, -1:], verdict.prefix, verdict.within_threshold, verdict.delta_b)
        rows.append(verdict.prefix.average(verdict.delta_b, tokens))
        maxima["delta_b"] = verdict.delta_b.amax()
    answered = length > 0 if advantages.size(-1) == 1 else own > 0
    maxima |= {"divergence": divergence.amax(), "advantage": advantages.abs().where(answered, 0.0).amax()}
    zero = divergence.new_zeros(())  # "nonfinite_losses" waits for count_nonfinite_loss
    return torch.cat(
        [
            torch.stack([sums.get(name, zero).float() for name in _SUMS]),
            histogram,
            _profile(parts, ends, rows).flatten(),
            torch.stack([maxima.get(name, zero).float() for name in _MAXIMA]),
        ]
    )


def _dot(a: Tensor, b: Tensor) -> Tensor:
    """The sum of the products of two ``(B, T)`` fp32 tensors: of zeros and ones, an exact count up to 2^24."""
    return a.flatten().dot(b.flatten())


def _count(tokens: Tensor, among: Tensor) -> Tensor:
    """The sum over ``(B, T)`` tokens among those marked by token, ``(B, T)``, or by response, ``(B, 1)``."""
    return ((tokens if among.size(-1) > 1 else tokens.sum(-1, keepdim=True)) * among).sum()


def _theorem_sums(
    tokens: Tensor, length: Tensor, last: Tensor, prefix: Prefix, within: Tensor, delta_b: Tensor
) -> dict[str, Tensor]:
    """Budgets, and where Theorem 1's Eq. (5) holds: w_t D_t <= δ, and S_t <= δ_b W_t before the last token.

    ``length`` and ``last``, ``(B, 1)``, are the number of a response's tokens and the place of the last one.
    """
    held = (prefix.left >= 0).scatter_(-1, last, True).logical_and_(within)
    prefixes = _to_float(held).mul_(tokens).sum(-1, keepdim=True)
    answered = length > 0
    return {
        "budgeted": answered.sum(),
        "delta_b": (delta_b * answered).sum(),
        "theorem_prefixes": prefixes.sum(),
        "theorem_responses": ((prefixes == length) & answered).sum(),
    }


def _histogram(divergence: Tensor, tokens: Tensor) -> Tensor:
    """Tokens by the leading bits of D_t: its octave, and the part of the octave."""
    lowest, end = (127 + _LOWEST_OCTAVE) << _MANTISSA, (127 + _LOWEST_OCTAVE + _OCTAVES) << _MANTISSA
    bits = (divergence.view(torch.int32) >> (23 - _MANTISSA)).clamp_(lowest, end - 1)
    return divergence.new_zeros(end).index_add_(0, bits.flatten(), tokens.flatten())[lowest:]


def count_nonfinite_loss(record: Tensor, loss: Tensor) -> None:
    """Count a loss that is NaN or infinite in a record, in place and without waiting for the device."""
    record[_SUMS.index("nonfinite_losses")] += ~loss.detach().isfinite()


def _parts(position: Tensor) -> tuple[Tensor, Tensor]:
    """For each of `POSITION_BINS` parts of the responses the tokens up to its end, and the place of its last one.

    ``position``, ``(B, T)`` int32, is t on the responses' tokens and stays there behind them. Both results are int64,
    ``(B, POSITION_BINS)``.
    """
    part = torch.arange(1, POSITION_BINS + 1, device=position.device)
    tokens = -(part * -position[:, -1:] // POSITION_BINS)  # rounded up
    return tokens, torch.searchsorted(position, tokens.int())


def _profile(parts: Tensor, ends: Tensor, rows: list[Tensor]) -> Tensor:
    """Sums named in ``_PROFILE`` over each part of the responses; ``parts`` and ``ends`` as from `_parts`.

    Each part is a stretch of its row, and its sum a difference of two prefix sums, which are taken of whole blocks
    first: far fewer than a prefix sum for every token.
    """
    blocks = ends // _BLOCK
    at = blocks.unsqueeze(-1) * _BLOCK + torch.arange(_BLOCK, device=ends.device)
    inside = at <= ends.unsqueeze(-1)
    at = at.clamp_(max=rows[0].size(-1) - 1).flatten(1)
    count = rows[0].size(-1) // _BLOCK
    sums = [parts.float(), *(torch.zeros_like(parts, dtype=torch.float32) for _ in _PROFILE[1:])]
    for i, row in enumerate(rows, 1):
        whole = row[:, : count * _BLOCK].unflatten(-1, (count, _BLOCK)).sum(-1).cumsum(-1)
        rest = row.gather(-1, at).view_as(inside).where(inside, 0.0).sum(-1)
        sums[i] = rest + torch.nn.functional.pad(whole, (1, 0)).gather(-1, blocks)
    return torch.stack(sums).diff(dim=-1, prepend=sums[0].new_zeros(len(sums), len(ends), 1)).sum(1)


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
        total: result of `total_over_processes`.
        bound: Theorem 1 for a budget, a length T and a largest absolute reward ξ, as `CPPOConfig.theorem_bound`; None
            to leave the theorem out. ξ is the largest absolute advantage: the surrogate's reward is Â.
    """
    n = dict(zip(_SUMS, total, strict=False)) | {name: sum(parts) for name, parts in position_profile(total).items()}
    largest = dict(zip(_MAXIMA, total[-len(_MAXIMA) :], strict=True))
    active, masked = n["active"], n["masked_by_threshold"] + n["masked_by_budget"]
    fractions = {
        "masked": (masked, active),
        "masked_by_threshold": (n["masked_by_threshold"], active),
        "masked_by_budget": (n["masked_by_budget"], active),
        "masked_positive": (n["masked_positive"], n["positive"]),
        "masked_negative": (masked - n["masked_positive"], active - n["positive"]),
        "weight": (n["weight"], active),
        "toward_rollout": (active - n["away"], active),
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
        fractions["theorem/range"] = (2 * largest["advantage"], float(n["budgeted"] > 0))  # of J
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
        total: result of `total_over_processes`.

    Returns:
        `POSITION_BINS` values each of ``tokens``, ``divergence`` (sum of D_t), ``active`` (tokens with non-zero
        advantage), ``masked_by_threshold`` and ``masked_by_budget`` (of the active ones), and ``prefix_average`` (sum
        of S_t / W_t; 0 without a budget).
    """
    rows = total[_PROFILE_START : -len(_MAXIMA)]
    return {name: rows[i * POSITION_BINS : (i + 1) * POSITION_BINS] for i, name in enumerate(_PROFILE)}


def _histogram_quantile(counts: list[float], quantile: float) -> float:
    """Quantile of D_t from its histogram: the middle of its bin, 0 for the lowest bin."""
    reached = bisect_right(list(accumulate(counts)), quantile * (sum(counts) - 1))
    octave, part = divmod(reached, 1 << _MANTISSA)
    return 2.0 ** (_LOWEST_OCTAVE + octave) * (1 + (part + 0.5) / (1 << _MANTISSA)) if reached else 0.0
