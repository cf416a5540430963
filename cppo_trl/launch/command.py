"""What every script shares: it reads a command line, and reports an error that is meant for its user in one line."""

import re
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import fields
from difflib import get_close_matches
from pathlib import Path
from typing import Any, NoReturn

import yaml
from trl import TrlParser

from cppo_trl.output.checkpoints import RunError


class _Parser(TrlParser):
    def error(self, message: str) -> NoReturn:
        """Raise instead of printing the usage, which has a line for each of some two hundred fields."""
        raise ValueError(message)


def parse(types: Sequence[type[Any]], arguments: Sequence[str] | None = None) -> tuple[Any, ...]:
    """Parse ``--config FILE.yaml`` and command-line fields, which take precedence, into dataclasses.

    Args:
        types: the dataclasses.
        arguments: the command line; None for this process's own.

    Returns:
        One instance of each.

    Raises:
        ValueError: for a file that is missing or not YAML, an unknown field, a value of the wrong type, or one that a
            dataclass refuses.
    """
    known = [field.name for kind in types for field in fields(kind)]
    try:
        return _Parser(types).parse_args_and_config(arguments)
    except OSError as error:
        raise ValueError(f"--config: cannot read {error.filename} ({error.strerror}).") from error
    except yaml.YAMLError as error:
        raise ValueError(f"--config: not valid YAML: {' '.join(str(error).split())}.") from error
    except (TypeError, ValueError) as error:
        unknown = [name for name in re.findall(r"'--(\w+)'", str(error)) if name not in known]
        if not unknown:
            raise ValueError(str(error)) from error
        close = [match for name in unknown for match in get_close_matches(name, known, 1)]
        hint = f" Did you mean {', '.join(close)}?" if close else ""
        raise ValueError(f"Unknown field: {', '.join(unknown)}.{hint}") from error


@contextmanager
def one_line_errors(if_interrupted: str) -> Iterator[None]:
    """End a script with one line on an error that this package raises on purpose, and on Ctrl-C.

    Any other error keeps its traceback.

    Args:
        if_interrupted: what to do after an interruption.
    """
    program = Path(sys.argv[0]).name
    try:
        yield
    except KeyboardInterrupt:
        print(f"\n{program}: interrupted. {if_interrupted}", file=sys.stderr)
        sys.exit(130)
    except Exception as error:
        if not _is_on_purpose(error):
            raise
        sys.exit(f"\n{program}: {error}")


def _is_on_purpose(error: Exception) -> bool:
    """Whether the error is a `RunError`, or one that this package's own code raised of a type meant for its user."""
    if isinstance(error, RunError):
        return True
    frame = error.__traceback__
    while frame is not None and frame.tb_next is not None:
        frame = frame.tb_next
    module = "" if frame is None else frame.tb_frame.f_globals.get("__name__", "")
    return isinstance(error, ValueError | RuntimeError) and module.partition(".")[0] == "cppo_trl"
