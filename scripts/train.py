"""Train a model with CPPO from a YAML recipe.

    python scripts/train.py --config configs/quickstart/cppo.yaml
    accelerate launch scripts/train.py --config configs/quickstart/cppo.yaml --learning_rate 5e-5

Fields of the recipe are those of `cppo_trl.CPPOConfig`, `trl.ModelConfig`, `trl.DatasetMixtureConfig` and
`cppo_trl.launch.training.CPPOScriptArguments`; the command line takes precedence, and unknown fields are refused.

    python scripts/train.py --dry_run --config FILE.yaml --accelerate_config configs/accelerate/fsdp2.yaml \
        --num_processes 4

loads no model, needs no GPU, and prints the recipe as it resolves for these processes: schedule, sizes, and what
cannot work. Both options are optional.
"""

import gc
import sys

from cppo_trl.launch.command import one_line_errors
from cppo_trl.launch.plan import dry_run
from cppo_trl.launch.training import parse_arguments, train
from cppo_trl.output.hub import push


def main() -> None:
    """Train as the recipe says, or print what that would be."""
    if "--dry_run" in sys.argv:
        plan = dry_run(sys.argv[1:])
        print(plan)
        sys.exit(1 if plan.problems else 0)
    trainer = train(*parse_arguments())
    trainer.accelerator.print(f"Model saved to {trainer.args.output_dir}")
    push(trainer)
    trainer.end()
    del trainer
    gc.collect()  # a process group that the wrapped model keeps alive must not outlast the interpreter


if __name__ == "__main__":
    with one_line_errors(
        "Repeat the command with --resume_from_checkpoint true to continue from the last checkpoint."
    ):
        main()
