"""Clips as they lie in the store, read as the plan asks: no Ray here.

    plan rows -> reads (neighbours together) -> ClipReader -> columns of numpy (what Ray Data carries)
                                                           -> ClipBatch of tensors (what training takes)

Frames go from the file to their place in the batch and nowhere else. A clip whose data is damaged or missing becomes a
clip without data, of which the loss counts nothing, and is marked `bad`, so that the worker that gets it names and
counts it. So does one whose subject withdrew since the plan was made, which is marked `withdrawn`. Storage that is away
says nothing about the data: the reader waits for it, for a limited time.
"""

from __future__ import annotations

import logging
import threading
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, fields
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from neurostorm.data.storage_wait import wait_for_storage
from neurostorm.data.withdrawals import Withdrawals
from neurostorm.store.layout import MissingRunError, StoreError, StoreUnavailableError
from neurostorm.store.reader import FrameStore
from neurostorm.store.run_index import RunIndex

if TYPE_CHECKING:  # Ray's reading tasks and its plan of them need no torch, which takes 2 s to load
    import torch

    from neurostorm.data.pinned import Copied, DeviceCopies

logger = logging.getLogger(__name__)

Columns = dict[str, NDArray[Any]]
UNAVAILABLE_S = 600.0  # data.unavailable_s of callers without a configuration


class WithdrawnError(StoreError):
    """A run is gone because its subject withdrew."""


@dataclass(frozen=True)
class ClipBatch:
    """The clips of one worker in one optimiser step; B clips, L frames, V mask voxels.

    row, run, start  int64/int32 (B): place in the plan's stream, run in the manifest, first frame
    bad              bool (B): the clip's data is damaged or missing; it holds zeros
    withdrawn        bool (B): the clip is left out, as its subject withdrew, and holds zeros; it is not bad
    waited_s         float32 (B): for how long the store's storage was away when the clip was read, seconds
    frames           int8 (B, L, V): 16 x voxel z
    scale, shift     float32 (B, V) and fill float32 (B): z of the voxel to global z (normalise=global), else None
    copied           the copy that brought frames, scale and shift to a GPU; None: all columns lie in one place
    """

    row: torch.Tensor
    run: torch.Tensor
    start: torch.Tensor
    bad: torch.Tensor
    withdrawn: torch.Tensor
    waited_s: torch.Tensor
    frames: torch.Tensor
    scale: torch.Tensor | None = None
    shift: torch.Tensor | None = None
    fill: torch.Tensor | None = None
    copied: Copied | None = None

    def part(self, first: int, count: int) -> ClipBatch:
        """Clips [first, first + count) as views."""
        return self.map(lambda values: values[first : first + count])

    def to(self, device: torch.device) -> ClipBatch:
        """The same clips on `device`; the caller's stream waits for a copy that is going on."""
        if self.copied is not None:
            large = (self.frames, self.scale, self.shift)
            self.copied.arrive([values for values in large if values is not None])
        return self.map(lambda values: values.to(device, non_blocking=True))

    def map(self, function: Callable[[torch.Tensor], torch.Tensor]) -> ClipBatch:
        """`function` of every column that is there."""
        columns: dict[str, Any] = {
            name: function(values) for name, values in vars(self).items() if name != "copied" and values is not None
        }
        return ClipBatch(**columns | {"copied": self.copied})


@dataclass(frozen=True)
class ClipReader:
    """Reads plan rows as columns of numpy arrays; picklable, so that read tasks carry it.

    runs           the manifest's run paths, in the order that the plan's `run` column indexes; a `RunIndex` also tells
                   where their rows lie, and the mean and std of each run
    normalise      `voxel`: frames alone; `global`: also each voxel's scale and shift to z over the whole run
    unavailable_s  longest wait for storage that is away, seconds; then StorageAwayError
    withdrawals    whose clips are left out; None: a clip whose run is gone is bad, whatever the reason
    """

    store: FrameStore
    runs: Sequence[str]
    clip_frames: int
    normalise: str
    unavailable_s: float = UNAVAILABLE_S
    withdrawals: Withdrawals | None = None

    def __post_init__(self) -> None:
        if isinstance(self.runs, RunIndex):
            self.store.use_index(self.runs)

    def __reduce__(self) -> tuple[type[ClipReader], tuple[Any, ...]]:
        """Travels without what its store knows, which the new one is told."""
        return type(self), tuple(getattr(self, field.name) for field in fields(self))

    def read(self, rows: NDArray[np.void], paths: Sequence[str] | None = None) -> Columns:
        """The columns of ClipBatch for `rows`, with unreadable clips zeroed and marked.

        `paths` names the run of each row; by default the reader's own `runs` do.
        """
        columns, reads, paths = self._prepare(rows, paths)
        for read in reads:
            self._fill(columns, read, paths[read.first])
        return columns

    def read_ahead(
        self,
        orders: Iterable[tuple[NDArray[np.void], Sequence[str]]],
        *,
        threads: int,
        ahead: int,
        copies: DeviceCopies | None = None,
    ) -> Iterator[Columns]:
        """`read` of each (rows, paths) of `orders`, in their order, up to `ahead` begun before they are asked for.

        Memory: `ahead` + 2 results, whose frames are used again and again, as new memory costs as much as reading into
        it: the frames of a result are overwritten once the second one after it has been asked for. `threads` reads go
        on at a time, of one result or of several. With `copies` the memory is pinned, and the copy of a result that
        was sent to the device is done before it is overwritten.
        """
        ring: deque[Columns | None] = deque([None] * (ahead + 2))
        waiting: deque[tuple[Columns, list[Any]]] = deque()
        stop, empty = threading.Event(), np.empty if copies is None else copies.empty
        with ThreadPoolExecutor(threads, thread_name_prefix="clips") as pool:
            try:
                for rows, paths in orders:
                    used = ring.popleft()
                    if copies is not None and used is not None:
                        copies.wait(used)
                    columns, reads, paths = self._prepare(rows, paths, used, empty)
                    ring.append(columns)
                    begun = [pool.submit(self._fill, columns, read, paths[read.first], stop) for read in reads]
                    waiting.append((columns, begun))
                    if len(waiting) > ahead:
                        yield _finished(*waiting.popleft())
                while waiting:
                    yield _finished(*waiting.popleft())
            finally:
                stop.set()
                pool.shutdown(wait=False, cancel_futures=True)

    def batch(self, rows: NDArray[np.void]) -> ClipBatch:
        """`rows` read here and now, as tensors."""
        return as_batch(self.read(rows))

    @property
    def clip_bytes(self) -> int:
        """Bytes of one clip in a batch."""
        return self.store.voxel_count * (self.clip_frames + (8 if self.normalise == "global" else 0))

    def _prepare(
        self,
        rows: NDArray[np.void],
        paths: Sequence[str] | None,
        used: Columns | None = None,
        empty: Callable[..., NDArray[Any]] = np.empty,
    ) -> tuple[Columns, list[Read], Sequence[str]]:
        """Columns still without frames, in the memory of `used` if that fits, and what to read for them."""
        columns: Columns = {name: np.ascontiguousarray(rows[name]) for name in ("row", "run", "start")}
        columns |= {name: np.zeros(len(rows), bool) for name in ("bad", "withdrawn")}
        columns["waited_s"] = np.zeros(len(rows), np.float32)
        shapes: dict[str, tuple[tuple[int, ...], type]] = {"frames": ((self.clip_frames,), np.int8)}
        if self.normalise == "global":
            shapes |= {"scale": ((), np.float32), "shift": ((), np.float32)}
            columns["fill"] = np.zeros(len(rows), np.float32)
        for name, (inner, dtype) in shapes.items():
            shape = (len(rows), *inner, self.store.voxel_count)
            fits = used is not None and used[name].shape == shape
            columns[name] = used[name] if used is not None and fits else empty(shape, dtype)
        named = [self.runs[run] for run in rows["run"]] if paths is None else paths
        reads = plan_reads(columns["run"], columns["start"], self.clip_frames)
        if self.withdrawals is not None:
            gone = self.withdrawals.left_out(named)
            for read in reads:
                if gone[read.first]:
                    _leave_out(columns, read)
            reads = [read for read in reads if not gone[read.first]]
        return columns, reads, named

    def _fill(self, columns: Columns, read: Read, run: str, stop: threading.Event | None = None) -> None:
        """Bring in the clips of one read; where it fails, one clip after the other, so that only bad ones are lost."""
        try:
            _, waited_s = wait_for_storage(lambda: self._read_clips(columns, read, run), self.unavailable_s, stop=stop)
            columns["waited_s"][read.first : read.first + read.count] = waited_s
        except StoreUnavailableError:
            raise
        except WithdrawnError:
            _leave_out(columns, read)
        except StoreError as error:  # a damaged clip, or a run that is gone
            if read.count > 1:
                for index in range(read.first, read.first + read.count):
                    one = Read(index, 1, int(columns["start"][index]), self.clip_frames, True)
                    self._fill(columns, one, run, stop)
                return
            logger.warning("%s", error)
            _zero(columns, read)
            columns["bad"][read.first] = True

    def _read_clips(self, columns: Columns, read: Read, run: str) -> None:
        """Bring in the clips of one read. WithdrawnError when they are gone because their subject withdrew."""
        try:
            self._read_frames(columns, read, run)
            if self.normalise == "global":
                self._read_scale(columns, read, run)
        except StoreError as error:
            gone = isinstance(error, MissingRunError) or isinstance(error.__cause__, FileNotFoundError)
            if gone and self.withdrawals is not None and self.withdrawals.explain(run):
                raise WithdrawnError(f"the subject of {run} withdrew") from error
            raise

    def _read_frames(self, columns: Columns, read: Read, run: str) -> None:
        clips = slice(read.first, read.first + read.count)
        frames = columns["frames"][clips]
        if read.in_order:
            self.store.frames(run, read.start, read.frames, out=frames.reshape(read.frames, -1))
            return
        held = self.store.frames(run, read.start, read.frames)
        for clip, start in zip(frames, columns["start"][clips], strict=True):
            clip[:] = held[start - read.start : start - read.start + self.clip_frames]

    def _read_scale(self, columns: Columns, read: Read, run: str) -> None:
        clips = slice(read.first, read.first + read.count)
        mean, std = self.store.moments(run)
        centre, spread = self._global_moments(run)
        columns["scale"][clips] = std / spread
        columns["shift"][clips] = (mean - centre) / spread
        columns["fill"][clips] = -centre / spread  # outside the mask the intensity is zero

    def _global_moments(self, run: str) -> tuple[float, float]:
        """Mean and std over the run's brain and frames, source units: the manifest's, or else the run's own."""
        if isinstance(self.runs, RunIndex):
            number = self.runs.find(run)
            stated = None if number is None else self.runs.moments(number)
            if stated is not None:
                return stated
        return _moments_by_metadata(self.store, run)


def as_batch(columns: Columns) -> ClipBatch:
    """Columns as tensors that share their memory, which may be read-only (Ray's); nothing writes into a batch."""
    import torch

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*not writable.*")
        tensors: dict[str, Any] = {name: torch.from_numpy(values) for name, values in columns.items()}
        return ClipBatch(**tensors)


def _leave_out(columns: Columns, read: Read) -> None:
    """Mark the clips of a read as those of a subject who withdrew."""
    _zero(columns, read)
    columns["withdrawn"][read.first : read.first + read.count] = True


def _zero(columns: Columns, read: Read) -> None:
    for name in columns.keys() & {"frames", "scale", "shift", "fill"}:
        columns[name][read.first : read.first + read.count] = 0


def _finished(columns: Columns, reads: list[Any]) -> Columns:
    for read in reads:
        read.result()
    return columns


@lru_cache(maxsize=1 << 17)
def _moments_by_metadata(store: FrameStore, run: str) -> tuple[float, float]:
    """Mean and std over the run's brain and frames, source units; from its metadata, read once per process."""
    attributes = store.run_attributes(run)
    return float(attributes["global_mean"]), float(attributes["global_std"])


@dataclass(frozen=True)
class Read:
    """One contiguous range of one run, and the clips that are cut from it.

    first, count   clips [first, first + count) of the list
    start, frames  the range, in stored frames
    in_order       the clips follow each other without gap or overlap, so the range is their bytes as they lie
    """

    first: int
    count: int
    start: int
    frames: int
    in_order: bool


def plan_reads(run: NDArray[np.integer], start: NDArray[np.integer], clip_frames: int) -> list[Read]:
    """The reads for clips of `clip_frames` frames from `start` of `run`, (N) each, in the order of the clips."""
    reads: list[Read] = []
    for index, (this_run, this_start) in enumerate(zip(run.tolist(), start.tolist(), strict=True)):
        last = reads[-1] if reads else None
        stop = last.start + last.frames if last else 0
        if last is None or this_run != run[last.first] or not last.start <= this_start <= stop:
            reads.append(Read(index, 1, this_start, clip_frames, True))
            continue
        frames = max(stop, this_start + clip_frames) - last.start
        reads[-1] = Read(last.first, last.count + 1, last.start, frames, last.in_order and this_start == stop)
    return reads
