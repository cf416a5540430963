"""What the report draws, from logged files whose numbers are known."""

import json

import numpy as np
import pytest
from PIL import Image

from cppo_trl.report.__main__ import main
from cppo_trl.report.panels import curves, heat_maps, logged_steps, masked_by_cause, prefix_averages, token_plot
from cppo_trl.report.runs import grouped, read_runs
from tests.report.conftest import CPPO, DPPO, make_run, token_record


def test_groups_differ_in_their_seed_alone(tmp_path):
    paths = [make_run(tmp_path / "a", 0), make_run(tmp_path / "b", 1), make_run(tmp_path / "c", 0, DPPO)]
    paths += [make_run(tmp_path / "d", 0, {**CPPO, "cppo_w_min": 0.5}), make_run(tmp_path / "e", 1, save_steps=7)]
    groups = grouped(read_runs(paths))
    assert {group.label: [run.name for run in group.runs] for group in groups} == {
        "cppo, delta_b 0.02, w_min 0.8": ["a", "b", "e"],
        "dppo, w_min 0.8": ["c"],
        "cppo, delta_b 0.02, w_min 0.5": ["d"],
    }
    assert [group.label for group in grouped(read_runs(paths[:2]))] == ["a"]
    # another model is another group, and a run that logged no configuration one of its own
    state = json.loads((paths[1] / "run.json").read_text())
    (paths[1] / "run.json").write_text(json.dumps({**state, "model": "other"}))
    (paths[4] / "run.json").unlink()
    assert len(grouped(read_runs([paths[0], paths[1], paths[4]]))) == 3


def test_a_line_is_the_mean_of_its_group_in_a_band_over_the_updates_of_all(tmp_path):
    paths = [make_run(tmp_path / "a", 0), make_run(tmp_path / "b", 1), make_run(tmp_path / "c", 0, DPPO)]
    state = tmp_path / "b" / "trainer_state.json"
    history = [row for row in json.loads(state.read_text())["log_history"] if row["step"] < 8]  # died early
    (tmp_path / "b" / "checkpoint-2").mkdir()
    (tmp_path / "b" / "checkpoint-10").mkdir()
    (tmp_path / "b" / "checkpoint-10" / "trainer_state.json").write_text(json.dumps({"log_history": history}))
    (tmp_path / "b" / "checkpoint-2" / "trainer_state.json").write_text(json.dumps({"log_history": []}))
    state.unlink()
    panels = {panel.name: panel for panel in curves(grouped(read_runs(paths)))}
    cppo, dppo = panels["reward"].lines
    assert list(cppo.x) == [2, 4, 6]
    assert cppo.y == pytest.approx([0.7, 0.9, 1.1])
    assert (list(cppo.low), list(cppo.high)) == (pytest.approx([0.2, 0.4, 0.6]), pytest.approx([1.2, 1.4, 1.6]))
    assert (list(dppo.x), dppo.low) == ([2, 4, 6, 8], None)
    assert list(panels["entropy"].lines[0].x) == [4, 6]  # no value was logged at 2
    assert [line.label for line in panels["budget"].lines] == [cppo.label]  # DPPO has no budget
    assert len(panels["accuracy"].lines) == 4  # two benchmarks, and no standard error
    assert "mismatch" not in panels


def test_pictures_by_training_and_position(tmp_path):
    (run,) = read_runs([make_run(tmp_path / "a")])
    threshold, budget, divergence = heat_maps(run)
    assert list(threshold.x) == [2, 4, 6, 8]  # a column for each rollout of two updates
    assert list(threshold.y) == [0.125, 0.375, 0.625, 0.875]
    np.testing.assert_allclose(threshold.z, [[0, 0.1, 0.1, 0.1]] * 4)
    np.testing.assert_allclose(budget.z[3], [0.06, 0.14, 0.22, 0.3])
    np.testing.assert_allclose(divergence.z[0], [0.015, 0.035, 0.055, 0.075])
    by_threshold, by_budget = masked_by_cause(run).lines
    assert by_threshold.y == pytest.approx([0, 0.1, 0.1, 0.1])
    assert by_budget.y == pytest.approx([(0.6 + s) / 40 for s in (0.6, 1.4, 2.2, 3.0)])
    *parts, limit = prefix_averages(run).lines
    assert parts[0].y == pytest.approx([0, 0.03, 0.06, 0.09])
    assert parts[-1].label == "to update 8"
    assert list(limit.y) == [0.03, 0.03]
    (dppo,) = read_runs([make_run(tmp_path / "b", 0, DPPO)])
    assert prefix_averages(dppo) is None
    assert [picture.name for picture in heat_maps(dppo)] == ["masked_by_threshold", "divergence"]
    assert len(masked_by_cause(dppo).lines) == 1


def test_figure_3_of_a_response():
    plot = token_plot(token_record(True), CPPO, "")
    assert plot.bars == {
        "toward": ([1], [0.05]),
        "within": ([4], [0.0]),
        "threshold": ([2], [pytest.approx(0.27)]),
        "budget": ([3], [pytest.approx(0.01049376)]),
    }
    assert (plot.threshold, plot.delta) == ([0.1, 0.07, -0.18, -0.17], 0.1)
    assert plot.y_range == (-0.1, pytest.approx(0.297))
    dppo = token_plot(token_record(False), DPPO, "")
    assert (dppo.threshold, dppo.delta, dppo.value_label) == (None, 0.1, "D_t")
    assert dppo.bars["threshold"] == ([2], [0.3])
    for rule in ({"trust_region": "grpo", "cppo_delta": None}, {**CPPO, "cppo_delta": float("inf")}):
        plot = token_plot(token_record(False), rule, "")
        assert (plot.delta, plot.y_range) == (None, None)
    assert "mean" in token_plot(token_record(False), {"trust_region": "trm_avg", "cppo_delta": 0.1}, "").delta_label


def test_the_shown_updates_are_spread_over_the_run():
    assert logged_steps([{"step": s} for s in range(10, 101, 10)]) == [10, 30, 50, 80, 100]
    assert logged_steps([{"step": 3}, {"step": 3}]) == [3]


def test_the_page_needs_no_network_and_has_its_pictures_beside_it(page):
    text = page.read_text()
    for remote in ('src="http', "src='http", 'href="http', "@import", "url(http"):
        assert remote not in text.replace(text[text.index("<script>") : text.rindex("<script>")], "")
    assert text.count("</script>") == text.count("<script") - text.count('"<script')  # a token's own was escaped
    pictures = {path.name for path in page.parent.glob("*.png")}
    runs = [f"report-{run}{end}.png" for run in ("cppo-0", "cppo-1", "dppo") for end in ("", "-tokens")]
    assert pictures == {"report-curves.png", *runs}
    for name in pictures:
        with Image.open(page.parent / name) as image:
            assert image.width >= 600
    assert "<b>0.375</b>" in text
    assert "lower bound" in text


def test_what_cannot_be_shown_is_named(tmp_path):
    make_run(tmp_path / "a")
    (tmp_path / "empty").mkdir()
    for runs, message in (
        (["empty"], "holds neither trainer_state.json nor trust_region.jsonl"),
        (["a", "a"], "named twice"),
    ):
        with pytest.raises(SystemExit, match=message):
            main([str(tmp_path / run) for run in runs])
    make_run(tmp_path / "x" / "a")
    assert [run.name for run in read_runs([tmp_path / "a", tmp_path / "x" / "a"])] == [f"{tmp_path.name}/a", "x/a"]


def test_a_run_that_logged_little_still_gets_its_page(tmp_path, capsys):
    make_run(tmp_path / "a", 0, DPPO)
    for name in ("trainer_state.json", "run.json", "trust_region_tokens.jsonl"):
        (tmp_path / "a" / name).unlink()
    main([str(tmp_path / "a")])
    assert capsys.readouterr().out.split() == [str(tmp_path / "a" / name) for name in ("report.html", "report-a.png")]
