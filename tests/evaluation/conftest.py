"""A directory with a tiny model and two benchmarks."""

import json
from pathlib import Path

import pytest

from cppo_trl.data import arithmetic
from cppo_trl.evaluation.command import EvaluationArguments
from tests.conftest import tiny_model


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A directory with a model and two sets of problems, of five and three rows."""
    monkeypatch.chdir(tmp_path)
    save_model(tiny_model(), "model")
    arithmetic.problems(5, 3, 0).to_json("sums.jsonl")
    arithmetic.problems(3, 2, 0).to_json("pairs.jsonl")
    return tmp_path


def save_model(model, directory):
    model.save_pretrained(directory)
    arithmetic.tokenizer().save_pretrained(directory)


def arguments(**fields):
    defaults = {"model": "model", "benchmarks": ["sums.jsonl", "pairs.jsonl"], "output_dir": "out", "samples": 4}
    return EvaluationArguments(**{**defaults, "max_new_tokens": 10, "batch_size": 8, **fields})


def results(directory="out"):
    return json.loads(Path(directory, "results.json").read_text())


def lines(directory):
    return [json.loads(line) for line in Path(directory, "generations.jsonl").read_text().splitlines()]
