"""What the report draws, from log files whose numbers are known."""

import json
import re
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from cppo_trl.report.command import main
from cppo_trl.report.pictures import (
    OUTCOMES,
    TRUST_REGION,
    accuracies,
    curves,
    plot_curves,
    run_pictures,
    shown_steps,
    token_figure,
)
from cppo_trl.report.runs import grouped, read_runs
from tests.report.conftest import CPPO, DPPO, make_run, token_record


def by_title(pictures):
    return {picture.title: picture.figure.axes[0] for picture in pictures}


def x(line):
    return list(line.get_xdata())


def y(line):
    return list(line.get_ydata())


def test_the_report_loads_neither_torch_nor_the_trainer():
    program = "import sys, cppo_trl.report.page, cppo_trl.report.command; print({'torch', 'trl'} & set(sys.modules))"
    loaded = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert loaded.stdout.strip() == "set()"


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


def test_a_line_is_the_mean_of_its_group_in_a_band_over_the_updates_of_all(tmp_path):
    paths = [make_run(tmp_path / "a", 0), make_run(tmp_path / "b", 1), make_run(tmp_path / "c", 0, DPPO)]
    state = tmp_path / "b" / "trainer_state.json"
    history = [row for row in json.loads(state.read_text())["log_history"] if row["step"] < 8]  # interrupted
    (tmp_path / "b" / "checkpoint-2").mkdir()
    (tmp_path / "b" / "checkpoint-10").mkdir()
    (tmp_path / "b" / "checkpoint-10" / "trainer_state.json").write_text(json.dumps({"log_history": history}))
    (tmp_path / "b" / "checkpoint-2" / "trainer_state.json").write_text(json.dumps({"log_history": []}))
    state.unlink()
    groups = grouped(read_runs(paths))
    figures = by_title(curves(groups, [*accuracies(groups), *OUTCOMES, *TRUST_REGION]))
    cppo, dppo = figures["Training reward"].lines
    (band,) = figures["Training reward"].collections
    assert x(cppo) == [2, 4, 6]
    assert y(cppo) == pytest.approx([0.7, 0.9, 1.1])
    edge = {tuple(corner) for corner in band.get_paths()[0].vertices.round(6)}
    assert edge == {(2, 0.2), (4, 0.4), (6, 0.6), (2, 1.2), (4, 1.4), (6, 1.6)}
    assert (cppo.get_color(), cppo.get_label()) == ("#0072B2", groups[0].label)
    assert x(dppo) == [2, 4, 6, 8]
    assert [line.get_label() for line in figures["Deduction of Theorem 1"].lines] == [groups[0].label]  # not of DPPO
    assert y(figures["Deduction of Theorem 1"].lines[0]) == pytest.approx([1.5, 2.0, 2.5])
    accuracy = [title for title in figures if title.startswith("Held-out accuracy")]
    assert accuracy == ["Held-out accuracy, aime24/avg@16", "Held-out accuracy, avg@16"]  # no standard errors
    assert y(figures[accuracy[0]].lines[0]) == [0.5]
    for flat in ("Masked by the budget", "Masked by the threshold", "Effective budget", "Entropy"):
        assert flat not in figures
    assert "Rollout mismatch" not in figures  # not logged


def test_pictures_by_training_and_position(tmp_path):
    (run,) = read_runs([make_run(tmp_path / "a")])
    figures = by_title(run_pictures(run))
    images = {title: axes.images[0] for title, axes in figures.items() if axes.images}
    threshold, budget, divergence = (image.get_array() for image in images.values())
    assert {tuple(image.get_extent()) for image in images.values()} == {(0, 8, 0, 1)}  # 4 rollouts of two updates
    assert {image.origin for image in images.values()} == {"lower"}
    np.testing.assert_allclose(threshold, [[0, 0.1, 0.1, 0.1]] * 4)
    np.testing.assert_allclose(budget[3], [0.06, 0.14, 0.22, 0.3])
    np.testing.assert_allclose(divergence[0], [0.015, 0.035, 0.055, 0.075])
    *parts, limit = figures["Prefix average against budget"].lines
    assert x(parts[0]) == [0.125, 0.375, 0.625, 0.875]
    assert y(parts[0]) == pytest.approx([0, 0.03, 0.06, 0.09])
    assert parts[-1].get_label() == "to update 8"
    assert y(limit) == [0.03, 0.03]
    (dppo,) = read_runs([make_run(tmp_path / "b", 0, DPPO)])
    assert list(by_title(run_pictures(dppo))) == [
        "Masked by the threshold, by position",
        "Mean divergence, by position",
    ]


def test_figure_3_of_a_response():
    def draw(record, config):
        return token_figure(record, config).axes[0]

    def bars(axes):
        return {
            each.get_label(): [(bar.get_center()[0], bar.get_height()) for bar in each] for each in axes.containers
        }

    axes = draw(token_record(True), CPPO)
    assert bars(axes) == {
        "kept, toward μ": [(1, 0.05)],
        "kept, within the limits": [(4, 0.0)],
        "masked by the threshold": [(2, pytest.approx(0.27))],
        "masked by the budget": [(3, pytest.approx(0.01049376))],
    }
    delta, threshold = axes.lines
    assert (y(delta), y(threshold)) == ([0.1, 0.1], [0.1, 0.07, -0.18, -0.17, -0.17])
    assert (x(threshold), threshold.get_drawstyle()) == ([0.5, 1.5, 2.5, 3.5, 4.5], "steps-post")
    assert axes.get_ylim() == (-0.1, pytest.approx(0.297))
    dppo = draw(token_record(False), DPPO)
    assert (dppo.lines[0].get_label(), y(dppo.lines[0]), dppo.get_ylabel()) == ("threshold δ", [0.1] * 2, "D_t")
    assert bars(dppo)["masked by the threshold"] == [(2, 0.3)]
    without = {"grpo": None, "drpo": 12.5, "vaco": 0.3, "cppo": float("inf")}  # theirs is no limit on D_t
    for rule in ({"trust_region": name, "cppo_delta": delta} for name, delta in without.items()):
        assert not draw(token_record(False), rule).lines
    assert "mean" in draw(token_record(False), {"trust_region": "trm_avg", "cppo_delta": 0.1}).lines[0].get_label()


def test_the_shown_updates_are_spread_over_the_run():
    assert shown_steps([{"step": s} for s in range(10, 101, 10)]) == [10, 30, 50, 80, 100]
    assert shown_steps([{"step": 3}, {"step": 3}]) == [3]
    assert shown_steps([]) == []


def test_the_page_is_self_contained(page):
    text = page.read_text()
    for remote in ('src="http', "src='http", 'href="http', "@import", "url(http"):
        assert remote not in text
    assert page.stat().st_size < 1.5e6
    assert text.count("</script>") == text.count("<script")  # a token's own was escaped
    assert [path.name for path in page.parent.glob("report*")] == ["report.html"]


def test_the_theorem_in_words_and_numbers(page):
    text = " ".join(re.sub("<[^>]+>", "", page.read_text()).split())
    assert "δ = 0.1, wmin = 0.8; δb, T and ξ are the largest budget in force" in text
    assert (
        "it is at most 3. J itself has a range of 2ξ, at most 2: the bound is vacuous in 2 of 4 logged" in text
    )  # 1.5, 2, 2.5, 3 against the range 2
    assert "is at most 0.4: the bound is tighter" in text
    assert "held at 75.00 % of the positions, and at all positions of 50.00 % of the responses" in text
    assert text.count("Theorem 1 as a gauge") == 2  # not for DPPO


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


def test_a_run_that_logged_little_still_gets_its_page(tmp_path, capsys):
    make_run(tmp_path / "a", 0, DPPO)
    for name in ("trainer_state.json", "run.json", "trust_region_tokens.jsonl"):
        (tmp_path / "a" / name).unlink()
    about = {"command": "python train.py --beta '<0>'", "versions": {"trl": "1.16.0", "torch": "2.10"}}
    (tmp_path / "a" / "run.json").write_text(json.dumps(about))
    main([str(tmp_path / "a")])
    assert capsys.readouterr().out.split() == [str(tmp_path / "a" / "report.html")]
    text = (tmp_path / "a" / "report.html").read_text()
    assert "<td>python train.py --beta &#39;&lt;0&gt;&#39;</td>" in text
    assert "<td>trl 1.16.0, torch 2.10</td>" in text
    assert re.findall("<h2>(.*?)</h2>", text) == ["The run", "By position"]  # no empty section, no selector


def test_the_outcome_comes_first(tmp_path):
    make_run(tmp_path / "a")
    accuracy = {"greedy": 0.5, "avg_at_16": 0.25, "avg_at_16_stderr": 0.01}
    (tmp_path / "a" / "results.json").write_text(
        json.dumps({"before": accuracy, "after": {**accuracy, "greedy": 0.875}})
    )
    (run,) = read_runs([tmp_path / "a"])
    assert (run.about["dataset"], run.about["model"]) == ("sums", "task/seed-0/warm_start")
    main([str(tmp_path / "a")])
    text = (tmp_path / "a" / "report.html").read_text()
    rows = dict(re.findall("<tr><th>(.*?)</th><td>(.*?)</td></tr>", text))
    assert list(rows.items())[:4] == [
        ("held-out accuracy, greedy", "0.500 → 0.875"),
        ("held-out accuracy, avg at 16", "0.250 → 0.250"),
        ("training reward, first and last tenth", "0.200 → 0.800"),
        ("tokens masked", "10.00%"),
    ]
    assert (rows["dataset"], rows["begun"]) == ("sums", run.about["date"])
    assert run.about["date"][:4].isdigit()


def test_the_curves_of_the_model_card_hold_what_was_logged(tmp_path):
    rows = [{"step": s, "reward": s / 10, "completions/mean_length": 5.0, "entropy": None} for s in (2, 4)]
    drawn = [rows, [*rows, {"step": 6, "reward": 0.9, "completions/mean_length": 5.0}], [*rows, {"eval_reward": 1.0}]]
    pixels = []
    for i, history in enumerate(drawn):
        plot_curves(history, tmp_path / f"{i}.png", title="t")
        with Image.open(tmp_path / f"{i}.png") as image:
            pixels.append(np.asarray(image.convert("RGB")))
    assert pixels[0].shape == (780, 1200, 3)
    left, right = slice(0, 600), slice(600, 1200)
    assert (pixels[0][:390, left] != pixels[1][:390, left]).any()  # the reward panel
    assert (pixels[0][390:, right] != pixels[1][390:, right]).any()  # the length panel
    assert (pixels[0] == pixels[2]).all()  # rows of evaluations are not training
