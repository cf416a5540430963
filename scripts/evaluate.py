"""`cppo-trl evaluate`, for a clone."""

import sys

from cppo_trl.launch.command import main

if __name__ == "__main__":
    main(["evaluate", *sys.argv[1:]])
