"""Problems from files and datasets."""

import pytest

from cppo_trl.data import arithmetic
from cppo_trl.evaluation.problems import load_problems, problems_of


def test_problems_come_from_files_and_datasets_and_wrong_ones_are_named(tmp_path):
    data = arithmetic.problems(3, 2, 0)
    data.to_json(tmp_path / "sums.jsonl")
    data.add_column("id", ["x", "y", "z"]).to_parquet(tmp_path / "named.parquet")
    problems = load_problems([str(tmp_path / "sums.jsonl"), str(tmp_path / "named.parquet")])
    assert [(p.benchmark, p.id) for p in problems] == [("sums", i) for i in "012"] + [("named", i) for i in "xyz"]
    assert [(p.prompt, p.solution) for p in problems[:3]] == list(zip(data["prompt"], data["solution"], strict=True))
    for benchmarks, message in (
        (["aime23"], "'aime23' is none of aime24"),
        ([str(tmp_path / "no.jsonl")], "there is no file"),
        ([str(tmp_path / "sums.jsonl")] * 2, "each once"),
        ([], "at least one"),
    ):
        with pytest.raises(ValueError, match=message):
            load_problems(benchmarks)
    with pytest.raises(ValueError, match="b: no column solution; it has prompt"):
        problems_of("b", data.remove_columns("solution"))
    with pytest.raises(ValueError, match="same id"):
        problems_of("b", data.add_column("id", ["x", "y", "x"]))
    with pytest.raises(ValueError, match="b: it has no rows"):
        problems_of("b", data.select([]))
