"""Build a dataset to train on, and optionally a test split, from Hub datasets or local files.

    python scripts/prepare_data.py --sources dapo-math-17k --output_dir data/dapo
    python scripts/prepare_data.py --config prepare.yaml --max_prompt_tokens 1024 --tokenizer Qwen/Qwen3-1.7B

Then ``scripts/train.py --dataset_name data/dapo``. Options are the fields of `cppo_trl.data.prepare.PrepareArguments`.
"""

from cppo_trl.data.prepare import PrepareArguments, prepare
from cppo_trl.launch.command import one_line_errors, parse


def main() -> None:
    """Prepare the dataset and print what became of the rows."""
    (args,) = parse((PrepareArguments,))
    for split, summary in prepare(args).items():
        print(f"{split}: {summary.report()}")
    print(f"written to {args.output_dir}")


if __name__ == "__main__":
    with one_line_errors("Repeat the command."):
        main()
