"""From the frame store to a worker, through Ray Data, in exactly the plan's order.

    ClipPlan -> ClipSource: one read task per (step, rank), placed anywhere on the cluster
             -> one block = the int8 clips of one worker in one step
             -> streaming split with preserved order: rank r gets blocks r, r + W, ... -> ClipBatch

Each block says which step and rank it is for, and `batches` refuses any other: a wrong order stops the run instead of
silently training on other clips. A clip that cannot be read becomes a clip without data (the loss counts nothing
of it) that carries `bad`, so that the worker names and counts it.

`read_step` is also the path without Ray: validation, tests and the Ray path share it.
"""

import logging
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import ray
import torch
from numpy.typing import NDArray
from ray.data.block import BlockAccessor, BlockMetadata
from ray.data.datasource import Datasource, ReadTask

from neurostorm.data.plan import ClipPlan
from neurostorm.store.reader import ClipReadError, FrameStore

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
        pick = slice(first, first + count)
        return ClipBatch(**{name: None if value is None else value[pick] for name, value in vars(self).items()})


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
            except ClipReadError as error:
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


class ClipSource(Datasource):
    """Read tasks for steps [first_step, last_step) of a plan: task (step, rank) makes that worker's block."""

    def __init__(self, reader: ClipReader, plan: ClipPlan, *, first_step: int, last_step: int, workers: int) -> None:
        super().__init__()
        self._reader, self._plan, self._workers = reader, plan, workers
        self._steps = range(first_step, last_step)

    def get_name(self) -> str:
        """The name that Ray's dashboard shows."""
        return "Clips"

    @property
    def block_bytes(self) -> int:
        """Size of one block."""
        clips = self._plan.global_batch // self._workers
        voxels = self._reader.store.voxel_count
        return clips * voxels * (self._reader.clip_frames + (8 if self._reader.normalise == "global" else 0))

    def estimate_inmemory_data_size(self) -> int:
        """Bytes of all blocks together."""
        return len(self._steps) * self._workers * self.block_bytes

    def get_read_tasks(
        self, parallelism: int, per_task_row_limit: int | None = None, data_context: object | None = None
    ) -> list[ReadTask]:
        """One task per block, in (step, rank) order, whatever `parallelism` Ray asks for."""
        tasks = []
        for step in self._steps:
            for rank in range(self._workers):
                rows = self._plan.step_rows(step, rank, self._workers)
                metadata = BlockMetadata(
                    num_rows=len(rows), size_bytes=self.block_bytes, input_files=None, exec_stats=None
                )
                tasks.append(ReadTask(_ReadBlock(self._reader, rows, step, rank), metadata))
        return tasks


@dataclass(frozen=True)
class _ReadBlock:
    """The function of one read task."""

    reader: ClipReader
    rows: NDArray[np.void]
    step: int
    rank: int

    def __call__(self) -> list[Any]:
        columns = self.reader.read(self.rows)
        for name, value in (("step", self.step), ("rank", self.rank)):
            columns[name] = np.full(len(self.rows), value, np.int64)
        return [BlockAccessor.batch_to_block(columns)]


def clip_dataset(reader: ClipReader, plan: ClipPlan, *, first_step: int, last_step: int, workers: int) -> Any:
    """A lazy Ray Dataset with one block per (step, rank) in order."""
    source = ClipSource(reader, plan, first_step=first_step, last_step=last_step, workers=workers)
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.target_max_block_size = max(context.target_max_block_size or 0, 2 * source.block_bytes)  # never split one
    return ray.data.read_datasource(source, override_num_blocks=(last_step - first_step) * workers)


def batches(shard: Any, *, rank: int, first_step: int, clips: int) -> Iterator[ClipBatch]:
    """A worker's shard of the dataset as ClipBatches for steps first_step, first_step + 1, ...

    Raises RuntimeError when a block is not the one that the plan has for this step and rank.
    """
    stream = shard.iter_torch_batches(batch_size=clips, prefetch_batches=2, device="cpu")
    for step, columns in enumerate(stream, first_step):
        steps, ranks = columns.pop("step").tolist(), columns.pop("rank").tolist()
        if set(steps) != {step} or set(ranks) != {rank} or len(steps) != clips:
            raise RuntimeError(
                f"clip order broken: worker {rank} expected its {clips} clips of step {step} and got {len(steps)} of "
                f"steps {sorted(set(steps))} for workers {sorted(set(ranks))}; keep data blocks unsplit "
                "(DataContext.target_max_block_size) and preserve_order on"
            )
        yield ClipBatch(**columns)
