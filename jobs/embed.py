"""Runs to vectors: `python jobs/embed.py --help`, the command `neurostorm embed`."""

import sys

from neurostorm.commands.embed import JOB, main

__all__ = ["JOB", "main"]

if __name__ == "__main__":
    sys.exit(main())
