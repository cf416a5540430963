"""What a run leaves in its ``output_dir`` for the report, beside transformers' ``trainer_state.json``.

``run.json`` holds the model's name, the schedule in words and the configuration. ``trust_region.jsonl`` has a line for
each update, `metrics.position_profile`; ``trust_region_tokens.jsonl`` one for each response of `tokens.token_records`.
A run that is resumed, or made anew in the same directory, writes on: where a step comes again, what stands before it
from that step on no longer counts.
"""

import json
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

RUN = "run.json"
PROFILES = "trust_region.jsonl"
TOKENS = "trust_region_tokens.jsonl"

FATES = ("toward", "within", "reweighted", "threshold", "budget", "idle", "foreign")
"""What may become of a token: kept because its step leads toward the rollout policy; kept within the limits; with a
weight other than 0 and 1; masked by the threshold; masked by the budget; no step, as its advantage is zero; not the
policy's own (written by a tool). A record's ``fate`` counts from 0."""


def write_run(directory: Path, model: str, schedule: Mapping[str, str], config: Mapping[str, Any]) -> None:
    """Write ``run.json``."""
    directory.mkdir(parents=True, exist_ok=True)
    run = {"model": model, "schedule": schedule, "config": config}
    (directory / RUN).write_text(json.dumps(run, indent=1, default=str) + "\n", encoding="utf-8")


def append_profile(directory: Path, step: int, profile: Mapping[str, list[float]]) -> None:
    """Add an update's position profile, to five digits."""
    rounded = {name: [float(f"{value:.5g}") for value in values] for name, values in profile.items()}
    _append(directory / PROFILES, [{"step": step, **rounded}])


def append_tokens(directory: Path, step: int, records: Iterable[Mapping[str, Any]]) -> None:
    """Add the responses that are logged of an update."""
    _append(directory / TOKENS, ({"step": step, **record} for record in records))


def _append(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as file:
        file.write("".join(json.dumps(row) + "\n" for row in rows))


def whole_lines(path: Path) -> Iterator[dict[str, Any]]:
    """The JSON lines of a file, none where there is no file; one that an interruption cut short is left out."""
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
