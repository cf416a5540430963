"""``cppo-trl report RUN_DIR [RUN_DIR ...]``: what the trust region did, as one page."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from cppo_trl.report.runs import read_runs


def main(arguments: Sequence[str] | None = None) -> None:
    """Read the runs, write the page and print its path."""
    parser = argparse.ArgumentParser(prog="cppo-trl report", description=__doc__)
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN_DIR", help="output_dir of a run")
    default = "report.html in the directory of a single run, or in the current directory for several"
    parser.add_argument("--output", type=Path, metavar="FILE.html", help=f"page to write (default: {default})")
    options = parser.parse_args(arguments)
    try:
        from cppo_trl.report.page import write_report  # noqa: PLC0415 (needs the extra)

        output = options.output or (options.runs[0] if len(options.runs) == 1 else Path()) / "report.html"
        write_report(read_runs(options.runs), output)
    except ModuleNotFoundError as error:
        sys.exit(f"{error.name} is not installed: pip install 'cppo-trl[report]'")
    except ValueError as error:
        sys.exit(str(error))
    print(output)
