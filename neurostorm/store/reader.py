"""Reading a store: what runs there are, their frames as stored bytes, and the way back to a box of voxels.

    FrameStore.open(path).frames(run, start, count)  ->  int8 (count, V)  --unpack-->  (count, X, Y, Z)

Only the chunks that hold the asked frames are read, and each carries a checksum: what comes back is what was written,
or an error that names the run and the clip. A `FrameStore` is cheap to send to another process (only its path
travels) and opens each array once per process.
"""

import hashlib
import json
import os
import threading
from collections import OrderedDict
from functools import cached_property
from pathlib import Path
from typing import Any, Self

import numpy as np
import zarr
from numpy.typing import NDArray

from neurostorm.store.files import StorePath, find_runs, is_group, local_path, read_attributes, read_header
from neurostorm.store.layout import (
    FRAMES,
    MASK,
    MEAN,
    MISSING_FRAME,
    STD,
    ClipReadError,
    FrameRangeError,
    Grid,
    StoreError,
    mask_hash,
    split_run,
)
from neurostorm.store.manifest import read_manifest

_OPEN_ARRAYS = 256  # a few kB each


class FrameStore:
    """One store, opened for reading. Make it with `FrameStore.open`.

    Attributes:
        path: the store's folder.
        grid: the box its runs are stored on.
        mask: (X, Y, Z) bool, True inside the brain.
        voxel_count: V, the voxels of the mask.
        tr_s: seconds between two frames.
        mask_sha256: the mask's hash, `layout.mask_hash`.
        recipe: `{"name", "version"}` of the preparation.
    """

    def __init__(self, path: StorePath) -> None:
        self.path = local_path(path)
        self._arrays: OrderedDict[str, Any] = OrderedDict()
        self._lock = threading.Lock()

    @classmethod
    def open(cls, path: StorePath) -> Self:
        """Open the store at `path`. StoreError: missing, not a store, another format, or a damaged header or mask."""
        store = cls(path)
        shape, expected = tuple(store.grid.shape), store.mask_sha256  # the header first: it says more when it is wrong
        if store.mask.shape != shape or mask_hash(store.mask) != expected:
            raise StoreError(
                f"{store.path / MASK} does not match the grid and hash in {store.path / 'zarr.json'}: "
                "restore the two, or ingest again"
            )
        return store

    def __reduce__(self) -> tuple[type[Self], tuple[str]]:
        return type(self), (os.fspath(self.path),)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({os.fspath(self.path)!r})"

    @cached_property
    def _header(self) -> dict[str, Any]:
        return read_header(self.path)

    def _property(self, key: str) -> Any:
        if key not in self._header:
            raise StoreError(f"{self.path / 'zarr.json'} has no `{key}`: restore the file, or ingest again")
        return self._header[key]

    @cached_property
    def grid(self) -> Grid:
        """The box its runs are stored on."""
        try:
            return Grid.from_attributes(self._property("grid"))
        except (KeyError, TypeError, ValueError, IndexError) as error:
            raise StoreError(f"{self.path / 'zarr.json'}: `grid` does not describe a grid ({error!r})") from error

    @property
    def tr_s(self) -> float:
        """Seconds between two frames."""
        return float(self._property("tr_s"))

    @property
    def mask_sha256(self) -> str:
        """The mask's hash, `layout.mask_hash`."""
        return str(self._property("mask_sha256"))

    @property
    def recipe(self) -> dict[str, Any]:
        """Name and version of the preparation that filled the store."""
        return dict(self._property("recipe"))

    @cached_property
    def mask(self) -> NDArray[np.bool_]:
        """(X, Y, Z) bool, True inside the brain."""
        try:
            return np.asarray(zarr.open_array(self.path / MASK, mode="r")[...]) != 0
        except (OSError, ValueError, KeyError) as error:
            raise StoreError(f"{self.path / MASK} cannot be read: {error}") from error

    @cached_property
    def _voxels(self) -> NDArray[np.intp]:
        return np.flatnonzero(self.mask)

    @property
    def voxel_count(self) -> int:
        """V, the voxels of the mask."""
        return len(self._voxels)

    def runs(self) -> list[str]:
        """The paths of all complete runs, sorted; found by walking the folders, so always what is there now."""
        return sorted(find_runs(self.path))

    def run_attributes(self, run: str) -> dict[str, Any]:
        """The run's attributes. StoreError if there is no such run."""
        return read_attributes(self._run_folder(run))

    def frame_count(self, run: str) -> int:
        """T of a run. StoreError if there is no such run, ClipReadError if its array cannot be opened."""
        return int(self._array(run, FRAMES, 0).shape[0])

    def frames(self, run: str, start: int = 0, count: int | None = None) -> NDArray[np.int8]:
        """The stored bytes of `count` frames from `start` on (to the end, if None).

        Returns:
            (count, V) int8; `codec.dequantise` makes z-scores of it.

        Raises:
            StoreError: there is no such run.
            FrameRangeError: the run does not have these frames.
            ClipReadError: a chunk is missing or fails its checksum.
        """
        array = self._array(run, FRAMES, start)
        total = int(array.shape[0])
        stop = total if count is None else start + count
        if not 0 <= start < stop <= total:
            raise FrameRangeError(f"{self.path / run} has frames 0 to {total - 1}, not {start} to {stop - 1}")
        values = self._read(array, slice(start, stop), run, start)
        absent = np.flatnonzero(values[:, 0] == MISSING_FRAME)
        if len(absent):
            raise ClipReadError(
                run, start, f"the chunk of frame {start + absent[0]} is missing from {self.path / run / FRAMES}"
            )
        return values

    def moments(self, run: str) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """Mean and standard deviation over the run, each (V) float32 in source units; std 0 outside its field of view.

        Raises StoreError if there is no such run, ClipReadError if an array is missing or fails its checksum.
        """
        mean, std = (self._read(self._array(run, name, 0), slice(None), run, 0) for name in (MEAN, STD))
        if np.isnan(mean).any() or np.isnan(std).any():
            raise ClipReadError(run, 0, f"mean or std is missing from {self.path / run}")
        return mean, std

    def unpack(self, values: NDArray[Any], fill: float = 0.0) -> NDArray[Any]:
        """Put packed voxels into the box: (..., V) -> (..., X, Y, Z) of the same dtype, `fill` outside the mask."""
        if values.shape[-1:] != (self.voxel_count,):
            raise ValueError(f"the last axis of {values.shape} must be the {self.voxel_count} voxels of the mask")
        box = np.full((*values.shape[:-1], self.mask.size), fill, values.dtype)
        box[..., self._voxels] = values
        return box.reshape(*values.shape[:-1], *self.mask.shape)

    def content_hash(self) -> str:
        """sha256 in hex of what a model would see: grid, mask, TR, and (run, source_sha256, frames) of the manifest.

        StoreError if there is no manifest.
        """
        table = read_manifest(self.path).select(["run", "source_sha256", "frames"])
        rows = sorted((row["run"], row["source_sha256"], row["frames"]) for row in table.to_pylist())
        facts = {"grid": self.grid.describe(), "mask_sha256": self.mask_sha256, "tr_s": self.tr_s, "runs": rows}
        return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()

    def _run_folder(self, run: str) -> Path:
        try:
            split_run(run)
        except ValueError as error:
            raise StoreError(str(error)) from error
        folder = self.path / run
        if not is_group(folder):
            raise StoreError(f"{self.path} has no run {run!r}")
        return folder

    def _array(self, run: str, name: str, start: int) -> Any:
        """The open array of a run, from the cache; the one used longest ago makes room."""
        key = f"{run}/{name}"
        with self._lock:
            if key in self._arrays:
                self._arrays.move_to_end(key)
                return self._arrays[key]
        folder = self._run_folder(run)
        try:
            array = zarr.open_array(folder / name, mode="r")
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ClipReadError(run, start, f"{folder / name} cannot be opened: {error}") from error
        with self._lock:
            self._arrays[key] = array
            while len(self._arrays) > _OPEN_ARRAYS:
                self._arrays.popitem(last=False)
        return array

    def _read(self, array: Any, part: slice, run: str, start: int) -> NDArray[Any]:
        try:
            return np.asarray(array[part])
        except (OSError, ValueError, KeyError, RuntimeError) as error:
            raise ClipReadError(run, start, str(error)) from error
