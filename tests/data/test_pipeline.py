"""The feed through Ray Data against reading without Ray: each worker gets its clips of each step, or an error.

One small local Ray for the module.
"""

import threading
import time

import numpy as np
import pytest
import ray
import ray.data
import ray.train
import torch

from neurostorm.data.clips import ClipReader
from neurostorm.data.pipeline import ClipSource, batches, clip_dataset
from neurostorm.data.plan import ClipPlan, Segments

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
        def read(self, rows):
            time.sleep(max(0.0, 0.3 - 0.02 * int(rows["row"][0])))
            return super().read(rows)

    reader = uneven.reader(normalise="global")
    return LateFirst(reader.store, reader.runs, reader.clip_frames, reader.normalise)


def feed(reader, plan, first_step):
    """What each of two workers gets from `first_step` on, taken at the same time as in training; by rank."""
    dataset = clip_dataset(reader, plan, first_step=first_step, last_step=STEPS, workers=WORKERS)
    options = ray.data.ExecutionOptions(preserve_order=True)
    shards = ray.train.DataConfig(execution_options=options).configure({"train": dataset}, WORKERS, None, None)
    taken = [[] for _ in shards]

    def take(rank):
        taken[rank].extend(batches(shards[rank]["train"], rank=rank, first_step=first_step, clips=CLIPS))

    threads = [threading.Thread(target=take, args=(rank,), daemon=True) for rank in range(WORKERS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    return taken


@pytest.mark.parametrize("first_step", [0, 3])
def test_each_worker_gets_its_clips_of_each_step_as_read_without_ray(first_step, late_first_reader, uneven, plan):
    taken = feed(late_first_reader, plan, first_step)
    plain = uneven.reader(normalise="global")
    for rank, stream in enumerate(taken):
        assert len(stream) == STEPS - first_step
        for step, batch in enumerate(stream, first_step):
            expected = plain.batch(plan.step_rows(step, rank, WORKERS))
            assert vars(batch).keys() == vars(expected).keys()
            for name, values in vars(expected).items():
                assert getattr(batch, name).dtype == values.dtype
                assert torch.equal(getattr(batch, name), values), f"{name} of worker {rank} in step {step}"


def in_order(dataset):
    """The dataset as one worker's shard."""
    dataset.context.execution_options.preserve_order = True
    return dataset.iterator()


def test_clips_without_data_arrive_marked(uneven, plan):
    class Blind(ClipReader):
        def read(self, rows):
            return super().read(rows) | {"bad": rows["row"] % 2 == 1}

    reader = uneven.reader()
    blind = Blind(reader.store, reader.runs, reader.clip_frames, reader.normalise)
    shard = in_order(clip_dataset(blind, plan, first_step=0, last_step=1, workers=1))
    (batch,) = batches(shard, rank=0, first_step=0, clips=plan.global_batch)
    assert batch.bad.dtype == torch.bool
    assert batch.bad.tolist() == [row % 2 == 1 for row in range(plan.global_batch)]


def test_one_block_is_one_workers_step_however_small_ray_wants_blocks(uneven, plan):
    context = ray.data.DataContext.get_current()
    context.target_max_block_size = 1000  # a block of three clips is about 60 kB
    dataset = clip_dataset(uneven.reader(), plan, first_step=1, last_step=4, workers=WORKERS).materialize()
    assert dataset.num_blocks() == 3 * WORKERS
    blocks = [ray.get(block) for block in dataset.get_internal_block_refs()]
    places = {tuple(set(zip(b["step"].to_pylist(), b["rank"].to_pylist(), strict=True))) for b in blocks}
    assert places == {((step, rank),) for step in (1, 2, 3) for rank in range(WORKERS)}
    assert all(block.num_rows == CLIPS for block in blocks)


def test_blocks_are_planned_with_their_true_size(uneven, plan):
    for normalise in ("voxel", "global"):
        reader = uneven.reader(normalise=normalise)
        source = ClipSource(reader, plan, first_step=2, last_step=4, workers=WORKERS)
        tasks = source.get_read_tasks(parallelism=99)
        assert len(tasks) == 2 * WORKERS, "whatever parallelism Ray asks for"
        (block,) = tasks[0]()
        assert tasks[0].metadata.num_rows == block.num_rows == CLIPS
        assert tasks[0].metadata.size_bytes == pytest.approx(block.nbytes, rel=0.05)
        assert source.estimate_inmemory_data_size() == 2 * WORKERS * tasks[0].metadata.size_bytes


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
    dataset = clip_dataset(uneven.reader(), plan, first_step=2, last_step=4, workers=1)
    shard = in_order(dataset)
    with pytest.raises(RuntimeError, match="clip order broken") as broken:
        list(batches(shard, rank=rank, first_step=first_step, clips=clips))
    for word in words:
        assert word in str(broken.value)
