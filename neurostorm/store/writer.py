"""Writing a store: the empty store once, then each run once, whole.

    local          .partial/<uuid>/{0.0, zarr.json} --flush to disk--> rename to runs/<dataset>/<subject>/<entities>/
    object store   upload .partial/<uuid>/0.0 --> copy to runs/.../0.0 --> put runs/.../zarr.json, unless they are there

The last step is one step for everybody who looks: a run that has its zarr.json is complete, and what was cut off is
only rubbish, for `remove_partials` to sweep. The same holds for the store itself, so any number of processes may create
and fill one store at once; whoever comes second finds the work done.
"""

import contextlib
import itertools
import json
import math
import os
import shutil
import uuid
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import zarr
from numpy.typing import NDArray

from neurostorm.io.atomic import copy_if_absent, fsync, put_if_absent
from neurostorm.io.locks import open_locked, temporary_name
from neurostorm.io.object_store import ObjectPath, ObjectStoreError
from neurostorm.io.paths import AnyPath, list_files
from neurostorm.store.codec import INT8_16, FrameCodec
from neurostorm.store.files import StorePath, is_node, read_header, store_place
from neurostorm.store.layout import (
    FORMAT,
    MASK,
    METADATA,
    PARTIAL,
    RECIPE_VERSION,
    RUNS,
    SPACE,
    Grid,
    StoreError,
    mask_hash,
    split_run,
)
from neurostorm.store.shard import (
    COMPRESSIONS,
    MOMENT_ROWS,
    SHARD_FILE,
    RunLayout,
    array_metadata,
    default_chunk_frames,
    encode,
    moment_rows,
)

_GROUP = {"zarr_format": 3, "node_type": "group", "attributes": {}}
_WRITE_BYTES = 8 << 20  # handed to the disk at a time


def create_store(
    path: StorePath,
    *,
    grid: Grid,
    mask: NDArray[Any],
    tr_s: float,
    recipe: str,
    recipe_version: int = RECIPE_VERSION,
    codec: FrameCodec = INT8_16,
) -> None:
    """Make an empty store at `path`, or agree that the one there is the same. Safe to call from many processes.

    Args:
        path: folder of the store; parents are made.
        grid: the box every run is stored on.
        mask: (X, Y, Z) of `grid.shape`, non-zero inside the brain; its voxels are the V of every run.
        tr_s: time between two stored frames, in seconds.
        recipe: name of the preparation that filled the store, with `recipe_version`.
        codec: how its frames store z-scores.

    Raises:
        ValueError: a mask of another shape or without a voxel, or a TR that is not positive.
        StoreError: the folder holds something else, or a store with other properties (the message lists them).
    """
    target = store_place(path)
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
        "frame_codec": codec.name,
        "recipe": {"name": recipe, "version": recipe_version},
    }
    if not is_node(target):
        _publish_store(target, _empty_store(header, inside))
    _check_same(target, header)


def write_run(
    path: StorePath,
    run: str,
    *,
    frames: NDArray[np.int8],
    mean: NDArray[np.floating[Any]],
    std: NDArray[np.floating[Any]],
    attributes: Mapping[str, Any],
    chunk_frames: int | None = None,
    compression: str = "none",
) -> bool:
    """Write one run, whole, or not at all.

    Args:
        path: the store.
        run: `run_path(dataset, subject, entities)`.
        frames: (T, V) int8 as the `encode` of the store's codec makes them.
        mean, std: (V) in source units; std 0 marks voxels outside the run's field of view.
        attributes: what the manifest and a reader need to know, JSON values; `frames`, `tr_s`, `dataset`, `subject` and
            `neurostorm_format` are filled in.
        chunk_frames: frames under one checksum; default: as many as come nearest to 128 kB.
        compression: "none", or "zstd" where the network is slower than the decompression.

    Returns:
        True if this call wrote the run, False if a complete one was there (it is left as it is).

    Raises:
        ValueError: shapes, values or names that do not fit the store.
        StoreError: `path` is not a store of this format, or something else lies, or is being put, in the run's place.
        OSError: the store cannot be written: disk full, no permission, an object store that does not answer.
    """
    root = store_place(path)
    dataset, subject, _ = split_run(run)
    header = read_header(root)
    _check_arrays(run, frames, mean, std, int(header["mask_voxels"]))
    chunk_frames = default_chunk_frames(frames.shape[1]) if chunk_frames is None else chunk_frames
    if compression not in COMPRESSIONS or chunk_frames < 1:
        raise ValueError(
            f"compression {compression!r} with chunks of {chunk_frames} frames: expected one of "
            f"{sorted(COMPRESSIONS)} and chunks of 1 frame or more"
        )
    if is_node(root / run):
        return False
    facts = dict(attributes) | {"dataset": dataset, "subject": subject, "frames": len(frames)}
    facts |= {"tr_s": header["tr_s"], "neurostorm_format": FORMAT}
    chunk_frames = min(chunk_frames, len(frames) + MOMENT_ROWS)  # no longer than the run
    layout = RunLayout(len(frames), frames.shape[1], chunk_frames, compression)
    metadata = _json(array_metadata(layout, _plain(facts)))
    shard = encode(layout, frames, moment_rows(mean, std))
    return publish(root, run, metadata, shard)


def publish(path: StorePath, run: str, metadata: bytes, shard: Iterable[bytes | memoryview]) -> bool:
    """Put a run's two files in place, whole or not at all; False when a complete run is there, which is left as it is.

    Errors as `write_run`, and whatever `shard` raises while its pieces are taken: then nothing was written.
    """
    root = store_place(path)
    make_groups(root, run)
    if isinstance(root, Path):
        return _publish_local(root, root / run, metadata, shard)
    return _publish_object(root, root / run, metadata, shard)


def make_groups(root: AnyPath, run: str) -> None:
    """Give the groups between the root and a run their metadata, so that any Zarr reader can walk down."""
    target = root / run
    target.parent.mkdir(parents=True, exist_ok=True)
    for group in (target.parents[1], target.parents[0]):  # dataset, subject
        if not is_node(group) and put_if_absent(group / METADATA, _json(_GROUP)) and isinstance(group, Path):
            fsync(group.parent)


def _publish_local(root: Path, target: Path, metadata: bytes, shard: Iterable[bytes | memoryview]) -> bool:
    """Write the run beside its place, flush it, rename it there; False when somebody else's is there already."""
    partial = root / PARTIAL / temporary_name()
    try:
        with open_locked(partial / SHARD_FILE, _WRITE_BYTES) as file:
            for piece in shard:
                file.write(piece)
            file.flush()
            (partial / METADATA).write_bytes(metadata)
            return _rename(partial, target)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _publish_object(root: ObjectPath, target: ObjectPath, metadata: bytes, shard: Iterable[bytes | memoryview]) -> bool:
    """Upload the shard beside its place, copy it there unless one is there, then put the metadata unless it is there.

    Neither file is ever overwritten, so a run never mixes the shard of one writer with the metadata of another, whoever
    is killed when. A shard that waits for its metadata, because its writer is at that or was killed before, serves
    every writer of the same bytes.
    """
    upload = root / PARTIAL / uuid.uuid4().hex / SHARD_FILE
    place = target / SHARD_FILE
    try:
        upload.write_bytes(bytes(piece) for piece in shard)
        if not copy_if_absent(upload, place):
            if is_node(target):
                return False
            if not _same(upload, place):
                raise StoreError(
                    f"{place} is another run's, of a source file that differs and is being written just now, or was "
                    f"when its writer was killed: wait for it, or clear up with tools/store.py repair {root}"
                )
        return put_if_absent(target / METADATA, metadata)
    finally:
        with contextlib.suppress(
            ObjectStoreError
        ):  # what made the upload fail is said already; `remove_partials` sweeps
            upload.unlink(missing_ok=True)


def _same(one: ObjectPath, other: ObjectPath) -> bool:
    """Whether two objects hold the same bytes."""
    if one.stat().st_size != other.stat().st_size:
        return False
    with one.open("rb") as first, other.open("rb") as second:
        return all(
            first.read(_WRITE_BYTES) == second.read(_WRITE_BYTES) for _ in range(0, one.stat().st_size, _WRITE_BYTES)
        )


def _empty_store(header: dict[str, Any], inside: NDArray[np.bool_]) -> dict[str, bytes]:
    """The files of a store without runs, the root's metadata last."""
    memory: dict[str, Any] = {}
    zarr.create_array(
        zarr.storage.MemoryStore(memory),
        name=MASK,
        data=inside.astype(np.uint8),
        chunks=inside.shape,
        compressors=(zarr.codecs.ZstdCodec(level=1), zarr.codecs.Crc32cCodec()),
        chunk_key_encoding={"name": "v2", "separator": "."},
        dimension_names=("x", "y", "z"),
    )
    files = {name: value.to_bytes() for name, value in memory.items() if name.startswith(f"{MASK}/")}
    return files | {f"{RUNS}/{METADATA}": _json(_GROUP), METADATA: _json(_GROUP | {"attributes": _plain(header)})}


def _publish_store(target: AnyPath, files: dict[str, bytes]) -> None:
    """Put the empty store in place in one step; one that came first is left as it is."""
    if _occupied(target, files) and not is_node(target):  # asked last: another process may have published just now
        raise StoreError(f"{target} exists and is not a frame store: choose another path, or an empty folder")
    if isinstance(target, ObjectPath):
        for name, data in files.items():
            if not put_if_absent(target / name, data) and name != METADATA and (target / name).read_bytes() != data:
                raise StoreError(
                    f"{target / name} is left from another attempt, with another mask, or one is being made just now: "
                    f"delete {target} if that has failed, or choose another path"
                )
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.parent / f"{temporary_name(f'.{target.name}.')}.partial"
    try:
        for name, data in files.items():
            (partial / name).parent.mkdir(parents=True, exist_ok=True)
            (partial / name).write_bytes(data)
        _rename(partial, target)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _occupied(target: AnyPath, files: dict[str, bytes]) -> bool:
    """Whether something else lies at `target`; what an interrupted creation left in an object store is no harm."""
    if isinstance(target, Path):
        return target.exists() and (not target.is_dir() or any(target.iterdir()))
    return any(name not in files for name, _ in itertools.islice(list_files(target), 100))


def _rename(partial: Path, target: Path) -> bool:
    """Flush a finished folder to disk and rename it to its place; False when somebody else's is there already."""
    for item in (*partial.rglob("*"), partial):  # the rename must not outlive the data in a power cut
        fsync(item)
    try:
        os.replace(partial, target)
    except OSError:
        if is_node(target):
            return False
        if target.is_dir() and any(target.iterdir()):
            raise StoreError(f"{target} holds something else, what is left of a deleted run maybe: delete it") from None
        raise
    fsync(target.parent)
    return True


def _check_same(target: AnyPath, wanted: dict[str, Any]) -> None:
    """StoreError naming every property in which the store differs from what the caller wants to put in."""
    found = {"frame_codec": INT8_16.name, **read_header(target)}  # earlier versions had one and did not name it
    differing = [
        f"{name} {_in_words(found.get(key))} instead of {_in_words(wanted[key])}"
        for key, name in (("grid", "grid"), ("tr_s", "TR (s)"), ("recipe", "recipe"), ("frame_codec", "frame codec"))
        if found.get(key) != wanted[key]
    ]
    if found.get("grid") == wanted["grid"] and found.get("mask_sha256") != wanted["mask_sha256"]:
        differing.append(f"another brain mask ({found.get('mask_voxels')} voxels instead of {wanted['mask_voxels']})")
    if differing:
        raise StoreError(
            f"the store at {target} has {', '.join(differing)}: choose another store, or ingest with the settings of "
            "this one (--grid, --mask, --ingest.tr_s)"
        )


def _in_words(value: Any) -> str:
    """A property of a store for people: of a grid its name, voxels and the center of the first one."""
    if not isinstance(value, Mapping):
        return str(value)
    if "affine" not in value:
        return f"{value.get('name')} (version {value.get('version')})"
    size = " x ".join(map(str, value.get("shape", ())))
    corner = ", ".join(f"{row[3]:g}" for row in value["affine"][:3])
    return f"{value.get('name')} ({size} voxels of {value.get('voxel_mm', 0):g} mm from {corner})"


def _check_arrays(run: str, frames: NDArray[Any], mean: NDArray[Any], std: NDArray[Any], voxels: int) -> None:
    """ValueError naming the run and the array that does not fit."""
    if frames.ndim != 2 or frames.dtype != np.int8 or frames.shape[0] < 1 or frames.shape[1] != voxels:
        raise ValueError(f"{run}: frames are {frames.dtype} {frames.shape}; the store takes int8 (T >= 1, {voxels})")
    if frames.min() == FrameCodec.missing:
        raise ValueError(
            f"{run}: frames hold {FrameCodec.missing}, which marks missing chunks; make them with `encode` of the codec"
        )
    for name, values in (("mean", mean), ("std", std)):
        if values.shape != (voxels,) or not np.isfinite(np.asarray(values, np.float32)).all():
            raise ValueError(f"{run}: {name} has shape {values.shape}; the store takes ({voxels},) finite numbers")
    if (std < 0).any():
        raise ValueError(f"{run}: std holds negative numbers")


def _json(tree: Mapping[str, Any]) -> bytes:
    return json.dumps(tree, indent=1).encode()


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
