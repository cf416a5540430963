r"""Compare the speed of ``cppo_trl.rewards.accuracy_reward`` with that of TRL's, on one batch and in one run.

The batch holds worked answers to GSM8K questions, each with its last line ``A: 18`` written as ``\boxed{18}``; the
file is ``example_model_solutions.jsonl`` of https://github.com/openai/grade-school-math. Both rewards see the same
completions and golds (boxed too), in turns, after one unmeasured call each; the pool's start is given apart. Plain
integers need no worker, so a second batch writes 18 as 18.00 in the completions and sends every pair to the pool.

    python scripts/benchmark_rewards.py ../shared/data/gsm8k/example_model_solutions.jsonl
"""

import argparse
import json
import logging
import os
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tqdm import tqdm

from cppo_trl.rewards import accuracy_reward
from cppo_trl.rewards.checker import shared_checker

STUCK = r"\boxed{9^{9^{9}}}"  # takes longer than any time limit


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
    parser.add_argument("answers", type=Path, help="example_model_solutions.jsonl of GSM8K")
    parser.add_argument("--size", type=int, default=4096)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--workers", type=int, help="default: one per core this process may use")
    parser.add_argument("--output", type=Path, default=Path("outputs/benchmark_rewards.json"))
    args = parser.parse_args()
    logging.getLogger("math_verify").setLevel(logging.ERROR)

    if args.workers:
        os.environ["CPPO_REWARD_WORKERS"] = str(args.workers)
    start = seconds(accuracy_reward, [r"\boxed{0.5}"], ["1/2"])
    batches = {
        "as written": load_batch(args.answers, args.size, decimals=False),
        "18 written as 18.00": load_batch(args.answers, args.size, decimals=True),
    }
    with tqdm(total=len(batches) * (args.repeats + 1), unit="run") as bar:
        results = {name: compare(batch, args.repeats, bar) for name, batch in batches.items()}
    completions, golds = batches["18 written as 18.00"]
    stuck = seconds(accuracy_reward, [*completions[:-1], STUCK], golds)
    extra = stuck - statistics.median(results["18 written as 18.00"]["ours_seconds"])

    report = {
        "batch": args.size,
        "workers": shared_checker().workers,
        "machine": f"{platform.machine()}, {len(os.sched_getaffinity(0))} cores, Python {platform.python_version()}",
        "pool_start_seconds": start,
        "one_stuck_completion_adds_seconds": extra,
        "time_limit_seconds": accuracy_reward.time_limit,
        "results": results,
    }
    for name, result in results.items():
        print(
            f"{name}: {statistics.median(result['ours_seconds']):.3f} s, TRL "
            f"{statistics.median(result['trl_seconds']):.3f} s, {result['ratio_median']:.2f} times as fast "
            f"({result['ratio_min']:.2f} to {result['ratio_max']:.2f}); same verdict {result['same_verdict']:.2%}"
        )
    print(f"pool start {start:.2f} s; one stuck completion adds {extra:.2f} s, limit {accuracy_reward.time_limit} s")
    args.output.parent.mkdir(parents=True, exist_ok=True)
    args.output.write_text(json.dumps(report, indent=2) + "\n")
    print(f"written to {args.output}")


if __name__ == "__main__":
    main()
