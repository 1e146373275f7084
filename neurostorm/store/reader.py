"""Reading a store: what runs there are, their frames as stored bytes, and the way back to a box of voxels.

    FrameStore.open(path).frames(run, start, count)  ->  int8 (count, V)  --unpack-->  (count, X, Y, Z)
        run's zarr.json (once), or `use_index` -> layout -> one contiguous range of the shard -> checksums -> the array

Chosen by measurement (tools/bench/feed.py): zarr-python brings the same clips at a twentieth of the rate at which the
file system gives them, tensorstore and zarrs at a fifth to a third; reading the range straight into its place brings
nearly all of it. Each chunk carries a checksum: what comes back is what was written, or an error that names the run and
the clip. A `FrameStore` is cheap to send to another process: only its path travels.
"""

import hashlib
import json
import threading
from collections import OrderedDict
from functools import cached_property
from typing import Any, Literal, Self

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from neurostorm.io.paths import AnyPath
from neurostorm.store.codec import FRAME_CODECS, INT8_16, FrameCodec
from neurostorm.store.files import (
    MissingNodeError,
    StorePath,
    find_runs,
    is_node,
    read_array,
    read_attributes,
    read_header,
    read_metadata,
    store_place,
    unreadable,
)
from neurostorm.store.layout import (
    MASK,
    METADATA,
    ClipReadError,
    FrameRangeError,
    Grid,
    MissingRunError,
    StoreError,
    StoreUnavailableError,
    mask_hash,
    split_run,
)
from neurostorm.store.manifest import read_manifest
from neurostorm.store.run_file import RunFile
from neurostorm.store.run_index import RunIndex
from neurostorm.store.shard import MOMENT_ROWS, SHARD_FILE, RunLayout, ShardError, layout_of, moments_of

Verify = Literal["first", "always"]
_KNOWN_RUNS = 1 << 17  # layouts kept of runs that no index has, about 250 bytes each; a corpus has 66,000
_RECENT_RUNS = 1024  # of which is kept which chunks were found to be whole, about 1 kB each


class FrameStore:
    """One store, opened for reading. Make it with `FrameStore.open`.

    Attributes:
        path: the store's place.
        verify: which reads check the checksums: "first", those of chunks that this process has not read before, or
            "always". Checking all costs a quarter to a half of the rate at which a cache gives them.
        grid: the box its runs are stored on.
        mask: (X, Y, Z) bool, True inside the brain.
        voxel_count: V, the voxels of the mask.
        tr_s: seconds between two frames.
        mask_sha256: the mask's hash, `layout.mask_hash`.
        codec: how its frames store z-scores.
        recipe: `{"name", "version"}` of the preparation.
    """

    def __init__(self, path: StorePath, verify: Verify = "first") -> None:
        self.path = store_place(path)
        self.verify = verify
        self._index: RunIndex | None = None
        self._layouts: dict[str, RunLayout] = {}  # read from the runs' own metadata
        self._recent: OrderedDict[str, RunFile] = OrderedDict()
        self._lock = threading.Lock()

    @classmethod
    def open(cls, path: StorePath, verify: Verify = "first") -> Self:
        """Open the store at `path`. StoreError: missing, not a store, another format, or a damaged header or mask."""
        store = cls(path, verify)
        shape, expected = tuple(store.grid.shape), store.mask_sha256  # the header first: it says more when it is wrong
        if store.mask.shape != shape or mask_hash(store.mask) != expected:
            raise StoreError(
                f"{store.path / MASK} does not match the grid and hash in {store.path / METADATA}: "
                "restore the two, or ingest again"
            )
        return store

    def __reduce__(self) -> tuple[type[Self], tuple[str, Verify]]:
        return type(self), (str(self.path), self.verify)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({str(self.path)!r})"

    def use_index(self, index: RunIndex) -> None:
        """Take the layouts of runs from a manifest from now on: no run's metadata is read before its first frames.

        A run that turns out to be another than the manifest says is an error of the reads that meet it.
        """
        self._index = index

    @cached_property
    def _header(self) -> dict[str, Any]:
        return read_header(self.path)

    def _property(self, key: str) -> Any:
        if key not in self._header:
            raise StoreError(f"{self.path / METADATA} has no `{key}`: restore the file, or ingest again")
        return self._header[key]

    @cached_property
    def grid(self) -> Grid:
        """The box its runs are stored on."""
        try:
            return Grid.from_attributes(self._property("grid"))
        except (KeyError, TypeError, ValueError, IndexError) as error:
            raise StoreError(f"{self.path / METADATA}: `grid` does not describe a grid ({error!r})") from error

    @property
    def tr_s(self) -> float:
        """Seconds between two frames."""
        return float(self._property("tr_s"))

    @property
    def mask_sha256(self) -> str:
        """The mask's hash, `layout.mask_hash`."""
        return str(self._property("mask_sha256"))

    @property
    def codec(self) -> FrameCodec:
        """How frames store z-scores. StoreError for one that this version does not know."""
        name = self._header.get("frame_codec", INT8_16.name)  # not named by earlier versions, which had one
        if name not in FRAME_CODECS:
            raise StoreError(f"{self.path / METADATA}: frame_codec {name!r} is not known: update neurostorm")
        return FRAME_CODECS[name]

    @property
    def recipe(self) -> dict[str, Any]:
        """Name and version of the preparation that filled the store."""
        return dict(self._property("recipe"))

    @cached_property
    def mask(self) -> NDArray[np.bool_]:
        """(X, Y, Z) bool, True inside the brain."""
        try:
            return read_array(self.path / MASK) != 0
        except OSError as error:
            raise unreadable(f"{self.path / MASK} cannot be read: {error}", error) from error
        except (ValueError, KeyError, RuntimeError) as error:
            raise StoreError(f"{self.path / MASK} cannot be read: {error}") from error

    @cached_property
    def _voxels(self) -> NDArray[np.intp]:
        return np.flatnonzero(self.mask)

    @cached_property
    def voxel_count(self) -> int:
        """V, the voxels of the mask."""
        return int(self.mask.sum())

    def runs(self) -> list[str]:
        """The paths of all complete runs, sorted; found by walking the folders, so always what is there now."""
        return sorted(find_runs(self.path))

    def run_attributes(self, run: str) -> dict[str, Any]:
        """The run's attributes. StoreError if there is no such run."""
        folder = self._run_folder(run)
        try:
            return read_attributes(folder)
        except MissingNodeError:
            raise self._missing_run(run) from None

    def frame_count(self, run: str) -> int:
        """T of a run. StoreError if there is no such run, ClipReadError if its metadata cannot be read.

        Of a run in the index it is what the manifest says.
        """
        return self._layout(run, 0).layout.frames

    def frames(
        self, run: str, start: int = 0, count: int | None = None, out: NDArray[np.int8] | None = None
    ) -> NDArray[np.int8]:
        """The stored bytes of `count` frames from `start` on (to the end, if None).

        Args:
            run, start, count: what is wanted.
            out: int8 (count, V), C-contiguous, to read into; a new array if None. What it holds after an error is
                undefined.

        Returns:
            (count, V) int8; `self.codec.decode` makes z-scores of it.

        Raises:
            StoreError: there is no such run.
            StoreUnavailableError: the store's storage does not answer, or refuses access now.
            ValueError: an `out` that does not fit.
            FrameRangeError: the run does not have these frames.
            ClipReadError: the run's file is missing, too short, or a chunk fails its checksum.
        """
        known = self._layout(run, start)
        total = known.layout.frames
        stop = total if count is None else start + count
        if not 0 <= start < stop <= total:
            raise FrameRangeError(f"{self.path / run} has frames 0 to {total - 1}, not {start} to {stop - 1}")
        wanted = (stop - start, known.layout.voxels)
        if out is None:
            out = np.empty(wanted, np.int8)
        elif out.shape != wanted or out.dtype != np.int8 or not (out.flags.c_contiguous and out.flags.writeable):
            raise ValueError(f"out is {out.dtype} {out.shape}; it must be int8 {wanted}, C-contiguous and writeable")
        self._read_rows(run, known, start, out)
        return out

    def moments(self, run: str) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """Mean and standard deviation over the run, each (V) float32 in source units; std 0 outside its field of view.

        Raises StoreError if there is no such run, ClipReadError as `frames`.
        """
        known = self._layout(run, 0)
        rows = np.empty((MOMENT_ROWS, self.voxel_count), np.int8)
        self._read_rows(run, known, known.layout.frames, rows)
        return moments_of(rows)

    def unpack(self, values: NDArray[Any], fill: float = 0.0) -> NDArray[Any]:
        """Put packed voxels into the box: (..., V) -> (..., X, Y, Z) of the same dtype, `fill` outside the mask."""
        if values.shape[-1:] != (self.voxel_count,):
            raise ValueError(f"the last axis of {values.shape} must be the {self.voxel_count} voxels of the mask")
        box = np.full((*values.shape[:-1], self.mask.size), fill, values.dtype)
        box[..., self._voxels] = values
        return box.reshape(*values.shape[:-1], *self.mask.shape)

    def content_hash(self, manifest: pa.Table | None = None) -> str:
        """sha256 in hex of what a model would see: grid, mask, TR, and (run, source_sha256, frames) of the manifest.

        The manifest is the store's own if none is given; StoreError if there is none.
        """
        manifest = read_manifest(self.path) if manifest is None else manifest
        table = manifest.select(["run", "source_sha256", "frames"])
        rows = sorted(zip(*(column.to_pylist() for column in table.columns), strict=True))
        facts = {"grid": self.grid.describe(), "mask_sha256": self.mask_sha256, "tr_s": self.tr_s, "runs": rows}
        return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()

    def _run_folder(self, run: str) -> AnyPath:
        try:
            split_run(run)
        except ValueError as error:
            raise StoreError(str(error)) from error
        return self.path / run

    def _layout(self, run: str, start: int) -> RunFile:
        """The run's file with its layout, from the index or read once; the one used longest ago makes room."""
        with self._lock:
            if run in self._recent:
                self._recent.move_to_end(run)
                return self._recent[run]
        known = self._layouts.get(run)
        stated = self._stated(run) if known is None else None
        layout = known or stated or self._keep(run, self._read_layout(run, start))
        return self._remember(run, RunFile(layout, self._run_folder(run) / SHARD_FILE, stated=stated is not None))

    def _stated(self, run: str) -> RunLayout | None:
        """The run's layout by the index; None when that does not have it."""
        number = None if self._index is None else self._index.find(run)
        return None if self._index is None or number is None else self._index.layout(number, self.voxel_count)

    def _remember(self, run: str, file: RunFile) -> RunFile:
        """The same file, or that of a thread that came first."""
        with self._lock:
            file = self._recent.setdefault(run, file)
            while len(self._recent) > _RECENT_RUNS:
                self._recent.popitem(last=False)
        return file

    def _keep(self, run: str, layout: RunLayout) -> RunLayout:
        """The same layout, which counts for this run from now on."""
        with self._lock:
            self._layouts[run] = layout
            while len(self._layouts) > _KNOWN_RUNS:
                del self._layouts[next(iter(self._layouts))]
        return layout

    def _read_layout(self, run: str, start: int) -> RunLayout:
        """The layout by the run's own metadata."""
        folder = self._run_folder(run)
        try:
            layout = layout_of(read_metadata(folder))
            if layout.voxels != self.voxel_count:
                raise ShardError(f"has {layout.voxels} voxels where the store's mask has {self.voxel_count}")
        except MissingNodeError:
            raise self._missing_run(run) from None
        except StoreUnavailableError:
            raise
        except (StoreError, ShardError) as error:
            raise ClipReadError(run, start, f"{folder / METADATA} {error}") from error
        return layout

    def _own_file(self, run: str, start: int, known: RunFile) -> RunFile:
        """The run's file by its own metadata, after `known`, which the index states, could not be read.

        ClipReadError when the run has another number of frames than the manifest says.
        """
        layout = self._read_layout(run, start)
        if layout.frames != known.layout.frames:
            raise ClipReadError(
                run, start,
                f"the manifest says {known.layout.frames} frames, the run has {layout.frames}: it was ingested anew. "
                f"Rebuild the manifest with tools/store.py repair {self.path}, and start a run of another --name",
            )  # fmt: skip
        with self._lock:
            self._recent.pop(run, None)
        return self._remember(run, RunFile(self._keep(run, layout), known.shard))

    def _read_rows(self, run: str, known: RunFile, first: int, out: NDArray[np.int8]) -> None:
        """Fill `out` with the rows from `first` on."""
        try:
            known.read(first, out, verify_all=self.verify == "always")
        except ShardError as error:
            if known.stated:  # the run itself decides
                self._read_rows(run, self._own_file(run, first, known), first, out)
                return
            raise ClipReadError(run, first, f"{known.shard} {error}") from error
        except OSError as error:
            message = f"{known.shard} cannot be read: {error}"
            if isinstance(error, FileNotFoundError) and not self._is_there(run):
                raise self._missing_run(run) from None
            found = unreadable(message, error)
            if isinstance(found, StoreUnavailableError):
                raise found from error
            raise ClipReadError(run, first, message) from error

    def _missing_run(self, run: str) -> StoreError:
        """The error for a run that is not there: a store without its header is one that is not mounted."""
        message = f"{self.path} has no run {run!r}"
        if self._is_there(""):
            return MissingRunError(message)
        return StoreUnavailableError(f"{message}: {self.path} is gone itself")

    def _is_there(self, run: str) -> bool:
        """Whether the metadata of a run, or of the store, is there. StoreUnavailableError when that cannot be seen."""
        folder = self.path / run if run else self.path
        try:
            return is_node(folder)
        except OSError as error:
            raise unreadable(f"{folder / METADATA} cannot be read: {error}", error) from error
