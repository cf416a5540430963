"""Six updates on one process or two; ``python -m tests.asynchronous.two_processes DIRECTORY`` under torchrun."""

import os
import sys
from pathlib import Path

import torch

from tests.asynchronous.conftest import make_trainer, run_on_the_cpu


def main(directory):
    run_on_the_cpu(setattr)
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    trainer = make_trainer(
        directory / os.environ.get("RANK", "0"),
        per_device_train_batch_size=16 // processes,
        cppo_delta=0.05,
        cppo_delta_b=0.005,
    )
    trainer.train()
    if trainer.accelerator.is_main_process:
        model = trainer.accelerator.unwrap_model(trainer.model)
        log = [
            {name: value for name, value in row.items() if name.startswith(("cppo/", "grad_norm", "loss"))}
            for row in trainer.state.log_history[:-1]
        ]
        torch.save({"model": model.state_dict(), "log": log}, directory / "results.pt")
    trainer.accelerator.wait_for_everyone()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
    sys.stdout.flush()
    os._exit(0)  # torch's threads now and then abort the end of a process that has done its work
