"""The directory of an evaluation: one line per record, so that a rerun answers the rest, and the results."""

import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from cppo_trl.evaluation.grading import Evaluator
from cppo_trl.evaluation.metrics import Record, all_metrics, table
from cppo_trl.evaluation.problems import Problem
from cppo_trl.output.run_files import LOCK, exclusive

SETTINGS, GENERATIONS, RESULTS, TABLE = "settings.json", "generations.jsonl", "results.json", "table.md"


def chunks(problems: Sequence[Problem], batch_size: int, samples: int) -> list[Sequence[Problem]]:
    """Split problems into parts of ``batch_size`` completions, but at least one problem."""
    size = max(1, batch_size // samples)
    return [problems[start : start + size] for start in range(0, len(problems), size)]


def answer_all(
    directory: Path,
    settings: dict[str, Any],
    parts: Sequence[Sequence[Problem]],
    make_evaluator: Callable[[], Evaluator],
) -> list[Record]:
    """Answer the problems without a record in ``directory``, and return the records of all.

    Args:
        directory: Holds ``settings.json`` and ``generations.jsonl``.
        settings: Everything that the records depend on; JSON.
        parts: The problems as `chunks` returns them. Samples depend on the whole part, so an interrupted one is
            answered again, and only its missing records are added.
        make_evaluator: Called once if anything is left to do.

    Raises:
        ValueError: If the directory belongs to a run with other settings, or another process is writing to it.
    """
    with exclusive(directory):
        claim(directory, settings)
        records, evaluator = _whole_records(directory / GENERATIONS), None
        bar = tqdm(total=sum(map(len, parts)), initial=len(records), desc="evaluating", unit="problem")
        with (directory / GENERATIONS).open("a", encoding="ascii") as file, bar:
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
    return [records[problem.benchmark, problem.id] for part in parts for problem in part]


def claim(directory: Path, settings: dict[str, Any]) -> None:
    """Record the settings of a new directory, or check those of an existing one.

    Raises:
        ValueError: If the directory belongs to a run with other settings, or to something else.
    """
    path, settings = directory / SETTINGS, json.loads(json.dumps(settings))
    if path.exists():
        earlier = json.loads(path.read_text())
        changed = [name for name in {**earlier, **settings} if earlier.get(name) != settings.get(name)]
        if changed:
            listed = "; ".join(f"{name} {earlier.get(name)!r} there, {settings.get(name)!r} here" for name in changed)
            raise ValueError(f"{directory} holds an evaluation with other settings: {listed}. Use another output_dir.")
    elif any(entry.name != LOCK for entry in directory.iterdir()):
        raise ValueError(f"output_dir: {directory} is not empty and holds no evaluation. Use another one.")
    else:
        path.write_text(json.dumps(settings, indent=2) + "\n")


def _whole_records(path: Path) -> dict[tuple[str, str], Record]:
    """Read the records of a file by benchmark and id, and remove a last line that was cut off."""
    path.touch()
    text = path.read_text(encoding="ascii")
    whole = text[: text.rfind("\n") + 1]
    os.truncate(path, len(whole))
    records = [Record(**json.loads(line)) for line in whole.splitlines()]
    return {(record.benchmark, record.id): record for record in records}


def write_results(
    directory: Path, settings: Mapping[str, Any], records: Sequence[Record], versions: Mapping[str, str]
) -> str:
    """Write ``results.json`` and ``table.md``; return the table.

    ``results.json`` holds ``settings``, ``versions`` and ``benchmarks``, as `all_metrics` returns them.
    """
    results = {"settings": settings, "versions": versions, "benchmarks": all_metrics(records)}
    text = table([results])
    (directory / RESULTS).write_text(json.dumps(results, indent=2) + "\n")
    (directory / TABLE).write_text(text + "\n")
    return text


def read_results(directory: Path) -> dict[str, Any]:
    """Read what `write_results` wrote.

    Raises:
        ValueError: If there is none.
    """
    path = directory / RESULTS
    if not path.exists():
        raise ValueError(f"{directory} holds no {RESULTS}: the evaluation is unfinished, or elsewhere.")
    return json.loads(path.read_text())
