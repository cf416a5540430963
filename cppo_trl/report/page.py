"""The report: one HTML page that needs no network."""

import operator
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader

from cppo_trl.output.run_files import FATES
from cppo_trl.report.pictures import (
    FATE_COLORS,
    FATE_WORDS,
    OUTCOMES,
    TRUST_REGION,
    accuracies,
    curves,
    embed,
    run_pictures,
    shown_steps,
    token_figure,
)
from cppo_trl.report.runs import Run, grouped

_TOKEN_COLUMNS = ("divergence", "position_weight", "threshold", "average", "ratio", "weight")
_THEOREM = ("prefixes", "responses", "bound_ratio", "deduction", "range")


def write_report(runs: Sequence[Run], path: Path) -> None:
    """Write the page of the runs, as from `read_runs`, to ``path``."""
    groups = grouped(runs)
    labels = {run.name: group.label for group in groups for run in group.runs}
    scalars = [*accuracies(groups), *OUTCOMES]
    environment = Environment(loader=PackageLoader("cppo_trl.report", "."), autoescape=True)
    environment.filters["embed"] = embed
    environment.policies["json.dumps_kwargs"] = {"ensure_ascii": False, "separators": (",", ":")}
    page = environment.get_template("page.html").render(
        outcome=_table({run.name: _outcome(run, [key for _, key, _, _ in scalars]) for run in runs}),
        facts=_table({run.name: _facts(run, labels[run.name] if len(groups) > 1 else "") for run in runs}),
        outcomes=curves(groups, scalars),
        trust_region=curves(groups, TRUST_REGION),
        fates=[{"name": name, "words": FATE_WORDS[name], "color": FATE_COLORS[name]} for name in FATES],
        runs=[_sections(run) for run in runs],
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(page, encoding="utf-8")


def _table(columns: Mapping[str, Mapping[str, str]]) -> dict[str, list[str]]:
    """The cells of each row, a column for each run; rows that are empty for all runs are left out."""
    names = dict.fromkeys(name for column in columns.values() for name in column)
    rows = {name: [column.get(name, "") for column in columns.values()] for name in names}
    return {name: cells for name, cells in rows.items() if any(cells)}


def _outcome(run: Run, keys: Sequence[str]) -> dict[str, str]:
    """What was learned, before → after, and how much was masked."""
    cells = {}
    for name, value in run.results.get("before", {}).items():
        if not name.endswith("stderr") and name in run.results.get("after", {}):
            cells[f"held-out accuracy, {name.replace('_', ' ')}"] = f"{value:.3f} → {run.results['after'][name]:.3f}"
    for key in keys:
        values = list(run.series(key).values())
        tenth = 1 if key.startswith("eval_") else max(1, len(values) // 10)
        name = key.removeprefix("eval_") if key != "reward" else "training reward, first and last tenth"
        if len(values) > 1:
            cells[name] = f"{sum(values[:tenth]) / tenth:.3f} → {sum(values[-tenth:]) / tenth:.3f}"
    masked = run.series("cppo/masked").values()
    return {**cells, "tokens masked": f"{sum(masked) / len(masked):.2%}" if masked else ""}


def _facts(run: Run, group: str) -> dict[str, str]:
    steps = [*run.series("reward"), *(row["step"] for row in run.profiles)]
    return {
        "trust region": run.about.get("schedule", {}).get("trust region", ""),
        "group": group,
        "model": run.about.get("model", ""),
        "dataset": run.about.get("dataset", ""),
        "updates": str(max(steps, default=0)),
        "seed": str(run.config.get("seed", "")),
        "begun": run.about.get("date", ""),
        "command": run.about.get("command", ""),
        "versions": ", ".join(f"{name} {version}" for name, version in run.about.get("versions", {}).items()),
    }


def _sections(run: Run) -> dict[str, Any]:
    """What the page shows of a single run."""
    steps = shown_steps(run.tokens)
    theorem = {name: list(run.series(f"cppo/theorem/{name}").values()) for name in _THEOREM}
    vacuous = sum(map(operator.gt, theorem["deduction"], theorem["range"]))
    return {
        "name": run.name,
        "config": run.config,
        "pictures": run_pictures(run),
        "theorem": {**theorem, "vacuous": vacuous},
        "responses": [_response(record, run.config) for record in run.tokens if record["step"] in steps],
    }


def _response(record: Mapping[str, Any], config: Mapping[str, Any]) -> dict[str, Any]:
    masked = sum(FATES[code] in ("threshold", "budget") for code in record["fate"])
    shown, step, advantage = len(record["fate"]), record["step"], record["advantage"]
    sums = zip(record.get("spent", ()), record.get("weight_sum", ()), strict=True)
    averages = [spent / weight if weight else 0.0 for spent, weight in sums]
    known = {**record, "average": averages} if averages else record
    return {
        "title": f"update {step}, {masked} of {shown} tokens masked, advantage {advantage:+.3g}",
        **{name: record[name] for name in ("length", "prompt", "text", "fate")},
        "budget": record.get("delta_b"),
        "columns": {n: [float(f"{value:.4g}") for value in known[n]] for n in _TOKEN_COLUMNS if n in known},
        "figure": embed(token_figure(record, config), "webp"),
    }
