"""``python -m cppo_trl.rewards audit DATASET``."""

import sys

from cppo_trl.rewards.command import main

if __name__ == "__main__":
    sys.exit(main())
