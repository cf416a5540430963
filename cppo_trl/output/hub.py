"""Uploads to the Hub: access is checked before training, and a failed upload loses no results."""

import shlex
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi

from cppo_trl.config import CPPOConfig
from cppo_trl.output.checkpoints import RunError

MESSAGE, LEFT_OUT = "End of training", ["_*", "checkpoint-*"]  # as in `Trainer.push_to_hub`


def require_repository(config: CPPOConfig) -> None:
    """With ``push_to_hub``, create or find the repository, which fails if the token has no write access.

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
            f"push_to_hub: the repository {name!r} cannot be created or found ({_reason(error)}). Log in with `hf "
            "auth login`, set hub_model_id to user/name, or set push_to_hub to false and upload after the run."
        ) from error


def push(trainer: Any) -> None:
    """With ``push_to_hub``, upload what a finished run has saved in its ``output_dir``.

    Call it on all processes.

    Raises:
        RunError: on the main process, if the upload fails; the message says where everything is saved and how to
            repeat the upload.
    """
    config: CPPOConfig = trainer.args
    if config.push_to_hub and trainer.is_world_process_zero():
        if trainer.push_in_progress is not None:  # of a checkpoint
            trainer.push_in_progress.wait_until_done()
        repository, folder, revision = trainer.hub_model_id, config.output_dir, config.hub_revision
        try:
            HfApi(token=config.hub_token).upload_folder(
                repo_id=repository,
                folder_path=folder,
                commit_message=MESSAGE,
                revision=revision,
                ignore_patterns=LEFT_OUT,
            )
        except Exception as error:  # whatever it is, training is saved
            command = ["hf", "upload", repository, folder, ".", "--commit-message", MESSAGE]
            command += [word for pattern in LEFT_OUT for word in ("--exclude", pattern)]
            command += ["--revision", revision] if revision else []
            raise RunError(
                f"Training is finished and saved in {folder}: model, tokenizer, log and card. Only the "
                f"upload to the Hub failed: {_reason(error)}\nRepeat it with:\n  {shlex.join(command)}"
            ) from error
    trainer.accelerator.wait_for_everyone()  # no process exits while the main one uploads


def _reason(error: BaseException) -> str:
    """The error and its cause in one line."""
    words = " ".join(str(error).split())
    cause = f" ({' '.join(str(error.__cause__).split())})" if error.__cause__ else ""
    return f"{type(error).__name__}: {words}{cause}"
