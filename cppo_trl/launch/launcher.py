"""``cppo-trl train``: check the recipe, then train in this process or in as many as Accelerate launches."""

import argparse
import logging
import os
import sys
from collections.abc import Sequence
from subprocess import CalledProcessError

import torch
from accelerate.commands.config.config_args import default_config_file
from accelerate.commands.launch import launch_command, launch_command_parser
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from trl.cli.commands.training import _subtract_subsequence

from cppo_trl.launch import training
from cppo_trl.launch.parsing import FieldParser, refuse, unknown_fields
from cppo_trl.launch.plan import dry_run, layout_file
from cppo_trl.seam.inputs import missing_packages

_ONE_MACHINE = ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]
"""Without a file of Accelerate's: what it otherwise assumes with a warning. The recipe sets the precision."""


def train(arguments: Sequence[str]) -> None:
    """Run a command line of fields and of ``accelerate launch``'s flags.

    Raises:
        ValueError: for what `cppo_trl.launch.plan.dry_run` refuses or calls a problem, or a package that is missing;
            no model has been loaded then.
    """
    if {"LOCAL_RANK", "ACCELERATE_DYNAMO_BACKEND"} & os.environ.keys():  # one of the processes that were launched
        return training.main(arguments)
    launch, fields = split(arguments)
    options = _accelerate_options(launch, fields)
    layout = {"--accelerate_config": options.config_file, "--num_processes": options.num_processes}
    flags = [str(word) for flag, value in layout.items() if value is not None for word in (flag, value)]
    plan = dry_run([*fields, *flags])
    problems = [*missing_packages(plan.config, plan.layout.sharding), *plan.problems]
    if problems:
        raise ValueError("\n".join(problems))
    if launch or torch.cuda.device_count() > 1:
        return _launch(options)
    return training.main(fields)


def split(arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """Part a command line into the flags of ``accelerate launch`` and the fields of the run, as TRL's commands do.

    Raises:
        ValueError: for a flag that neither has.
    """
    parser = FieldParser(training.argument_types(arguments))
    fields = set(parser._option_string_actions)
    parser.add_argument("--config")
    _, launch = parser.parse_known_args(list(arguments))
    known = {"--accelerate_config", *launch_command_parser()._option_string_actions}
    unknown = [word for word in launch if word.startswith("-") and word.partition("=")[0] not in known]
    if unknown:
        raise unknown_fields([word.lstrip("-") for word in unknown], [word.lstrip("-") for word in known | fields])
    rest = _subtract_subsequence(list(arguments), launch)
    if "--accelerate_config" in launch[:-1]:
        place = launch.index("--accelerate_config")
        launch[place : place + 2] = ["--config_file", layout_file(launch[place + 1])]
    return launch, rest


def _accelerate_options(launch: Sequence[str], fields: Sequence[str]) -> argparse.Namespace:
    """What ``accelerate launch`` makes of its flags, with a file or the number of processes filled in."""
    parser = launch_command_parser()
    parser.error = refuse
    program = ["--module", "cppo_trl", "train", *fields]
    options = parser.parse_args([*launch, *program])
    if options.training_script != program[1]:
        raise ValueError(f"{options.training_script!r} belongs to no field: a recipe is given with --config.")
    if options.config_file is not None or os.path.isfile(default_config_file):
        options.config_file = options.config_file or default_config_file
        return options
    count = max(torch.cuda.device_count(), 1) if options.num_processes is None else options.num_processes
    others = (options.cpu, options.tpu, options.use_deepspeed, options.use_fsdp, options.multi_gpu)
    several = ["--multi_gpu"] if count > 1 and not any(others) else []
    return parser.parse_args(["--num_processes", str(count), *_ONE_MACHINE, *several, *launch, *program])


def _launch(options: argparse.Namespace) -> None:
    logging.disable(logging.ERROR)  # of this process: the launched ones have said what went wrong
    try:
        launch_command(options)
    except (KeyboardInterrupt, SignalException):
        sys.exit(130)
    except CalledProcessError as error:
        sys.exit(error.returncode)
    except ChildFailedError as error:
        _, failure = error.get_first_failure()
        sys.exit(failure.exitcode if failure.exitcode > 0 else f"cppo-trl: a process was ended by a signal: {failure}")
