"""The end of a run whose loss or weights are NaN or infinite."""

import warnings

import torch
from accelerate import Accelerator
from torch import Tensor
from torch.distributed.tensor import DTensor

from cppo_trl.output.checkpoints import RunError, last_checkpoint


def stop_or_warn(mode: str, output_dir: str, update: int) -> None:
    """What follows from a loss that is not finite; to be called on all processes.

    Args:
        mode: ``"train"``, where the run stops before the update is made, or ``"eval"``, where it goes on.
        output_dir: output directory of the run.
        update: the update's number, counted from 1.

    Raises:
        RunError: in training.
    """
    if mode == "eval":
        warnings.warn("The loss of an evaluation batch is not finite; see eval_cppo/nonfinite_losses.", stacklevel=3)
        return
    last, _ = last_checkpoint(output_dir)
    raise RunError(
        f"The loss of update {update} is not finite: the weights are not changed by it. Look for an infinite reward, "
        f"or lower the learning rate. The last complete checkpoint is {last or 'none'}."
    )


def require_finite(accelerator: Accelerator, model: torch.nn.Module, update: int) -> None:
    """Refuse weights that are not finite, so that no checkpoint holds any; waits for the device.

    To be called on all processes; each looks at its own share of the weights, under FSDP2 and ZeRO-3 as well.

    Raises:
        RunError: on all processes, if a weight of any of them is NaN or infinite.
    """
    finite = torch.stack([_own_share(parameter).isfinite().all() for parameter in model.parameters()]).all()
    if not accelerator.gather(finite).all():
        raise RunError(
            f"After update {update} the weights are not finite: they are not saved, and earlier checkpoints are kept. "
            "A gradient overflowed though the loss did not: lower the learning rate, or raise the precision."
        )


def _own_share(parameter: Tensor) -> Tensor:
    if isinstance(parameter, DTensor):
        return parameter.to_local()
    return getattr(parameter, "ds_tensor", parameter).detach()  # ZeRO-3 empties the parameter between two passes
