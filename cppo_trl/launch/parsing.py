"""Command lines and YAML recipes into dataclasses."""

import argparse
import re
import sys
from collections.abc import Iterable, Sequence
from dataclasses import fields
from typing import Any, NoReturn

import yaml
from trl import TrlParser

from cppo_trl.launch import recipes


class FieldParser(TrlParser):
    """`trl.TrlParser` that raises ValueError instead of printing the usage, a line for each of two hundred fields."""

    def __init__(self, types: Sequence[type[Any]], prog: str | None = None) -> None:
        super().__init__(types, prog=prog, allow_abbrev=False)

    def error(self, message: str) -> NoReturn:
        """Called by argparse."""
        refuse(message)


def refuse(message: str) -> NoReturn:
    """Raise ValueError, as the ``error`` of a parser."""
    raise ValueError(message)


def parse(
    types: Sequence[type[Any]],
    arguments: Sequence[str] | None = None,
    prog: str | None = None,
    others: bool = False,
) -> Any:
    """Parse ``--config``, a file or the name of a recipe, and fields, which take precedence, into dataclasses.

    Args:
        types: the dataclasses.
        arguments: the command line; None for this process's own.
        prog: the command, for ``--help``.
        others: return unknown fields instead of raising.

    Returns:
        A tuple with one instance of each; with ``others``, what is left as well.

    Raises:
        ValueError: for a file that is missing or not YAML, an unknown field, a value of the wrong type, or one that a
            dataclass refuses.
    """
    given = list(sys.argv[1:] if arguments is None else arguments)
    if "--config" in given[:-1]:
        place = given.index("--config") + 1
        given[place] = recipes.find(given[place], recipes.recipes(), "--config")
    known = [field.name for kind in types for field in fields(kind)]
    try:
        return FieldParser(types, prog).parse_args_and_config(given, return_remaining_strings=others)
    except OSError as error:
        raise ValueError(f"--config: cannot read {error.filename} ({error.strerror}).") from error
    except IndexError as error:
        raise ValueError("--config: expected a file or the name of a recipe.") from error
    except yaml.YAMLError as error:
        raise ValueError(f"--config: not valid YAML: {' '.join(str(error).split())}.") from error
    except (TypeError, ValueError) as error:
        unknown = [name for name in re.findall(r"'--([\w-]+)'", str(error)) if name not in known]
        if not unknown:
            raise ValueError(str(error)) from error
        raise unknown_fields(unknown, known) from error


def unknown_fields(unknown: Sequence[str], known: Iterable[str]) -> ValueError:
    """The error for fields that nothing takes, with the nearest ones that exist."""
    return ValueError(f"Unknown field: {', '.join(unknown)}.{recipes.nearest(unknown, known)}")


def answer_help(
    prog: str, types: Sequence[type[Any]], arguments: Sequence[str], flags: Sequence[argparse.Action] = ()
) -> None:
    """On ``--help``, print the fields that this package adds and exit; on ``--help_all``, TRL's below them.

    Args:
        prog: the command.
        types: dataclasses of its fields.
        arguments: its command line.
        flags: flags of the command besides the fields.
    """
    if not {"-h", "--help", "--help_all"} & set(arguments):
        return
    parser = FieldParser(types, prog)
    parser.usage = f"{prog} --config FILE_OR_RECIPE [--FIELD VALUE ...]"
    parser.epilog = "--help_all lists TRL's fields as well. `cppo-trl recipes` lists the recipes."
    kinds = [base for kind in types for base in kind.__mro__ if base.__module__.startswith("cppo_trl")]
    own = [name for base in kinds for name in base.__annotations__]
    actions = [
        action for action in parser._optionals._group_actions if not action.option_strings[0].startswith("--no_")
    ]
    ours = sorted((action for action in actions if action.dest in own), key=lambda action: own.index(action.dest))
    others = [action for action in actions if action.dest not in own] if "--help_all" in arguments else []
    for action in actions:
        del action.option_strings[1:]  # the same with hyphens
    parser._optionals._group_actions[:] = [*flags, *ours, *others]
    parser.print_help()
    sys.exit()
