"""The report: one HTML page that needs no network, and the same pictures as PNG beside it."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader
from plotly.offline import get_plotlyjs

from cppo_trl.output.run_files import FATES
from cppo_trl.report import figures, interactive
from cppo_trl.report.panels import (
    FATE_COLOURS,
    FATE_WORDS,
    HeatMap,
    Panel,
    curves,
    heat_maps,
    logged_steps,
    masked_by_cause,
    prefix_averages,
    token_plot,
)
from cppo_trl.report.runs import Group, Run, grouped

_TOKEN_COLUMNS = ("divergence", "position_weight", "threshold", "average", "ratio", "weight")


def write_report(runs: Sequence[Run], path: Path) -> list[Path]:
    """Write the page and, beside it, its pictures as PNG.

    Args:
        runs: as from `read_runs`.
        path: of the page; the pictures' names begin with its stem.

    Returns:
        The files written, the page first.
    """
    groups = grouped(runs)
    over_training = curves(groups)
    label = {id(run): group.label for group in groups for run in group.runs}
    details = [run_details(run) for run in runs]
    page = _template().render(
        plotly=get_plotlyjs(),
        groups=groups,
        rows=[_row(run, label[id(run)]) for run in runs],
        curves=[_embedded(panel) for panel in over_training],
        fates=[{"name": name, "words": FATE_WORDS[name], "colour": FATE_COLOURS[name]} for name in FATES],
        runs=[_embedded_run(run, pictures) for run, pictures in zip(runs, details, strict=True)],
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(page, encoding="utf-8")
    return [path, *_write_pictures(path, groups, over_training, dict(zip(map(id, runs), details, strict=True)))]


def run_details(run: Run) -> list[Panel | HeatMap]:
    """The pictures of a single run that are drawn from its position profiles."""
    if not run.profiles:
        return []
    average = prefix_averages(run)
    return [masked_by_cause(run), *heat_maps(run), *([average] if average else [])]


def _write_pictures(
    path: Path, groups: Sequence[Group], over_training: Sequence[Panel], details: Mapping[int, Sequence[Any]]
) -> list[Path]:
    written = []

    def place(name: str) -> Path:
        written.append(path.with_name(f"{path.stem}-{name.replace('/', '-')}.png"))
        return written[-1]

    if over_training:
        figures.draw(over_training, place("curves"))
    for run in (run for group in groups for run in group.runs):
        if details[id(run)]:
            figures.draw(details[id(run)], place(run.name), title=run.name)
        if run.tokens:
            last = [record for record in run.tokens if record["step"] == run.tokens[-1]["step"]]
            figures.draw_tokens(token_plot(last[0], run.config, _token_title(last[0])), place(f"{run.name}-tokens"))
    return written


def _template() -> Any:
    environment = Environment(loader=PackageLoader("cppo_trl.report", "."), autoescape=True)
    environment.policies["json.dumps_kwargs"] = {"ensure_ascii": False, "separators": (",", ":"), "sort_keys": False}
    return environment.get_template("page.html")


def _row(run: Run, group: str) -> dict[str, Any]:
    """A run in the table at the top."""
    reward, masked = run.series("reward"), run.series("cppo/masked")
    updates = max([*reward, *(row["step"] for row in run.profiles)], default=0)
    return {
        "name": run.name,
        "group": group,
        "rule": run.schedule.get("trust region", "not logged"),
        "model": run.model or "not logged",
        "seed": run.config.get("seed", "not logged"),
        "updates": updates,
        "reward": f"{list(reward.values())[-1]:.3f}" if reward else "",
        "masked": f"{100 * sum(masked.values()) / len(masked):.2f} %" if masked else "",
    }


def _embedded(picture: Panel | HeatMap) -> dict[str, Any]:
    draw: Any = interactive.heat_map_figure if isinstance(picture, HeatMap) else interactive.panel_figure
    return {"title": picture.title, "note": picture.note, "figure": _json(draw(picture))}


def _json(figure: Any) -> dict[str, Any]:
    plain = json.loads(figure.to_json())
    plain["layout"].pop("template")  # the same for all: the page sets it once
    return plain


def _embedded_run(run: Run, pictures: Sequence[Panel | HeatMap]) -> dict[str, Any]:
    steps = logged_steps(run.tokens)
    records = [record for record in run.tokens if record["step"] in steps]
    return {
        "name": run.name,
        "pictures": [_embedded(picture) for picture in pictures],
        "theorem": _theorem(run),
        "responses": [_embedded_response(record, run.config) for record in records],
    }


def _theorem(run: Run) -> dict[str, Any] | None:
    ratio, prefixes, responses = (
        list(run.series(f"cppo/theorem/{name}").values()) for name in ("bound_ratio", "prefixes", "responses")
    )
    if not ratio:
        return None
    means = {"ratio": ratio, "prefixes": prefixes, "responses": responses}
    return {
        **{name: sum(values) / len(values) for name, values in means.items()},
        "estimator": run.config.get("cppo_divergence"),
    }


def _token_title(record: Mapping[str, Any]) -> str:
    return f"update {record['step']}, {_masked_tokens(record)} of {len(record['fate'])} tokens masked"


def _masked_tokens(record: Mapping[str, Any]) -> int:
    return sum(FATES[code] in ("threshold", "budget") for code in record["fate"])


def _embedded_response(record: Mapping[str, Any], config: Mapping[str, Any]) -> dict[str, Any]:
    sums = zip(record.get("spent", ()), record.get("weight_sum", ()), strict=True)
    averages = [spent / weight if weight else 0.0 for spent, weight in sums]
    known = {**record, "average": averages} if averages else record
    columns = {name: known[name] for name in _TOKEN_COLUMNS if name in known}
    title = _token_title(record)
    return {
        "title": f"{title}, advantage {record['advantage']:+.3g}",
        "shown": len(record["fate"]),
        "length": record["length"],
        "prompt": record["prompt"],
        "text": record["text"],
        "fate": record["fate"],
        "budget": record.get("delta_b"),
        "columns": {name: [float(f"{value:.4g}") for value in values] for name, values in columns.items()},
        "figure": _json(interactive.token_figure(token_plot(record, config, title))),
    }
