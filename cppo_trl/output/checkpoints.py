"""Checkpoints that a run can go on from, and a clear end where one cannot be written."""

import json
import shutil
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any

from safetensors import SafetensorError, safe_open
from transformers import TrainerCallback
from transformers.trainer_utils import sort_checkpoints
from trl.trainer.utils import RepeatSampler

_WEIGHTS = ("*.safetensors", "*model*.bin", "*/*.distcp", "global_step*/*.pt")  # one process or DDP, FSDP, DeepSpeed


class RunError(RuntimeError):
    """A run ends before its time; the message says what is kept, where, and what to do."""


def defect(checkpoint: Path) -> str | None:
    """What a checkpoint lacks, or None if it is complete.

    Transformers writes the weights, then optimizer, scheduler and random states, and ``trainer_state.json`` last.
    Files that a full disk or a crash of the machine cut short are found by the sizes and directories that they hold
    themselves, without reading the weights.
    """
    if not (checkpoint / "trainer_state.json").exists():
        return "trainer_state.json, which is written last, is missing"
    if not any(any(checkpoint.glob(pattern)) for pattern in _WEIGHTS):
        return "the weights are missing"
    for path in sorted(checkpoint.rglob("*")):
        if _is_cut_short(path):
            return f"{path.name} is cut short"
    for index in checkpoint.glob("*.index.json"):
        shards = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        if missing := sorted(shard for shard in shards if not (checkpoint / shard).exists()):
            return f"{missing[0]} is missing"
    return None


def _is_cut_short(path: Path) -> bool:
    try:
        if path.suffix == ".json":
            json.loads(path.read_text(encoding="utf-8"))
        elif path.suffix == ".safetensors":
            with safe_open(path, framework="pt"):
                pass
    except (ValueError, SafetensorError):
        return True
    return path.suffix in {".bin", ".pt", ".pth"} and not zipfile.is_zipfile(path)  # as torch.save writes


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
    """The checkpoint to go on from, or None to start anew; what was chosen is printed.

    Args:
        output_dir: of the run.
        resume: ``resume_from_checkpoint``: True for the last complete checkpoint in ``output_dir``, and a new start
            where there is none, so that one command serves before and after an interruption; or a checkpoint's path.
        main_process: whether this process prints.

    Raises:
        ValueError: if the named checkpoint is incomplete, or if the run would begin anew in a directory that holds
            checkpoints of an earlier one: a later resume could not tell them from its own.
    """
    if isinstance(resume, str) and resume.lower() in ("true", "false"):  # from the command line
        resume = resume.lower() == "true"
    if isinstance(resume, str):
        if wrong := defect(Path(resume)):
            raise ValueError(
                f"resume_from_checkpoint={resume!r} is incomplete: {wrong}. Set it to true for the last complete "
                "checkpoint in output_dir."
            )
        return resume
    last, skipped = last_checkpoint(output_dir)
    if not resume:
        if last is not None:
            raise ValueError(
                f"output_dir={output_dir!r} holds {last.name} of an earlier run. Set resume_from_checkpoint to true "
                "to go on with it, or another output_dir to begin anew."
            )
        return None
    if main_process:
        chosen = f"Resuming from {last}" if last else f"No complete checkpoint in {output_dir}: training starts anew"
        print("\n".join([*skipped, chosen]))
    return None if last is None else str(last)


class TrainingFinished(Exception):  # noqa: N818
    """The checkpoint that training would go on from is that of its last update."""


class ExactResume(TrainerCallback):
    """Mends two things of a resume, once weights, optimizer and state are loaded.

    TRL's sampler draws the order of an epoch when the epoch begins, so a resume in the third would walk in the order
    of the first. And transformers makes at least one update, also where none is left.

    Raises:
        TrainingFinished: if no update is left.
    """

    def on_train_begin(self, args: Any, state: Any, control: Any, train_dataloader: Any = None, **kwargs: Any) -> None:
        """Called by the trainer."""
        if 0 < args.max_steps <= state.global_step:
            raise TrainingFinished
        sampler = train_dataloader.batch_sampler
        while hasattr(sampler, "batch_sampler"):  # a process's share
            sampler = sampler.batch_sampler
        if isinstance(getattr(sampler, "sampler", None), RepeatSampler):  # a streamed dataset has none
            for _ in range(int(state.epoch or 0)):
                next(iter(sampler.sampler))


def require_writable(output_dir: str) -> None:
    """Make ``output_dir`` and write a file in it.

    Raises:
        ValueError: if that is impossible.
    """
    try:
        Path(output_dir).mkdir(parents=True, exist_ok=True)
        with TemporaryFile(dir=output_dir) as file:  # each process its own
            file.write(b"x" * 4096)
    except OSError as error:
        raise ValueError(f"output_dir={output_dir!r} cannot be written to ({error}). Name another.") from error


@contextmanager
def saving(output_dir: str, unfinished: Path | None = None, main_process: bool = True) -> Iterator[None]:
    """Turn a failure to save into the end of the run that says which checkpoint is left.

    Args:
        output_dir: of the run.
        unfinished: the checkpoint being written; the main process removes what there is of it.
        main_process: whether this process is the main one.

    Raises:
        RunError: if what is inside fails with an error of the system, safetensors or torch.
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
            f"Saving {unfinished or output_dir} failed: {error} ({free:.0f} MiB are free there). {kept}. Make room, "
            "then repeat the command with --resume_from_checkpoint true."
        ) from error
