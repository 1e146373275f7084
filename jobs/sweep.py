"""Downstream sweeps on Ray Tune: `python jobs/sweep.py --help`, the command `neurostorm sweep`."""

import sys

from neurostorm.commands.sweep import JOB, main

__all__ = ["JOB", "main"]

if __name__ == "__main__":
    sys.exit(main())
