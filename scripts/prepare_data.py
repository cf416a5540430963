"""Make a dataset to train on, and optionally a test split, from sets on the Hub or local files.

    python scripts/prepare_data.py --sources dapo-math-17k --output_dir data/dapo
    python scripts/prepare_data.py --config prepare.yaml --max_prompt_tokens 1024 --tokenizer Qwen/Qwen3-1.7B

Then ``scripts/train.py --dataset_name data/dapo``. Fields are those of `cppo_trl.data.prepare.PrepareArguments`.
"""

import time

from cppo_trl.data.prepare import PrepareArguments, prepare
from cppo_trl.launch.command import one_line_errors, parse


def main() -> None:
    """Prepare as the arguments say, and print the summary."""
    start = time.monotonic()
    (args,) = parse((PrepareArguments,))
    summary = prepare(args)
    print(f"\n{summary.report()}\n\n{args.output_dir}: written after {time.monotonic() - start:.0f} s")


if __name__ == "__main__":
    with one_line_errors("Repeat the command."):
        main()
