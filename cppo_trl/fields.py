"""The help of a dataclass's flags, from its docstring: each field is described once."""

import inspect
import re
from typing import TypeVar

Kind = TypeVar("Kind", bound=type)


def meanings(kind: type) -> dict[str, str]:
    """The texts of the fields in a dataclass's docstring, under ``Args`` or after a bullet with the new default."""
    entry = r"^(?: {4}|\* ``)(\w+)[^`:\n]*(?:``)?: (.*(?:\n {2,3}\S.*|\n {5,}.*)*)"
    found = re.findall(entry, inspect.getdoc(kind) or "", re.MULTILINE)
    return {name: " ".join(text.replace("``", "`").split()) for name, text in found}


def documented(kind: Kind) -> Kind:
    """Class decorator above ``@dataclass``: what the docstring says of a field is the help of its flag."""
    for name, text in meanings(kind).items():
        if name in kind.__annotations__:
            kind.__dataclass_fields__[name].metadata = {"help": text.replace("%", "%%")}  # type: ignore[attr-defined]
    return kind
