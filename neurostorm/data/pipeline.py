"""From the frame store to a worker, through Ray Data, in exactly the plan's order.

    ClipPlan -> ClipSource: one read task per (step, rank), placed anywhere on the cluster
             -> one block = the int8 clips of one worker in one step
             -> streaming split with preserved order: rank r gets blocks r, r + W, ... -> ClipBatch

Each block says which step and rank it is for, and `batches` refuses any other: a wrong order stops the run instead of
silently training on other clips. `ClipReader` does the reading, here in tasks and elsewhere without Ray.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import ray
from numpy.typing import NDArray
from ray.data.block import BlockAccessor, BlockMetadata
from ray.data.datasource import Datasource, ReadTask

from neurostorm.data.clips import ClipBatch, ClipReader
from neurostorm.data.plan import ClipPlan


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
