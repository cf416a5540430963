r"""Compare the speed of ``cppo_trl.rewards.accuracy_reward`` with that of TRL's, on one batch and in one process.

Both rewards see the same completions and golds, in turns, after one unmeasured call each; the pool's start is given
apart. The batch of LaTeX golds is made here: fractions, radicals, tuples, intervals, sets, polynomials, matrices and
more, half of the answers written in another way, half with other numbers. With a file of worked GSM8K answers
(``example_model_solutions.jsonl`` of https://github.com/openai/grade-school-math), two batches more are timed: its
answers as they are, and with 18 written as 18.00, for a pair of plain integers needs no worker.

    python scripts/benchmark_rewards.py ../shared/data/gsm8k/example_model_solutions.jsonl
"""

import argparse
import json
import logging
import os
import platform
import random
import re
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tqdm import tqdm

from cppo_trl.rewards import accuracy_reward
from cppo_trl.rewards.checker import shared_checker

LATEX = [  # each gold, and another way to write it
    (r"\frac{<a>}{<p>}", r"\dfrac{<a>}{<p>}"),
    (r"-\frac{<a>}{<p>}", r"<-a>/<p>"),
    (r"<a>\sqrt{<p>}", r"\sqrt{<aap>}"),
    (r"\frac{<a>+\sqrt{<p>}}{2}", r"\frac{\sqrt{<p>}+<a>}{2}"),
    (r"\frac{<a>\pi}{<p>}", r"\frac{<a>}{<p>}\pi"),
    (r"(<a>, <b>)", r"\left(<a>,<b>\right)"),
    (r"[-<a>, <b>)", r"-<a> \leq x < <b>"),
    (r"(-\infty, <a>)\cup(<p>, \infty)", r"\left(-\infty,<a>\right)\cup\left(<p>,\infty\right)"),
    (r"\{<a>, <b>, <p>\}", r"\{<p>, <a>, <b>\}"),
    (r"x^2+<a>x-<b>", r"<a>x-<b>+x^2"),
    (r"\frac{x+<a>}{<b>}", r"\frac{1}{<b>}x+\frac{<a>}{<b>}"),
    (r"y=<a>x-<b>", r"y = -<b> + <a>x"),
    (r"\begin{pmatrix}<a>\\<b>\end{pmatrix}", r"\begin{bmatrix} <a> \\ <b> \end{bmatrix}"),
    (r"<a>-<b>i", r"-<b>i+<a>"),
    (r"<a>\text{ cm}^2", r"<a>"),
    (r"2^{<a>}", r"4^{<a>/2}"),
]


def latex_batch(size: int) -> tuple[list[list[dict[str, str]]], list[str]]:
    """Return conversational completions and boxed golds, made of `LATEX` and random numbers; every other is right."""
    rng = random.Random(0)
    completions: list[str] = []
    golds: list[str] = []
    for number in range(size):
        gold, answer = LATEX[number % len(LATEX)]
        a, b, p = rng.randint(2, 60), rng.randint(2, 60), rng.choice([61, 67, 71, 73, 79, 83])
        for text, wrong in ((gold, 0), (answer, number // len(LATEX) % 2)):
            values = {"a": a + wrong, "b": b, "p": p, "-a": -a - wrong, "aap": (a + wrong) ** 2 * p}
            written = re.sub("<(-?[abp]+)>", "{\\1}", text.replace("{", "{{").replace("}", "}}")).format(**values)
            (golds if text is gold else completions).append(rf"\boxed{{{written}}}")
    return [[{"role": "assistant", "content": f"We get {text}."}] for text in completions], golds


def load_batch(path: Path, size: int, decimals: bool) -> tuple[list[list[dict[str, str]]], list[str]]:
    """Return conversational completions and boxed golds; ``decimals`` writes 18 as 18.00 in the completions."""
    completions, golds = [], []
    for line in path.read_text().splitlines():
        row = json.loads(line)
        gold = row["ground_truth"].rpartition("\nA: ")[2]
        for model in (value for value in row.values() if isinstance(value, dict)):
            work, _, answer = model["solution"].rpartition("\nA: ")
            if decimals and answer.isdigit():
                answer += ".00"
            completions.append([{"role": "assistant", "content": f"{work}\n\\boxed{{{answer}}}"}])
            golds.append(rf"\boxed{{{gold}}}")
    if len(golds) < size:
        raise SystemExit(f"{path} holds {len(golds)} answers, fewer than --size {size}")
    return completions[:size], golds[:size]


def seconds(function: Callable[..., Any], *arguments: Any) -> float:
    """Return how long a call takes."""
    began = time.perf_counter()
    function(*arguments)
    return time.perf_counter() - began


def compare(batch: tuple[list, list], repeats: int, bar: tqdm) -> dict[str, Any]:
    """Time both rewards in turns and return their times and the ratio."""
    from trl.rewards import accuracy_reward as trl_reward  # noqa: PLC0415

    verdicts = list(zip(accuracy_reward(*batch), trl_reward(*batch), strict=True))
    bar.update()
    ours_s, trl_s = [], []
    for _ in range(repeats):
        shared_checker().close()  # workers remember what they have read
        accuracy_reward([r"\boxed{0.5}"], ["1/2"])
        ours_s.append(seconds(accuracy_reward, *batch))
        trl_s.append(seconds(trl_reward, *batch))
        bar.update()
    ratios = [theirs / mine for mine, theirs in zip(ours_s, trl_s, strict=True)]
    return {
        "ours_seconds": ours_s,
        "trl_seconds": trl_s,
        "ratio_median": statistics.median(ratios),
        "ratio_min": min(ratios),
        "ratio_max": max(ratios),
        "same_verdict": sum(a == b for a, b in verdicts) / len(verdicts),
    }


def main() -> None:
    """Run the comparison, print it and write it to a file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("answers", type=Path, nargs="?", help="example_model_solutions.jsonl of GSM8K")
    parser.add_argument("--size", type=int, default=4096, help="of a batch of GSM8K answers (default: %(default)s)")
    parser.add_argument("--latex-size", type=int, default=1024, help="of the batch of LaTeX (default: %(default)s)")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--workers", type=int, help="default: one per core this process may use")
    parser.add_argument("--output", type=Path, default=Path("outputs/benchmark_rewards.json"))
    args = parser.parse_args()
    logging.getLogger("math_verify").setLevel(logging.ERROR)

    if args.workers:
        os.environ["CPPO_REWARD_WORKERS"] = str(args.workers)
    start = seconds(accuracy_reward, [r"\boxed{0.5}"], ["1/2"])
    batches = {"LaTeX golds": latex_batch(args.latex_size)}
    if args.answers:
        batches["GSM8K, as written"] = load_batch(args.answers, args.size, decimals=False)
        batches["GSM8K, 18 written as 18.00"] = load_batch(args.answers, args.size, decimals=True)
    with tqdm(total=len(batches) * (args.repeats + 1), unit="run") as bar:
        results = {name: compare(batch, args.repeats, bar) for name, batch in batches.items()}

    report = {
        "batches": {name: len(golds) for name, (_, golds) in batches.items()},
        "workers": shared_checker().workers,
        "machine": f"{platform.machine()}, {len(os.sched_getaffinity(0))} cores, Python {platform.python_version()}",
        "pool_start_seconds": start,
        "results": results,
    }
    for name, result in results.items():
        print(
            f"{name}: {statistics.median(result['ours_seconds']):.3f} s, TRL "
            f"{statistics.median(result['trl_seconds']):.3f} s, {result['ratio_median']:.2f} times as fast "
            f"({result['ratio_min']:.2f} to {result['ratio_max']:.2f}); same verdict {result['same_verdict']:.2%}"
        )
    print(f"pool start {start:.2f} s")
    args.output.parent.mkdir(parents=True, exist_ok=True)
    args.output.write_text(json.dumps(report, indent=2) + "\n")
    print(f"written to {args.output}")


if __name__ == "__main__":
    main()
