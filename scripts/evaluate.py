"""Evaluate a model: avg@k with standard error, pass@k, maj@k, response length, truncated share.

    python scripts/evaluate.py --model Qwen/Qwen3-1.7B                 # AIME24, 25 and 26 as in the paper
    python scripts/evaluate.py --model outputs/run --benchmarks math-500 my-problems.jsonl --samples 4
    python scripts/evaluate.py --compare outputs/evaluation/a outputs/evaluation/b

The same command again goes on where it was interrupted. Options are the fields of
`cppo_trl.evaluation.command.EvaluationArguments`, also from ``--config FILE.yaml``; see ``docs/evaluation.md``.
"""

import datasets

from cppo_trl.evaluation.command import EvaluationArguments, evaluate_command
from cppo_trl.launch.command import one_line_errors, parse


def main() -> None:
    """Evaluate and print the table."""
    datasets.disable_progress_bars()
    (args,) = parse((EvaluationArguments,))
    print(evaluate_command(args))
    if not args.compare:
        print(f"\n{args.output_dir}: results.json (every number), table.md, generations.jsonl (every answer)")


if __name__ == "__main__":
    with one_line_errors("The same command continues where it stopped."):
        main()
