"""Uploads to the Hub that cannot cost a run its results."""

import shlex
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi
from transformers import TrainerCallback

from cppo_trl.config import CPPOConfig
from cppo_trl.output.checkpoints import RunError


def require_repository(config: CPPOConfig) -> None:
    """With ``push_to_hub``, make the repository, or find it: a token that may not write is found out here.

    Raises:
        RunError: if the Hub cannot be reached or refuses.
    """
    if not config.push_to_hub or config.process_index != 0:
        return
    name = config.hub_model_id or Path(config.output_dir).absolute().name
    try:
        HfApi().create_repo(name, token=config.hub_token, private=config.hub_private_repo, exist_ok=True)
    except Exception as error:  # of the network, the token, the name, the offline mode
        raise RunError(
            f"push_to_hub: the repository {name!r} cannot be made or found ({_reason(error)}). Log in with `hf auth "
            "login`, set hub_model_id to user/name, or set push_to_hub to false and upload when the run has ended."
        ) from error


def push(trainer: Any, model_name: str | None = None) -> None:
    """With ``push_to_hub``, upload what a finished run has saved, with its model card; else do nothing.

    Call it on all processes, once the evaluation table of the card is set.

    Raises:
        RunError: on the main process, if the upload fails; what is saved stays, and the message says how to repeat.
    """
    config: CPPOConfig = trainer.args
    if not config.push_to_hub:
        return
    failure: Exception | None = None
    try:
        trainer.push_to_hub(model_name=model_name)
    except Exception as error:  # whatever it is, training is saved
        failure = error
    trainer.accelerator.wait_for_everyone()  # no process leaves while the first still uploads
    if failure is not None:
        raise RunError(
            f"Training is finished and saved in {config.output_dir}: model, tokenizer, log and card. Only the upload "
            f"to the Hub failed: {_reason(failure)}\nRepeat it with:\n  {upload_command(config, trainer.hub_model_id)}"
        ) from failure


def upload_command(config: CPPOConfig, repository: str) -> str:
    """The command that uploads what `push` would."""
    command = ["hf", "upload", repository, config.output_dir, "."]
    command += ["--exclude", "checkpoint-*", "--exclude", "_*", "--commit-message", "End of training"]
    if config.hub_revision:
        command += ["--revision", config.hub_revision]
    return shlex.join(command)


class ReportFailedPushes(TrainerCallback):
    """Says when an upload in the middle of training has failed: transformers keeps that to itself."""

    def __init__(self, trainer: Any) -> None:
        self.trainer = trainer
        self.watched: set[Future[Any]] = set()

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Called by the trainer, right after it has started the upload of a checkpoint."""
        push_in_progress = getattr(self.trainer, "push_in_progress", None)
        for job in push_in_progress.jobs if push_in_progress else []:
            if job not in self.watched:
                self.watched.add(job)
                job.add_done_callback(_reporter(state.global_step))


def _reporter(step: int) -> Callable[[Future[Any]], None]:
    def report(job: Future[Any]) -> None:
        if error := job.exception():
            print(f"The upload after update {step} failed, training goes on: {_reason(error)}", flush=True)

    return report


def _reason(error: BaseException) -> str:
    """The error in one line, with that which caused it."""
    words = " ".join(str(error).split())
    cause = f" ({' '.join(str(error.__cause__).split())})" if error.__cause__ else ""
    return f"{type(error).__name__}: {words}{cause}"
