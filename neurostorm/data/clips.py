"""Clips as they lie in the store, read as the plan asks: no Ray here.

    plan rows -> ClipReader -> columns of numpy (what Ray Data carries) or a ClipBatch of tensors (what training takes)

A clip that cannot be read becomes a clip without data, of which the loss counts nothing, and is marked `bad`, so that
the worker that gets it names and counts it.
"""

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from neurostorm.store.layout import StoreError
from neurostorm.store.reader import FrameStore

logger = logging.getLogger(__name__)

Columns = dict[str, NDArray[Any]]


@dataclass(frozen=True)
class ClipBatch:
    """The clips of one worker in one optimiser step, on the CPU; B clips, L frames, V mask voxels.

    row, run, start  int64/int32 (B): place in the plan's stream, run in the manifest, first frame
    bad              bool (B): the clip could not be read and holds no data
    frames           int8 (B, L, V): 16 x voxel z
    scale, shift     float32 (B, V) and fill float32 (B): z of the voxel to global z (normalise=global), else None
    """

    row: torch.Tensor
    run: torch.Tensor
    start: torch.Tensor
    bad: torch.Tensor
    frames: torch.Tensor
    scale: torch.Tensor | None = None
    shift: torch.Tensor | None = None
    fill: torch.Tensor | None = None

    def part(self, first: int, count: int) -> "ClipBatch":
        """Clips [first, first + count) as views."""
        return self.map(lambda values: values[first : first + count])

    def to(self, device: torch.device) -> "ClipBatch":
        """The same clips on `device`, copied asynchronously where that is possible."""
        return self.map(lambda values: values.to(device, non_blocking=True))

    def map(self, function: Callable[[torch.Tensor], torch.Tensor]) -> "ClipBatch":
        """`function` of every column that is there."""
        columns: dict[str, Any] = {name: function(values) for name, values in vars(self).items() if values is not None}
        return ClipBatch(**columns)


@dataclass(frozen=True)
class ClipReader:
    """Reads plan rows as columns of numpy arrays; picklable, so that read tasks carry it.

    runs       the manifest's run paths, in the order that the plan's `run` column indexes
    normalise  `voxel`: frames alone; `global`: also each voxel's scale and shift to z over the whole run
    """

    store: FrameStore
    runs: tuple[str, ...]
    clip_frames: int
    normalise: str

    def read(self, rows: NDArray[np.void]) -> Columns:
        """The columns of ClipBatch for `rows`, with unreadable clips zeroed and marked."""
        shape = (len(rows), self.clip_frames, self.store.voxel_count)
        columns: Columns = {name: np.ascontiguousarray(rows[name]) for name in ("row", "run", "start")}
        columns |= {"bad": np.zeros(len(rows), bool), "frames": np.zeros(shape, np.int8)}
        if self.normalise == "global":
            columns |= {name: np.zeros((len(rows), shape[2]), np.float32) for name in ("scale", "shift")}
            columns["fill"] = np.zeros(len(rows), np.float32)
        for index, row in enumerate(rows):
            try:
                self._read_clip(columns, index, self.runs[row["run"]], int(row["start"]))
            except StoreError as error:  # a damaged clip, or a run that is gone
                logger.warning("%s", error)
                columns["bad"][index] = True
                columns["frames"][index] = 0
        return columns

    def _read_clip(self, columns: Columns, index: int, run: str, start: int) -> None:
        columns["frames"][index] = self.store.frames(run, start, self.clip_frames)
        if self.normalise == "global":
            mean, std = self.store.moments(run)
            attributes = self.store.run_attributes(run)
            centre, spread = attributes["global_mean"], attributes["global_std"]
            columns["scale"][index] = std / spread
            columns["shift"][index] = (mean - centre) / spread
            columns["fill"][index] = -centre / spread  # outside the mask the intensity is zero

    def batch(self, rows: NDArray[np.void]) -> ClipBatch:
        """`rows` read here and now, as tensors."""
        return ClipBatch(**{name: torch.from_numpy(values) for name, values in self.read(rows).items()})
