"""``python -m cppo_trl.rewards audit DATASET``: are the golds of a dataset fit to train on."""

import argparse
import sys
from collections.abc import Sequence

from cppo_trl.rewards.audit import GOLD_COLUMNS, MEANINGS, PROMPT_COLUMNS, audit_golds, load_columns


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns 0 if the data is fit, 1 if not, 2 if it could not be read."""
    parser = argparse.ArgumentParser(prog="python -m cppo_trl.rewards", description=__doc__)
    audit = parser.add_subparsers(required=True).add_parser("audit", help="check the golds of a dataset")
    audit.add_argument("dataset", help="a .json, .jsonl, .csv or .parquet file, or a name on the Hub")
    audit.add_argument("--config", help="the dataset's configuration on the Hub")
    audit.add_argument("--split", default="train", help="split of a dataset on the Hub (default: %(default)s)")
    audit.add_argument("--gold-column", help=f"default: the first of {', '.join(GOLD_COLUMNS)}")
    audit.add_argument("--prompt-column", help=f"default: the first of {', '.join(PROMPT_COLUMNS)}")
    audit.add_argument("--examples", type=int, default=3, help="shown of each finding (default: %(default)s)")
    audit.add_argument(
        "--fail-on",
        nargs="*",
        choices=list(MEANINGS),
        default=["unusable", "unequal", "indiscriminate", "conflicts"],
        help="findings that make the exit code 1 (default: %(default)s)",
    )
    args = parser.parse_args(arguments)
    try:
        golds, prompts = load_columns(args.dataset, args.config, args.split, args.gold_column, args.prompt_column)
    except (ValueError, OSError) as error:
        print(error, file=sys.stderr)
        return 2
    result = audit_golds(golds, prompts)
    print(result.report(args.examples))
    return int(any(result.findings[name] for name in args.fail_on))


if __name__ == "__main__":
    sys.exit(main())
