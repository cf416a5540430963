"""Samples on their way from the rollout queue to the loss: how old they are, and their rows."""

import random
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

_STAMP = "sampled_at"


def seeded(loop: Callable[..., Any], seed: int, **kwargs: Any) -> Any:
    """TRL's loop in the process of its rollout worker, which draws a seed for each request from Python's generator."""
    random.seed(f"{seed} {kwargs['dataset_start_index']}")  # a resumed run draws others
    return loop(**kwargs)


class StampedQueue:
    """TRL's rollout queue; it stamps each sample with the update whose weights sampled it.

    TRL drops samples that are too old; what is lost of long responses by that is logged.

    Args:
        queue: filled by the rollout worker.
        updates_at: the number of updates made when a version of the weights was published.
        too_old: whether TRL will drop a sample of a version.
        metrics: the trainer's metrics, by name.
    """

    def __init__(
        self,
        queue: Any,
        updates_at: Callable[[int], int],
        too_old: Callable[[int], bool],
        metrics: dict[str, list[Any]],
    ) -> None:
        self._queue, self._updates_at, self._too_old, self._metrics = queue, updates_at, too_old, metrics

    def get(self, *args: Any, **kwargs: Any) -> Any:
        """The next sample."""
        sample = self._queue.get(*args, **kwargs)
        fate = "dropped_stale" if self._too_old(sample.model_version) else "kept"
        self._metrics[f"sample/{fate}_length"].append(float(sample.completion_mask.sum()))
        sample.metrics = {**sample.metrics, _STAMP: self._updates_at(sample.model_version)}
        return sample

    def qsize(self) -> int:
        """Samples that wait."""
        return self._queue.qsize()


class StampedCollator:
    """TRL's collator; it adds ``sampled_at``, ``(processes, S)`` int64, of the samples of each row, padded with -1.

    Args:
        collate: TRL's ``DataCollatorForRollout``.
    """

    def __init__(self, collate: Callable[[list[Any]], dict[str, Any]]) -> None:
        self.collate = collate

    def __call__(self, examples: list[Any]) -> dict[str, Any]:
        """Collate a micro-batch: one list of rows, one row for each process."""
        (rows,) = examples
        stamps = [torch.tensor([sample["metrics"].pop(_STAMP) for sample in row.samples]) for row in rows]
        batch = self.collate(examples)
        batch[_STAMP] = torch.nn.utils.rnn.pad_sequence(stamps, batch_first=True, padding_value=-1)
        return batch


class Rows:
    """The flat loss terms of a packed row as ``(B, T)``, a row for each sample, padded on the right, and back.

    Args:
        segment_id: ``(M,)`` int64, the sample of each term; a sample's terms are in a stretch, in order.
    """

    def __init__(self, segment_id: Tensor) -> None:
        lengths = torch.bincount(segment_id)
        starts = lengths.cumsum(0) - lengths
        position = torch.arange(len(segment_id), device=segment_id.device) - starts[segment_id]
        self._place = segment_id, position
        self._shape = len(lengths), int(lengths.max())  # waits for the device, as TRL does at the same place

    def pad(self, terms: Tensor) -> Tensor:
        """``(M,)`` to ``(B, T)``; 0 behind a sample's terms."""
        padded = terms.new_zeros(self._shape)
        padded[self._place] = terms
        return padded

    def flat(self, padded: Tensor) -> Tensor:
        """``(B, T)`` to ``(M,)``."""
        return padded[self._place]


def by_staleness(
    staleness: Tensor, bins: int, divergence: Tensor, log_ratio: Tensor, mask: Tensor, active: Tensor, masked: Tensor
) -> Tensor:
    """Sums over tokens by how many updates lie between sampling and use.

    Args:
        staleness: ``(B,)`` int64.
        bins: the last one takes all that is older.
        divergence: ``(B, T)`` D_t; this and the others are 0 behind a sample's tokens, as `Rows.pad` leaves them.
        log_ratio: ``(B, T)`` log ρ_t.
        mask: ``(B, T)``, 1 on the samples' tokens.
        active: ``(B, T)`` fp32, 1 on the tokens with an advantage.
        masked: the same, on the masked ones of these.

    Returns:
        ``(bins, 5)`` fp32: tokens, D_t, |log ρ_t|, active and masked tokens.
    """
    sums = torch.stack([row.sum(-1) for row in (mask, divergence, log_ratio.abs(), active, masked)], -1)
    return sums.new_zeros(bins, 5).index_add_(0, staleness.clamp(0, bins - 1), sums)


def staleness_scalars(table: list[float]) -> dict[str, float]:
    """Named scalars of `by_staleness`, flattened, after summing over micro-batches and processes.

    Returns:
        Share masked and mean D_t by staleness, and at staleness 0, before the weights have moved, the engine's noise
        as ``cppo/rollout_mismatch`` and ``cppo/rollout_mismatch_nats``.
    """
    scalars = {}
    for updates in range(len(table) // 5):
        tokens, divergence, nats, active, masked = table[5 * updates : 5 * updates + 5]
        if tokens:
            scalars[f"cppo/staleness_{updates}/divergence"] = divergence / tokens
            if updates == 0:
                scalars["cppo/rollout_mismatch"] = divergence / tokens
                scalars["cppo/rollout_mismatch_nats"] = nats / tokens
        if active:
            scalars[f"cppo/staleness_{updates}/masked"] = masked / active
    return scalars
