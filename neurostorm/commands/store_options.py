"""The command line of `neurostorm store`: its commands, their options, and what makes no sense together."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from neurostorm.commands import program
from neurostorm.io.paths import to_path
from neurostorm.store.maintenance.inventory import OLDER_THAN_S

RUN_HELP = "as `list` names it, <dataset>/<subject>/<entities>, or parts that only one run has: sub-001, sub-001_ses-2"
WORKERS_HELP = "runs read at a time, 32 MB each (64 MB in an object store); default: the cores, 8 at most"


def parse(argv: Sequence[str] | None, description: str | None) -> argparse.Namespace:
    """The command line; exits with status 2 and the reason when it makes no sense."""
    parser = argparse.ArgumentParser(
        prog=program("store", "store.py"), description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="name", metavar="COMMAND", required=True)
    for add in (add_stats, add_list, add_show, add_verify, add_repair, add_remove, add_merge, add_export):
        add(commands)
    options = parser.parse_args(argv)
    if error := nonsense(options):
        parser.error(error)
    return options


def add_command(commands: Any, name: str, text: str) -> Any:
    """A command with its STORE."""
    added = commands.add_parser(name, help=text, description=text)
    added.add_argument("store", metavar="STORE", type=to_path, help="folder, s3://BUCKET/KEY or gs://BUCKET/KEY")
    return added


def add_stats(commands: Any) -> None:
    """`stats`."""
    added = add_command(commands, "stats", "Datasets, hours of scan, quality, labels, quarantine, disk.")
    added.add_argument("--json", metavar="FILE", type=Path, help="also write it as JSON")


def add_list(commands: Any) -> None:
    """`list`."""
    added = add_command(commands, "list", "The runs: path, subject, session, task, frames, minutes, coverage.")
    added.add_argument(
        "--subject",
        metavar="[DATASET/]sub-ID",
        action="append",
        default=[],
        help="only the runs of this subject; may be given several times",
    )
    added.add_argument("--json", metavar="FILE", type=Path, help="also write them as JSON")


def add_show(commands: Any) -> None:
    """`show`."""
    added = add_command(commands, "show", "One run: attributes, figures from its stored bytes, a picture.")
    added.add_argument("run", metavar="RUN", help=RUN_HELP)
    added.add_argument(
        "--png",
        metavar="FILE",
        type=Path,
        help="write a picture, sagittal, coronal and axial, of the mean image, the temporal signal to noise and the "
        "z-scores of the middle frame",
    )


def add_verify(commands: Any) -> None:
    """`verify`."""
    text = (
        "Read all runs: checksums, shapes, figures; compare the tables with them. Exit status 1 if anything is wrong."
    )
    added = add_command(commands, "verify", text)
    added.add_argument("--run", metavar="RUN", help=f"only this run, {RUN_HELP}")
    added.add_argument("--workers", metavar="N", type=positive, help=WORKERS_HELP)
    added.add_argument(
        "--sample",
        metavar="FRACTION",
        type=fraction,
        default=1.0,
        help="read only this share of the runs, drawn anew each time; the tables are compared in full",
    )
    added.add_argument("--json", metavar="FILE", type=Path, help="also write what was found as JSON")


def add_repair(commands: Any) -> None:
    """`repair`."""
    text = "Delete half-written runs, give groups their metadata, rebuild the manifest from the runs."
    added = add_command(commands, "repair", text)
    added.add_argument("--dry-run", action="store_true", help="change nothing, only say what would be done")
    added.add_argument(
        "--drop-damaged",
        action="store_true",
        help="read all runs as `verify` does and delete those that are damaged; the next ingest brings them back",
    )
    added.add_argument(
        "--older-than-s",
        metavar="SECONDS",
        type=float,
        default=OLDER_THAN_S,
        help="in an object store, the age from which a shard without metadata counts as half-written; "
        "default: %(default)g",
    )
    added.add_argument("--workers", metavar="N", type=positive, help=WORKERS_HELP)


def add_remove(commands: Any) -> None:
    """`remove`."""
    text = (
        "A participant withdraws: frames, labels, rows of manifest and quarantine are deleted, and an ingest refuses "
        "the id from then on. When it was cut off, start it again. Backups, and versions that a bucket keeps, stay."
    )
    added = add_command(commands, "remove", text)
    added.add_argument(
        "--subject",
        metavar="[DATASET/]sub-ID",
        action="append",
        required=True,
        help="who; with the dataset if several have the id. May be given several times",
    )
    added.add_argument("--yes", action="store_true", help="do not ask")
    added.add_argument("--undo", action="store_true", help="let an ingest take them again; brings nothing back itself")


def add_merge(commands: Any) -> None:
    """`merge`."""
    text = (
        "Copy the runs, labels and quarantine of other stores into STORE, which is made if it is missing. Nothing in "
        "STORE is overwritten; what differs is listed, with exit status 1. When it was cut off, start it again."
    )
    added = add_command(commands, "merge", text)
    added.add_argument(
        "others", metavar="FROM", nargs="+", type=to_path, help="a store of the same grid, mask, TR and recipe"
    )


def add_export(commands: Any) -> None:
    """`export`."""
    added = add_command(commands, "export", "A run as NIfTI, or a run or all of them as NIfTI-Zarr.")
    added.add_argument("run", metavar="RUN", nargs="?", help=f"{RUN_HELP}; without it, all runs (NIfTI-Zarr)")
    added.add_argument(
        "--nifti",
        metavar="FILE",
        type=Path,
        help="4D float32 (.nii or .nii.gz) in the source's units, 0 outside the brain mask, on the store's grid and TR",
    )
    added.add_argument(
        "--nifti-zarr",
        metavar="FOLDER",
        type=to_path,
        help="the same values as NIfTI-Zarr (OME-NGFF 0.5): RUN becomes this group, as in run.nii.zarr; all runs "
        "become FOLDER/<dataset>/<subject>/<entities>.nii.zarr, and those that are there are skipped",
    )


def nonsense(options: argparse.Namespace) -> str | None:
    """Why options that are right one by one make no sense together."""
    if options.name == "remove" and not (options.yes or options.undo or sys.stdin.isatty()):
        return "remove asks before it deletes, and this is no terminal: add --yes"
    if options.name == "export":
        if not (options.nifti or options.nifti_zarr):
            return "say what to write: --nifti FILE or --nifti-zarr FOLDER"
        if options.nifti and options.run is None:
            return "--nifti writes one run: name it behind STORE"
    for name, endings in (("png", (".png",)), ("nifti", (".nii", ".nii.gz")), ("json", (".json",))):
        file = getattr(options, name, None)
        if file and not file.name.lower().endswith(endings):
            return f"--{name} {file}: the file's name must end in {' or '.join(endings)}"
        if file and not file.absolute().parent.is_dir():
            return f"--{name} {file}: there is no folder {file.absolute().parent}"
    return None


def positive(text: str) -> int:
    """A whole number from 1 on."""
    if int(text) < 1:
        raise ValueError(text)
    return int(text)


def fraction(text: str) -> float:
    """A number above 0, at most 1."""
    if not 0 < float(text) <= 1:
        raise ValueError(text)
    return float(text)
