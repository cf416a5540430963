"""The pictures hold the numbers that were logged."""

import json

import numpy as np
import pytest
from PIL import Image

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
