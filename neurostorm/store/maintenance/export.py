"""Runs for other programs: as NIfTI, or as NIfTI-Zarr for viewers that read over a network.

    frames (n, V) ─ q / 16 x std + mean ─ unpack ─> (n, X, Y, Z) float32, source units ─┬─> run.nii.gz
                                                                                        └─> run.nii.zarr/{0, nifti}

NIfTI-Zarr is that of the draft 1.0.rc1 (github.com/neuroscales/nifti-zarr): an OME-Zarr image with the NIfTI header as
one more array. Of the versions that it leaves free, OME-NGFF 0.5 and Zarr v3 are taken. Values are float32: 16-bit
integers have one slope for all voxels, and viewers do not apply it. There is one level, as a frame is one chunk.
"""

import json
import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import zarr
from nibabel.openers import Opener
from numpy.typing import NDArray

from neurostorm.io.atomic import atomic_write
from neurostorm.io.object_store import ObjectPath
from neurostorm.io.paths import AnyPath, remove_tree
from neurostorm.store.files import is_node
from neurostorm.store.layout import METADATA, RUNS
from neurostorm.store.maintenance.inventory import Progress, silent
from neurostorm.store.reader import FrameStore

NGFF_VERSION = "0.5"
_BLOCK_BYTES = 64 << 20  # of float32 volumes made at a time
_AXES = ("t", "z", "y", "x")


def write_nifti(store: FrameStore, run: str, file: Path, *, progress: Progress = silent) -> None:
    """Write a run as 4D float32 NIfTI, put in place when it is whole.

    Args:
        store, run: the run.
        file: .nii or .nii.gz; 0 outside the mask, on the store's grid and TR, in the source's units.
        progress: gets the number of frames, and is told of them as they are written.

    StoreError as `FrameStore.frames`, OSError when the file cannot be written.
    """
    with _in_place_of(file) as partial, Opener(partial, "wb") as out:
        nifti_header(store, run).write_to(out)
        with progress(store.frame_count(run)) as advance:
            for volumes in _volumes(store, run, _block_frames(store)):  # NIfTI stores frame after frame
                for volume in volumes:
                    out.write(volume.astype("<f4").tobytes(order="F"))
                advance(len(volumes))


def write_nifti_zarr(store: FrameStore, run: str, folder: AnyPath, *, progress: Progress = silent) -> bool:
    """Write a run as NIfTI-Zarr: `0` is float32 (T, Z, Y, X), `nifti` the bytes of the header.

    Args:
        store, run: the run.
        folder: the Zarr group, `*.nii.zarr`. Its zarr.json comes last: one that has it is whole.
        progress: as in `write_nifti`.

    Returns:
        False if a whole one is there; it is left as it is.

    Raises as `write_nifti`.
    """
    if is_node(folder):
        return False
    count, per_file = store.frame_count(run), _block_frames(store)
    box = store.grid.shape[::-1]
    image = _create(
        folder / "0",
        shape=(count, *box),
        chunks=(1, *box),
        shards=(per_file, *box),  # one file for many frames
        dtype="float32",
        compressors=zarr.codecs.BloscCodec(cname="zstd", clevel=1, shuffle="shuffle"),
        dimension_names=_AXES,
    )
    with progress(count) as advance:
        first = 0
        for volumes in _volumes(store, run, per_file):
            image[first : first + len(volumes)] = volumes.transpose(0, 3, 2, 1)
            first += len(volumes)
            advance(len(volumes))
    header = nifti_header(store, run)
    data = np.frombuffer(header.binaryblock, np.uint8)
    words = _header_in_words(header)
    held = _create(
        folder / "nifti", shape=data.shape, chunks=data.shape, dtype="uint8", compressors=None, attributes=words
    )
    held[:] = data
    group = {"zarr_format": 3, "node_type": "group", "attributes": _ome(store, run)}
    atomic_write(folder / METADATA, json.dumps(group, indent=1).encode())
    return True


def nifti_zarr_name(run: str) -> str:
    """Where a run stands among the NIfTI-Zarrs of a whole store: `<dataset>/<subject>/<entities>.nii.zarr`."""
    return f"{run.removeprefix(f'{RUNS}/')}.nii.zarr"


def nifti_header(store: FrameStore, run: str) -> Any:
    """The NIfTI-1 header of a run: float32 (X, Y, Z, T), mm and seconds, MNI152."""
    header = nib.Nifti1Header()
    header.set_data_dtype(np.dtype("<f4"))
    header.set_data_shape((*store.grid.shape, store.frame_count(run)))
    header.set_zooms((store.grid.voxel_mm,) * 3 + (store.tr_s,))
    header.set_xyzt_units("mm", "sec")
    header.set_qform(store.grid.affine, code="mni")
    header.set_sform(store.grid.affine, code="mni")
    header["descrip"] = f"neurostorm store, recipe {store.recipe['name']}".encode()[:79]
    return header


def _volumes(store: FrameStore, run: str, count: int) -> Iterator[NDArray[np.float32]]:
    """(n, X, Y, Z) float32 in source units, `count` frames at a time."""
    mean, std = store.moments(run)
    total = store.frame_count(run)
    for first in range(0, total, count):
        frames = store.frames(run, first, min(count, total - first))
        yield store.unpack(store.codec.decode(frames) * std + mean)


def _block_frames(store: FrameStore) -> int:
    return max(1, _BLOCK_BYTES // (4 * store.mask.size))


def _create(node: AnyPath, **properties: Any) -> Any:
    """A new Zarr array at `node`, open for writing; what an export that was cut off left there is deleted.

    Its metadata is made in memory: Zarr would give the groups above theirs, and the group's own says that it is whole.
    """
    memory: dict[str, Any] = {}
    zarr.create_array(zarr.storage.MemoryStore(memory), **properties)
    remove_tree(node)
    node.mkdir(parents=True)
    atomic_write(node / METADATA, memory[METADATA].to_bytes())
    if isinstance(node, ObjectPath):
        return zarr.open_array(zarr.storage.ObjectStore(node.client), path=node.key, mode="r+")
    return zarr.open_array(node, mode="r+")


def _ome(store: FrameStore, run: str) -> dict[str, Any]:
    """The group's attributes: what OME-NGFF 0.5 calls `multiscales`."""
    units = {"t": ("time", "second")} | dict.fromkeys("zyx", ("space", "millimeter"))
    scale = [store.tr_s, *([store.grid.voxel_mm] * 3)]
    image = {
        "name": run,
        "axes": [{"name": axis, "type": units[axis][0], "unit": units[axis][1]} for axis in _AXES],
        "datasets": [{"path": "0", "coordinateTransformations": [{"type": "scale", "scale": scale}]}],
    }
    return {"ome": {"version": NGFF_VERSION, "multiscales": [image]}}


def _header_in_words(header: Any) -> dict[str, Any]:
    """The header as JSON for people to read, in the names of JNIfTI; programs take the bytes."""
    return {
        "NIIHeaderSize": int(header["sizeof_hdr"]),
        "NIIFormat": "n+1",
        "Dim": [int(n) for n in header.get_data_shape()],
        "VoxelSize": [float(n) for n in header.get_zooms()],
        "Unit": {"L": "mm", "T": "s"},
        "DataType": "single",
        "BitDepth": int(header["bitpix"]),
        "QForm": "mni_152",
        "SForm": "mni_152",
        "Affine": header.get_sform()[:3].tolist(),
        "Description": header["descrip"].item().decode(),
    }


@contextmanager
def _in_place_of(file: Path) -> Iterator[Path]:
    """A name beside `file`, of the same ending, that is renamed to it at the end; after an error it is gone."""
    partial = file.with_name(f".{uuid.uuid4().hex}.{file.name}")
    try:
        yield partial
        os.replace(partial, file)
    finally:
        partial.unlink(missing_ok=True)
