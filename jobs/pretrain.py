"""Pretraining on a cluster or on this machine: `python jobs/pretrain.py --help`, the command `neurostorm pretrain`."""

import sys

from neurostorm.commands.pretrain import JOB, main

__all__ = ["JOB", "main"]

if __name__ == "__main__":
    sys.exit(main())
