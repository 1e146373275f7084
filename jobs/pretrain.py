"""Pretraining on a cluster or on this machine: `python jobs/pretrain.py --help`; an installed package has the same as `neurostorm pretrain`."""

import sys

from neurostorm.commands.pretrain import JOB, main

__all__ = ["JOB", "main"]

if __name__ == "__main__":
    sys.exit(main())
