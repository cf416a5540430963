"""Runs read and grouped."""

import json

import pytest

from cppo_trl.report.command import main
from cppo_trl.report.runs import grouped, read_runs
from tests.report.conftest import CPPO, DPPO, make_run


def test_groups_differ_only_in_their_seed(tmp_path):
    paths = [make_run(tmp_path / "a", 0), make_run(tmp_path / "b", 1), make_run(tmp_path / "c", 0, DPPO)]
    paths += [make_run(tmp_path / "d", 0, {**CPPO, "cppo_w_min": 0.5}), make_run(tmp_path / "e", 1, save_steps=7)]
    groups = grouped(read_runs(paths))
    assert {group.label: [run.name for run in group.runs] for group in groups} == {
        "cppo, delta_b 0.02, w_min 0.8": ["a", "b", "e"],
        "dppo, w_min 0.8": ["c"],
        "cppo, delta_b 0.02, w_min 0.5": ["d"],
    }
    assert [group.label for group in grouped(read_runs(paths[:2]))] == ["a"]
    # a different model is a different group, and a run without a logged configuration is one of its own
    state = json.loads((paths[1] / "run.json").read_text())
    (paths[1] / "run.json").write_text(json.dumps({**state, "model": "other"}))
    (paths[4] / "run.json").unlink()
    assert len(grouped(read_runs([paths[0], paths[1], paths[4]]))) == 3


def test_what_cannot_be_shown_is_named(tmp_path):
    make_run(tmp_path / "a")
    (tmp_path / "empty").mkdir()
    for runs, message in (
        (["empty"], "holds neither trainer_state.json nor trust_region.jsonl"),
        (["a", "a"], "given twice"),
    ):
        with pytest.raises(SystemExit, match=message):
            main([str(tmp_path / run) for run in runs])
    paths = [make_run(tmp_path / "x" / "a"), tmp_path / "a", make_run(tmp_path / "b")]
    assert [run.name for run in read_runs(paths)] == [str(paths[0]), str(paths[1]), "b"]
