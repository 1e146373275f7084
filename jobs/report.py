"""The report of a sweep, from MLflow alone: `python jobs/report.py --help`, the command `neurostorm report`."""

import sys

from neurostorm.commands.report import JOB, main

__all__ = ["JOB", "main"]

if __name__ == "__main__":
    sys.exit(main())
