"""NIfTI files into the frame store: `python jobs/ingest.py --source DIR --store STORE [--grid 4mm] [--dry-run]`.

A second start skips what is complete. Exit status 0 when the store holds a run of the source (with --dry-run: would),
1 when it holds none or cannot be written, 2 when the command line is wrong.
"""

import logging
import sys
from collections.abc import Sequence

import yaml

from neurostorm.cli import Job
from neurostorm.config import ConfigError
from neurostorm.ingest.discover import DiscoverError
from neurostorm.ingest.estimate import dry_run
from neurostorm.ingest.fanout import ingest
from neurostorm.ingest.template import MaskError
from neurostorm.store import StoreError

JOB = Job(
    "ingest",
    "Bring preprocessed fMRI (NIfTI in MNI space: BIDS derivatives, HCP or plain names) into a frame store.",
    sections=("run", "ingest", "data"),
    aliases={
        "--source": "ingest.source",
        "--store": "data.store",
        "--grid": "ingest.grid",
        "--dataset": "ingest.dataset",
        "--mask": "ingest.mask",
        "--dry-run": "ingest.dry_run",
    },
)
PRESETS_FOR_GRID = {"2mm": "base", "4mm": "tiny", "reference": "paper"}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the job; returns the exit status."""
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(name)s: %(message)s")
    config = JOB.parse(argv)
    settings = config.model_dump(mode="json", include={"ingest": True, "data": {"store"}})
    print(yaml.safe_dump(settings, sort_keys=False).rstrip(), flush=True)
    try:
        report = dry_run(config) if config.ingest.dry_run else ingest(config)
    except (ConfigError, DiscoverError, MaskError, StoreError, OSError) as error:
        print(f"jobs/ingest.py: {error}", file=sys.stderr)
        return 2 if isinstance(error, ConfigError) else 1
    print("\n".join(report.lines()))
    if not report.in_store:
        print("nothing was ingested: no run of this source can be used, see the reasons above", file=sys.stderr)
        return 1
    train = f"python jobs/pretrain.py --preset {PRESETS_FOR_GRID[config.ingest.grid]} --store {config.data.store}"
    print(f"next: {'the same command without --dry-run' if config.ingest.dry_run else train}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
