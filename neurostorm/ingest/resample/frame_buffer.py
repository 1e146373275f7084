"""The frames of a run while they are read: only what the plan needs is held, in the layout that suits its product.

    Taken   every packed voxel is one source voxel    (T, V) in the file's numbers; no product, an index copy
    Kept    source voxels are few, packed ones many   (N, T) in the file's numbers; the product works on blocks of them
    Mixed   source voxels are many                    (T, V) float32; the product works on groups of frames as they come

A sparse product with one frame jumps through memory for each weight. With several frames side by side a weight is met
once, and multiplies values that lie together: so Kept and Mixed turn groups of frames into series of voxels first.
Every weight's product and every sum is the same float32 operation in the same order in all of these.
"""

from collections.abc import Iterator
from itertools import chain
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray
from scipy import sparse

from neurostorm.ingest.nifti import as_values

Float32 = NDArray[np.float32]
Scaling = tuple[float, float]  # slope and intercept from stored numbers to values

_GROUP_FRAMES = 16  # frames that are turned into series at a time
_FLOAT_BYTES = 4


class FrameBuffer(Protocol):
    """What is held of a run's T frames."""

    def add(self, number: int, frame: NDArray[Any]) -> None:
        """Take from frame `number`, (X * Y * Z) in the file's numbers; frames come in order."""

    def block(self, part: slice) -> Float32:
        """(T, block) values of the packed voxels `part`, an array that the caller may change. Safe in threads."""


def buffer_frames(frames: Iterator[NDArray[Any]], count: int, rows: sparse.csr_array, scaling: Scaling) -> FrameBuffer:
    """Read `count` frames, (X * Y * Z) of any one real type, into the smallest of the three.

    Args:
        frames: must end after `count`; ValueError otherwise.
        count: T, at least one.
        rows: (V, X * Y * Z) CSR without empty rows, the packed voxels.
        scaling: from the frames' numbers to values.
    """
    first = next(frames)
    hold = _hold_for(first.dtype, count, rows, scaling)
    for number, frame in zip(range(count), chain([first], frames), strict=True):
        hold.add(number, frame)
    return hold


class VoxelBuffer:
    """Packed voxels that are one source voxel each: (T, V) in the file's numbers."""

    def __init__(self, rows: sparse.csr_array, count: int, dtype: np.dtype[Any], scaling: Scaling) -> None:
        self._places, self._scaling = rows.indices.astype(np.intp), scaling
        self._held = np.empty((count, len(self._places)), dtype)

    def add(self, number: int, frame: NDArray[Any]) -> None:
        _take(frame, self._places, self._held[number])

    def block(self, part: slice) -> Float32:
        return as_values(self._held[:, part], *self._scaling)


class SourceBuffer:
    """The N source voxels that are needed: (N, T) in the file's numbers. Packed voxels are made of them on demand."""

    def __init__(self, rows: sparse.csr_array, count: int, dtype: np.dtype[Any], scaling: Scaling) -> None:
        self._places, self._matrix = _compact(rows)
        self._scaling = scaling
        self._series = np.empty((len(self._places), count), dtype)
        self._group = np.empty((min(_GROUP_FRAMES, count), len(self._places)), dtype)

    def add(self, number: int, frame: NDArray[Any]) -> None:
        count = number % _GROUP_FRAMES + 1
        _take(frame, self._places, self._group[count - 1])
        if count == _GROUP_FRAMES or number + 1 == self._series.shape[1]:
            self._series[:, number + 1 - count : number + 1] = self._group[:count].T

    def block(self, part: slice) -> Float32:
        starts = self._matrix.indptr[part.start : part.stop + 1]
        entries = slice(starts[0], starts[-1])
        parts = (self._matrix.data[entries], self._matrix.indices[entries], starts - starts[0])
        used, matrix = _compact(sparse.csr_array(parts, shape=(len(starts) - 1, len(self._places))))
        return np.ascontiguousarray((matrix @ as_values(self._series[used], *self._scaling)).T)


class ResampledBuffer:
    """Packed voxels, (T, V) float32, made of each group of frames when it is complete."""

    def __init__(self, rows: sparse.csr_array, count: int, dtype: np.dtype[Any], scaling: Scaling) -> None:
        self._places, self._matrix = _compact(rows)
        self._scaling = scaling
        self._held = np.empty((count, rows.shape[0]), np.float32)
        self._group = np.empty((min(_GROUP_FRAMES, count), len(self._places)), dtype)

    def add(self, number: int, frame: NDArray[Any]) -> None:
        count = number % _GROUP_FRAMES + 1
        _take(frame, self._places, self._group[count - 1])
        if count == _GROUP_FRAMES or number + 1 == len(self._held):
            series = np.ascontiguousarray(as_values(self._group[:count], *self._scaling).T)
            self._held[number + 1 - count : number + 1] = (self._matrix @ series).T

    def block(self, part: slice) -> Float32:
        return self._held[:, part].copy()


def _hold_for(stored: np.dtype[Any], count: int, rows: sparse.csr_array, scaling: Scaling) -> FrameBuffer:
    dtype = stored.newbyteorder("=") if stored.kind in "iu" and stored.itemsize < _FLOAT_BYTES else np.dtype(np.float32)
    if rows.nnz == rows.shape[0]:
        return VoxelBuffer(rows, count, dtype, scaling)
    smaller = len(_used(rows)) * dtype.itemsize <= rows.shape[0] * _FLOAT_BYTES
    return (SourceBuffer if smaller else ResampledBuffer)(rows, count, dtype, scaling)


def _used(rows: sparse.csr_array) -> NDArray[np.intp]:
    """Columns that any row uses, rising; by flags, as sorting millions of indices takes longer than a run's product."""
    flags = np.zeros(rows.shape[1], bool)
    flags[rows.indices] = True
    return np.flatnonzero(flags)


def _compact(rows: sparse.csr_array) -> tuple[NDArray[np.intp], sparse.csr_array]:
    """The columns that are used, and the matrix with only these."""
    used = _used(rows)
    position = np.empty(rows.shape[1], np.int32)
    position[used] = np.arange(len(used), dtype=np.int32)
    parts = (rows.data, position[rows.indices], rows.indptr)
    return used, sparse.csr_array(parts, shape=(rows.shape[0], len(used)))


def _take(frame: NDArray[Any], places: NDArray[np.intp], out: NDArray[Any]) -> None:
    """frame[places] into `out`, in its type; what float32 cannot hold becomes infinite."""
    if frame.dtype == out.dtype:
        np.take(frame, places, out=out, mode="clip")  # places are within; the default mode would go by a copy
        return
    with np.errstate(over="ignore", invalid="ignore"):
        out[:] = frame.take(places)
