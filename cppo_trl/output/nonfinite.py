"""The end of a run whose loss or weights are NaN or infinite."""

from typing import NoReturn

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from cppo_trl.output.checkpoints import RunError, last_checkpoint


def stop(output_dir: str, update: int) -> NoReturn:
    """End a run in the middle of an update whose loss is not finite; to be called on all processes.

    Raises:
        RunError: always.
    """
    last, _ = last_checkpoint(output_dir)
    raise RunError(
        f"The loss of update {update} is not finite: the weights are not changed by it. Look for a reward that is "
        f"infinite, or lower the learning rate. The last complete checkpoint is {last or 'none'}."
    )


def require_finite(model: torch.nn.Module, update: int) -> None:
    """Refuse weights that are not finite, so that no checkpoint holds any; waits for the device.

    Each process looks at its own share of the weights, under FSDP2 and DeepSpeed's ZeRO-3 as well.

    Raises:
        RunError: if a weight of this process is NaN or infinite.
    """
    if not all(_own_share(parameter).isfinite().all().item() for parameter in model.parameters()):
        raise RunError(
            f"After update {update} the weights are not finite: they are not saved, and earlier checkpoints are kept. "
            "A gradient overflowed though the loss did not: lower the learning rate, or raise the precision."
        )


def _own_share(parameter: Tensor) -> Tensor:
    if isinstance(parameter, DTensor):
        return parameter.to_local()
    return getattr(parameter, "ds_tensor", parameter).detach()  # ZeRO-3 empties the parameter between two passes
