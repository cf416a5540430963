"""The report: one HTML page that needs no network."""

import base64
import gzip
import json
import operator
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader
from plotly.offline import get_plotlyjs

from cppo_trl.output.run_files import FATES
from cppo_trl.report.pictures import FATE_COLORS, FATE_WORDS, curves, run_pictures, shown_steps, token_figure
from cppo_trl.report.runs import Run, grouped

_TOKEN_COLUMNS = ("divergence", "position_weight", "threshold", "average", "ratio", "weight")
_THEOREM = ("prefixes", "responses", "bound_ratio", "deduction", "range")


def write_report(runs: Sequence[Run], path: Path) -> None:
    """Write the page of the runs, as from `read_runs`, to ``path``."""
    groups = grouped(runs)
    environment = Environment(loader=PackageLoader("cppo_trl.report", "."), autoescape=True)
    environment.filters["plain"] = lambda figure: json.loads(figure.to_json())  # for `tojson`, which escapes it
    environment.policies["json.dumps_kwargs"] = {"ensure_ascii": False, "separators": (",", ":")}
    page = environment.get_template("page.html").render(
        plotly=base64.b64encode(gzip.compress(get_plotlyjs().encode())).decode(),
        rows=[_row(run, group.label) for group in groups for run in group.runs],
        groups=len(groups),
        curves=curves(groups),
        fates=[{"name": name, "words": FATE_WORDS[name], "color": FATE_COLORS[name]} for name in FATES],
        runs=[_sections(run) for run in runs],
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(page, encoding="utf-8")


def _row(run: Run, group: str) -> dict[str, Any]:
    """A run in the table at the top."""
    reward, masked = list(run.series("reward").values()), run.series("cppo/masked").values()
    return {
        "run": run.name,
        "group": group,
        "trust region": run.schedule.get("trust region", "not logged"),
        "model": run.model or "not logged",
        "seed": run.config.get("seed", "not logged"),
        "updates": max([*run.series("reward"), *(row["step"] for row in run.profiles)], default=0),
        "reward, first → last": f"{reward[0]:.3f} → {reward[-1]:.3f}" if reward else "",
        "tokens masked": f"{sum(masked) / len(masked):.2%}" if masked else "",
    }


def _sections(run: Run) -> dict[str, Any]:
    """What the page shows of a single run."""
    steps = shown_steps(run.tokens)
    theorem = {name: list(run.series(f"cppo/theorem/{name}").values()) for name in _THEOREM}
    vacuous = sum(map(operator.gt, theorem["deduction"], theorem["range"]))
    return {
        "name": run.name,
        "config": run.config,
        "command": run.command,
        "versions": ", ".join(f"{name} {version}" for name, version in run.versions.items()),
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
        "figure": json.loads(token_figure(record, config).to_json()),
    }
