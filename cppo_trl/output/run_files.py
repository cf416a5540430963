"""What a run leaves in its ``output_dir`` for the report, beside transformers' ``trainer_state.json``.

``run.json`` holds the names of model and dataset, the date, the schedule in words, the configuration, the command, and
versions.
``trust_region.jsonl`` has a line for each update, `metrics.position_profile`; ``trust_region_tokens.jsonl`` one for
each response of `tokens.token_records`. A run that is resumed or repeated in the same directory appends: where a step
occurs again, earlier lines of that step and of later ones no longer count.
"""

import fcntl
import json
import os
import platform
import re
import shlex
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

RUN = "run.json"
PROFILES = "trust_region.jsonl"
TOKENS = "trust_region_tokens.jsonl"
LOCK = "_lock"
"""Locked by the process that writes to the directory. Uploads to the Hub leave out names with an underscore."""

PACKAGES = ("cppo-trl", "trl", "transformers", "torch", "accelerate", "peft", "math-verify", "vllm")
"""Packages whose versions a run records, where they are installed."""

FATES = ("toward", "within", "reweighted", "threshold", "budget", "idle", "foreign")
"""What may happen to a token: kept because its step leads toward the rollout policy; kept within the limits; given a
weight other than 0 and 1; masked by the threshold; masked by the budget; no step, because its advantage is zero; not
sampled by the policy (written by a tool). A record's ``fate`` is an index into this tuple."""


@contextmanager
def exclusive(directory: Path, main_process: bool = True) -> Iterator[None]:
    """Create a directory and keep other processes from writing to it; the lock of a process that dies is free.

    The same process may nest this. Processes other than the main one of a run do nothing.

    Raises:
        ValueError: if another process holds the lock, or the directory cannot be written to.
    """
    if not main_process:
        yield
        return
    name, me = str(directory), f"process {os.getpid()} on {platform.node()}"
    try:
        directory.mkdir(parents=True, exist_ok=True)
        file = (directory / LOCK).open("a+", encoding="utf-8")
    except OSError as error:
        raise ValueError(f"output_dir={name!r} cannot be written to ({error}). Choose another.") from error
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            file.seek(0)
            if (holder := file.read()) != me:
                raise ValueError(
                    f"output_dir={name!r} is in use by {holder}. Wait for it, or choose another."
                ) from error
        else:
            file.truncate(0)
            print(me, end="", file=file, flush=True)
        yield


def command_line(argv: Sequence[str]) -> str:
    """The command of this process, without the values of tokens."""
    return re.sub(r"(--\w*token[= ])\S+", r"\1***", shlex.join([Path(sys.executable).name, *argv]))


def versions() -> dict[str, str]:
    """Versions of Python and of the installed packages among `PACKAGES`."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        with suppress(PackageNotFoundError):
            found[name] = version(name)
    return found


def loaded_from(dataset: Any) -> list[str]:
    """Names on the Hub or local paths that a dataset was loaded from, as far as it knows them."""
    name = getattr(getattr(dataset, "info", None), "dataset_name", None)
    return name.split(", ") if name else []


def write_run(
    directory: Path, model: str, dataset: str, schedule: Mapping[str, str], config: Mapping[str, Any]
) -> None:
    """Write ``run.json``."""
    directory.mkdir(parents=True, exist_ok=True)
    run: dict[str, Any] = {"model": model, "dataset": dataset, "date": time.strftime("%Y-%m-%d %H:%M %Z")}
    run |= {"schedule": schedule, "config": config, "command": command_line(sys.argv), "versions": versions()}
    (directory / RUN).write_text(json.dumps(run, indent=1, default=str) + "\n", encoding="utf-8")


def append_profile(directory: Path, step: int, profile: Mapping[str, list[float]]) -> None:
    """Add an update's position profile, to five digits."""
    rounded = {name: [float(f"{value:.5g}") for value in values] for name, values in profile.items()}
    _append(directory / PROFILES, [{"step": step, **rounded}])


def append_tokens(directory: Path, step: int, records: Iterable[Mapping[str, Any]]) -> None:
    """Add an update's logged responses."""
    _append(directory / TOKENS, ({"step": step, **record} for record in records))


def _append(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as file:
        file.write("".join(json.dumps(row) + "\n" for row in rows))


def whole_lines(path: Path) -> Iterator[dict[str, Any]]:
    """The JSON lines of a file, none where there is no file; a line that an interruption cut off is left out."""
    for text in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
        with suppress(json.JSONDecodeError):
            yield json.loads(text)


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The lines of a file that count, by step."""
    rows: list[dict[str, Any]] = []
    for row in whole_lines(path):
        if rows and _place(row) <= _place(rows[-1]):
            rows = [earlier for earlier in rows if earlier["step"] < row["step"]]
        rows.append(row)
    return rows


def _place(row: Mapping[str, Any]) -> tuple[int, int]:
    return row["step"], row.get("response", 0)
