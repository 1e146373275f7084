"""Clips through Ray Data to the training workers, in exactly the plan's order.

    ClipPlan -> OrderSource: tasks that each give the plan rows of a stretch of steps, a few kB (no clips yet)
      read_in=tasks    -> cut into one block per (step, rank) -> tasks anywhere on the cluster read their clips
      read_in=worker   -> one block per (stretch, rank) -> the worker reads its clips itself, some steps ahead
    -> streaming split with preserved order: rank r gets blocks r, r + W, ... -> ClipBatch

The list of tasks stays short however long the run is: a task stands for thousands of clips, and Ray makes the reading
tasks as their rows arrive. Each block says which step and rank it is for, and `batches` refuses any other: a wrong
order stops the run instead of silently training on other clips. `ClipReader` does the reading, in either place.

Memory: with read_in=worker a worker holds `data.prefetch_steps` + 2 of its batches, and nothing passes through Ray's
object store; with a GPU that memory is pinned (with read_in=tasks, two batches of it), and the GPU holds two batches.
With read_in=tasks that store holds `feed_bytes` in blocks. Reading in the worker costs the least by far
(tools/bench/feed.py); tasks use the cores of nodes that do not train.
"""

import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import pyarrow as pa
import ray
from numpy.typing import NDArray
from ray.data.block import BlockMetadata
from ray.data.datasource import Datasource, ReadTask

from neurostorm.data.batch_stream import BatchStream
from neurostorm.data.clips import ClipBatch, ClipReader, Columns, as_batch
from neurostorm.data.plan.clip_plan import ROW, ClipPlan
from neurostorm.store.run_index import RunIndex

if TYPE_CHECKING:  # it loads torch
    from neurostorm.data.pinned import DeviceCopies

ReadIn = Literal["worker", "tasks"]
STRETCH_CLIPS = 4096  # of one worker in one task of plan rows: about 0.5 MB of rows and names
_ROW_BYTES = 120  # of a plan row with its run's path


class OrderSource(Datasource):
    """Plan rows of steps [first_step, last_step), each with its run's path, step and rank; no clip is read here."""

    def __init__(
        self, plan: ClipPlan, runs: Sequence[str], *, first_step: int, last_step: int, workers: int, per_rank: bool
    ) -> None:
        super().__init__()
        self._plan, self._runs, self._workers = plan, runs, workers
        self._share = plan.global_batch // workers
        length = max(1, STRETCH_CLIPS // self._share)
        stretches = [range(s, min(s + length, last_step)) for s in range(first_step, last_step, length)]
        groups = [range(rank, rank + 1) for rank in range(workers)] if per_rank else [range(workers)]
        self._parts = [(steps, ranks) for steps in stretches for ranks in groups]

    def get_name(self) -> str:
        """The name that Ray's dashboard shows."""
        return "Plan"

    def __len__(self) -> int:
        """Read tasks, which is also blocks."""
        return len(self._parts)

    def estimate_inmemory_data_size(self) -> int:
        """Bytes of all rows together."""
        return sum(len(steps) * len(ranks) for steps, ranks in self._parts) * self._share * _ROW_BYTES

    def get_read_tasks(
        self, parallelism: int, per_task_row_limit: int | None = None, data_context: object | None = None
    ) -> list[ReadTask]:
        """One task per stretch (and rank, with `per_rank`) in order, whatever `parallelism` Ray asks for."""
        held = ray.put((self._plan, self._runs))  # once, not with every task
        tasks = []
        for steps, ranks in self._parts:
            rows = len(steps) * len(ranks) * self._share
            metadata = BlockMetadata(num_rows=rows, size_bytes=rows * _ROW_BYTES, input_files=None, exec_stats=None)
            tasks.append(ReadTask(_Stretch(held, steps, ranks, self._workers), metadata))
        return tasks


@dataclass(frozen=True)
class _Stretch:
    """The function of one task of plan rows: steps outside, ranks inside."""

    held: Any
    steps: range
    ranks: range
    workers: int

    def __call__(self) -> list[pa.Table]:
        plan, runs = _plan_and_runs(self.held)
        places = [(step, rank) for step in self.steps for rank in self.ranks]
        rows = np.concatenate([plan.step_rows(step, rank, self.workers) for step, rank in places])
        share = plan.global_batch // self.workers
        columns: dict[str, Any] = {name: rows[name] for name in ROW.names or ()}
        columns["path"] = runs.take(rows["run"]) if isinstance(runs, RunIndex) else [runs[run] for run in rows["run"]]
        columns |= {name: np.repeat(np.array(column), share) for name, column in zip(
            ("step", "rank"), zip(*places, strict=True), strict=True
        )}  # fmt: skip
        return [pa.table(columns)]


@lru_cache(maxsize=1)
def _plan_and_runs(held: Any) -> tuple[ClipPlan, Sequence[str]]:
    """The plan, fetched once per process: an epoch that it has drawn serves the next task too."""
    plan, runs = ray.get(held)
    return plan, runs


def clip_dataset(
    reader: ClipReader, plan: ClipPlan, *, first_step: int, last_step: int, workers: int, read_in: ReadIn = "worker"
) -> Any:
    """A lazy Ray Dataset for `batches`: plan rows (read_in=worker) or clips (read_in=tasks), in order."""
    source = OrderSource(
        plan, reader.runs, first_step=first_step, last_step=last_step, workers=workers, per_rank=read_in == "worker"
    )
    share = plan.global_batch // workers
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.target_max_block_size = max(context.target_max_block_size or 0, 2 * share * reader.clip_bytes)  # split none
    # One task at a time makes rows far faster than they are used, and the plan is drawn in one process. It reserves no
    # core: the workers may have taken them all, and it runs for milliseconds every few thousand clips.
    dataset = ray.data.read_datasource(source, override_num_blocks=len(source), concurrency=1, num_cpus=0)
    if read_in == "worker":
        return dataset
    read = _ReadBlock(replace(reader, runs=()), ray.put(reader.runs))
    return dataset.repartition(target_num_rows_per_block=share).map_batches(read, batch_size=None, zero_copy_batch=True)


def loader_options(
    reader: ClipReader, plan: ClipPlan, *, read_in: ReadIn, prefetch_steps: int
) -> ray.data.ExecutionOptions:
    """What Ray Data needs to keep the order, and to bound what it holds of clips."""
    options = ray.data.ExecutionOptions(preserve_order=True)
    if read_in == "tasks":
        held = loader_bytes(reader, plan.global_batch, prefetch_steps)
        options.resource_limits = ray.data.ExecutionResources(object_store_memory=held)
    return options


def loader_bytes(reader: ClipReader, global_batch: int, prefetch_steps: int) -> int:
    """What Ray's object store may hold of clips with read_in=tasks: blocks being made, waiting and in use."""
    return (2 * prefetch_steps + 2) * global_batch * reader.clip_bytes


@dataclass(frozen=True)
class _ReadBlock:
    """Plan rows of one worker's step to its clips, inside a task; `runs` is a reference to the reader's own."""

    reader: ClipReader
    runs: Any

    def __call__(self, orders: Columns) -> Columns:
        store = self.reader.store
        key = (type(self.reader), str(store.path), store.verify, self.reader.clip_frames, self.reader.normalise)
        if key not in _READERS:
            _READERS[key] = replace(self.reader, runs=ray.get(self.runs))
        reader = _READERS[key]
        return reader.read(_rows(orders), orders["path"].tolist()) | {name: orders[name] for name in ("step", "rank")}


_READERS: dict[tuple[Any, ...], ClipReader] = {}  # of this process: what a reader knows of runs outlives a task


@dataclass
class _Feeding:
    """What the feed of one worker is busy with, as the thread that waits for it reports it."""

    reader: ClipReader
    clips: int
    read_in: ReadIn | None = None  # not known before the first block
    reads: bool = False  # in this process, with read_in=worker

    def blocks(self, blocks: Iterable[Columns]) -> Iterator[Columns]:
        """The same blocks, noting when they are waited for."""
        for block in blocks:
            self.read_in, self.reads = ("tasks", False) if "frames" in block else ("worker", True)
            yield block
            self.reads = False

    def words(self) -> tuple[str, str]:
        """What is waited for, and what to check."""
        store = self.reader.store.path
        answers = f"{store} answers on the workers' nodes (python tools/store.py stats {store})"
        if self.reads:
            return f"reads from {store}", answers
        if self.read_in == "worker":
            return "Ray Data's next rows of the plan", "no node is lost and Ray's object store is not full (ray status)"
        step_mb = self.clips * self.reader.clip_bytes / 1e6
        room = f"Ray's object store has room for steps of {step_mb:.0f} MB per worker"
        tasks = f"a core is free for reading tasks, that {room} (ray status), and that {answers}"
        if self.read_in == "tasks":
            return "clips from Ray's reading tasks", tasks
        return "Ray Data's first block", f"no node is lost (ray status); with data.read_in=tasks, that {tasks}"


def batches(
    shard: Any, reader: ClipReader, *, rank: int, first_step: int, clips: int, threads: int = 2,
    prefetch_steps: int = 2, timeout_s: float = 1800, copies: "DeviceCopies | None" = None,
) -> BatchStream:  # fmt: skip
    """A worker's shard of the dataset as ClipBatches for steps first_step, first_step + 1, ...

    Without `copies` the frames of a batch are good until the second one after it is asked for: their memory is used
    again. With it a batch goes to the GPU while the step before it is computed.

    Args:
        shard: the worker's part of `clip_dataset`.
        reader: reads the clips of plan rows (read_in=worker).
        rank: of the worker.
        first_step: step of the first batch.
        clips: of one batch.
        threads: reads at a time (read_in=worker).
        prefetch_steps: batches that are begun before they are asked for.
        timeout_s: longest wait for one batch, seconds.
        copies: sends batches to the GPU of this worker; None leaves them on the CPU.

    Raises:
        RuntimeError: a block is not the one that the plan has for this step and rank.
        BatchTimeout: a batch did not come in time.
    """
    feeding = _Feeding(reader, clips)
    blocks = shard.iter_batches(batch_size=None, batch_format="numpy", prefetch_batches=prefetch_steps)
    parts = _steps(feeding.blocks(blocks), rank=rank, first_step=first_step, clips=clips)
    made = _read(parts, reader, threads, prefetch_steps, copies)
    return BatchStream(
        made, rank=rank, first_step=first_step, timeout_s=timeout_s, words=feeding.words, ask_ahead=copies is not None
    )


def _read(
    parts: Iterator[Columns], reader: ClipReader, threads: int, prefetch_steps: int, copies: "DeviceCopies | None"
) -> Iterator[ClipBatch]:
    """Converts the parts to batches; reads the clips first if the parts hold plan rows only."""
    first = next(parts, None)
    if first is None:
        return
    whole = itertools.chain([first], parts)
    if "frames" in first:
        yield from map(as_batch if copies is None else copies.send_shared, whole)
    else:
        orders = ((_rows(part), part["path"].tolist()) for part in whole)
        read = reader.read_ahead(orders, threads=threads, ahead=prefetch_steps, copies=copies)
        yield from map(as_batch if copies is None else copies.send, read)


def _steps(blocks: Iterator[Columns], *, rank: int, first_step: int, clips: int) -> Iterator[Columns]:
    """The blocks step by step, checked, without the columns that the check needs."""
    step = first_step
    for block in blocks:
        columns = dict(block)
        steps, ranks = columns.pop("step"), columns.pop("rank")
        for first in range(0, len(steps), clips):
            part = slice(first, first + clips)
            if (steps[part] != step).any() or (ranks[part] != rank).any() or len(steps[part]) != clips:
                raise RuntimeError(
                    f"clip order broken: worker {rank} expected its {clips} clips of step {step} and got "
                    f"{len(steps[part])} of steps {np.unique(steps[part]).tolist()} for workers "
                    f"{np.unique(ranks[part]).tolist()}; keep data blocks unsplit "
                    "(DataContext.target_max_block_size) and preserve_order on"
                )
            yield {name: values[part] for name, values in columns.items()}
            step += 1


def _rows(orders: Columns) -> NDArray[np.void]:
    """Plan rows as records, from the columns that Ray carried."""
    rows = np.empty(len(orders["row"]), ROW)
    for name in ROW.names or ():
        rows[name] = orders[name]
    return rows
