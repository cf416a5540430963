"""Train a model with CPPO from a YAML recipe.

    python scripts/train.py --config configs/quickstart/cppo.yaml
    accelerate launch scripts/train.py --config configs/quickstart/cppo.yaml --learning_rate 5e-5

Fields of the recipe are those of `cppo_trl.CPPOConfig`, `trl.ModelConfig`, `trl.DatasetMixtureConfig` and
`cppo_trl.launch.training.CPPOScriptArguments`; the command line wins over the file, and unknown fields are refused.

    python scripts/train.py --dry_run --config FILE.yaml --accelerate_config configs/accelerate/fsdp2.yaml \
        --num_processes 4 --gpu_memory_gb 80

loads nothing, needs no GPU, and says what the recipe comes to there: schedule, memory, and what cannot work. All three
options are optional.
"""

import gc
import sys

from cppo_trl.launch.plan import dry_run
from cppo_trl.launch.training import parse_arguments, train
from cppo_trl.output.checkpoints import RunError
from cppo_trl.output.hub import push


def main() -> None:
    """Train as the recipe says, or say what that would be."""
    if "--dry_run" in sys.argv:
        try:
            plan = dry_run(sys.argv[1:])
        except (ValueError, OSError) as error:
            sys.exit(f"Refused: {error}")
        print(plan)
        sys.exit(1 if plan.problems else 0)
    try:
        arguments = parse_arguments()
    except ValueError as error:
        sys.exit(f"Refused: {error}")
    try:
        trainer = train(*arguments)
        trainer.accelerator.print(f"Model saved to {trainer.args.output_dir}")
        push(trainer)
    except RunError as error:
        sys.exit(f"\n{error}")
    trainer.end()
    del trainer
    gc.collect()  # a process group that the wrapped model keeps alive must not outlast the interpreter


if __name__ == "__main__":
    main()
