"""Runs as vectors: `python jobs/embed.py --model DIR (--store STORE | --source DIR_OF_NIFTI) --out OUT`.

A second start goes on with what is left. Exit status 0 when OUT holds an embedded run, 1 when it holds none or
cannot (model and data do not fit), 2 when the command line is wrong.
"""

import logging
import sys
from collections.abc import Sequence

from neurostorm.cli import Job
from neurostorm.config import ConfigError

JOB = Job(
    "embed",
    "Embed every run of a frame store, or of a folder of preprocessed NIfTI files, with a pretrained model.",
    sections=("embed",),
    aliases={
        "--model": "embed.model",
        "--store": "embed.store",
        "--source": "embed.source",
        "--out": "embed.out",
        "--workers": "embed.workers",
    },
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the job; returns the exit status."""
    config = JOB.parse(argv)
    print(config.to_yaml(*JOB.sections), flush=True)
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(name)s: %(message)s")
    from neurostorm.downstream.embed import embed
    from neurostorm.ingest.discover import DiscoverError
    from neurostorm.model.hub import HubError
    from neurostorm.object_store import PlaceError
    from neurostorm.store import StoreError

    try:
        report = embed(config)
    except (ConfigError, DiscoverError, HubError, PlaceError, StoreError) as error:
        print(f"jobs/embed.py: {error}", file=sys.stderr)
        return 2 if isinstance(error, ConfigError) else 1
    print("\n".join(report.lines()))
    if not report.tables.runs:
        print("nothing was embedded: see the reasons above", file=sys.stderr)
        return 1
    print(f"next: pandas.read_parquet({str(report.out / 'subjects.parquet')!r}), one vector per subject")
    return 0


if __name__ == "__main__":
    sys.exit(main())
