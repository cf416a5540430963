"""The report's pictures, and training curves, as PNG. Needs matplotlib (the extra ``plots``)."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from cppo_trl.report.panels import FATE_COLOURS, FATE_WORDS, HeatMap, Panel, TokenPlot

mpl.use("Agg")


def plot_curves(
    history: Sequence[Mapping[str, Any]], path: Path, *, title: str = "", evaluation: Mapping[str, float] | None = None
) -> None:
    """Draw reward, masked share by cause, divergence and response length over training.

    Args:
        history: the trainer's log history (``trainer.state.log_history``).
        path: the PNG to write.
        title: of the figure.
        evaluation: held-out accuracy, shown as horizontal lines in the reward's panel.
    """
    rows = [row for row in history if "reward" in row]
    figure = Figure(figsize=(10, 6.5), layout="constrained")
    figure.suptitle(title)
    (reward, masked), (divergence, length) = figure.subplots(2, 2)

    def draw(axes: Any, keys: Mapping[str, str], ylabel: str) -> None:
        for key, label in keys.items():
            points = [(row["step"], row[key]) for row in rows if row.get(key) is not None]
            if points:
                axes.plot(*zip(*points, strict=True), label=label, linewidth=1.2)
        axes.set(xlabel="update", ylabel=ylabel)
        axes.grid(alpha=0.3)

    draw(reward, {"reward": "training reward"}, "reward")
    for i, (label, value) in enumerate((evaluation or {}).items()):
        reward.axhline(value, linestyle="--", color=f"C{i + 1}", label=label)
    causes = {"cppo/masked_by_threshold": "threshold", "cppo/masked_by_budget": "budget"}
    draw(masked, causes, "share of tokens masked, by cause")
    draw(divergence, {"cppo/divergence/mean": "mean", "cppo/divergence/p90": "90th percentile"}, "divergence D")
    draw(divergence, {"cppo/delta_b": "budget δ_b"}, "divergence D")
    draw(length, {"completions/mean_length": "mean"}, "response length (tokens)")
    for axes in (reward, masked, divergence, length):
        if axes.get_legend_handles_labels()[0]:  # nothing was masked where all advantages were zero
            axes.legend(fontsize="small")
    figure.savefig(path, dpi=120)


def draw(pictures: Sequence[Panel | HeatMap], path: Path, title: str = "") -> None:
    """Draw panels and heat maps side by side, as PNG."""
    columns = min(len(pictures), 3)
    rows = math.ceil(len(pictures) / columns)
    figure = Figure(figsize=(4.6 * columns, 3.3 * rows), layout="constrained")
    figure.suptitle(title)
    places = figure.subplots(rows, columns, squeeze=False).flatten()
    for axes, picture in zip(places, pictures, strict=False):
        axes.set_title(picture.title, fontsize="medium")
        if isinstance(picture, HeatMap):
            _draw_heat_map(figure, axes, picture)
        else:
            _draw_panel(axes, picture)
    for axes in places[len(pictures) :]:
        axes.remove()
    figure.savefig(path, dpi=150)


def _draw_panel(axes: Any, panel: Panel) -> None:
    if panel.stacked:
        colours, labels = [line.colour for line in panel.lines], [line.label for line in panel.lines]
        axes.stackplot(panel.lines[0].x, *(line.y for line in panel.lines), colors=colours, labels=labels)
    for line in () if panel.stacked else panel.lines:
        style = "--" if line.dashed else "-"
        axes.plot(line.x, line.y, style, color=line.colour, label=line.label, linewidth=1.3, clip_on=False)
        if line.low is not None:
            axes.fill_between(line.x, line.low, line.high, color=line.colour, alpha=0.15, linewidth=0)
    axes.set(xlabel=panel.x_label, ylabel=panel.y_label)
    if min(min(line.y) for line in panel.lines) >= 0:
        axes.set_ylim(0.0, 1.05 * (axes.get_ylim()[1] or 1.0))
    axes.grid(alpha=0.3)
    if panel.share:
        axes.yaxis.set_major_formatter(PercentFormatter(1.0))
    if len(panel.lines) > 1:
        axes.legend(fontsize="x-small", loc="upper right" if panel.stacked else "best")


def _draw_heat_map(figure: Figure, axes: Any, heat_map: HeatMap) -> None:
    image = axes.pcolormesh(
        heat_map.x, heat_map.y, heat_map.z, vmin=0, vmax=heat_map.top, shading="nearest", rasterized=True
    )
    axes.set(xlabel="update", ylabel="relative position")
    figure.colorbar(image, ax=axes, label=heat_map.label, format=PercentFormatter(1.0) if heat_map.share else None)


def draw_tokens(plot: TokenPlot, path: Path) -> None:
    """Draw what each token of a response spends against what it may, as PNG."""
    figure = Figure(figsize=(10, 3.6), layout="constrained")
    axes = figure.subplots()
    edges = [at + 0.5 for at in range(plot.positions + 1)]
    if plot.delta is not None:
        axes.axhline(plot.delta, color="#444", linestyle="--", linewidth=1, label=plot.delta_label)
    if plot.threshold is not None:
        colour = FATE_COLOURS["budget"]
        axes.stairs(plot.threshold, edges, color=colour, label="effective threshold c_t", baseline=None)
        assert plot.delta is not None  # c_t is at most δ
        axes.stairs([plot.delta] * plot.positions, edges, baseline=plot.threshold, fill=True, color=colour, alpha=0.12)
    for fate, (positions, values) in plot.bars.items():
        axes.bar(positions, values, 0.9, color=FATE_COLOURS[fate], edgecolor="#8a9199", lw=0.3, label=FATE_WORDS[fate])
    axes.set(xlabel="token of the response", ylabel=plot.value_label, title=plot.title, xlim=(edges[0], edges[-1]))
    if plot.y_range is not None:
        axes.set_ylim(plot.y_range)
    axes.legend(fontsize="x-small")
    figure.savefig(path, dpi=150)
