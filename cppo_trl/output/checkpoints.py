"""Checkpoints that a run can resume from, and a clear end where one cannot be written."""

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from zipfile import BadZipFile, ZipFile

from safetensors import SafetensorError, safe_open
from transformers import TrainerCallback
from transformers.trainer_utils import sort_checkpoints
from trl.trainer.utils import RepeatSampler

_WEIGHTS = ("*.safetensors", "*model*.bin", "*/*.distcp", "global_step*/*.pt")  # one process or DDP, FSDP, DeepSpeed


class RunError(RuntimeError):
    """A run stops early; the message says what is kept, where, and what to do."""


def defect(checkpoint: Path) -> str | None:
    """What a checkpoint lacks, or None if it is complete.

    Transformers writes the weights, then optimizer, scheduler and random states, and ``trainer_state.json`` last.
    Files that a full disk or a crash cut off are recognized by the sizes and directories that they contain, without
    reading the weights.
    """
    if not (checkpoint / "trainer_state.json").exists():
        return "trainer_state.json, which is written last, is missing"
    if not any(any(checkpoint.glob(pattern)) for pattern in _WEIGHTS):
        return "the weights are missing"
    for path in sorted(checkpoint.rglob("*")):
        try:
            if path.suffix == ".json":
                json.loads(path.read_text(encoding="utf-8"))
            elif path.suffix == ".safetensors":
                with safe_open(path, framework="pt"):
                    pass
            elif path.suffix in {".bin", ".pt", ".pth"}:  # as torch.save writes
                ZipFile(path).close()
        except (ValueError, SafetensorError, BadZipFile):
            return f"{path.name} is cut short"
    for index in checkpoint.glob("*.index.json"):
        shards = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        if missing := sorted(shard for shard in shards if not (checkpoint / shard).exists()):
            return f"{missing[0]} is missing"
    return None


def last_checkpoint(output_dir: str) -> tuple[Path | None, list[str]]:
    """The last complete checkpoint below ``output_dir``, and what is wrong with each later one, in words."""
    skipped: list[str] = []
    found = sort_checkpoints(output_dir) if Path(output_dir).is_dir() else []
    for checkpoint in map(Path, reversed(found)):
        wrong = defect(checkpoint)
        if wrong is None:
            return checkpoint, skipped
        skipped.append(f"{checkpoint} is incomplete ({wrong})")
    return None, skipped


def checkpoint_to_resume(output_dir: str, resume: str | bool | None, main_process: bool) -> str | None:
    """The checkpoint to resume from, or None to start from scratch; the choice is printed.

    Args:
        output_dir: directory of the run.
        resume: ``resume_from_checkpoint``: a checkpoint's path, or True for the last complete checkpoint in
            ``output_dir`` and a fresh start where there is none, so that the same command works before and after an
            interruption.
        main_process: whether this process prints.

    Raises:
        ValueError: if the named checkpoint is missing or incomplete, or if a run without ``resume`` would start in a
            directory that holds checkpoints of an earlier one: a later resume could not tell them from its own.
    """
    if isinstance(resume, str) and resume.lower() in ("true", "false"):  # from the command line
        resume = resume.lower() == "true"
    if isinstance(resume, str):
        if wrong := defect(Path(resume)):
            state = f"is incomplete: {wrong}" if Path(resume).is_dir() else "does not exist"
            raise ValueError(
                f"resume_from_checkpoint={resume!r} {state}. Set it to true for the last complete checkpoint."
            )
        return resume
    last, skipped = last_checkpoint(output_dir)
    if not resume:
        if last is not None:
            raise ValueError(
                f"output_dir={output_dir!r} holds {last.name} of an earlier run. Set resume_from_checkpoint to true "
                "to continue it, or choose another output_dir."
            )
        return None
    if main_process:
        chosen = (
            f"Resuming from {last}"
            if last
            else f"No complete checkpoint in {output_dir}: training starts from scratch"
        )
        print("\n".join([*skipped, chosen]))
    return None if last is None else str(last)


class TrainingFinished(Exception):  # noqa: N818
    """The checkpoint to resume from is that of the last update."""


class ExactResume(TrainerCallback):
    """Fixes two problems of a resume, once weights, optimizer and state are loaded.

    TRL's sampler draws the order of an epoch when the epoch begins, so a run resumed in its third epoch would follow
    the order of the first. And transformers makes at least one update, even where none is left.

    Raises:
        TrainingFinished: if no update is left.
    """

    def on_train_begin(self, args: Any, state: Any, control: Any, train_dataloader: Any = None, **kwargs: Any) -> None:
        """Stop if no update is left; else bring the sampler to its epoch."""
        if 0 < args.max_steps <= state.global_step:
            raise TrainingFinished(f"All {args.max_steps} updates are made: there is nothing left to train.")
        sampler = train_dataloader.batch_sampler
        while hasattr(sampler, "batch_sampler"):  # of a process's shard
            sampler = sampler.batch_sampler
        if isinstance(getattr(sampler, "sampler", None), RepeatSampler):  # a streamed dataset has none
            for _ in range(int(state.epoch or 0)):
                next(iter(sampler.sampler))


@contextmanager
def saving(output_dir: str, unfinished: Path | None = None, main_process: bool = True) -> Iterator[None]:
    """Turn a failure to save into a `RunError` that names the last complete checkpoint.

    Args:
        output_dir: directory of the run.
        unfinished: the checkpoint being written, whose remains the main process removes.
        main_process: whether this process is the main one.

    Raises:
        RunError: if the body raises an error of the operating system, safetensors or torch.
    """
    try:
        yield
    except RunError:
        raise
    except (OSError, SafetensorError, RuntimeError) as error:
        if unfinished is not None and main_process:
            shutil.rmtree(unfinished, ignore_errors=True)
        last, _ = last_checkpoint(output_dir)
        kept = f"The last complete checkpoint is {last}" if last else "There is no complete checkpoint"
        free = shutil.disk_usage(output_dir).free / 2**20
        raise RunError(
            f"Saving {unfinished or output_dir} failed: {error} ({free:.0f} MiB free). {kept}. Fix the cause, then "
            "repeat the command with --resume_from_checkpoint true."
        ) from error
