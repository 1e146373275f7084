"""NIfTI files into a frame store: `python jobs/ingest.py --help`, the command `neurostorm ingest`."""

import sys

from neurostorm.commands.ingest import JOB, main

__all__ = ["JOB", "main"]

if __name__ == "__main__":
    sys.exit(main())
