"""Training curves as PNG, for the model card. Needs matplotlib (the extra ``plots``)."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.figure import Figure

mpl.use("Agg")

_PANELS = (
    ("reward", {"reward": "training reward"}),
    ("share of tokens masked", {"cppo/masked_by_threshold": "threshold", "cppo/masked_by_budget": "budget"}),
    (
        "divergence D",
        {"cppo/divergence/mean": "mean", "cppo/divergence/p90": "90th percentile", "cppo/delta_b": "budget δ_b"},
    ),
    ("response length (tokens)", {"completions/mean_length": "mean"}),
)
"""Label of the y axis, and labels of the lines by key of the log."""


def plot_curves(
    history: Sequence[Mapping[str, Any]], path: Path, *, title: str = "", evaluation: Mapping[str, float] | None = None
) -> None:
    """Plot reward, masked share by cause, divergence and response length over training.

    Args:
        history: the trainer's log history (``trainer.state.log_history``).
        path: PNG file to write.
        title: title of the figure.
        evaluation: held-out accuracies by label, drawn as horizontal lines in the reward panel.
    """
    rows = [row for row in history if "reward" in row]
    figure = Figure(figsize=(10, 6.5), layout="constrained")
    figure.suptitle(title)
    panels = figure.subplots(2, 2).flatten()
    for axes, (ylabel, keys) in zip(panels, _PANELS, strict=True):
        for key, label in keys.items():
            points = [(row["step"], row[key]) for row in rows if row.get(key) is not None]
            if points:
                axes.plot(*zip(*points, strict=True), label=label, linewidth=1.2)
        axes.set(xlabel="update", ylabel=ylabel)
        axes.grid(alpha=0.3)
    for i, (label, value) in enumerate((evaluation or {}).items()):
        panels[0].axhline(value, linestyle="--", color=f"C{i + 1}", label=label)
    for axes in panels:
        if axes.get_legend_handles_labels()[0]:
            axes.legend(fontsize="small")
    figure.savefig(path, dpi=120)
