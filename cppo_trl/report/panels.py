"""What each picture of the report shows: numbers from the logs, before any plotting library."""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from cppo_trl.output.run_files import FATES
from cppo_trl.report.runs import Group, Run

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#444444")  # Okabe and Ito
FATE_COLOURS = dict(
    zip(FATES, ("#9ecae1", "#c7ccd1", "#e9b949", "#d55e00", "#8e44ad", "#eceff1", "#ffffff"), strict=True)
)
FATE_WORDS = dict(
    zip(
        FATES,
        (
            "kept, toward μ",
            "kept, within the limits",
            "reweighted",
            "masked by the threshold",
            "masked by the budget",
            "advantage zero",
            "not the policy's own",
        ),
        strict=True,
    )
)
_COLUMNS = 120
"""Most columns of a heat map: updates are summed over so many rollouts that there are no more."""
_PHASES = 5
"""Parts of the training that the prefix average is drawn for."""
_BRIGHTEST = 0.98
"""Quantile of a heat map's cells from which on they are brightest: a few outliers would darken the rest."""
_HEAT_NOTE = (
    "from left to right over training, from bottom to top from first to last token of a response; the highest "
    "fiftieth of the cells share the brightest colour"
)
_ACCURACY = re.compile(r"eval_(.*/)?avg@\d+$")


@dataclass(frozen=True)
class Line:
    """A line, with the band around it where it stands for several runs."""

    label: str
    x: Sequence[float]
    y: Sequence[float]
    colour: str
    low: Sequence[float] | None = None
    high: Sequence[float] | None = None
    dashed: bool = False


@dataclass(frozen=True)
class Panel:
    """Lines over a common axis."""

    name: str
    title: str
    note: str
    """how to read it"""
    lines: Sequence[Line]
    y_label: str
    x_label: str = "update"
    stacked: bool = False
    share: bool = False
    """whether y is a share, to be shown in percent"""


@dataclass(frozen=True)
class HeatMap:
    """A quantity over training and relative position."""

    name: str
    title: str
    note: str
    x: Sequence[float]
    y: Sequence[float]
    z: Any
    """``(len(y), len(x))``, NaN where there is nothing to average over"""
    top: float
    """the brightest colour's value"""
    label: str
    share: bool = False


@dataclass(frozen=True)
class TokenPlot:
    """The paper's Figure 3 from real data: what each token spends against what it may."""

    title: str
    value_label: str
    bars: Mapping[str, tuple[Sequence[int], Sequence[float]]]
    """fate to the positions, counted from 1, and the divergences of its tokens"""
    threshold: Sequence[float] | None
    """c_t at every position, or None for a rule that has no threshold of its own at each"""
    delta: float | None
    positions: int
    delta_label: str = "threshold δ"

    @property
    def y_range(self) -> tuple[float, float] | None:
        """A few δ around the limits: taller bars and deeper thresholds are cut, not the scale."""
        if self.delta is None:
            return None
        highest = max(value for _, values in self.bars.values() for value in values)
        lowest = min(self.threshold or [0.0])
        return max(1.1 * lowest, -self.delta) if lowest < 0 else 0.0, min(
            max(1.1 * highest, 1.5 * self.delta), 4 * self.delta
        )


_CURVES = (
    ("reward", "Training reward", "mean reward of the rollouts", "reward", "reward"),
    ("length", "Response length", "mean over the rollouts", "completions/mean_length", "tokens"),
    ("entropy", "Entropy", "of the policy's next-token distribution, mean over tokens", "entropy", "nats"),
    (
        "threshold",
        "Masked by the threshold",
        "share of the tokens with an advantage that left the loss because w_t D_t > δ (or the rule's own limit)",
        "cppo/masked_by_threshold",
        "share",
    ),
    (
        "budget",
        "Masked by the budget",
        "share of the tokens with an advantage that left the loss because their prefix had drifted",
        "cppo/masked_by_budget",
        "share",
    ),
    ("weight", "Mean weight", "of a token's surrogate: 1 less the masked share, for a mask", "cppo/weight", "weight"),
    ("divergence", "Divergence", "mean over all tokens, kept or masked", "cppo/divergence/mean", "D_t"),
    (
        "delta_b",
        "Effective budget",
        "mean over responses, after the calibration to each of them (Eq. 22)",
        "cppo/delta_b",
        "δ_b",
    ),
    (
        "mismatch",
        "Rollout mismatch",
        "mean divergence before the weights have moved since the rollout: 0 where one model samples and trains, else "
        "the numerical noise between engine and trainer; thresholds have to lie far above it",
        "cppo/rollout_mismatch",
        "D_t",
    ),
    (
        "theorem",
        "Within the constraints of Theorem 1",
        "share of the positions with w_t D_t ≤ δ and S_t ≤ δ_b W_t; explained below, with each run",
        "cppo/theorem/prefixes",
        "share",
    ),
)
"""Name, title, note, key of the log and y label of the pictures over training."""


def curves(groups: Sequence[Group]) -> list[Panel]:
    """The logged scalars over training: a line for each group, with a band over its runs."""
    panels = []
    for name, title, note, key, y_label in _CURVES:
        lines = [_group_line(group, key, group.label, COLOURS[i % len(COLOURS)]) for i, group in enumerate(groups)]
        panels.append(Panel(name, title, note, [line for line in lines if line], y_label, share=y_label == "share"))
    panels.insert(1, _accuracy(groups))
    return [panel for panel in panels if panel.lines]


def _accuracy(groups: Sequence[Group]) -> Panel:
    """avg@k on each benchmark where it was logged, else the reward of TRL's own evaluation."""
    logged = {key for group in groups for run in group.runs for row in run.history for key in row}
    keys = sorted(key for key in logged if _ACCURACY.match(key))
    title, note = "Held-out accuracy", "share of right answers to held-out problems"
    if not keys:
        keys, title, note = ["eval_reward"], "Held-out reward", "mean reward on held-out problems"
    lines = []
    for i, (group, key) in enumerate((group, key) for group in groups for key in keys):
        label = f"{group.label}: {key.removeprefix('eval_')}" if len(keys) > 1 else group.label
        line = _group_line(group, key, label, COLOURS[i % len(COLOURS)])
        lines += [line] if line else []
    return Panel("accuracy", title, note, lines, keys[0].removeprefix("eval_"))


def _group_line(group: Group, key: str, label: str, colour: str) -> Line | None:
    """Mean, least and greatest over the runs, at the updates that all of them logged."""
    if key == "cppo/masked_by_budget" and not any(run.series("cppo/delta_b") for run in group.runs):
        return None  # there is no budget
    series = [run.series(key) for run in group.runs]
    steps = sorted(set.intersection(*map(set, series)))
    if not steps:
        return None
    values = np.array([[each[step] for step in steps] for each in series])
    low, high = (values.min(0).tolist(), values.max(0).tolist()) if len(series) > 1 else (None, None)
    return Line(label, steps, values.mean(0).tolist(), colour, low, high)


def by_training_and_position(run: Run) -> tuple[list[float], dict[str, Any]]:
    """The position profiles, summed over as few rollouts as give no more than 120 columns.

    Returns:
        The last update of each column, and ``(positions, columns)`` sums by name.
    """
    per_rollout = run.updates_per_rollout
    last = max(row["step"] for row in run.profiles)
    size = per_rollout * -(-last // (per_rollout * _COLUMNS))
    columns: dict[int, list[Mapping[str, Any]]] = {}
    for row in run.profiles:
        columns.setdefault((row["step"] - 1) // size, []).append(row)
    names = [name for name in run.profiles[0] if name != "step"]
    sums = {n: np.array([np.sum([row[n] for row in rows], 0) for rows in columns.values()]).T for n in names}
    return [min((column + 1) * size, last) for column in columns], sums


def _mean(part: Any, whole: Any) -> Any:
    return np.divide(part, whole, out=np.full(np.shape(part), np.nan), where=np.asarray(whole) > 0)


def positions(bins: int) -> list[float]:
    """The middles of the equal parts of a response."""
    return ((np.arange(bins) + 0.5) / bins).tolist()


def masked_by_cause(run: Run) -> Panel:
    """Share of the tokens masked, over training, by cause."""
    steps, sums = by_training_and_position(run)
    lines = []
    for cause in ("threshold", "budget"):
        share = np.nan_to_num(_mean(sums[f"masked_by_{cause}"].sum(0), sums["active"].sum(0)))
        if cause == "threshold" or share.any():
            lines.append(Line(f"by the {cause}", steps, share.tolist(), FATE_COLOURS[cause]))
    note = "share of the tokens with an advantage that left the loss, one cause on top of the other"
    return Panel("masked", "Tokens masked, by cause", note, lines, "share masked", stacked=True, share=True)


def heat_maps(run: Run) -> list[HeatMap]:
    """Masked shares and mean divergence over training and relative position."""
    steps, sums = by_training_and_position(run)
    position = positions(len(sums["tokens"]))
    maps = []
    for name, title, whole, label in (
        ("masked_by_threshold", "Masked by the threshold, by position", "active", "share"),
        ("masked_by_budget", "Masked by the budget, by position", "active", "share"),
        ("divergence", "Mean divergence, by position", "tokens", "D_t"),
    ):
        values = _mean(sums[name], sums[whole])
        top = float(np.nanquantile(values, _BRIGHTEST))
        if top > 0:
            maps.append(HeatMap(name, title, _HEAT_NOTE, steps, position, values, top, label, label == "share"))
    return maps


def prefix_averages(run: Run) -> Panel | None:
    """The mean prefix average S_t / W_t by position, for parts of the training, against the mean budget."""
    budgets = list(run.series("cppo/delta_b").values())
    if not budgets:
        return None
    steps, sums = by_training_and_position(run)
    parts = np.array_split(np.arange(sums["tokens"].shape[1]), min(_PHASES, sums["tokens"].shape[1]))
    position = positions(len(sums["tokens"]))
    shades = ("#c6dbef", "#9ecae1", "#6baed6", "#3182bd", "#08519c")
    lines = []
    for i, part in enumerate(parts):
        mean = _mean(sums["prefix_average"][:, part].sum(1), sums["tokens"][:, part].sum(1))
        label = f"to update {steps[part[-1]]}"
        lines.append(Line(label, position, mean.tolist(), shades[i + len(shades) - len(parts)]))
    mean_budget = float(np.mean(budgets))
    lines.append(Line("mean budget δ_b", [0, 1], [mean_budget] * 2, FATE_COLOURS["budget"], dashed=True))
    note = (
        "mean of S_t / W_t over the responses. Below the dashed line the budget has nothing to say to the average "
        "response; single responses lie above it, and short prefixes may, by the slack δ that the rule grants"
    )
    title = "Prefix average against budget"
    return Panel("prefix", title, note, lines, "S_t / W_t", "relative position in the response")


def token_plot(record: Mapping[str, Any], config: Mapping[str, Any], title: str) -> TokenPlot:
    """The figure of one logged response.

    Args:
        record: a line of ``trust_region_tokens.jsonl``.
        config: the run's configuration.
        title: of the figure.
    """
    delta = config.get("cppo_delta")
    of_the_mean = " of the response's mean" if config.get("trust_region") == "trm_avg" else ""
    weights = record.get("position_weight", [1.0] * len(record["fate"]))
    spent = [w * d for w, d in zip(weights, record["divergence"], strict=True)]
    bars: dict[str, tuple[list[int], list[float]]] = {}
    for at, (code, value) in enumerate(zip(record["fate"], spent, strict=True), 1):
        positions, values = bars.setdefault(FATES[code], ([], []))
        positions.append(at)
        values.append(value)
    ordered = {fate: bars[fate] for fate in FATES if fate in bars}
    label = "w_t D_t" if "position_weight" in record else "D_t"
    delta = None if delta is None or np.isinf(delta) else delta
    return TokenPlot(title, label, ordered, record.get("threshold"), delta, len(spent), f"threshold δ{of_the_mean}")


def logged_steps(records: Iterable[Mapping[str, Any]], most: int = 5) -> list[int]:
    """The updates whose logged responses are shown: first, last, and evenly between."""
    steps = sorted({record["step"] for record in records})
    if len(steps) <= most:
        return steps
    return [steps[round(i * (len(steps) - 1) / (most - 1))] for i in range(most)]
