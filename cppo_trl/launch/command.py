"""``cppo-trl``, which is ``python -m cppo_trl``: one command for all that the package does.

Each command imports what it needs when it runs, so that ``--help`` and ``recipes`` answer without torch.
"""

import os
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from cppo_trl.launch import recipes
from cppo_trl.report import command as report


def _train(arguments: Sequence[str]) -> None:
    from cppo_trl.launch import launcher, parsing, training

    parsing.answer_help("cppo-trl train", training.ARGUMENT_TYPES, arguments)
    if "--dry_run" in arguments:
        return _plan([argument for argument in arguments if argument != "--dry_run"])
    return launcher.train(arguments)


def _plan(arguments: Sequence[str]) -> None:
    from cppo_trl.launch import parsing, plan, training

    parsing.answer_help("cppo-trl plan", training.ARGUMENT_TYPES, arguments, plan.dry_run_parser()._actions)
    planned = plan.dry_run(arguments)
    print(planned)
    sys.exit(1 if planned.problems else 0)


def _evaluate(arguments: Sequence[str]) -> None:
    import datasets

    from cppo_trl.evaluation.command import EvaluationArguments, evaluate_command
    from cppo_trl.launch.parsing import parse

    datasets.disable_progress_bars()
    (args,) = parse((EvaluationArguments,), arguments, "cppo-trl evaluate")
    print(evaluate_command(args))
    if not args.compare:
        print(f"\n{args.output_dir}: results.json (metrics), table.md, generations.jsonl (completions)")


def _prepare_data(arguments: Sequence[str]) -> None:
    from cppo_trl.data.prepare import PrepareArguments, prepare
    from cppo_trl.launch.parsing import parse

    (args,) = parse((PrepareArguments,), arguments, "cppo-trl prepare-data")
    for split, summary in prepare(args).items():
        print(f"{split}: {summary.report()}")
    print(f"written to {args.output_dir}")


COMMANDS: dict[str, tuple[Callable[[Sequence[str]], None], str, str]] = {
    "train": (
        _train,
        "Train a model from a recipe, in this process or in as many as Accelerate launches.",
        "Repeat the command with --resume_from_checkpoint true to continue from the last checkpoint.",
    ),
    "plan": (_plan, "Resolve a recipe for a number of processes without loading a model.", "Repeat the command."),
    "evaluate": (_evaluate, "Evaluate a model on benchmarks or a file.", "The same command resumes the evaluation."),
    "prepare-data": (_prepare_data, "Make a dataset to train on, and a test split.", "Repeat the command."),
    "report": (report.main, "Draw what the trust region did in finished or running trainings.", "Repeat the command."),
    "recipes": (recipes.main, "List the recipes, or print one to start from.", "Repeat the command."),
}
"""The commands: function, help, and what to do after an interruption."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Run a command line; None for this process's own."""
    name, *rest = (sys.argv[1:] if arguments is None else arguments) or ["--help"]
    if name in ("-h", "--help"):
        width = max(map(len, COMMANDS))
        rows = "\n".join(f"  {name:<{width}}  {text}" for name, (_, text, _) in COMMANDS.items())
        print(f"usage: cppo-trl COMMAND ...\n\n{rows}\n\n`cppo-trl COMMAND --help` lists a command's fields.")
    elif name in COMMANDS:
        run, _, if_interrupted = COMMANDS[name]
        with one_line_errors(if_interrupted):
            run(rest)
    else:
        hint = recipes.nearest([name], COMMANDS)
        sys.exit(f"cppo-trl: there is no command {name!r}.{hint or ' `cppo-trl --help` lists them.'}")


@contextmanager
def one_line_errors(if_interrupted: str) -> Iterator[None]:
    """End a program with one line on an error that this package raises on purpose, and on Ctrl-C.

    Any other error keeps its traceback.

    Args:
        if_interrupted: what to do after an interruption.
    """
    program = Path(sys.argv[0]).name.replace("__main__.py", "cppo-trl")
    try:
        yield
    except KeyboardInterrupt:
        if os.environ.get("RANK", "0") == "0":
            print(f"\n{program}: interrupted. {if_interrupted}", file=sys.stderr)
        sys.exit(130)
    except (ValueError, RuntimeError) as error:
        if not _is_ours(error):
            raise
        sys.exit(f"\n{program}: {error}")


def _is_ours(error: Exception) -> bool:
    """Whether the error is a `RunError`, or one that this package's own code raised, and nothing that it calls."""
    from cppo_trl.output.checkpoints import RunError

    *_, (frame, _) = traceback.walk_tb(error.__traceback__)
    return isinstance(error, RunError) or frame.f_globals.get("__name__", "").partition(".")[0] == "cppo_trl"
