"""Runs as the report sees them: read from the files in their ``output_dir``, and grouped by configuration."""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cppo_trl.output.run_files import PROFILES, RUN, TOKENS, read_lines

_STATE = "trainer_state.json"
_RESULTS = "results.json"
_BOOKKEEPING = re.compile(
    "(seed|data_seed|output_dir|run_name|project|report_to|disable_tqdm|num_completions_to_print|resume_from_checkpoint)$"
    "|(log|logging|save|eval|per_device_eval|hub|push_to_hub|trackio)_"
)
"""Fields of the configuration that may differ within a group."""


@dataclass(frozen=True)
class Run:
    """What a run logged; any part may be empty."""

    name: str
    about: Mapping[str, Any]
    """``run.json``"""
    history: Sequence[Mapping[str, Any]]
    """transformers' log history"""
    profiles: Sequence[Mapping[str, Any]]
    """the position profile of each update"""
    tokens: Sequence[Mapping[str, Any]]
    """the responses logged token by token"""
    results: Mapping[str, Any]
    """``results.json`` of a quickstart: held-out accuracies ``before`` and ``after``"""

    @property
    def config(self) -> Mapping[str, Any]:
        """The configuration."""
        return self.about.get("config", {})

    def series(self, key: str) -> dict[int, float]:
        """A logged scalar by update."""
        return {row["step"]: row[key] for row in self.history if row.get(key) is not None}

    @property
    def updates_per_rollout(self) -> int:
        """Updates between two rollouts, at least 1."""
        steps = self.config.get("steps_per_generation", 1) * self.config.get("num_iterations", 1)
        return max(1, steps // self.config.get("gradient_accumulation_steps", 1))


@dataclass(frozen=True)
class Group:
    """Runs that differ only in their seed."""

    label: str
    runs: Sequence[Run]


def read_runs(directories: Sequence[Path]) -> list[Run]:
    """Read runs. A run is named after its directory, or by its whole path where two directories share a name.

    Raises:
        ValueError: for a directory without logs, or one given twice.
    """
    paths = [directory.resolve() for directory in directories]
    names = [path.name for path in paths]
    if repeated := {str(path) for path in paths if paths.count(path) > 1}:
        raise ValueError(f"{', '.join(sorted(repeated))}: given twice.")
    return [_read_run(path, path.name if names.count(path.name) == 1 else str(path)) for path in paths]


def _read_run(directory: Path, name: str) -> Run:
    states = [directory / _STATE, *sorted(directory.glob(f"checkpoint-*/{_STATE}"), key=_step, reverse=True)]
    state = next((path for path in states if path.exists()), None)
    profiles = read_lines(directory / PROFILES)
    if state is None and not profiles:
        raise ValueError(f"{directory} holds neither {_STATE} nor {PROFILES}: name the output_dir of a run.")
    history = _read_json(state)["log_history"] if state else []
    about, results = _read_json(directory / RUN), _read_json(directory / _RESULTS)
    return Run(name, about, history, profiles, read_lines(directory / TOKENS), results)


def _read_json(path: Path) -> dict[str, Any]:
    """The object in a file; empty where there is none."""
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


def _step(state: Path) -> int:
    return int(state.parent.name.rpartition("-")[2])


def grouped(runs: Sequence[Run]) -> list[Group]:
    """Group the runs that differ only in their seed; a label holds the fields that differ between groups."""
    groups: dict[str, list[Run]] = {}
    for run in runs:
        key = json.dumps(_setting(run), sort_keys=True) if run.config else run.name
        groups.setdefault(key, []).append(run)
    members = list(groups.values())
    settings = [_setting(runs[0]) for runs in members]
    differing = [name for name in settings[0] if len({json.dumps(s.get(name)) for s in settings}) > 1]
    labels = [", ".join(_words(name, s[name]) for name in differing if s.get(name) is not None) for s in settings]
    for i, runs_of_group in enumerate(members):
        if not labels[i] or labels.count(labels[i]) > 1:
            labels[i] = runs_of_group[0].name
    return [Group(label, runs_of_group) for label, runs_of_group in zip(labels, members, strict=True)]


def _setting(run: Run) -> dict[str, Any]:
    """The configuration without seed and bookkeeping; a seed in the model's path is blanked."""
    names = sorted(run.config, key=lambda name: (name != "trust_region", name))
    method = {name: run.config[name] for name in names if not _BOOKKEEPING.match(name)}
    return {**method, "model": re.sub(rf"(seed\D?){run.config.get('seed')}\b", r"\1*", run.about.get("model", ""))}


def _words(field: str, value: Any) -> str:
    return str(value) if field == "trust_region" else f"{field.removeprefix('cppo_')} {value}"
