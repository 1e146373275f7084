#!/usr/bin/env python3
"""Look into a frame store: what it holds, what one run is like, a picture of it, and the run back as NIfTI.

inspect_store.py STORE                                  summary: grid, datasets, hours of scan, disk, quarantine
inspect_store.py STORE --run RUN                        the run's attributes and its figures, from the stored bytes
inspect_store.py STORE --run RUN --png run.png          mean image, temporal SNR and one frame, three planes each
inspect_store.py STORE --run RUN --nifti run.nii.gz     4D float32 in the source's units, MNI152 millimetres
"""

import argparse
import difflib
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import matplotlib.image
import nibabel as nib
import numpy as np
import pyarrow as pa
from nibabel.openers import Opener

from neurostorm.pictures import Row, percentiles, rows_figure
from neurostorm.store import (
    FrameStore,
    StoreError,
    build_manifest,
    dequantise,
    read_manifest,
    read_participants,
    read_quarantine,
)
from neurostorm.store.codec import clipped_fraction
from neurostorm.store.files import replace_file
from neurostorm.store.layout import FORMAT, MANIFEST, RUNS

_BLOCK_FRAMES = 60  # what is unpacked at a time: 14 MB of bytes at 2 mm
_SHOWN_QUARANTINE = 20


def main(argv: Sequence[str] | None = None) -> int:
    """Exit status 0, or 1 with the reason on stderr."""
    options = parse(argv)
    try:
        store = FrameStore.open(options.store)
        if options.run is None:
            print_lines(summary(store))
            return 0
        run = find_run(store, options.run)
        print_lines(run_figures(store, run))
        if options.png:
            write_png(store, run, options.png)
            print(f"\nwrote {options.png}")
        if options.nifti:
            write_nifti(store, run, options.nifti)
            print(f"\nwrote {options.nifti}")
    except (StoreError, OSError) as error:
        print(f"inspect_store: {error}", file=sys.stderr)
        return 1
    return 0


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line; exits with status 2 and the reason when it makes no sense."""
    parser = argparse.ArgumentParser(
        description="Look into a frame store. Without options: a summary of all of it.",
        epilog="The runs' names are in manifest.parquet, column `run`; an unknown one is answered with the nearest.",
    )
    parser.add_argument(
        "store", metavar="STORE", type=Path, help="the store's folder, as given to jobs/ingest.py --store"
    )
    parser.add_argument(
        "--run",
        metavar="RUN",
        help="one run, as in runs/<dataset>/<subject>/<entities> (`runs/` may be left out): print its attributes, "
        "temporal signal to noise, coverage of the brain mask and quantisation in dB",
    )
    parser.add_argument(
        "--png",
        metavar="FILE",
        type=Path,
        help="with --run: write a picture, sagittal, coronal and axial, of the mean image, the temporal signal to "
        "noise and the z-scores of the middle frame",
    )
    parser.add_argument(
        "--nifti",
        metavar="FILE",
        type=Path,
        help="with --run: write the run back as 4D float32 NIfTI (.nii or .nii.gz) in the source's units, 0 outside "
        "the brain mask, on the store's grid and TR",
    )
    options = parser.parse_args(argv)
    if options.run is None and (options.png or options.nifti):
        parser.error("--png and --nifti show one run: name it with --run")
    if options.png and options.png.suffix.lower() != ".png":
        parser.error(f"--png {options.png}: the file's name must end in .png")
    if options.nifti and not options.nifti.name.lower().endswith((".nii", ".nii.gz")):
        parser.error(f"--nifti {options.nifti}: the file's name must end in .nii or .nii.gz")
    for option in (options.png, options.nifti):
        if option and not option.absolute().parent.is_dir():
            parser.error(f"{option}: there is no folder {option.absolute().parent}")
    return options


def summary(store: FrameStore) -> Iterator[str]:
    """The store at a glance, line by line."""
    runs = build_manifest(store.path)
    grid = store.grid
    size_bytes, files = disk_use(store.path)
    yield f"store        {store.path}"
    yield f"format       {FORMAT}"
    yield f"grid         {grid.name}: {' x '.join(map(str, grid.shape))} voxels of {grid.voxel_mm:g} mm"
    yield f"brain mask   {store.voxel_count:,} voxels ({store.voxel_count / store.mask.size:.1%} of the box)"
    yield f"TR           {store.tr_s:g} s"
    yield f"recipe       {store.recipe['name']}, version {store.recipe['version']}"
    yield f"on disk      {readable_bytes(size_bytes)} in {files:,} files"
    yield ""
    yield from dataset_table(runs, store.tr_s)
    participants = read_participants(store.path)
    if participants is not None:
        yield ""
        yield f"participants {participants.num_rows:,} rows: {', '.join(participants.column_names)}"
    yield from manifest_note(store, runs)
    yield ""
    yield from quarantine_lines(read_quarantine(store.path))


def manifest_note(store: FrameStore, runs: pa.Table) -> Iterator[str]:
    """A warning if the manifest does not list what is there: training plans on the manifest alone."""
    try:
        listed = read_manifest(store.path)
    except StoreError as error:
        yield f"\nnote: {error}"
        return
    if not listed.equals(runs):
        yield f"\nnote: {MANIFEST} ({listed.num_rows:,} runs) is not up to date: run the ingest again to rebuild it"


def dataset_table(runs: pa.Table, tr_s: float) -> Iterator[str]:
    """One line per dataset and one for all: subjects, runs, frames, hours of scan."""
    rows = runs.select(["dataset", "subject", "frames"]).to_pylist()
    datasets = sorted({row["dataset"] for row in rows})
    width = max(7, *(len(name) for name in datasets)) if datasets else 7
    yield f"{'dataset':<{width}}  {'subjects':>8}  {'runs':>8}  {'frames':>12}  {'hours':>9}"
    for name in (*datasets, "all"):
        chosen = [row for row in rows if name in ("all", row["dataset"])]
        subjects = len({(row["dataset"], row["subject"]) for row in chosen})
        frames = sum(row["frames"] for row in chosen)
        yield f"{name:<{width}}  {subjects:>8,}  {len(chosen):>8,}  {frames:>12,}  {frames * tr_s / 3600:>9,.2f}"


def quarantine_lines(table: pa.Table) -> Iterator[str]:
    """What could not be ingested, and why; the first twenty."""
    yield f"quarantine   {table.num_rows:,} inputs"
    for row in table.slice(0, _SHOWN_QUARANTINE).to_pylist():
        yield f"  {row['source']}: {row['reason']} ({row['when']})"
    if table.num_rows > _SHOWN_QUARANTINE:
        yield f"  ... {table.num_rows - _SHOWN_QUARANTINE:,} more in quarantine.parquet"


def find_run(store: FrameStore, name: str) -> str:
    """The path of the run that `name` means. StoreError with the nearest names if there is none."""
    runs = store.runs()
    wanted = name.strip("/")
    wanted = wanted if wanted.startswith(f"{RUNS}/") else f"{RUNS}/{wanted}"
    if wanted in runs:
        return wanted
    near = difflib.get_close_matches(wanted, runs, n=3, cutoff=0.3)
    hint = f"; the nearest: {', '.join(near)}" if near else f"; it holds {len(runs):,} runs"
    raise StoreError(f"{store.path} has no run {name!r}{hint}")


def run_figures(store: FrameStore, run: str) -> Iterator[str]:
    """Attributes as they were written, then figures from the stored arrays themselves."""
    attributes = store.run_attributes(run)
    mean, std = store.moments(run)
    width = max(len(key) for key in attributes)
    yield f"run {run}"
    for key in sorted(attributes):
        value = attributes[key]
        yield f"  {key:<{width}}  {f'{value:.6g}' if isinstance(value, float) else value}"
    frames = store.frame_count(run)
    inside = std > 0
    decibels = attributes.get("quantisation_db")
    quality = (
        "not recorded" if decibels is None else f"{decibels:.1f} dB (signal to rounding noise, median over voxels)"
    )
    yield ""
    yield "from the stored arrays"
    yield f"  length            {frames:,} frames, {frames * store.tr_s / 60:.1f} min"
    yield f"  temporal SNR      {snr_text(mean[inside] / std[inside])} (mean / std, median and 5th to 95th percentile)"
    yield f"  coverage          {inside.mean():.1%} of the brain mask"
    yield f"  clipped values    {clipped_share(store, run):.4%} (|z| >= 7.9)"
    yield f"  quantisation      {quality}"


def snr_text(values: np.ndarray) -> str:
    """Median and spread of what there is."""
    if values.size == 0:
        return "none: no voxel varies"
    low, middle, high = np.percentile(values, (5, 50, 95))
    return f"{middle:.1f} ({low:.1f} to {high:.1f})"


def clipped_share(store: FrameStore, run: str) -> float:
    """Share of the run's stored values at the codec's limit."""
    shares, weights = zip(*((clipped_fraction(frames), len(frames)) for frames in blocks(store, run)), strict=True)
    return float(np.average(shares, weights=weights))


def write_png(store: FrameStore, run: str, file: Path) -> None:
    """Three rows (mean image, temporal SNR, middle frame's z) of three planes."""
    mean, std = store.moments(run)
    middle = store.frame_count(run) // 2
    z = dequantise(store.frames(run, middle, 1)[0])
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
    replace_file(file, lambda partial: matplotlib.image.imsave(partial, picture, format="png"))


def write_nifti(store: FrameStore, run: str, file: Path) -> None:
    """The run as 4D float32 NIfTI, q / 16 x std + mean, a block of frames at a time: NIfTI stores frame after frame."""
    mean, std = store.moments(run)
    header = nib.Nifti1Header()
    header.set_data_dtype(np.float32)
    header.set_data_shape((*store.grid.shape, store.frame_count(run)))
    header.set_zooms((store.grid.voxel_mm,) * 3 + (store.tr_s,))
    header.set_xyzt_units("mm", "sec")
    header.set_qform(store.grid.affine, code="mni")
    header.set_sform(store.grid.affine, code="mni")
    header["descrip"] = f"neurostorm store, recipe {store.recipe['name']}".encode()[:79]

    def write(partial: Path) -> None:
        with Opener(partial, "wb") as out:
            header.write_to(out)
            for frames in blocks(store, run):
                for volume in store.unpack(dequantise(frames) * std + mean):
                    out.write(volume.astype("<f4").tobytes(order="F"))

    replace_file(file, write)


def blocks(store: FrameStore, run: str) -> Iterator[np.ndarray]:
    """The run's bytes in successive parts, each int8 (n, V)."""
    total = store.frame_count(run)
    for first in range(0, total, _BLOCK_FRAMES):
        yield store.frames(run, first, min(_BLOCK_FRAMES, total - first))


def disk_use(path: Path) -> tuple[int, int]:
    """Bytes and number of the files below a folder."""
    sizes = [os.path.getsize(Path(folder) / name) for folder, _, names in os.walk(path) for name in names]
    return sum(sizes), len(sizes)


def readable_bytes(size_bytes: float) -> str:
    """Decimal units, as disks are sold."""
    for unit in ("B", "kB", "MB", "GB"):
        if size_bytes < 1000:
            return f"{size_bytes:.3g} {unit}"
        size_bytes /= 1000
    return f"{size_bytes:,.3g} TB"


def print_lines(lines: Iterator[str]) -> None:
    """Each as it comes."""
    for line in lines:
        print(line)


if __name__ == "__main__":
    sys.exit(main())
