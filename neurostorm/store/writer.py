"""Writing a store: the empty store once, then each run once, whole.

    .partial/<uuid>/{frames, mean, std, attributes} --flush to disk--> rename to runs/<dataset>/<subject>/<entities>/

A rename is one step for everybody who looks: a run that is there is complete, and one that was cut off is only rubbish
under `.partial`, for `remove_partials` to sweep. The same holds for the store itself, so any number of processes may
create and fill one store at once; whoever comes second finds the work done.
"""

import contextlib
import json
import logging
import math
import shutil
import time
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import zarr
from numpy.typing import NDArray
from zarr.codecs import Crc32cCodec, ZstdCodec

from neurostorm.store.codec import LIMIT
from neurostorm.store.files import StorePath, flush, is_group, local_path, publish, read_header, replace_file
from neurostorm.store.layout import (
    FORMAT,
    FRAMES,
    MASK,
    MEAN,
    MISSING_FRAME,
    PARTIAL,
    RECIPE_VERSION,
    RUNS,
    SPACE,
    STD,
    Grid,
    StoreError,
    mask_hash,
    split_run,
)

logger = logging.getLogger(__name__)

SHARD_FRAMES = 600  # one shard holds most runs whole, and stays near 140 MB at 2 mm
CODECS: dict[str, tuple[Any, ...]] = {
    "none": (Crc32cCodec(),),
    "zstd": (ZstdCodec(level=1), Crc32cCodec()),
}
# One file name per chunk ("0.0") instead of a folder per dimension: inodes are what a corpus runs out of.
_FLAT_KEYS = {"name": "v2", "separator": "."}


def create_store(
    path: StorePath,
    *,
    grid: Grid,
    mask: NDArray[Any],
    tr_s: float,
    recipe: str,
    recipe_version: int = RECIPE_VERSION,
) -> None:
    """Make an empty store at `path`, or agree that the one there is the same. Safe to call from many processes.

    Args:
        path: folder of the store; parents are made.
        grid: the box every run is stored on.
        mask: (X, Y, Z) of `grid.shape`, non-zero inside the brain; its voxels are the V of every run.
        tr_s: time between two stored frames, in seconds.
        recipe: name of the preparation that filled the store, with `recipe_version`.

    Raises:
        ValueError: a mask of another shape or without a voxel, or a TR that is not positive.
        StoreError: the folder holds something else, or a store with other properties (the message lists them).
    """
    target = local_path(path)
    inside = np.asarray(mask) != 0
    if inside.shape != tuple(grid.shape):
        raise ValueError(f"the mask has shape {inside.shape}, the grid {grid.name} has {tuple(grid.shape)}")
    if not inside.any():
        raise ValueError("the mask holds no voxel")
    if not (math.isfinite(tr_s) and tr_s > 0):
        raise ValueError(f"tr_s is {tr_s}: the repetition time must be a positive number of seconds")
    header = {
        "neurostorm_format": FORMAT,
        "space": SPACE,
        "grid": grid.describe(),
        "tr_s": float(tr_s),
        "mask_sha256": mask_hash(inside),
        "mask_voxels": int(inside.sum()),
        "recipe": {"name": recipe, "version": recipe_version},
    }
    if not is_group(target):
        _publish_store(target, header, inside)
    _check_same(target, header)


def write_run(
    path: StorePath,
    run: str,
    *,
    frames: NDArray[np.int8],
    mean: NDArray[np.floating[Any]],
    std: NDArray[np.floating[Any]],
    attributes: Mapping[str, Any],
    chunk_frames: int = 10,
    codec: str = "none",
) -> bool:
    """Write one run, whole, or not at all.

    Args:
        path: the store.
        run: `run_path(dataset, subject, entities)`.
        frames: (T, V) int8 as `codec.quantise` makes them.
        mean, std: (V) in source units; std 0 marks voxels outside the run's field of view.
        attributes: what the manifest and a reader need to know, JSON values; `frames`, `tr_s`, `dataset`, `subject` and
            `neurostorm_format` are filled in.
        chunk_frames: frames that are read together, about 2 MB per ten at 2 mm.
        codec: "none", or "zstd" where the network is slower than the decompression.

    Returns:
        True if this call wrote the run, False if a complete one was there (it is left as it is).

    Raises:
        ValueError: shapes, values or names that do not fit the store.
        StoreError: `path` is not a store of this format.
    """
    root = local_path(path)
    dataset, subject, _ = split_run(run)
    header = read_header(root)
    _check_arrays(run, frames, mean, std, int(header["mask_voxels"]))
    if codec not in CODECS or chunk_frames < 1:
        raise ValueError(
            f"codec {codec!r} with chunks of {chunk_frames} frames: codecs are {sorted(CODECS)}, chunks >= 1"
        )
    target = root / run
    if is_group(target):
        return False
    facts = dict(attributes) | {"dataset": dataset, "subject": subject, "frames": len(frames)}
    facts |= {"tr_s": header["tr_s"], "neurostorm_format": FORMAT}
    partial = root / PARTIAL / uuid.uuid4().hex
    try:
        zarr.create_group(partial, attributes=_plain(facts))
        _write_frames(partial, frames, chunk_frames, codec)
        for name, values in ((MEAN, mean), (STD, std)):
            _write_vector(partial, name, values)
        flush(partial)
        _make_parents(root, target)
        return publish(partial, target)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def remove_partials(path: StorePath, older_than_s: float = 24 * 3600.0) -> int:
    """Delete what interrupted writers left under `.partial` and did not touch for `older_than_s`; returns how many."""
    removed = 0
    folder = local_path(path) / PARTIAL
    for entry in sorted(folder.glob("*/")):
        with contextlib.suppress(FileNotFoundError):  # its writer finished just now
            newest = max(item.stat().st_mtime for item in (entry, *entry.rglob("*")))
            if time.time() - newest >= older_than_s:
                shutil.rmtree(entry)
                removed += 1
    if removed:
        logger.info("removed %d unfinished run(s) from %s", removed, folder)
    return removed


def _publish_store(target: Path, header: dict[str, Any], inside: NDArray[np.bool_]) -> None:
    """Build the empty store beside `target` and rename it there; a store that came first is left as it is."""
    occupied = target.exists() and (not target.is_dir() or any(target.iterdir()))
    if occupied and not is_group(target):  # asked last: another process may have published just now
        raise StoreError(f"{target} exists and is not a frame store: choose another path, or an empty folder")
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.parent / f".{target.name}.{uuid.uuid4().hex}.partial"
    try:
        group = zarr.create_group(partial, attributes=header)
        group.create_array(
            MASK,
            data=inside.astype(np.uint8),
            chunks=inside.shape,
            compressors=CODECS["zstd"],
            chunk_key_encoding=_FLAT_KEYS,
            dimension_names=("x", "y", "z"),
        )
        group.create_group(RUNS)
        flush(partial)
        publish(partial, target)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _check_same(target: Path, wanted: dict[str, Any]) -> None:
    """StoreError naming every property in which the store differs from what the caller wants to put in."""
    found = read_header(target)
    differing = [
        f"{key} is {found.get(key)}, not {wanted[key]}"
        for key in ("grid", "tr_s", "recipe")
        if found.get(key) != wanted[key]
    ]
    if found.get("mask_sha256") != wanted["mask_sha256"]:
        differing.append(f"the mask is another ({found.get('mask_voxels')} voxels, not {wanted['mask_voxels']})")
    if differing:
        raise StoreError(f"the store at {target} holds something else: {'; '.join(differing)}. Choose another path")


def _check_arrays(run: str, frames: NDArray[Any], mean: NDArray[Any], std: NDArray[Any], voxels: int) -> None:
    """ValueError naming the run and the array that does not fit."""
    if frames.ndim != 2 or frames.dtype != np.int8 or frames.shape[0] < 1 or frames.shape[1] != voxels:
        raise ValueError(f"{run}: frames are {frames.dtype} {frames.shape}; the store takes int8 (T >= 1, {voxels})")
    if frames.min() < -LIMIT:
        raise ValueError(
            f"{run}: frames hold {MISSING_FRAME}, which marks missing chunks; make them with codec.quantise"
        )
    for name, values in (("mean", mean), ("std", std)):
        if values.shape != (voxels,) or not np.isfinite(values).all():
            raise ValueError(f"{run}: {name} has shape {values.shape}; the store takes ({voxels},) finite numbers")
    if (std < 0).any():
        raise ValueError(f"{run}: std holds negative numbers")


def _write_frames(group: Path, frames: NDArray[np.int8], chunk_frames: int, codec: str) -> None:
    shard = min(-(-len(frames) // chunk_frames), max(1, SHARD_FRAMES // chunk_frames)) * chunk_frames
    array = zarr.create_array(
        group / FRAMES,
        shape=frames.shape,
        dtype="int8",
        chunks=(chunk_frames, frames.shape[1]),
        shards=(shard, frames.shape[1]),
        compressors=CODECS[codec],
        fill_value=MISSING_FRAME,
        chunk_key_encoding=_FLAT_KEYS,
        dimension_names=("frame", "voxel"),
    )
    array[:] = frames


def _write_vector(group: Path, name: str, values: NDArray[Any]) -> None:
    array = zarr.create_array(
        group / name,
        shape=values.shape,
        dtype="float32",
        chunks=values.shape,
        compressors=CODECS["none"],
        fill_value=float("nan"),  # what a missing file reads as, and no mean or std ever is
        chunk_key_encoding=_FLAT_KEYS,
        dimension_names=("voxel",),
    )
    array[:] = values.astype(np.float32)


def _make_parents(root: Path, target: Path) -> None:
    """Give every group between the root and a run its metadata, so that any Zarr reader can walk down."""
    target.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps({"zarr_format": 3, "node_type": "group", "attributes": {}})
    for group in (target.parents[2], target.parents[1], target.parents[0]):
        if root in group.parents and not is_group(group):
            replace_file(group / "zarr.json", lambda partial: partial.write_text(text, encoding="utf-8"))


def _plain(value: Any) -> Any:
    """`value` as strict JSON: numpy scalars unpacked, tuples as lists, nan and inf as null."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, np.generic | np.ndarray):
        return _plain(value.tolist())
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
