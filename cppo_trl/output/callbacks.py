"""Callbacks of a run: what it records, prints, and does on Ctrl-C."""

import signal
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

from transformers import PrinterCallback, ProgressCallback, TrainerCallback

from cppo_trl.output.run_files import exclusive, loaded_from, write_run


class WriteRun(TrainerCallback):
    """Writes ``run.json`` when training begins, and keeps other runs out of ``output_dir`` until it ends."""

    def __init__(self) -> None:
        self.held = ExitStack()

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        """Write ``run.json`` and lock the directory."""
        if state.is_world_process_zero:
            self.held.enter_context(exclusive(Path(args.output_dir)))
            dataset = ", ".join(loaded_from(kwargs["train_dataloader"].dataset)) or "not named"
            write_run(Path(args.output_dir), model.config._name_or_path, dataset, args.schedule(), args.to_dict())

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Unlock the directory."""
        self.held.close()


SHOWN = frozenset(
    (
        "loss grad_norm learning_rate reward reward_std frac_reward_zero_std completions/mean_length "
        "completions/clipped_ratio entropy cppo/masked cppo/divergence/mean epoch"
    ).split()
)
"""Metrics that the console shows; the log has all."""


def shorten_console(callbacks: Sequence[TrainerCallback]) -> None:
    """Make transformers' callbacks that print metrics print those of `SHOWN` for an update or an evaluation batch."""
    for callback in callbacks:
        if isinstance(callback, PrinterCallback | ProgressCallback):
            callback.on_log = partial(_log_shown, callback.on_log)


def _log_shown(show: Callable[..., None], *state: Any, logs: dict[str, float], **kwargs: Any) -> None:
    if {"loss", "eval_loss"} & logs.keys():
        logs = {name: value for name, value in logs.items() if name.removeprefix("eval_") in SHOWN}
    show(*state, logs=logs, **kwargs)


class SaveOnInterrupt(TrainerCallback):
    """On Ctrl-C, finishes the update, saves a checkpoint and raises KeyboardInterrupt; a second one raises at once.

    Several processes would not stop after the same update: there, Ctrl-C raises at once.
    """

    def __init__(self) -> None:
        self.interrupted = False

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Listen for Ctrl-C."""
        if args.world_size == 1:
            signal.signal(signal.SIGINT, self._interrupt)

    def _interrupt(self, *_: Any) -> None:
        self.interrupted = True
        signal.signal(signal.SIGINT, signal.default_int_handler)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Stop after this update if Ctrl-C was pressed."""
        if self.interrupted:
            control.should_save = control.should_training_stop = True

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Restore the handler; raise KeyboardInterrupt if Ctrl-C was pressed."""
        signal.signal(signal.SIGINT, signal.default_int_handler)
        if self.interrupted:
            raise KeyboardInterrupt
