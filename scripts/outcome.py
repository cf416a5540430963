"""What both quickstarts say of a finished run."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

Log = dict[str, float]


def rollouts_of(output_dir: Path) -> list[Log]:
    """The log of a finished run, an entry for each rollout."""
    history = json.loads((output_dir / "trainer_state.json").read_text(encoding="utf-8"))["log_history"]
    return [row for row in history if "reward" in row]


def mean(logs: Sequence[Log], name: str) -> float:
    """Mean of a logged scalar; where it is missing nothing had an advantage, and it counts as 0."""
    return sum(log.get(name, 0.0) for log in logs) / len(logs)


def rewards(logs: Sequence[Log]) -> dict[str, float]:
    """Training reward of the first and the last rollouts."""
    return {"reward_first_10": mean(logs[:10], "reward"), "reward_last_10": mean(logs[-10:], "reward")}


def masked(logs: Sequence[Log]) -> dict[str, float]:
    """Share of the tokens with an advantage that was masked, in all and by cause."""
    return {name: mean(logs, f"cppo/{name}") for name in ("masked", "masked_by_threshold", "masked_by_budget")}


def markdown(columns: Sequence[str], rows: Mapping[str, Sequence[str]]) -> str:
    """A table of named rows."""
    lines = {"": columns, "---": ["---"] * len(columns), **rows}
    return "\n".join(f"| {name} | {' | '.join(cells)} |" for name, cells in lines.items())
