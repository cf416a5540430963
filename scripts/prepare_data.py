"""`cppo-trl prepare-data`, for a clone."""

import sys

from cppo_trl.launch.command import main

if __name__ == "__main__":
    main(["prepare-data", *sys.argv[1:]])
