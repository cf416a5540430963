"""Callbacks that every `CPPOTrainer` has."""

from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from cppo_trl.output.run_files import write_run


class WriteRun(TrainerCallback):
    """Writes ``run.json`` when training begins."""

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        """Called by the trainer."""
        if state.is_world_process_zero:
            write_run(Path(args.output_dir), model.config._name_or_path, args.schedule(), args.to_dict())
