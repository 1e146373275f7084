"""The feed through Ray Data against reading without Ray: each worker gets its clips of each step, or an error.

One small local Ray for the module.
"""

import pickle
import shutil
import threading
import time

import numpy as np
import pytest
import ray
import ray.data
import ray.train
import torch
from ray.util.placement_group import placement_group, remove_placement_group

from neurostorm.data import batch_stream, loader
from neurostorm.data.batch_stream import BatchTimeout
from neurostorm.data.clips import ClipReader
from neurostorm.data.loader import OrderSource, batches, clip_dataset, loader_bytes, loader_options
from neurostorm.data.plan.clip_plan import ClipPlan
from neurostorm.data.plan.split import Segments
from neurostorm.store.shard import SHARD_FILE

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:ray")  # Ray's own, of copying its context

WORKERS, CLIPS, STEPS = 2, 3, 5


@pytest.fixture(scope="module", autouse=True)
def block_size(local_ray):
    """`clip_dataset` raises the context's block size; other modules get it back as it was."""
    context = ray.data.DataContext.get_current()
    before = context.target_max_block_size
    yield
    context.target_max_block_size = before


@pytest.fixture(scope="module")
def plan(uneven):
    lengths = np.array([len(uneven.frames[run]) for run in uneven.runs], np.int32)
    segments = Segments(np.arange(len(lengths), dtype=np.int32), np.zeros_like(lengths), lengths)
    return ClipPlan(segments, clip_frames=6, stride_frames=6, seed=5, global_batch=WORKERS * CLIPS)


@pytest.fixture(scope="module")
def late_first_reader(uneven):
    """A reader whose earliest rows take longest, so that blocks become ready in another order than the plan's."""

    class LateFirst(ClipReader):  # local, so that it travels to the tasks by value
        def _fill(self, columns, read, run, stop=None):
            time.sleep(max(0.0, 0.3 - 0.02 * int(columns["row"][read.first])))
            super()._fill(columns, read, run)

    reader = uneven.reader(normalise="global")
    return LateFirst(reader.store, reader.runs, reader.clip_frames, reader.normalise)


def feed(reader, plan, first_step, read_in):
    """What each of two workers gets from `first_step` on, taken at the same time as in training; by rank."""
    dataset = clip_dataset(reader, plan, first_step=first_step, last_step=STEPS, workers=WORKERS, read_in=read_in)
    options = loader_options(reader, plan, read_in=read_in, prefetch_steps=2)
    shards = ray.train.DataConfig(execution_options=options).configure({"train": dataset}, WORKERS, None, None)
    taken = [[] for _ in shards]

    def take(rank):
        shard = shards[rank]["train"]
        stream = batches(shard, reader, rank=rank, first_step=first_step, clips=CLIPS)
        taken[rank].extend(batch.map(torch.clone) for batch in stream)

    threads = [threading.Thread(target=take, args=(rank,), daemon=True) for rank in range(WORKERS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    return taken


@pytest.mark.parametrize("read_in", ["worker", "tasks"])
@pytest.mark.parametrize("first_step", [0, 3])
def test_each_worker_gets_its_clips_of_each_step_as_read_without_ray(
    first_step, read_in, late_first_reader, uneven, plan, monkeypatch
):
    monkeypatch.setattr(loader, "STRETCH_CLIPS", 2 * CLIPS)  # two steps in a task of rows, the last task shorter
    taken = feed(late_first_reader, plan, first_step, read_in)
    plain = uneven.reader(normalise="global")
    for rank, stream in enumerate(taken):
        assert len(stream) == STEPS - first_step
        for step, batch in enumerate(stream, first_step):
            expected = plain.batch(plan.step_rows(step, rank, WORKERS))
            assert vars(batch).keys() == vars(expected).keys() and batch.copied is None
            for name, values in vars(expected).items():
                if name == "copied":
                    continue
                assert getattr(batch, name).dtype == values.dtype
                assert torch.equal(getattr(batch, name), values), f"{name} of worker {rank} in step {step}"


def test_the_plan_arrives_while_workers_reserve_every_core(uneven, plan):
    group = placement_group([{"CPU": ray.cluster_resources()["CPU"]}])
    try:
        assert group.wait(30)
        taken = feed(uneven.reader(), plan, 0, "worker")
    finally:
        remove_placement_group(group)
    rows = [[batch.row.tolist() for batch in stream] for stream in taken]
    expected = [[plan.step_rows(s, rank, WORKERS)["row"].tolist() for s in range(STEPS)] for rank in range(WORKERS)]
    assert rows == expected


def in_order(dataset):
    """The dataset as one worker's shard."""
    dataset.context.execution_options.preserve_order = True
    return dataset.iterator()


@pytest.mark.parametrize("read_in", ["worker", "tasks"])
def test_clips_without_data_arrive_marked(read_in, uneven, plan, tmp_path):
    store = tmp_path / "damaged.zarr"
    shutil.copytree(uneven.path, store)
    bad = plan.step_rows(0, 0, 1)[1]
    (store / uneven.runs[bad["run"]] / SHARD_FILE).unlink()
    reader = uneven.reader(path=store)
    shard = in_order(clip_dataset(reader, plan, first_step=0, last_step=1, workers=1, read_in=read_in))
    (batch,) = batches(shard, reader, rank=0, first_step=0, clips=plan.global_batch)
    assert batch.bad.dtype == torch.bool
    assert batch.bad.tolist() == [row["run"] == bad["run"] for row in plan.step_rows(0, 0, 1)]


def test_one_block_is_one_workers_step_however_small_ray_wants_blocks(uneven, plan):
    context = ray.data.DataContext.get_current()
    context.target_max_block_size = 1000  # a block of three clips is about 60 kB
    dataset = clip_dataset(uneven.reader(), plan, first_step=1, last_step=4, workers=WORKERS, read_in="tasks")
    dataset.context.execution_options.preserve_order = True
    dataset = dataset.materialize()
    assert dataset.num_blocks() == 3 * WORKERS
    blocks = [ray.get(block) for block in dataset.get_internal_block_refs()]
    places = [set(zip(b["step"].to_pylist(), b["rank"].to_pylist(), strict=True)) for b in blocks]
    assert places == [{(step, rank)} for step in (1, 2, 3) for rank in range(WORKERS)]
    assert all(block.num_rows == CLIPS for block in blocks)


@pytest.mark.parametrize(("per_rank", "parts"), [(True, 3 * WORKERS), (False, 3)])
def test_a_long_plan_is_few_tasks_of_true_size(per_rank, parts, uneven, plan, monkeypatch):
    monkeypatch.setattr(loader, "STRETCH_CLIPS", 10 * CLIPS)
    source = OrderSource(plan, uneven.runs, first_step=2, last_step=25, workers=WORKERS, per_rank=per_rank)
    tasks = source.get_read_tasks(parallelism=99)
    assert len(tasks) == len(source) == parts, "whatever parallelism Ray asks for"
    tables = [table for task in tasks for table in task()]
    assert [task.metadata.num_rows for task in tasks] == [table.num_rows for table in tables]
    assert sum(table.num_rows for table in tables) == 23 * plan.global_batch
    assert source.estimate_inmemory_data_size() == sum(task.metadata.size_bytes for task in tasks)
    assert sum(len(pickle.dumps(task)) for task in tasks) < 3000 * parts, "the plan travels once, not with every task"


def test_what_ray_may_hold_of_clips_is_bounded_where_it_holds_any(uneven, plan):
    reader = uneven.reader()
    assert loader_options(reader, plan, read_in="worker", prefetch_steps=2).preserve_order
    limited = loader_options(reader, plan, read_in="tasks", prefetch_steps=2).resource_limits.object_store_memory
    block = reader.batch(plan.step_rows(0, 0, 1)).frames.nbytes
    assert limited == loader_bytes(reader, plan.global_batch, 2) == 6 * block


class Stuck:
    """A worker's shard that gives some blocks and then none."""

    def __init__(self, *blocks):
        self.blocks, self.end = blocks, threading.Event()

    def iter_batches(self, **_):
        yield from self.blocks
        self.end.wait(60)


def block_of(plan, reader, step, read_in):
    rows = plan.step_rows(step, 0, 1)
    block = {name: rows[name] for name in rows.dtype.names} | {
        "path": np.array([reader.runs[run] for run in rows["run"]]),
        "step": np.full(len(rows), step), "rank": np.zeros(len(rows), int),
    }  # fmt: skip
    return block if read_in == "worker" else reader.read(rows) | {name: block[name] for name in ("step", "rank")}


@pytest.mark.parametrize(
    ("read_in", "given", "words"),
    [
        ("worker", 0, ["step 0 ", "Ray Data's first block", "data.read_in=tasks"]),
        ("worker", 2, ["step 1 ", "Ray Data's next rows of the plan", "ray status"]),
        ("tasks", 2, ["step 2 ", "clips from Ray's reading tasks", "a core is free", "steps of 0 MB"]),
    ],
)
def test_a_batch_that_does_not_come_ends_the_wait_with_what_it_was_for(
    read_in, given, words, uneven, plan, monkeypatch, caplog
):
    monkeypatch.setattr(batch_stream, "SAY_EVERY_S", 0.02)
    reader = uneven.reader()
    shard = Stuck(*(block_of(plan, reader, step, read_in) for step in range(given)))
    stream = batches(shard, reader, rank=0, first_step=0, clips=plan.global_batch, prefetch_steps=1, timeout_s=0.3)
    taken = []
    with pytest.raises(BatchTimeout) as late:
        taken += (batch.row.tolist() for batch in stream)
    shard.end.set()
    for word in [*words, "worker 0", "data.batch_timeout_s"]:
        assert word in str(late.value)
    assert f"worker 0 waits for the clips of {words[0]}" in caplog.text


def test_reads_that_do_not_end_are_named_with_the_store(uneven, plan):
    end = threading.Event()

    class Hanging(ClipReader):
        def _fill(self, columns, read, run, stop=None):
            end.wait(60)

    reader = uneven.reader()
    hanging = Hanging(reader.store, reader.runs, reader.clip_frames, reader.normalise)
    shard = Stuck(*(block_of(plan, reader, step, "worker") for step in range(4)))
    stream = batches(shard, hanging, rank=0, first_step=0, clips=plan.global_batch, timeout_s=0.3)
    with pytest.raises(BatchTimeout, match=rf"step 0 .*waited for reads from {uneven.path}\. Check that .* answers"):
        next(stream)
    end.set()
    shard.end.set()


@pytest.mark.parametrize(
    ("rank", "first_step", "clips", "words"),
    [
        (0, 1, 3, ["step 1", "steps [2]"]),
        (0, 3, 3, ["step 3", "steps [2]"]),
        (1, 2, 3, ["worker 1", "workers [0]"]),
        (0, 2, 4, ["4 clips of step 2", "steps [2, 3]"]),
        (0, 2, 2, ["2 clips of step 3", "steps [2, 3]"]),
    ],
)
def test_clips_of_another_step_or_worker_stop_the_run(rank, first_step, clips, words, uneven, plan):
    plan = ClipPlan(plan.segments, 6, 6, seed=5, global_batch=3)
    reader = uneven.reader()
    shard = in_order(clip_dataset(reader, plan, first_step=2, last_step=4, workers=1))
    with pytest.raises(RuntimeError, match="clip order broken") as broken:
        list(batches(shard, reader, rank=rank, first_step=first_step, clips=clips))
    for word in words:
        assert word in str(broken.value)
