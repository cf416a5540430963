"""Tables and figures of a study, from its JSON lines. Needs matplotlib and scipy (the extra ``study``)."""

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.figure import Figure
from scipy import stats

from cppo_trl.report.panels import positions

mpl.use("Agg")

Line = Mapping[str, Any]
"""One run, as `cppo_trl.study.carry_out` returns it."""
Lines = Sequence[Line]
COLLAPSED_BELOW = 0.5
"""A run has collapsed if its last evaluation is below this share of the warm start's accuracy."""
BASELINES = ("dppo", "grpo")


def best(line: Line) -> float:
    """The best held-out avg@16 of the run's evaluations after the warm start: the paper's selection rule."""
    return max(point[1] for point in line["evaluations"][1:])


def final(line: Line) -> float:
    """The last held-out avg@16."""
    return line["evaluations"][-1][1]


def collapsed(line: Line) -> bool:
    """Whether the run ended below `COLLAPSED_BELOW` of where it began."""
    return final(line) < COLLAPSED_BELOW * line["evaluations"][0][1]


def confidence_interval(values: Sequence[float], level: float = 0.95) -> tuple[float, float]:
    """Mean of independent values and the half-width of its Student-t interval; NaN for a single value."""
    mean = math.fsum(values) / len(values)
    if len(values) == 1:
        return mean, math.nan
    half = stats.sem(values) * stats.t.ppf((1 + level) / 2, len(values) - 1)
    return mean, float(half)


def paired_difference(lines: Lines, others: Lines, value: Callable[[Line], float]) -> tuple[float, float, int]:
    """Mean and half-width of the 95 % interval of the difference over the seeds that both have; their number."""
    by_seed = {line["seed"]: value(line) for line in others}
    differences = [value(line) - by_seed[line["seed"]] for line in lines if line["seed"] in by_seed]
    return (*confidence_interval(differences), len(differences)) if differences else (math.nan, math.nan, 0)


def by_setting_and_method(lines: Lines) -> dict[str, dict[str, list[Line]]]:
    """Runs grouped, in the order of the study."""
    groups: dict[str, dict[str, list[Line]]] = {}
    for line in lines:
        groups.setdefault(line["setting"], {}).setdefault(line["method"], []).append(line)
    return groups


def table(lines: Lines) -> str:
    """Markdown: one table for each setting, methods by falling best accuracy."""
    parts = []
    for setting, methods in by_setting_and_method(lines).items():
        start = next(iter(methods.values()))[0]["evaluations"][0][1]
        baselines = [name for name in BASELINES if name in methods]
        head = ["method", "runs", "best avg@16", "last avg@16"]
        head += [f"best - {name}" for name in baselines]
        head += ["collapsed", "tokens masked", "by threshold, budget", "mean weight"]
        rows = []
        for method, runs in sorted(methods.items(), key=lambda item: -np.mean([best(run) for run in item[1]])):
            row = [method, str(len(runs)), _pm(*confidence_interval([best(run) for run in runs]))]
            row.append(_pm(*confidence_interval([final(run) for run in runs])))
            for name in baselines:
                mean, half, pairs = paired_difference(runs, methods[name], best)
                seeds = "" if pairs == len(runs) else f" ({pairs} seeds)"
                row.append("" if name == method or not pairs else _pm(mean, half, sign="+") + seeds)
            row.append(f"{sum(map(collapsed, runs))} of {len(runs)}")
            profile = _profile(runs)
            active = max(profile["active"].sum(), 1.0)
            shares = [profile[name].sum() / active for name in ("masked_by_threshold", "masked_by_budget")]
            row += [f"{100 * sum(shares):.2f} %", f"{100 * shares[0]:.2f} %, {100 * shares[1]:.2f} %"]
            row.append(f"{np.mean([x for run in runs for x in run['weight'] if x is not None]):.3f}")
            rows.append("| " + " | ".join(row) + " |")
        parts += [f"**{setting}**, warm start {start:.3f}", "", "| " + " | ".join(head) + " |"]
        parts += ["|" + "---|" * len(head), *rows, ""]
    parts.append("± is the half-width of the 95 % Student-t interval over seeds; differences are paired by seed.")
    return "\n".join(parts) + "\n"


def _pm(mean: float, half: float, sign: str = "") -> str:
    return f"{mean:{sign}.3f}" + ("" if math.isnan(half) else f" ± {half:.3f}")


def _profile(runs: Lines) -> dict[str, Any]:
    """Tokens with an advantage, and those of them that were masked, by position, over all runs."""
    names = ("active", "masked_by_threshold", "masked_by_budget")
    return {name: np.sum([run["profile"][name] for run in runs], axis=0) for name in names}


def write_report(lines: Lines, directory: Path, name: str) -> list[Path]:
    """Write ``name.md`` and the figures ``name-*.png``, and return their paths; nothing without a finished run."""
    if not lines:
        return []
    (directory / f"{name}.md").write_text(table(lines))
    written = [directory / f"{name}.md"]
    groups = by_setting_and_method(lines)
    figures = {
        "scores": _scores(groups),
        "accuracy": _panels(groups, "held-out avg@16", _draw_accuracy),
        "masks": _panels(groups, "share of tokens masked", _draw_masks, xlabel="relative position"),
        "length": _panels(groups, "response length (tokens)", _draw_length),
    }
    if len(groups) > 1:
        figures["updates"] = _final_against_updates(lines)
    for kind, figure in figures.items():
        path = directory / f"{name}-{kind}.png"
        figure.savefig(path, dpi=120)
        written.append(path)
    return written


def _panels(
    groups: Mapping[str, Mapping[str, Lines]], ylabel: str, draw: Callable[..., None], xlabel: str = "rollout"
) -> Figure:
    columns = min(len(groups), 3)
    rows = math.ceil(len(groups) / columns)
    figure = Figure(figsize=(5.5 * columns + 1.5, 4 * rows), layout="constrained")
    panels = figure.subplots(rows, columns, squeeze=False).flatten()
    styles = _styles(groups)
    for axes, (setting, methods) in zip(panels, groups.items(), strict=False):
        for method, runs in methods.items():
            draw(axes, method, runs, *styles[method])
        axes.set(title=setting, xlabel=xlabel, ylabel=ylabel)
        axes.grid(alpha=0.3)
        if not axes.lines:
            axes.text(0.5, 0.5, "none", ha="center", transform=axes.transAxes)
    for axes in panels[len(groups) :]:
        axes.remove()
    entries: dict[str, Any] = {}
    for axes in panels[: len(groups)]:
        entries |= dict(zip(*reversed(axes.get_legend_handles_labels()), strict=True))
    figure.legend(entries.values(), entries.keys(), loc="outside right upper", fontsize="small")
    return figure


def _styles(groups: Mapping[str, Mapping[str, Lines]]) -> dict[str, tuple[Any, str]]:
    """Colour and line of each method, the same in all settings."""
    methods = dict.fromkeys(method for setting in groups.values() for method in setting)
    colors = [*mpl.color_sequences["tab10"], *mpl.color_sequences["Dark2"]]
    return {method: (colors[i % len(colors)], "-" if i < 10 else "--") for i, method in enumerate(methods)}


def _scores(groups: Mapping[str, Mapping[str, Lines]]) -> Figure:
    """Every run's best accuracy as a dot; their mean and its 95 % interval."""
    styles = _styles(groups)
    names = list(styles)
    figure = Figure(figsize=(3.2 * len(groups) + 1.5, 0.28 * len(names) + 1.4), layout="constrained")
    panels = figure.subplots(1, len(groups), squeeze=False, sharey=True)[0]
    for axes, (setting, methods) in zip(panels, groups.items(), strict=True):
        for method, runs in methods.items():
            scores, (color, _), y = [best(run) for run in runs], styles[method], names.index(method)
            mean, half = confidence_interval(scores)
            axes.plot(scores, [y] * len(scores), "o", color=color, alpha=0.4, markersize=4)
            axes.errorbar(mean, y, xerr=0 if math.isnan(half) else half, fmt="d", color=color, capsize=3)
        axes.axvline(runs[0]["evaluations"][0][1], color="grey", linestyle=":", linewidth=1)
        axes.set(title=setting, xlabel="best held-out avg@16", xlim=(0, 1))
        axes.grid(alpha=0.3, axis="x")
    panels[0].set_yticks(range(len(names)), names)
    panels[0].invert_yaxis()
    return figure


def _draw_accuracy(axes: Any, method: str, runs: Lines, color: Any, style: str) -> None:
    rollouts = [point[0] for point in runs[0]["evaluations"]]
    _band(axes, rollouts, np.array([[p[1] for p in run["evaluations"]] for run in runs]), method, color, style)


def _draw_length(axes: Any, method: str, runs: Lines, color: Any, style: str) -> None:
    lengths = np.array([run["length"] for run in runs], dtype=float)
    _band(axes, np.arange(1, lengths.shape[1] + 1), lengths, method, color, style)


def _band(axes: Any, x: Any, values: Any, label: str, color: Any, style: str) -> None:
    axes.plot(x, values.mean(0), style, color=color, label=label, linewidth=1.5)
    if len(values) > 1:
        axes.fill_between(x, values.min(0), values.max(0), color=color, alpha=0.12, linewidth=0)


def _draw_masks(axes: Any, method: str, runs: Lines, color: Any, style: str) -> None:
    profile = _profile(runs)
    active = np.maximum(profile["active"], 1)
    threshold, budget = profile["masked_by_threshold"] / active, profile["masked_by_budget"] / active
    if not (threshold + budget).any():
        return
    position = positions(len(active))
    axes.plot(position, threshold, "-", color=color, label=f"{method}, by threshold")
    if budget.any():
        axes.plot(position, budget, ":", color=color, label=f"{method}, by budget")


def _final_against_updates(lines: Lines) -> Figure:
    figure = Figure(figsize=(6.5, 4), layout="constrained")
    axes = figure.subplots()
    points: dict[str, dict[int, list[float]]] = {}
    rate = lines[0]["fields"]["learning_rate"]
    for line in lines:
        if not line["stale_rollouts"] and line["fields"]["learning_rate"] == rate:
            points.setdefault(line["method"], {}).setdefault(line["updates_per_rollout"], []).append(final(line))
    styles = _styles(by_setting_and_method(lines))
    for method, by_updates in points.items():
        if len(by_updates) > 1:
            updates = sorted(by_updates)
            intervals = np.array([confidence_interval(by_updates[u]) for u in updates])
            axes.errorbar(updates, intervals[:, 0], intervals[:, 1], color=styles[method][0], label=method, capsize=3)
    axes.set(xlabel="updates per rollout", ylabel="last held-out avg@16", xscale="log", ylim=(0, 1))
    ticks = sorted({updates for by_updates in points.values() for updates in by_updates})
    axes.set_xticks(ticks, map(str, ticks))
    axes.minorticks_off()
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small")
    return figure
