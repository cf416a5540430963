"""``python -m cppo_trl.report``: the command ``cppo-trl report``."""

from cppo_trl.report.command import main

if __name__ == "__main__":
    main()
