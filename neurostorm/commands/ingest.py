"""NIfTI files into the frame store: `python jobs/ingest.py --source DIR --store STORE [--grid 4mm] [--dry-run]`.

A second start skips what is complete. Exit status 0 when the store holds a run of the source (with --dry-run: would)
and every run that can be used was written.
"""

import shlex
import sys
from collections.abc import Sequence

from neurostorm.commands.command import Job
from neurostorm.config import Config

JOB = Job(
    "ingest",
    "Bring preprocessed fMRI (NIfTI in MNI space: BIDS derivatives, HCP or plain names) into a frame store.",
    settings=("ingest", "data.store", "scale.wait_for_nodes_s"),
    aliases={
        "--source": "ingest.source",
        "--store": "data.store",
        "--grid": "ingest.grid",
        "--dataset": "ingest.dataset",
        "--mask": "ingest.mask",
        "--dry-run": "ingest.dry_run",
    },
    presets=True,
    facts=lambda config: {"grid": f"{config.ingest.grid}, a frame every {config.ingest.tr_s:g} s"},
)


def work(config: Config) -> int:
    """Ingests what is new; 1 when the store then holds no run of the source, or a run could not be written."""
    from neurostorm.ingest.estimate import dry_run
    from neurostorm.ingest.job import ingest
    from neurostorm.runtime.capacity import pretrain_suggestion
    from neurostorm.runtime.resources import current

    if config.ingest.dry_run:
        estimate = dry_run(config)
        print("\n".join(estimate.lines()))
        if not estimate.in_store:
            return _nothing()
        print("next: the same command without --dry-run")
        return 0
    report = ingest(config)
    print("\n".join(report.lines()))
    if not report.in_store:
        return _nothing()
    store = shlex.quote(str(config.data.store))
    print(f"next: {pretrain_suggestion(config.ingest.grid, current(), store, JOB.command('pretrain'))}")
    return 1 if report.having("unwritten") else 0


def _nothing() -> int:
    print("nothing was ingested: no run of this source can be used, see the reasons above", file=sys.stderr)
    return 1


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the job; returns the exit status."""
    return JOB.run(work, argv)
