"""Runs to vectors: `python jobs/embed.py --help`; an installed package has the same as `neurostorm embed`."""

import sys

from neurostorm.commands.embed import JOB, main

__all__ = ["JOB", "main"]

if __name__ == "__main__":
    sys.exit(main())
