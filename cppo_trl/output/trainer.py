"""What every trainer of the package writes, and how."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import Trainer

from cppo_trl.config import in_columns
from cppo_trl.metrics import position_profile
from cppo_trl.output.callbacks import WriteRun, shorten_console
from cppo_trl.output.checkpoints import ExactResume, saving
from cppo_trl.output.model_card import complete_card
from cppo_trl.output.nonfinite import require_finite, stop_or_warn
from cppo_trl.output.run_files import append_profile


class GuardedOutput(Trainer):
    """Mixed into a trainer before TRL's: logs an update; saves finite weights, whole checkpoints and a whole card."""

    def _set_up_output(self) -> None:
        """Name the rule that trains on the model card; write ``run.json``, resume exactly, and print a short log."""
        if not self.args.trust_region.startswith("cppo"):
            self._name = self.args.rule.source.split(",")[0]
            self._paper: dict[str, Any] = {}
        self.add_callback(WriteRun)
        self.add_callback(ExactResume)
        shorten_console(self.callback_handler.callbacks)

    def _print_schedule(self) -> None:
        processes = {"processes": str(self.accelerator.num_processes)}
        print(in_columns(f"{self._name} schedule", {**processes, **self.args.schedule()}))

    def _drop_clip_metrics(self, mode: str) -> None:
        """Leave out what TRL logs of its clip, which is off."""
        for name in [name for name in self._metrics[mode] if name.startswith("clip_ratio/")]:
            del self._metrics[mode][name]

    def _log_update(self, mode: str, scalars: Mapping[str, float], record: list[float]) -> None:
        """Log an update, or an evaluation batch, and stop or warn where its loss is not finite.

        Args:
            mode: ``"train"`` or ``"eval"``.
            scalars: by name.
            record: result of `cppo_trl.metrics.total_over_processes`.
        """
        update = self.state.global_step + 1
        for name, scalar in scalars.items():
            self._metrics[mode][name].append(scalar)
        if mode == "train" and self.accelerator.is_main_process:
            append_profile(Path(self.args.output_dir), update, position_profile(record))
        if "cppo/nonfinite_losses" in scalars:
            stop_or_warn(mode, self.args.output_dir, update)

    def save_model(self, *args: Any, **kwargs: Any) -> None:
        """Save the weights, tokenizer and arguments, unless a weight is NaN or infinite."""
        require_finite(self.accelerator, self.model, self.state.global_step)
        super().save_model(*args, **kwargs)

    def _save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        checkpoint = Path(self.args.output_dir, f"checkpoint-{self.state.global_step}")
        with saving(self.args.output_dir, checkpoint, self.accelerator.is_main_process):
            super()._save_checkpoint(*args, **kwargs)

    def create_model_card(
        self, model_name: str | None = None, dataset_name: str | None = None, tags: str | list[str] | None = None
    ) -> None:
        """Write the model card: TRL's, completed by `cppo_trl.output.model_card.complete_card`.

        Args:
            model_name: None for the name of the output directory.
            dataset_name: name on the Hub of the training data.
            tags: further tags.
        """
        name = model_name or Path(self.args.output_dir).absolute().name
        super().create_model_card(name, dataset_name, tags)
        if self.accelerator.is_main_process:
            complete_card(self)
