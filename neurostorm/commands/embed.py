"""Runs as vectors: `python jobs/embed.py --model DIR (--store STORE | --source DIR_OF_NIFTI) --out OUT`.

A second start does what is left. Exit status 0 when OUT holds an embedded run.
"""

import sys
from collections.abc import Sequence

from neurostorm.commands.command import Job
from neurostorm.config import Config

JOB = Job(
    "embed",
    "Embed every run of a frame store, or of a folder of preprocessed NIfTI files, with a pretrained model.",
    settings=("embed", "scale.wait_for_nodes_s"),
    aliases={
        "--model": "embed.model",
        "--store": "embed.store",
        "--source": "embed.source",
        "--out": "embed.out",
        "--workers": "embed.workers",
    },
)


def work(config: Config) -> int:
    """Embeds what is left; 1 when nothing could be embedded."""
    from neurostorm.downstream.embed.job import embed

    report = embed(config)
    print("\n".join(report.lines()))
    if not report.tables.runs:
        print("nothing was embedded: see the reasons above", file=sys.stderr)
        return 1
    print(f"next: pandas.read_parquet({str(report.out / 'subjects.parquet')!r}), one vector per subject")
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the job; returns the exit status."""
    return JOB.run(work, argv)
