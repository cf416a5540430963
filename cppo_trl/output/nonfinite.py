"""The end of a run whose loss or weights are NaN or infinite, and what is kept of the batch to find out why."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from cppo_trl.output.checkpoints import RunError, last_checkpoint

MAX_RESPONSES = 16
"""Most responses that `save_batch` keeps: at 16,000 tokens each, 10 MB."""

KEPT = (
    "prompt_ids",
    "prompt_mask",
    "completion_ids",
    "completion_mask",
    "tool_mask",
    "advantages",
    "old_per_token_logps",
    "per_token_logps",
    "ref_per_token_logps",
    "divergence",
)
"""What is kept of a loss's batch, ``(B, T)`` or ``(B,)``: ids, masks, Â, log μ, log π, the reference's, D_t."""


def save_batch(path: Path, batches: Sequence[tuple[Tensor, Mapping[str, Any]]], **context: Any) -> bool:
    """Save the first of an update's micro-batches whose loss is not finite; the rows that are not finite come first.

    The file is read with ``torch.load(path)``: a dictionary of ``loss``, ``micro_batch`` (counted from 0), ``rows``
    (their places in the micro-batch), the tensors of `KEPT` for these rows, and ``context``.

    Args:
        path: the file.
        batches: loss and inputs of each micro-batch of the update.
        context: numbers and text to add.

    Returns:
        Whether there was such a micro-batch: the file is written only then.
    """
    for i, (loss, batch) in enumerate(batches):
        if not loss.isfinite():
            tensors = {name: batch[name] for name in KEPT if isinstance(batch.get(name), Tensor)}
            finite = torch.stack([x.isfinite().view(len(x), -1).all(-1) for x in tensors.values()]).all(0)
            rows = finite.int().argsort(stable=True)[:MAX_RESPONSES]
            kept = {name: x[rows].cpu() for name, x in tensors.items()}
            torch.save({"loss": loss.item(), "micro_batch": i, "rows": rows.cpu(), **kept, **context}, path)
            return True
    return False


def stop(trainer: Any, batches: Sequence[tuple[Tensor, Mapping[str, Any]]], scalars: Mapping[str, float]) -> NoReturn:
    """Save what led to a loss that is not finite, on each process that had one, and end the run on all of them.

    Args:
        trainer: the trainer, in the middle of an update.
        batches: loss and inputs of each micro-batch of the update on this process.
        scalars: the update's metrics.
    """
    update, process = trainer.state.global_step + 1, trainer.accelerator.process_index
    path = Path(trainer.args.output_dir, f"nonfinite-update-{update}-process-{process}.pt")
    path.parent.mkdir(parents=True, exist_ok=True)
    saved = save_batch(path, batches, update=update, process=process, metrics=dict(scalars))
    trainer.accelerator.wait_for_everyone()  # the first process to leave ends the others
    where = f"saved in {path}" if saved else "saved by the process that had it"
    last, _ = last_checkpoint(trainer.args.output_dir)
    raise RunError(
        f"The loss of update {update} is not finite. The weights were not changed by it; the batch is {where}. The "
        f"last complete checkpoint is {last or 'none'}. docs/troubleshooting.md says how to read the file."
    )


def require_finite(model: torch.nn.Module, update: int) -> None:
    """Refuse weights that are not finite, so that no checkpoint holds any; waits for the device.

    Raises:
        RunError: if a weight of this process is NaN or infinite.
    """
    shards = (p.to_local() if isinstance(p, DTensor) else p for p in model.parameters())
    if not all(shard.isfinite().all().item() for shard in shards):
        raise RunError(
            f"After update {update} the weights are not finite: they are not saved, and earlier checkpoints are kept. "
            "A gradient overflowed though the loss did not: lower the learning rate, or raise the precision."
        )
