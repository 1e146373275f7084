"""One method on one task: `python jobs/finetune.py --help`, the command `neurostorm finetune`."""

import sys

from neurostorm.commands.finetune import JOB, main

__all__ = ["JOB", "main"]

if __name__ == "__main__":
    sys.exit(main())
