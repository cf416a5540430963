"""The recipes and Accelerate files that travel with the package, by name."""

import argparse
from collections.abc import Iterable, Sequence
from difflib import get_close_matches
from importlib import resources
from pathlib import Path

_PACKAGED = Path(str(resources.files("cppo_trl"))) / "recipes"
ROOT = _PACKAGED if _PACKAGED.is_dir() else _PACKAGED.parents[1] / "configs"
"""In a wheel ``cppo_trl/recipes``, in a clone ``configs``."""


def recipes() -> dict[str, Path]:
    """The training recipes by name: the path below `ROOT`, without ``cppo.yaml`` or ``.yaml``."""
    paths = sorted(path for path in ROOT.rglob("*.yaml") if path.parent.name != "accelerate")
    return {str(path.relative_to(ROOT).with_suffix("")).removesuffix("/cppo"): path for path in paths}


def layouts() -> dict[str, Path]:
    """The Accelerate files by name, and the Slurm script that uses them."""
    return {path.stem: path for path in sorted([*ROOT.glob("accelerate/*.yaml"), *ROOT.glob("slurm/*.sbatch")])}


def nearest(names: Iterable[str], known: Iterable[str]) -> str:
    """A hint " Did you mean ...?" for unknown names, or an empty string."""
    known = list(known)
    close = [match for name in names for match in get_close_matches(name, known, 1)]
    return f" Did you mean {', '.join(close)}?" if close else ""


def find(name: str, known: dict[str, Path], flag: str) -> str:
    """The path of a file, or of what a name stands for.

    Args:
        name: a path or a name.
        known: paths by name.
        flag: what was given the name, for the message.

    Raises:
        ValueError: if it is neither.
    """
    if Path(name).is_file():
        return name
    if name not in known:
        hint = nearest([name], known) or " `cppo-trl recipes` lists the names."
        raise ValueError(f"{flag}: cannot read {name} (No such file, and no recipe's name).{hint}")
    return str(known[name])


def main(arguments: Sequence[str]) -> None:
    """List the recipes, or print one."""
    parser = argparse.ArgumentParser(prog="cppo-trl recipes", description="List the recipes, or print one.")
    parser.add_argument("name", nargs="?", help="of a recipe, an Accelerate file or the Slurm script")
    name = parser.parse_args(arguments).name
    if name is not None:
        print(Path(find(name, recipes() | layouts(), "recipes")).read_text(encoding="utf-8"), end="")
        return
    for flag, known in (("--config", recipes()), ("--accelerate_config", layouts())):
        print(f"For {flag}:\n")
        for name, path in known.items():
            print(f"  {name}\n{_about(path)}\n")
    print("`cppo-trl recipes NAME > my.yaml` makes a copy to change.")


def _about(path: Path) -> str:
    """The comment at the top of a file."""
    head = path.read_text(encoding="utf-8").removeprefix("#!/bin/bash\n")
    lines = head.splitlines()
    end = next(number for number, line in enumerate(lines) if not line.startswith("# "))
    return "\n".join(f"      {line.removeprefix('# ')}" for line in lines[:end])
