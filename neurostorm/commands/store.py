"""Look after a frame store: check it, repair it, take a participant out, merge, count, look at and export runs.

store.py stats STORE                                    datasets, hours of scan, quality, labels, quarantine, disk
store.py list STORE --subject sub-001                   the runs, one a line: path, task, frames, minutes, coverage
store.py show STORE RUN --png run.png                   a run's figures from its stored bytes, and a picture of it
store.py verify STORE                                   every checksum, shape and figure; a table of what is wrong
store.py repair STORE --dry-run                         what is half-written or out of date, and would be put right
store.py remove STORE --subject hcp/sub-100307          a participant withdraws: frames, labels and rows are deleted
store.py merge STORE OTHER [OTHER ...]                  copy the runs and tables of other stores into STORE
store.py export STORE RUN --nifti run.nii.gz            4D float32 in the source's units, MNI152 millimetres
store.py export STORE --nifti-zarr viewer               every run as NIfTI-Zarr, for viewers

STORE is a folder, or s3://BUCKET/KEY or gs://BUCKET/KEY.
"""

import argparse
import io
import json
import os
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import matplotlib.image
import numpy as np

from neurostorm.commands import program
from neurostorm.commands.store_options import parse
from neurostorm.io.atomic import atomic_write
from neurostorm.runtime.progress import progress, tracked
from neurostorm.store import FrameStore, StoreError
from neurostorm.store.layout import RUNS
from neurostorm.store.maintenance.care import Holding, allow_removed, find_subject, holding, remove_subject, repair
from neurostorm.store.maintenance.check_run import Problem
from neurostorm.store.maintenance.export import nifti_zarr_name, write_nifti, write_nifti_zarr
from neurostorm.store.maintenance.inventory import Advance, Progress, find_run
from neurostorm.store.maintenance.merge import merge
from neurostorm.store.maintenance.summary import list_runs, run_figures, summarise
from neurostorm.store.maintenance.verify import verify
from neurostorm.tracking.images import Row, percentiles, rows_figure


def main(argv: Sequence[str] | None = None) -> int:
    """Exit status 0; 1 with the reason on stderr when something is wrong or was found wrong; 2 for the command line."""
    options = parse(argv, __doc__)
    commands = {
        "stats": stats,
        "list": list_of_runs,
        "show": show,
        "verify": verify_store,
        "repair": repair_store,
        "remove": remove_subjects,
        "merge": merge_stores,
        "export": export,
    }
    try:
        return commands[options.name](options)
    except BrokenPipeError:  # `... | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (StoreError, OSError) as error:
        print(f"{program('store', 'store.py')} {options.name}: {error}", file=sys.stderr)
        return 1


def stats(options: argparse.Namespace) -> int:
    """The store at a glance."""
    found = summarise(options.store)
    size, share = " x ".join(map(str, found["shape"])), found["mask_share"]
    print(f"store        {found['store']}")
    print(f"format       {found['format']}")
    print(f"grid         {found['grid']}: {size} voxels of {found['voxel_mm']:g} mm")
    print(f"brain mask   {found['mask_voxels']:,} voxels ({share:.1%} of the box)")
    print(f"TR           {found['tr_s']:g} s")
    print(f"recipe       {found['recipe']}, version {found['recipe_version']}")
    print(f"on disk      {readable_bytes(found['size_bytes'])} in {found['files']:,} files\n")
    print_datasets(found["datasets"])
    people, rows = found["participants"], found["participants"]["rows"]
    labels = ", ".join(f"{name} ({count:,})" for name, count in people["labels"].items())
    print(f"\nparticipants {rows:,} rows{': ' + labels if labels else ''}")
    if people["labels"]:
        print("             predict one: --task phenotype:COLUMN (a number) or diagnosis:COLUMN (classes)")
    print(f"withdrawn    {found['withdrawn']:,} subjects")
    print(f"quarantine   {found['quarantine']['inputs']:,} inputs")
    for kind in found["quarantine"]["reasons"]:
        print(f"  {kind['count']:>6,} x {kind['reason']} (as {kind['source']})")
    for note in found["notes"]:
        print(f"note: {note}")
    write_json(options.json, found)
    return 0


def list_of_runs(options: argparse.Namespace) -> int:
    """The runs, one a line."""
    found = list_runs(options.store)
    if options.subject:
        people = {find_subject(options.store, name) for name in options.subject}
        found["runs"] = [row for row in found["runs"] if (row["dataset"], row["subject"]) in people]
    rows = found["runs"]
    texts = {name: [str(row[name] or "-") for row in rows] for name in ("run", "subject", "session", "task")}
    widths = {name: max([len(name), *map(len, column)]) for name, column in texts.items()}
    titles = "  ".join(f"{name:<{width}}" for name, width in widths.items())
    print(f"{titles}  {'frames':>8}  {'minutes':>7}  {'coverage':>8}")
    for number, row in enumerate(rows):
        line = "  ".join(f"{texts[name][number]:<{width}}" for name, width in widths.items())
        coverage = "-" if row["coverage"] is None else f"{row['coverage']:.1%}"
        print(f"{line}  {row['frames']:>8,}  {row['minutes']:>7.1f}  {coverage:>8}")
    people = {(row["dataset"], row["subject"]) for row in rows}
    minutes = sum(row["minutes"] for row in rows)
    print(f"\n{len(rows):,} run(s) of {len(people):,} subject(s), {minutes:,.1f} minutes")
    for note in found["notes"]:
        print(f"note: {note}")
    write_json(options.json, found)
    return 0


def show(options: argparse.Namespace) -> int:
    """One run: its attributes as they were written, then figures from the stored arrays themselves."""
    store, run = open_run(options)
    attributes = store.run_attributes(run)
    width = max(len(key) for key in attributes)
    print(f"run {run}")
    for key, value in sorted(attributes.items()):
        print(f"  {key:<{width}}  {f'{value:.6g}' if isinstance(value, float) else value}")
    found, decibels = run_figures(store, run), attributes.get("quantisation_db")
    noise = "not recorded" if decibels is None else f"{decibels:.1f} dB (signal to rounding noise, median over voxels)"
    low, middle, high = found["tsnr"] or (np.nan,) * 3
    print("\nfrom the stored arrays")
    print(f"  length            {found['frames']:,} frames, {found['minutes']:.1f} min")
    print(f"  temporal SNR      {middle:.1f} ({low:.1f} to {high:.1f}) (mean / std, median and 5th to 95th percentile)")
    print(f"  coverage          {found['coverage']:.1%} of the brain mask")
    print(f"  clipped values    {found['clipped_fraction']:.4%} (|z| >= 7.9, of voxels with signal)")
    print(f"  quantisation      {noise}")
    if options.png:
        atomic_write(options.png, run_picture(store, run))
        print(f"\nwrote {options.png}")
    return 0


def verify_store(options: argparse.Namespace) -> int:
    """What is wrong, as a table."""
    bar = progress_bar("verify", "B")
    found = verify(options.store, run=options.run, sample=options.sample, workers=options.workers, progress=bar)
    print_problems(found.problems)
    speed = f"{found.runs:,} run(s), {readable_bytes(found.size_bytes)} in {found.seconds:.1f} s"
    print(f"{speed}: {f'{len(found.problems):,} problem(s)' if found.problems else 'nothing is wrong'}")
    write_json(options.json, asdict(found))
    return 1 if found.problems else 0


def repair_store(options: argparse.Namespace) -> int:
    """What was, or would be, put right."""
    done = repair(
        options.store,
        dry_run=options.dry_run,
        drop_damaged=options.drop_damaged,
        older_than_s=options.older_than_s,
        workers=options.workers,
        progress=progress_bar("verify", "B"),
    )
    print_problems(done.dropped + done.unread)
    would = "would be " if options.dry_run else ""
    for name in done.leftovers:
        print(f"{would}deleted, unfinished: {name}")
    for name in sorted({problem.where for problem in done.dropped}):
        print(f"{would}deleted, damaged: {name}")
    for name in done.groups:
        print(f"{would}given its metadata: {name}")
    print(f"manifest {would}rebuilt from {done.runs:,} run(s)")
    if done.dropped:
        print("next: start the ingest again, it brings back what was deleted")
    return 1 if done.unread else 0


def remove_subjects(options: argparse.Namespace) -> int:
    """Participants who withdraw, or who are taken again."""
    people = [find_subject(options.store, name) for name in options.subject]
    if options.undo:
        for dataset, subject in people:
            back = allow_removed(options.store, dataset, subject)
            print(f"{dataset}/{subject}: {'an ingest takes them again' if back else 'had not withdrawn'}")
        return 0
    for dataset, subject in people:
        print(holding_text(holding(options.store, dataset, subject)))
    if not options.yes and input("Delete this for good? Type yes: ").strip().lower() != "yes":
        print("nothing was deleted", file=sys.stderr)
        return 1
    for dataset, subject in people:
        remove_subject(options.store, dataset, subject)
        print(f"{dataset}/{subject} was removed; an ingest refuses them from now on")
    return 0


def merge_stores(options: argparse.Namespace) -> int:
    """What came, and what did not."""
    done = merge(options.store, options.others, progress=progress_bar("merge", "B"))
    print_problems(done.problems)
    there = f"; {done.there:,} were there already" if done.there else ""
    print(f"{done.copied:,} run(s) copied, {readable_bytes(done.size_bytes)}{there}")
    if done.refused:
        print(f"{done.refused:,} run(s) of subjects who withdrew were left out")
    return 1 if done.problems else 0


def export(options: argparse.Namespace) -> int:
    """One run, or all as NIfTI-Zarr; what is there already is left as it is."""
    if options.run is None:
        store = FrameStore.open(options.store)
        runs = store.runs()
        written = 0
        for run in tracked(runs, len(runs), "export", "run"):
            written += write_nifti_zarr(store, run, options.nifti_zarr / nifti_zarr_name(run))
        there = f"; {len(runs) - written:,} were there already" if written < len(runs) else ""
        print(f"{written:,} of {len(runs):,} run(s) written to {options.nifti_zarr}{there}")
        return 0
    store, run = open_run(options)
    bar = progress_bar("export", " frames")
    if options.nifti:
        write_nifti(store, run, options.nifti, progress=bar)
        print(f"wrote {options.nifti}")
    if options.nifti_zarr and not write_nifti_zarr(store, run, options.nifti_zarr, progress=bar):
        raise StoreError(f"{options.nifti_zarr} is there already: choose another folder, or delete it")
    if options.nifti_zarr:
        print(f"wrote {options.nifti_zarr}")
    return 0


def open_run(options: argparse.Namespace) -> tuple[FrameStore, str]:
    """The store and the path of the run that RUN means."""
    store = FrameStore.open(options.store)
    return store, find_run(store.path, options.run)


def run_picture(store: FrameStore, run: str) -> bytes:
    """A PNG of three rows (mean image, temporal SNR, middle frame's z) of three planes."""
    mean, std = store.moments(run)
    middle = store.frame_count(run) // 2
    z = store.codec.decode(store.frames(run, middle, 1)[0])
    covered = std > 0
    snr = np.divide(mean, std, out=np.full_like(mean, np.nan), where=covered)
    reach = percentiles(np.abs(z[covered]))[1]
    moment = f"Frame {middle}\n{middle * store.tr_s:.1f} s, each voxel\nagainst its own mean"

    def volume(values: np.ndarray) -> np.ndarray:
        return store.unpack(np.where(covered, values, np.nan).astype(np.float32))

    rows = [
        Row("Mean image", volume(mean), percentiles(mean[covered]), "source units", "anatomy"),
        Row("Temporal SNR\nmean / std", volume(snr), (0.0, percentiles(snr)[1]), "ratio", "amount"),
        Row(moment, volume(z), (-reach, reach), "z", "signed"),
    ]
    grid = f"{store.grid.name} grid, {store.frame_count(run):,} frames of {store.tr_s:g} s"
    title = f"{run.removeprefix(RUNS + '/')}\n{grid}"
    outside = 1 - covered.mean()
    caption = f"dark grey: outside the run's field of view ({outside:.1%} of the brain)" if outside else ""
    picture = rows_figure(rows, store.mask, title, affine=store.grid.affine, caption=caption)
    data = io.BytesIO()
    matplotlib.image.imsave(data, picture, format="png")
    return data.getvalue()


def holding_text(held: Holding) -> str:
    """What will be deleted."""
    again = "; recorded as withdrawn already" if held.withdrawn else ""
    return (
        f"{held.dataset}/{held.subject}: {held.runs} run(s), {readable_bytes(held.size_bytes)}, "
        f"{held.labels} row(s) of labels, {held.quarantined} row(s) of quarantine{again}"
    )


def print_datasets(datasets: Sequence[dict[str, Any]]) -> None:
    """One line per dataset and one for all."""
    width = max(7, *(len(row["name"]) for row in datasets))
    print(
        f"{'dataset':<{width}}  {'subjects':>8}  {'runs':>8}  {'frames':>12}  {'hours':>9}  {'GB':>9}  {'tSNR':>6}  "
        f"{'coverage':>8}  {'clipped':>8}"
    )
    for row in datasets:
        figures = ((row["tsnr_median"], ".1f", 6), (row["coverage"], ".1%", 8), (row["clipped_fraction"], ".4%", 8))
        quality = "  ".join(f"{'-' if value is None else format(value, form):>{n}}" for value, form, n in figures)
        print(
            f"{row['name']:<{width}}  {row['subjects']:>8,}  {row['runs']:>8,}  {row['frames']:>12,}  "
            f"{row['hours']:>9,.2f}  {row['size_bytes'] / 1e9:>9,.3f}  {quality}"
        )


def print_problems(problems: Sequence[Problem]) -> None:
    """A table of what is wrong; nothing if nothing is."""
    if not problems:
        return
    where = max(len(problem.where) for problem in problems)
    what = min(80, max(len(problem.what) for problem in problems))
    print(f"{'where':<{where}}  {'what':<{what}}  fix")
    for problem in problems:
        print(f"{problem.where:<{where}}  {problem.what:<{what}}  {problem.fix}")
    print()


def progress_bar(title: str, unit: str) -> Progress:
    """A bar on the terminal, or a line now and then in a log file."""

    @contextmanager
    def show_progress(total: int) -> Iterator[Advance]:
        lock = threading.Lock()
        with progress(total, title, unit, scale=True) as bar:

            def advance(count: int) -> None:
                with lock:
                    bar.update(count)

            yield advance

    return show_progress


def write_json(file: Path | None, tree: dict[str, Any]) -> None:
    """The figures for a program, if asked for."""
    if file:
        atomic_write(file, (json.dumps(tree, indent=1) + "\n").encode())


def readable_bytes(size_bytes: float) -> str:
    """Decimal units, as disks are sold."""
    for unit in ("B", "kB", "MB", "GB"):
        if size_bytes < 1000:
            return f"{size_bytes:.3g} {unit}"
        size_bytes /= 1000
    return f"{size_bytes:,.3g} TB"
