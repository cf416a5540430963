"""Train a model with CPPO from a YAML recipe.

    python scripts/train.py --config configs/quickstart/cppo.yaml
    accelerate launch scripts/train.py --config configs/quickstart/cppo.yaml --learning_rate 5e-5

Fields of the recipe are those of `cppo_trl.CPPOConfig`, `trl.ModelConfig`, `trl.DatasetMixtureConfig` and
`cppo_trl.training.CPPOScriptArguments`; the command line wins over the file, and unknown fields are refused.
"""

import gc
import sys

from cppo_trl.checkpoints import RunError
from cppo_trl.hub import push
from cppo_trl.training import parse_arguments, train


def main() -> None:
    """Train as the recipe says."""
    try:
        trainer = train(*parse_arguments())
        trainer.accelerator.print(f"Model saved to {trainer.args.output_dir}")
        push(trainer)
    except RunError as error:
        sys.exit(f"\n{error}")
    trainer.end()
    del trainer
    gc.collect()  # a process group that the wrapped model keeps alive must not outlast the interpreter


if __name__ == "__main__":
    main()
