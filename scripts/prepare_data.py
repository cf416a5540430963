"""Build a dataset to train on, and optionally a test split, from Hub datasets or local files.

    python scripts/prepare_data.py --sources dapo-math-17k --output_dir data/dapo
    python scripts/prepare_data.py --config prepare.yaml --max_prompt_tokens 1024 --tokenizer Qwen/Qwen3-1.7B

Then ``scripts/train.py --dataset_name data/dapo``. Options are the fields of `cppo_trl.data.prepare.PrepareArguments`.
"""

import sys

from trl import TrlParser

from cppo_trl.data.prepare import PrepareArguments, prepare


def main() -> None:
    """Prepare the dataset and print what became of the rows."""
    try:
        (args,) = TrlParser(PrepareArguments).parse_args_and_config()
        summaries = prepare(args)
    except (OSError, ValueError) as error:
        sys.exit(f"prepare_data.py: {error}")
    for split, summary in summaries.items():
        print(f"{split}: {summary.report()}")
    print(f"written to {args.output_dir}")


if __name__ == "__main__":
    main()
