"""What every trainer of the package writes, and how."""

from pathlib import Path
from typing import Any

from cppo_trl.output.checkpoints import saving
from cppo_trl.output.model_card import complete_card
from cppo_trl.output.nonfinite import require_finite


class GuardedOutput:
    """Mixed into a trainer before TRL's: saves only finite weights, whole checkpoints, and a complete model card."""

    accelerator: Any
    args: Any
    model: Any
    state: Any

    def save_model(self, *args: Any, **kwargs: Any) -> None:
        """Save the weights, tokenizer and arguments, unless a weight is NaN or infinite."""
        require_finite(self.accelerator, self.model, self.state.global_step)
        super().save_model(*args, **kwargs)  # type: ignore[misc]

    def _save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        checkpoint = Path(self.args.output_dir, f"checkpoint-{self.state.global_step}")
        with saving(self.args.output_dir, checkpoint, self.accelerator.is_main_process):
            super()._save_checkpoint(*args, **kwargs)  # type: ignore[misc]

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
        super().create_model_card(name, dataset_name, tags)  # type: ignore[misc]
        if self.accelerator.is_main_process:
            complete_card(self)
