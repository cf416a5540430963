"""A run that can be interrupted: each problem's record is a line in a file, and a rerun answers the rest."""

import fcntl
import json
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import IO, Any

from tqdm.auto import tqdm

from cppo_trl.evaluation.grading import Evaluator
from cppo_trl.evaluation.metrics import Record, avg_at_n
from cppo_trl.evaluation.problems import Problem

SETTINGS, GENERATIONS = "settings.json", "generations.jsonl"


def chunks(problems: Sequence[Problem], batch_size: int, samples: int) -> list[Sequence[Problem]]:
    """The problems in the parts that are answered at once: ``batch_size`` answers, but at least one problem."""
    size = max(1, batch_size // samples)
    return [problems[start : start + size] for start in range(0, len(problems), size)]


def run(
    directory: Path,
    settings: dict[str, Any],
    parts: Sequence[Sequence[Problem]],
    make_evaluator: Callable[[], Evaluator],
) -> list[Record]:
    """Answer the problems that ``directory`` holds no record of, and return the records of all.

    Args:
        directory: Where ``settings.json`` and ``generations.jsonl`` are kept.
        settings: Everything that the numbers depend on; JSON.
        parts: The problems as `chunks` gives them. What is sampled depends on the part as a whole, so one that was
            interrupted is answered again, and only its missing records are added.
        make_evaluator: Called once if anything is left to do.

    Raises:
        ValueError: If the directory belongs to a run with other settings, or another process is writing to it.
    """
    claim(directory, settings)
    total = sum(map(len, parts))
    with _appending(directory / GENERATIONS) as file:
        records = {(record.benchmark, record.id): record for record in _read(file)}
        with tqdm(total=total, initial=len(records), desc="evaluating", unit="problem") as bar:
            evaluator = None
            for part in parts:
                if all((problem.benchmark, problem.id) in records for problem in part):
                    continue
                evaluator = evaluator or make_evaluator()
                for record in evaluator(part):
                    if (record.benchmark, record.id) not in records:
                        records[record.benchmark, record.id] = record
                        file.write(json.dumps(asdict(record)) + "\n")
                        bar.update()
                file.flush()
                os.fsync(file.fileno())
                known = [avg_at_n(r.scores) for r in records.values() if not r.excluded]  # type: ignore[arg-type]
                bar.set_postfix_str(f"mean score {avg_at_n(known):.3f}" if known else "no readable gold")
    return [records[problem.benchmark, problem.id] for part in parts for problem in part]


def claim(directory: Path, settings: dict[str, Any]) -> None:
    """Make the directory this run's, or find that it is.

    Raises:
        ValueError: If it belongs to a run with other settings.
    """
    path = directory / SETTINGS
    settings = json.loads(json.dumps(settings))
    if path.exists():
        earlier = json.loads(path.read_text())
        changed = [name for name in {**earlier, **settings} if earlier.get(name) != settings.get(name)]
        if changed:
            listed = "\n".join(
                f"  {name}: {earlier.get(name)!r} there, {settings.get(name)!r} here" for name in changed
            )
            raise ValueError(
                f"{directory} holds an evaluation with other settings:\n{listed}\n"
                "Give another output_dir, or the same settings to go on with it, or remove the directory."
            )
    elif directory.exists() and any(directory.iterdir()):
        raise ValueError(f"output_dir: {directory} is not empty and holds no evaluation. Give another one.")
    else:
        directory.mkdir(parents=True, exist_ok=True)
        unfinished = path.with_suffix(".tmp")
        unfinished.write_text(json.dumps(settings, indent=2) + "\n")
        unfinished.rename(path)


@contextmanager
def _appending(path: Path) -> Iterator[IO[str]]:
    """Open a file of lines for reading and appending, for this process alone."""
    with path.open("a+", encoding="ascii") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ValueError(f"{path} is being written by another process: wait for it or end it.") from error
        yield file


def _read(file: IO[str]) -> list[Record]:
    """The records of a file; a last line that was cut off is removed from it."""
    file.seek(0)
    text = file.read()
    whole = text[: text.rfind("\n") + 1]
    file.truncate(len(whole))
    return [Record(**json.loads(line)) for line in whole.splitlines()]
