"""`cppo-trl train`, for ``accelerate launch scripts/train.py``."""

import sys

from cppo_trl.launch.command import main

if __name__ == "__main__":
    main(["train", *sys.argv[1:]])
