"""avg@n, pass@k and maj@n from scores and groups of equal answers, and their markdown table."""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, stdev
from typing import Any

RIGHT = 1.0
Metrics = dict[str, Any]
"""Numbers by name; None for the standard error over a single problem."""


@dataclass(frozen=True)
class Record:
    """The n graded samples of one problem; every list has one entry per sample.

    Attributes:
        benchmark: Name of the benchmark.
        id: Id of the problem, unique within the benchmark.
        solution: Gold answer.
        completions: Texts that the model generated.
        lengths: Tokens per completion, including the end-of-sequence token.
        truncated: Whether a completion reached the token limit.
        answers: Answers extracted from the completions; None where there is none.
        groups: Equal numbers for equal answers; None where there is none.
        scores: Rewards, of which 1.0 is right; None where the reward could not read the gold answer.
    """

    benchmark: str
    id: str
    solution: Any
    completions: list[str]
    lengths: list[int]
    truncated: list[bool]
    answers: list[str | None]
    groups: list[int | None]
    scores: list[float | None]

    @property
    def excluded(self) -> bool:
        """Whether the problem does not count because a sample has no score, as with an unreadable gold answer."""
        return None in self.scores


def pass_at_k(n: int, right: int, k: int) -> float:
    """Probability that k of n samples, drawn without replacement, include a right one: 1 - C(n-c, k) / C(n, k).

    The unbiased estimator of Chen et al. (arXiv 2107.03374, Eq. 1), in exact integers.

    Args:
        n: Number of samples.
        right: Number of right samples, c.
        k: Samples drawn, at most n.
    """
    return 1 - math.comb(n - right, k) / math.comb(n, k)


def maj_at_n(scores: Sequence[float], groups: Sequence[int | None]) -> float:
    """Score of the most frequent answer, on a tie of the one given first; 0 if no sample has an answer."""
    votes = Counter(group for group in groups if group is not None)  # in order of first appearance
    return scores[groups.index(votes.most_common(1)[0][0])] if votes else 0.0


def standard_error(values: Sequence[float]) -> float | None:
    """Standard error of the mean, s / √P with P - 1 in s; None for a single value."""
    return stdev(values) / math.sqrt(len(values)) if len(values) > 1 else None


def problem_metrics(record: Record) -> dict[str, float]:
    """Metrics of one problem that counts: ``avg@n``, ``pass@k`` for k = 1, 2, 4, ... n, ``maj@n``, lengths."""
    scores = [score for score in record.scores if score is not None]
    n, right = len(scores), scores.count(RIGHT)
    ks = sorted({2**i for i in range(n.bit_length())} | {n})
    return {
        f"avg@{n}": fmean(scores),
        **{f"pass@{k}": pass_at_k(n, right, k) for k in ks},
        f"maj@{n}": maj_at_n(scores, record.groups),
        "response_length": fmean(record.lengths),
        "truncated": fmean(record.truncated),
    }


def benchmark_metrics(records: Sequence[Record]) -> Metrics:
    """Means over the problems that count, with standard errors of the accuracies.

    Returns:
        The keys of `problem_metrics`, ``<key>_stderr`` for those with an ``@``, and the numbers of problems that
        count (``problems``) and that do not (``excluded``).

    Raises:
        ValueError: If no problem counts.
    """
    counted = [problem_metrics(record) for record in records if not record.excluded]
    if not counted:
        raise ValueError(f"{records[0].benchmark}: no problem has a readable gold answer; check its solutions.")
    result: Metrics = {"problems": len(counted), "excluded": len(records) - len(counted)}
    for name in counted[0]:
        values = [metrics[name] for metrics in counted]
        result[name] = fmean(values)
        if "@" in name:
            result[f"{name}_stderr"] = standard_error(values)
    return result


def mean_metrics(benchmarks: Sequence[Metrics]) -> Metrics:
    """Unweighted mean over B benchmarks; its standard error is √Σ s_b² / B, as benchmarks are independent."""
    result: Metrics = {}
    for name in benchmarks[0]:
        values = [value for metrics in benchmarks if (value := metrics[name]) is not None]
        if len(values) < len(benchmarks):  # a standard error is unknown
            result[name] = None
        elif name in ("problems", "excluded"):
            result[name] = sum(values)
        else:
            result[name] = math.hypot(*values) / len(values) if name.endswith("_stderr") else fmean(values)
    return result


def all_metrics(records: Sequence[Record]) -> dict[str, Metrics]:
    """`benchmark_metrics` by benchmark and, if there are several, their ``"mean"``."""
    names = dict.fromkeys(record.benchmark for record in records)
    result = {name: benchmark_metrics([record for record in records if record.benchmark == name]) for name in names}
    return {**result, "mean": mean_metrics(list(result.values()))} if len(result) > 1 else result


def table(runs: Sequence[Mapping[str, Any]]) -> str:
    """Return a markdown table with one row per benchmark and run; accuracies in percent ± standard error.

    Args:
        runs: Contents of ``results.json``; of the settings, ``model`` and ``samples`` are used.

    Raises:
        ValueError: If the runs differ in their number of samples.
    """
    samples = sorted({run["settings"]["samples"] for run in runs})
    if len(samples) > 1:
        raise ValueError(f"The runs have {samples} samples per problem: their avg@k are not comparable.")
    names = list(dict.fromkeys([f"avg@{samples[0]}", f"pass@{samples[0]}", f"maj@{samples[0]}"]))
    heads = ["model", "benchmark", "problems", *(f"{name} (%)" for name in names), "tokens", "truncated (%)"]
    lines = [heads, ["---"] * len(heads)]
    for run in runs:
        for benchmark, metrics in run["benchmarks"].items():
            excluded = f" ({metrics['excluded']} excluded)" if metrics["excluded"] else ""
            accuracies = [_percent(metrics[name], metrics[f"{name}_stderr"]) for name in names]
            lengths = [f"{metrics['response_length']:.0f}", f"{100 * metrics['truncated']:.1f}"]
            counted = f"{metrics['problems']}{excluded}"
            lines.append([run["settings"]["model"], benchmark, counted, *accuracies, *lengths])
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def _percent(value: float, stderr: float | None) -> str:
    return f"{100 * value:.2f}" + ("" if stderr is None else f" ± {100 * stderr:.2f}")
