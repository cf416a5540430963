"""Training curves as PNG. Needs matplotlib (``pip install cppo-trl[plots]``)."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.figure import Figure

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
