"""What the paired study says: contrasts between rules at equal drift, with intervals by trajectory, and the figure."""

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from matplotlib import colormaps
from matplotlib.figure import Figure
from scipy import stats

MARGIN = 0.005
"""Differences in J within which two rules count as equivalent."""
FIELDS = ("gain", "kl", "tv", "drift", "surrogate", "masked", "greedy")
"""Of an arm in a row."""
CONTRASTS = (
    ("cppo", "dppo"),
    ("cppo", "grpo"),
    ("dppo", "grpo"),
    ("cppo", "weight"),
    ("cppo", "budget"),
    ("weight", "dppo"),
    ("budget", "dppo"),
    ("amplified", "dppo"),
    ("shuffled", "dppo"),
    ("reversed", "dppo"),
    ("weight", "reversed"),
    ("amplified", "reversed 0.2"),
    *((rule, "dppo") for rule in ("soft gate", "vaco", "drpo", "ipo", "trm_max", "trm_avg", "minpro", "cispo")),
)
"""Which rules are held against each other; minuend first."""
LABELS = {
    "cppo": "CPPO",
    "dppo": "DPPO",
    "grpo": "GRPO's clip",
    "budget": "budget alone",
    "weight": "position weight alone",
    "amplified": "weight, w_min 0.2",
    "shuffled": "weight, shuffled",
    "reversed": "weight, reversed",
    "reversed 0.2": "weight, reversed, w_min 0.2",
    "none": "no trust region",
    "soft gate": "CPPO's soft gate",
    "vaco": "VACO",
    "drpo": "DRPO",
    "ipo": "IPO's mask",
    "trm_max": "TRM-Max",
    "trm_avg": "TRM-Avg",
    "minpro": "MinPRO",
    "cispo": "CISPO",
}

Rows = Sequence[Mapping[str, Any]]


class Interval(NamedTuple):
    """A mean over trajectories."""

    mean: float
    half: float
    """half of the 95 % interval"""
    trajectories: int
    units: int

    def __str__(self) -> str:
        return f"{self.mean:+.4f} ± {self.half:.4f}"

    @property
    def verdict(self) -> str:
        """``above`` or ``below`` where the interval excludes 0, ``equal`` where it lies within `MARGIN`, or both."""
        words = []
        if abs(self.mean) > self.half:
            words.append("above" if self.mean > 0 else "below")
        if abs(self.mean) + self.half <= MARGIN:
            words.append("equivalent")
        return ", ".join(words) or "undecided"


def interval(values: Mapping[int, Sequence[float]]) -> Interval | None:
    """The mean of the trajectories' means, with a t interval; None for fewer than three trajectories."""
    means = [float(np.mean(of)) for of in values.values() if of]
    if len(means) < 3:
        return None
    half = stats.t.ppf(0.975, len(means) - 1) * np.std(means, ddof=1) / math.sqrt(len(means))
    return Interval(float(np.mean(means)), float(half), len(means), sum(map(len, values.values())))


def ladder_of(arm: str) -> str:
    """The rule of an arm: its name without the step."""
    return arm.rpartition(" ")[0] or arm


def ladders(row: Mapping[str, Any]) -> dict[str, list[dict[str, float]]]:
    """What was measured in a unit, by rule."""
    found: dict[str, list[dict[str, float]]] = defaultdict(list)
    for arm, values in row["arms"].items():
        found[ladder_of(arm)].append(dict(zip(FIELDS, values, strict=True)))
    return found


def curve(steps: Iterable[Mapping[str, float]], against: str) -> tuple[np.ndarray, np.ndarray]:
    """A ladder as drift and gain, by drift; the drift is √KL, or the surrogate as it is."""
    points = sorted((math.sqrt(max(s["kl"], 0.0)) if against == "kl" else s[against], s["gain"]) for s in steps)
    x, y = np.array(points).T
    return x, y


def difference(row: Mapping[str, Any], rule: str, other: str, against: str) -> float | None:
    """Gain of one rule minus another's at equal drift, averaged over where both ladders reach; None without overlap.

    Both ladders are interpolated linearly at nine places; nothing is extrapolated.
    """
    steps = ladders(row)
    if rule not in steps or other not in steps:
        return None
    (x, y), (u, v) = curve(steps[rule], against), curve(steps[other], against)
    low, high = max(x[0], u[0]), min(x[-1], u[-1])
    if low >= high:
        return None
    places = np.linspace(low, high, 9)
    return float(np.mean(np.interp(places, x, y) - np.interp(places, u, v)))


def contrast(rows: Rows, rule: str, other: str, against: str = "kl") -> Interval | None:
    """`difference` over the units of one setting, with an interval by trajectory."""
    by_trajectory: dict[int, list[float]] = defaultdict(list)
    for row in rows:
        found = difference(row, rule, other, against)
        if found is not None:
            by_trajectory[row["trajectory"]].append(found)
    return interval(by_trajectory)


def settings(rows: Rows) -> dict[str, list[Mapping[str, Any]]]:
    """The rows by setting."""
    found: dict[str, list[Mapping[str, Any]]] = defaultdict(list)
    for row in rows:
        found[row["setting"]].append(row)
    return found


def summary(rows: Rows) -> str:
    """The settings in Markdown: J before, what the best step of a ladder gains, and contrasts at equal KL."""
    pairs = (("cppo", "dppo"), ("cppo", "grpo"), ("weight", "dppo"), ("budget", "dppo"))
    heads = [f"{LABELS[rule]} − {LABELS[other]}" for rule, other in pairs]
    lines = [f"| setting (units) | J | best gain, none | {' | '.join(heads)} |", f"|---|---|---|{'---|' * len(pairs)}"]
    for setting, found in settings(rows).items():
        if "cppo" not in ladders(found[0]):
            continue
        gains = {arm: float(np.mean([row["arms"][arm][0] for row in found])) for arm in found[0]["arms"]}
        cells = [
            f"{np.mean([row['before'][0] for row in found]):.2f}",
            f"{max(gains.values()):+.3f}, {gains['none']:+.3f}",
        ]
        cells += [str(contrast(found, *pair) or "–") for pair in pairs]
        lines.append(f"| {setting} ({len(found)}) | {' | '.join(cells)} |")
    return "\n".join(lines)


def tables(rows: Rows, own: str | None = None) -> str:
    """Contrasts and arms of each setting, in Markdown."""
    pairs = [(own, "cppo"), (own, "dppo"), ("cppo", "dppo")] if own else CONTRASTS
    lines = []
    for setting, found in settings(rows).items():
        before = np.mean([row["before"] for row in found], 0)
        trajectories = len({row["trajectory"] for row in found})
        lines += [
            f"## {setting}",
            f"\n{len(found)} units of {trajectories} trajectories; J {before[0]:.3f}, greedy {before[1]:.3f}.\n",
            "| | at equal KL | | at equal surrogate | units |",
            "|---|---|---|---|---|",
        ]
        for rule, other in pairs:
            at_kl, at_surrogate = contrast(found, rule, other), contrast(found, rule, other, "surrogate")
            if at_kl or at_surrogate:
                label = f"{LABELS.get(rule, rule)} − {LABELS.get(other, other)}"
                verdict, units = (at_kl.verdict, at_kl.units) if at_kl else ("no overlap", 0)
                lines.append(f"| {label} | {at_kl or '–'} | {verdict} | {at_surrogate or '–'} | {units} |")
        lines += ["", "| arm | gain in J | KL, nats | sequence TV | masked | greedy |", "|---|---|---|---|---|---|"]
        for arm in found[0]["arms"]:
            gain, kl, tv, _, _, masked, greedy = np.mean([row["arms"][arm] for row in found], 0)
            lines.append(f"| {arm} | {gain:+.4f} | {kl:.4f} | {tv:.3f} | {masked:.3f} | {greedy:.3f} |")
        lines.append("")
    return "\n".join(lines)


def draw(rows: Rows, path: Path) -> None:
    """Gain in J against drift: a panel for each setting, a line for each rule's ladder, 95 % bands by trajectory."""
    enough = {name: units for name, units in settings(rows).items() if len({row["trajectory"] for row in units}) > 2}
    columns = math.ceil(math.sqrt(len(enough)))
    lines = math.ceil(len(enough) / columns)
    figure = Figure(figsize=(3.0 * columns + 1.0, 2.9 * lines), layout="constrained")
    panels = figure.subplots(lines, columns, squeeze=False).ravel()
    colors = dict(zip(LABELS, map(colormaps["tab20"], (*range(0, 20, 2), *range(1, 20, 2))), strict=False))
    for axes, (setting, units) in zip(panels, enough.items(), strict=False):
        rules = dict.fromkeys(ladder_of(arm) for arm in units[0]["arms"])
        first = ("cppo", "dppo", "grpo", "none")
        for rule in rules:
            if rule in first or rule not in LABELS or "cppo" not in rules:
                x, y, half = averages(units, rule)
                (line,) = axes.plot(
                    x, y, marker="o", markersize=3, label=LABELS.get(rule, rule), color=colors.get(rule)
                )
                axes.fill_between(x, y - half, y + half, color=line.get_color(), alpha=0.15, linewidth=0)
        axes.axhline(0, color="gray", linewidth=0.8)
        axes.set_title(f"{setting} ({len(units)} units)", fontsize=9)
        axes.set(xlabel="drift, √KL(μ‖π)", ylabel="gain in J")
        axes.grid(alpha=0.3)
        if axes is panels[0] or "cppo" not in rules:
            axes.legend(fontsize=6)
    for axes in panels[len(enough) :]:
        axes.remove()
    figure.savefig(path, dpi=100)


def averages(rows: Rows, rule: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Over the units, for each step of a ladder: √KL, gain, and half of the gain's interval, by drift."""
    points = []
    for arm in (arm for arm in rows[0]["arms"] if ladder_of(arm) == rule):
        gains: dict[int, list[float]] = defaultdict(list)
        for row in rows:
            gains[row["trajectory"]].append(row["arms"][arm][0])
        drift = float(np.mean([math.sqrt(max(row["arms"][arm][1], 0.0)) for row in rows]))
        if (found := interval(gains)) is not None:
            points.append((drift, found.mean, found.half))
    x, y, half = np.array(sorted(points)).T
    return x, y, half
