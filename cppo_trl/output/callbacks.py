"""Callbacks that every `CPPOTrainer` has."""

from contextlib import ExitStack
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from cppo_trl.output.run_files import exclusive, write_run


class WriteRun(TrainerCallback):
    """Writes ``run.json`` when training begins, and keeps other runs out of ``output_dir`` until it ends."""

    def __init__(self) -> None:
        self.held = ExitStack()

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        """Called by the trainer."""
        if state.is_world_process_zero:
            self.held.enter_context(exclusive(Path(args.output_dir)))
            info = getattr(kwargs["train_dataloader"].dataset, "info", None)  # of the datasets library
            dataset = getattr(info, "dataset_name", None) or "not named"
            write_run(Path(args.output_dir), model.config._name_or_path, dataset, args.schedule(), args.to_dict())

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Called by the trainer."""
        self.held.close()
