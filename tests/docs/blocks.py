"""The code blocks of the documents, and what each of their commands must satisfy."""

import argparse
import os
import re
import runpy
import shlex
import subprocess
import sys
import tomllib
from contextlib import ExitStack, redirect_stdout
from importlib.metadata import requires
from pathlib import Path
from typing import NamedTuple
from unittest import mock

import click
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import launch_command_parser
from huggingface_hub.cli.hf import app as hf
from markdown_it import MarkdownIt
from packaging.requirements import Requirement
from trl import TrlParser

from cppo_trl.launch.command import main
from cppo_trl.launch.launcher import split
from cppo_trl.launch.plan import dry_run

ROOT = Path(__file__).parents[2]
PAGES = sorted([ROOT / "README.md", *ROOT.glob("docs/*.md"), *ROOT.glob("configs/**/README.md")])
KINDS = ("python", "bash", "console", "yaml", "text", "bibtex", "{include}", "{toctree}", "{eval-rst}")
"""What a block may be; `text` is what a program prints or a reader reads."""
INLINE = re.compile(r"python scripts/|cppo-trl [a-z-]+ -|python -m cppo_trl|make [a-z-]+( |$)|pip install \S")
"""Code within a line that is checked as a command."""
OURS = re.compile(r"(configs|scripts|docs|tests|cppo_trl)/|constraints.*\.txt$|pyproject\.toml$")
"""Paths that belong to the repository."""
MACHINES = {"RANK": "0"}
"""Variables of the shell that the documents use."""


class Block(NamedTuple):
    """A code block: its kind, its text and the line of its page."""

    kind: str
    text: str
    line: int


def blocks(markdown):
    """All of a page, in order: fenced ones, indented ones (commands) and commands within a line."""
    found = []
    for token in MarkdownIt().enable("table").parse(markdown):
        line = token.map[0] + 1 if token.map else 0
        if token.type == "fence":
            found.append(Block(token.info.split()[0] if token.info else "", token.content, line))
        elif token.type == "code_block":
            found.append(Block("bash", token.content, line))
        for child in token.children or ():
            if child.type == "code_inline" and INLINE.match(child.content):
                found.append(Block("bash", child.content, line))
    return found


def commands(block):
    """The commands of a shell block, each a list of words; of a console block, those after a prompt."""
    lines = block.text.replace("\\\n", " ").splitlines()
    if block.kind == "console":
        lines = [line.removeprefix("$ ") for line in lines if line.startswith("$ ")]
    with mock.patch.dict(os.environ, MACHINES):
        words = [[os.path.expandvars(word) for word in shlex.split(line, comments=True)] for line in lines]
    for line in words:
        while line and re.match(r"[A-Z_]+=", line[0]):
            line.pop(0)
    return [line for line in words if line]


def check_command(words):
    """Fail unless the command would start: its program is known, its flags too, the repository's files exist."""
    name, *rest = words
    for word in rest:
        path = word.rpartition("=")[2]
        assert not OURS.match(path) or Path(path).exists(), f"there is no {path}"
    program = re.sub(r"^\.venv[\w-]*/bin/", "", name)
    assert program in PROGRAMS, f"nobody knows the command {name!r}"
    PROGRAMS[program](rest)


class Parsed(Exception):  # noqa: N818
    """A script has read its command line."""


def run_until_parsed(run, words):
    """Start a program with a command line, and end it when its own parser has taken that."""

    def ending(parse):
        def parse_and_end(*args, **kwargs):
            parse(*args, **kwargs)
            raise Parsed

        return parse_and_end

    parsers = ((argparse.ArgumentParser, "parse_args"), (TrlParser, "parse_args_and_config"))
    quiet = ("datasets.disable_progress_bars", "transformers.utils.logging.disable_progress_bar")
    with ExitStack() as patches:
        patches.enter_context(mock.patch.dict(os.environ))
        patches.enter_context(mock.patch.object(sys, "argv", words))
        for kind, name in parsers:
            patches.enter_context(mock.patch.object(kind, name, ending(getattr(kind, name))))
        for name in quiet:
            patches.enter_context(mock.patch(name))
        try:
            run()
        except Parsed:
            return
    raise AssertionError(f"{words[0]} did not read its command line")


def check_python(words):
    script, *rest = words
    if script == "-m":
        check_module(*rest)
    elif script == "scripts/train.py":
        check_training(rest)
    else:
        run_until_parsed(lambda: runpy.run_path(script, run_name="__main__"), words)


def check_ours(words):
    """`cppo-trl`: a training's recipe as on the machine it is meant for; `recipes NAME > FILE` writes the file."""
    command, *rest = words
    if "--dry_run" in rest:
        command, rest = "plan", [word for word in rest if word != "--dry_run"]
    if command == "train":
        launch, rest = split(rest)
        options = launch_command_parser().parse_args([*launch, "script"])
        rest += ["--accelerate_config", options.config_file] if options.config_file else []
        rest += ["--num_processes", str(options.num_processes)] if options.num_processes else []
    if command in ("train", "plan"):
        check_training(rest)
    elif command == "recipes":
        with open(rest[2] if rest[1:2] == [">"] else os.devnull, "w") as file, redirect_stdout(file):
            main(["recipes", *rest[:1]])
    else:
        run_until_parsed(lambda: main(words), ["cppo-trl", *words])


def check_module(module, *rest):
    if module == "cppo_trl":
        check_ours(rest or ["recipes"])
    elif module.startswith("cppo_trl"):
        run_until_parsed(lambda: runpy.run_module(module, run_name="__main__"), [module, *rest])
    else:
        assert module in ("venv", "pytest"), f"nobody knows python -m {module}"


def check_training(words):
    """The recipe, as on the machine it is meant for: nothing in it that cannot work."""
    plan = dry_run(words)
    assert plan.problems == []


def check_launch(words):
    assert words.pop(0) == "launch"
    options = launch_command_parser().parse_args(words)
    load_config_from_file(options.config_file)
    assert options.training_script == "scripts/train.py"
    processes = ["--num_processes", str(options.num_processes)] if options.num_processes else []
    check_training([*options.training_script_args, "--accelerate_config", options.config_file, *processes])


def check_batch_script(words):
    script, recipe, layout = (word for word in words if not word.startswith("--"))
    assert Path(script).is_file()
    check_training(["--config", recipe, "--accelerate_config", layout])


def check_make(words):
    done = subprocess.run(["make", "-n", *words], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def check_pip(words):
    assert words.pop(0) == "install"
    parser = argparse.ArgumentParser(exit_on_error=False)
    parser.add_argument("-c", type=Path)
    parser.add_argument("-e", dest="editable")
    parser.add_argument("packages", nargs="*")
    options = parser.parse_args(words)
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    known = {Requirement(text).name for texts in (project["dependencies"], *extras.values()) for text in texts}
    ours = [options.editable.replace(".", project["name"], 1)] if options.editable else []
    for requirement in map(Requirement, [*ours, *options.packages]):
        assert requirement.name in known | {project["name"]}, f"{requirement.name} is no dependency"
        if requirement.name == project["name"]:
            assert requirement.extras <= set(extras), f"there is no extra {requirement.extras - set(extras)}"


def check_hub(words):
    name, command = "hf", hf
    while isinstance(command, click.Group):
        name, command, words = command.resolve_command(click.Context(command), words)
    command.make_context(name, words)


TESTED_SERVER = "tests/vllm/test_async.py"


def check_server(words):
    """The options are those of the batch script, run with a stand-in elsewhere, or of a server of the tests."""
    assert words[0] == "serve"
    known = "".join((ROOT / name).read_text() for name in ("configs/slurm/train-with-server.sbatch", TESTED_SERVER))
    for word in words:
        assert not word.startswith("--") or re.search(rf"{word}\b", known), f"no server was started with {word}"


def check_tracker(words):
    assert words[0] in ("show", "get")
    assert any(Requirement(text).name == "trackio" for text in requires("cppo-trl"))


PROGRAMS = {
    "cppo-trl": check_ours,
    "python": check_python,
    "python3": check_python,
    "accelerate": check_launch,
    "sbatch": check_batch_script,
    "make": check_make,
    "pip": check_pip,
    "hf": check_hub,
    "vllm": check_server,
    "trackio": check_tracker,
    "source": lambda words: None if words == [".venv/bin/activate"] else sys.exit(f"no {words}"),
    "pre-commit": lambda words: None if words == ["install"] else sys.exit(f"no {words}"),
}
"""What checks the rest of a command."""
