"""``python -m cppo_trl``: the command ``cppo-trl``."""

from cppo_trl.launch.command import main

if __name__ == "__main__":
    main()
