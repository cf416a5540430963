"""Tables and figures of a study, from its records. Needs matplotlib and scipy (the extra ``study``)."""

import math
from collections.abc import Callable, Mapping, Sequence
from itertools import cycle
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.figure import Figure
from scipy import stats

mpl.use("Agg")

Record = Mapping[str, Any]
"""One run, as returned by `study.train`."""
Groups = Mapping[str, Mapping[str, Sequence[Record]]]
"""Records by setting and method, in the order of the study."""
COLLAPSED_BELOW = 0.5
"""A run has collapsed if its last avg@16 is below this share of the warm start's."""
BASELINES = ("dppo", "grpo")


def best(record: Record) -> float:
    """Best held-out avg@16 after the warm start: the paper's selection rule."""
    return max(avg for _, avg, *_ in record["evaluations"][1:])


def last(record: Record) -> float:
    """Last held-out avg@16."""
    return record["evaluations"][-1][1]


def last_greedy(record: Record) -> float:
    """Last held-out greedy accuracy."""
    return record["evaluations"][-1][3]


def collapsed(record: Record) -> bool:
    """Whether the run ended below `COLLAPSED_BELOW` of its start."""
    return last(record) < COLLAPSED_BELOW * record["evaluations"][0][1]


def confidence_interval(values: Sequence[float], level: float = 0.95) -> tuple[float, float]:
    """Mean of independent values and the half-width of its Student-t interval (NaN for a single value)."""
    mean = math.fsum(values) / len(values)
    if len(values) == 1:
        return mean, math.nan
    half = stats.sem(values) * stats.t.ppf((1 + level) / 2, len(values) - 1)
    return mean, float(half)


def paired_difference(
    records: Sequence[Record], others: Sequence[Record], value: Callable[[Record], float]
) -> tuple[float, float, int]:
    """Mean difference over the common seeds, half-width of its 95 % interval, and the number of pairs."""
    by_seed = {record["seed"]: value(record) for record in others}
    differences = [value(record) - by_seed[record["seed"]] for record in records if record["seed"] in by_seed]
    return (*confidence_interval(differences), len(differences)) if differences else (math.nan, math.nan, 0)


def grouped(records: Sequence[Record]) -> Groups:
    """Group records by setting and method."""
    groups: dict[str, dict[str, list[Record]]] = {}
    for record in records:
        groups.setdefault(record["setting"], {}).setdefault(record["method"], []).append(record)
    return groups


def tables(groups: Groups) -> str:
    """One Markdown table per setting; methods by decreasing best avg@16."""
    parts = []
    for setting, methods in groups.items():
        _, avg, _, greedy = next(iter(methods.values()))[0]["evaluations"][0]
        baselines = [name for name in BASELINES if name in methods]
        head = [
            "method",
            "runs",
            "best avg@16",
            "last avg@16",
            "last greedy",
            *(f"best - {name}" for name in baselines),
        ]
        head += ["collapsed", "tokens masked", "by threshold, budget", "mean weight"]
        parts += [f"**{setting}**, warm start: avg@16 {avg:.3f}, greedy {greedy:.3f}", ""]
        parts += ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
        for method, runs in sorted(methods.items(), key=lambda item: -np.mean([best(run) for run in item[1]])):
            row = [method, str(len(runs))]
            row += [_pm(*confidence_interval([value(run) for run in runs])) for value in (best, last, last_greedy)]
            row += ["" if name == method else _difference(runs, methods[name]) for name in baselines]
            row += [f"{sum(map(collapsed, runs))} of {len(runs)}", *_masked(runs)]
            parts.append("| " + " | ".join(row) + " |")
        parts.append("")
    parts.append("± is the half-width of the 95 % Student-t interval over seeds; differences are paired by seed.")
    return "\n".join(parts) + "\n"


def _difference(runs: Sequence[Record], others: Sequence[Record]) -> str:
    mean, half, pairs = paired_difference(runs, others, best)
    return _pm(mean, half, sign="+") + ("" if pairs == len(runs) else f" ({pairs} seeds)") if pairs else ""


def _pm(mean: float, half: float, sign: str = "") -> str:
    return f"{mean:{sign}.3f}" + ("" if math.isnan(half) else f" ± {half:.3f}")


def _masked(runs: Sequence[Record]) -> list[str]:
    """Share masked, shares by cause, and mean weight."""
    active, *masked = (by_position.sum() for by_position in _profile(runs))
    threshold, budget = (100 * share / max(active, 1.0) for share in masked)
    weight = np.mean([x for run in runs for x in run["weight"] if x is not None])
    return [f"{threshold + budget:.2f} %", f"{threshold:.2f} %, {budget:.2f} %", f"{weight:.3f}"]


def _profile(runs: Sequence[Record]) -> list[Any]:
    """By position, over all runs: tokens with an advantage, those masked by the threshold, those by the budget."""
    names = ("active", "masked_by_threshold", "masked_by_budget")
    return [np.sum([run["profile"][name] for run in runs], axis=0) for name in names]


def write_tables(records: Sequence[Record], directory: Path, name: str) -> list[Path]:
    """Write ``name.md``, ``name-accuracy.png`` and ``name-masks.png``; return their paths."""
    if not records:
        return []
    groups = grouped(records)
    page, accuracy, masks = (directory / f"{name}{end}" for end in (".md", "-accuracy.png", "-masks.png"))
    page.write_text(tables(groups))
    _draw(groups, _draw_accuracy, accuracy, "rollout", "Held-out avg@16, mean over seeds")
    _draw(groups, _draw_masks, masks, "relative position", "Share of tokens masked")
    return [page, accuracy, masks]


def _draw(groups: Groups, draw: Callable[..., None], path: Path, xlabel: str, title: str) -> None:
    """Draw one panel per setting, with the same color for a method in all of them."""
    columns = min(len(groups), 2)
    rows = math.ceil(len(groups) / columns)
    figure = Figure(figsize=(4.3 * columns, 3 * rows + 1), layout="constrained")  # the width of a page
    methods = dict.fromkeys(method for setting in groups.values() for method in setting)
    colors = dict(zip(methods, cycle([*mpl.color_sequences["tab10"], "black", "navy"]), strict=False))
    entries: dict[str, Any] = {}
    for i, (setting, runs_of) in enumerate(groups.items()):
        axes = figure.add_subplot(rows, columns, i + 1, title=setting, xlabel=xlabel)
        for method, runs in runs_of.items():
            draw(axes, method, runs, colors[method])
        if not axes.lines:
            axes.text(0.5, 0.5, "none", ha="center", transform=axes.transAxes)
        axes.set_ylim(bottom=0)
        axes.grid(alpha=0.3)
        entries |= dict(zip(*reversed(axes.get_legend_handles_labels()), strict=True))
    figure.suptitle(title)
    figure.legend(entries.values(), entries.keys(), loc="outside lower center", ncols=3)
    figure.savefig(path, dpi=100)


def _draw_accuracy(axes: Any, method: str, runs: Sequence[Record], color: Any) -> None:
    rollouts = [rollout for rollout, *_ in runs[0]["evaluations"]]
    axes.plot(rollouts, np.mean([[p[1] for p in run["evaluations"]] for run in runs], 0), color=color, label=method)


def _draw_masks(axes: Any, method: str, runs: Sequence[Record], color: Any) -> None:
    active, threshold, budget = _profile(runs)
    position = (np.arange(len(active)) + 0.5) / len(active)
    for masked, style, cause in ((threshold, "-", "threshold"), (budget, ":", "budget")):
        if masked.any():
            axes.plot(position, masked / np.maximum(active, 1), style, color=color, label=f"{method}, by {cause}")
