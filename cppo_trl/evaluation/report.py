"""An evaluation in numbers: ``results.json`` and a markdown table, of one run or of several side by side."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from cppo_trl.evaluation.metrics import Record, all_metrics, problem_metrics

RESULTS, TABLE = "results.json", "table.md"


def write_results(
    directory: Path, settings: Mapping[str, Any], records: Sequence[Record], versions: Mapping[str, str]
) -> str:
    """Write ``results.json`` and ``table.md``; return the table.

    ``results.json`` holds ``settings``, ``versions``, ``benchmarks`` (name to metrics; ``mean`` where there are
    several) and ``problems`` (one entry each; an excluded one has no metrics).
    """
    problems = [
        {"benchmark": record.benchmark, "id": record.id, "excluded": record.excluded}
        | ({} if record.excluded else problem_metrics(record))
        for record in records
    ]
    results = {"settings": settings, "benchmarks": all_metrics(records), "versions": versions, "problems": problems}
    (directory / RESULTS).write_text(json.dumps(results, indent=2) + "\n")
    text = table([results])
    (directory / TABLE).write_text(text + "\n")
    return text


def read_results(directory: Path) -> dict[str, Any]:
    """What `write_results` wrote.

    Raises:
        ValueError: If there is none.
    """
    path = directory / RESULTS
    if not path.exists():
        raise ValueError(
            f"{directory} holds no {RESULTS}: the evaluation is not finished, or it is another directory."
        )
    return json.loads(path.read_text())


def table(runs: Sequence[Mapping[str, Any]]) -> str:
    """A markdown table with a row for each benchmark of each run; accuracies in percent, ± standard errors.

    Raises:
        ValueError: If the runs differ in their number of samples.
    """
    samples = {run["settings"]["samples"] for run in runs}
    if len(samples) > 1:
        raise ValueError(f"The runs have {sorted(samples)} samples a problem: their avg@k are not comparable.")
    n = samples.pop()
    names = list(dict.fromkeys([f"avg@{n}", f"pass@{n}", f"maj@{n}"]))
    lines = [
        f"| model | benchmark | problems | {' | '.join(f'{name} (%)' for name in names)} | tokens | truncated (%) |",
        "|---|---|---|" + "---|" * len(names) + "---|---|",
    ]
    for run in runs:
        for benchmark, metrics in run["benchmarks"].items():
            counted = f"{metrics['problems']}" + (f" ({metrics['excluded']} excluded)" * bool(metrics["excluded"]))
            accuracies = [_percent(metrics[name], metrics[f"{name}_stderr"]) for name in names]
            lengths = f"{metrics['response_length']:.0f} | {100 * metrics['truncated']:.1f}"
            cells = [run["settings"]["model"], benchmark, counted, *accuracies, lengths]
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _percent(value: float, stderr: float | None) -> str:
    return f"{100 * value:.2f}" + ("" if stderr is None else f" ± {100 * stderr:.2f}")
