#!/usr/bin/env python3
"""How fast clips come from the store to a training worker, beside what this machine can do. Runs of 2 mm size.

bench_feed.py                          8 runs of 430 frames in a temporary folder, 5 rounds
bench_feed.py --store STORE            the runs of a store of one's own
bench_feed.py --json FILE              the figures for a machine

All sides bring the same clips, in batches, into new memory, and take turns within one start of the program:

    memcpy        the clips' bytes from one place in memory to another
    pread, mmap   their bytes from the shards, checksums and all, as the file system's cache gives them
    reader        ClipReader: to a batch of int8; the second reading of a frame, and one that compares every checksum
    zarr-python   the same clips by the library
    pipeline      plan rows through Ray Data to a worker's process; clips read there, or in Ray tasks
    patches       float patches for the model, against the released path: 20 frames of a torch-saved int8 volume file by
                  mmap, dequantised and cut into patches

`reader_share` and `pipeline_share` (its better mode) are rates over that of pread. `wait_fraction` is what a worker
waits for its next batch while a step of `--step-clips-per-s` sleeps in its place.
"""

import argparse
import json
import logging
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")

import numpy as np
import ray
import ray.train
import torch
import zarr
from einops import rearrange
from numpy.typing import NDArray

from neurostorm.data.clips import ClipReader
from neurostorm.data.device import ClipUnpacker
from neurostorm.data.pipeline import batches, clip_dataset, feed_options
from neurostorm.data.plan import ClipPlan
from neurostorm.data.split import Segments
from neurostorm.ingest.template import brain_mask
from neurostorm.model.geometry import patch_table
from neurostorm.model.strd import StrdConfig
from neurostorm.model.swin4d import SwinEncoder
from neurostorm.model.swin_config import SwinConfig
from neurostorm.store import GRIDS, FrameStore, create_store, run_path, write_run
from neurostorm.store.files import read_metadata
from neurostorm.store.shard import SHARD_FILE, RunLayout, layout_of

CLIP_FRAMES = 20
WARM_STEPS = 4  # of a pipeline, before its clock starts
PATCH = (6, 6, 6, 1)


@dataclass(frozen=True)
class Work:
    """One round: batches of plan rows over the store's runs."""

    store: FrameStore
    runs: tuple[str, ...]
    plan: ClipPlan
    steps: int

    @property
    def reader(self) -> ClipReader:
        """A reader of voxel z."""
        return ClipReader(self.store, self.runs, CLIP_FRAMES, "voxel")

    @property
    def clips(self) -> int:
        """Clips of a round."""
        return self.steps * self.plan.global_batch

    @property
    def size_gb(self) -> float:
        """Clips of a round, in GB."""
        return self.clips * self.reader.clip_bytes / 1e9

    def batches(self) -> list[NDArray[np.void]]:
        """The plan rows of each batch."""
        return [self.plan.step_rows(step, 0, 1) for step in range(self.steps)]


def main() -> int:
    """Measure, print, write."""
    options = parse()
    torch.set_num_threads(options.threads)
    with tempfile.TemporaryDirectory(prefix="bench_feed_", dir=options.folder) as folder:
        store = options.store or make_store(Path(folder), options.runs, options.frames)
        work = open_work(FrameStore.open(store), options.batch, options.steps)
        sides = direct_sides(work) | patch_sides(work, Path(folder), options.frames)
        ray.init(address="local", logging_level=logging.ERROR, log_to_driver=False)
        lasting = pipelines(work)
        seconds: dict[str, list[float]] = {name: [] for name in (*sides, *lasting)}
        for _ in range(options.rounds + 1):  # the first brings everything into the cache and is not counted
            for name, side in sides.items():
                began_s = time.perf_counter()
                side()
                seconds[name].append(time.perf_counter() - began_s)
            for name, pipeline in lasting.items():
                seconds[name].append(pipeline.seconds(step_s=0.0)[0])
        step_s = options.batch / options.step_clips_per_s
        waits = {name: pipeline.seconds(step_s=step_s)[1] for name, pipeline in lasting.items()}
        ray.shutdown()
    figures = summary(work, {name: statistics.median(times[1:]) for name, times in seconds.items()}, waits)
    show(figures, work, options)
    if options.json:
        options.json.write_text(json.dumps(figures, indent=1))
    return 0


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--store", type=Path, help="a local store with runs of 20 frames or more (default: made)")
    parser.add_argument("--folder", type=Path, help="where temporary files go: the disk to measure (default: TMPDIR)")
    parser.add_argument("--runs", type=int, default=8, help="runs of the made store (default: 8)")
    parser.add_argument("--frames", type=int, default=430, help="frames of each (default: 430)")
    parser.add_argument("--batch", type=int, default=8, help="clips of a batch (default: 8)")
    parser.add_argument("--steps", type=int, default=12, help="batches of a round (default: 12)")
    parser.add_argument("--rounds", type=int, default=5, help="rounds; medians are taken (default: 5)")
    parser.add_argument("--threads", type=int, default=1, help="torch threads of either patch side (default: 1)")
    parser.add_argument("--step-clips-per-s", type=float, default=500.0, help="rate of the mock step (default: 500)")
    parser.add_argument("--json", type=Path, help="write the figures here")
    return parser.parse_args()


def make_store(folder: Path, runs: int, frames: int) -> Path:
    """A store on the 2 mm grid with runs of random bytes, which no file system compresses."""
    grid = GRIDS["2mm"]
    mask = brain_mask(grid, None)
    path = folder / "store.zarr"
    create_store(path, grid=grid, mask=mask, tr_s=0.8, recipe="bench")
    rng = np.random.default_rng(0)
    ones = np.ones(int(mask.sum()), np.float32)
    for number in range(runs):
        values = rng.integers(-60, 61, (frames, len(ones)), dtype=np.int8)
        run = run_path("bench", f"sub-{number:03d}", "task-rest")
        write_run(path, run, frames=values, mean=1000 * ones, std=ones, attributes={})
    return path


def open_work(store: FrameStore, batch: int, steps: int) -> Work:
    """Clips of all runs in random order, at random places."""
    runs = tuple(store.runs())
    frames = np.array([store.frame_count(run) for run in runs], np.int32)
    segments = Segments(np.arange(len(runs), dtype=np.int32), np.zeros_like(frames), frames)
    return Work(store, runs, ClipPlan(segments, CLIP_FRAMES, CLIP_FRAMES, seed=0, global_batch=batch), steps)


def direct_sides(work: Work) -> dict[str, Callable[[], object]]:
    """Everything that needs no Ray, as functions of no argument that bring in one round's clips."""
    every = FrameStore.open(work.store.path, verify="always")
    readers = {"reader": work.reader, "reader, every checksum": ClipReader(every, work.runs, CLIP_FRAMES, "voxel")}
    held = np.ones((work.plan.global_batch, work.reader.clip_bytes), np.int8)
    return {
        "memcpy": lambda: each(work, lambda rows: held.copy()),
        "pread": lambda: each(work, lambda rows: pread(work, rows)),
        "mmap": lambda: each(work, lambda rows: mmap(work, rows)),
        **{name: (lambda r=reader: each(work, r.read)) for name, reader in readers.items()},
        "zarr-python": lambda: each(work, lambda rows: by_zarr(work, rows)),
    }


def each(work: Work, side: Callable[[NDArray[np.void]], object]) -> None:
    """One batch after the other; as in training, none outlives the next."""
    for rows in work.batches():
        side(rows)


def ranges(work: Work, rows: NDArray[np.void]) -> Iterator[tuple[Path, int, int]]:
    """File, first byte and number of bytes of each clip, with the checksums that lie between its frames."""
    for row in rows:
        folder = work.store.path / work.runs[row["run"]]
        layout = layout_of_run(folder)
        chunks = layout.chunk_range(int(row["start"]), CLIP_FRAMES)
        index = layout.packed_index[chunks.start : chunks.stop]
        yield folder / SHARD_FILE, int(index[0, 0]), int(index[:, 1].sum())


@lru_cache
def layout_of_run(folder: Path) -> RunLayout:
    """Where an uncompressed run's chunks lie, read once."""
    return layout_of(read_metadata(folder))


def pread(work: Work, rows: NDArray[np.void]) -> list[NDArray[np.int8]]:
    """The clips' bytes by pread, one call a clip."""
    found = list(ranges(work, rows))
    batch = np.empty((len(found), max(size for _, _, size in found)), np.int8)
    for values, (file, offset, size) in zip(batch, found, strict=True):
        handle = os.open(file, os.O_RDONLY)
        os.preadv(handle, [values[:size]], offset)
        os.close(handle)
    return list(batch)


def mmap(work: Work, rows: NDArray[np.void]) -> NDArray[np.int8]:
    """The clips' bytes copied out of a map of their files."""
    found = list(ranges(work, rows))
    batch = np.empty((len(found), max(size for _, _, size in found)), np.int8)
    for values, (file, offset, size) in zip(batch, found, strict=True):
        values[:size] = np.memmap(file, np.int8, "r")[offset : offset + size]
    return batch


def by_zarr(work: Work, rows: NDArray[np.void]) -> NDArray[np.int8]:
    """The clips by zarr-python, arrays opened anew for each."""
    batch = np.empty((len(rows), CLIP_FRAMES, work.store.voxel_count), np.int8)
    for values, row in zip(batch, rows, strict=True):
        array = zarr.open_array(work.store.path / work.runs[row["run"]], mode="r")
        values[:] = array[int(row["start"]) : int(row["start"]) + CLIP_FRAMES]
    return batch


def patch_sides(work: Work, folder: Path, frames: int) -> dict[str, Callable[[], object]]:
    """Float patches of one clip after the other: ours of brain patches, the released path's of the dense volume."""
    shape = work.store.grid.shape
    files = [folder / f"dense-{number}.pt" for number in range(4)]
    for file in files:
        values = torch.randint(-127, 128, (frames, *shape), dtype=torch.int8)
        torch.save({"frames": values, "scale": torch.tensor(0.05)}, file)
    brain = torch.from_numpy(work.store.mask)
    config = SwinConfig(img_size=(*shape, CLIP_FRAMES), patch_size=PATCH, tokens="brain")
    finest = SwinEncoder(config, StrdConfig(), brain=brain).geometry(CLIP_FRAMES).levels[0]
    table = patch_table(brain, PATCH)
    unpack = ClipUnpacker(table, finest.space_of_token, finest.time_of_token, work.store.voxel_count)
    reader = work.reader

    def ours() -> None:
        for rows in work.batches():
            for index in range(len(rows)):
                unpack(reader.batch(rows[index : index + 1]))

    def released() -> None:
        for rows in work.batches():
            for row in rows:
                held = torch.load(files[row["run"] % len(files)], mmap=True, weights_only=True)
                clip = held["frames"][row["start"] : row["start"] + CLIP_FRAMES].float() * held["scale"]
                rearrange(
                    clip, "t (d p) (h q) (w r) -> (t d h w) (p q r)", p=PATCH[0], q=PATCH[1], r=PATCH[2]
                ).contiguous()

    return {"patches": ours, "patches, released path": released}


@ray.remote(num_cpus=0.5)
class Worker:
    """A training worker's process: takes its batches, as `neurostorm.train.worker` does, and times them."""

    def __init__(self, work: Work) -> None:
        self._work, self._reader = work, work.reader

    def take(self, shard: Any, step_s: float) -> tuple[float, float]:
        """Seconds for the round's steps after the warm ones, and the share of them spent waiting for batches."""
        work = self._work
        stream = batches(shard, self._reader, rank=0, first_step=0, clips=work.plan.global_batch)
        waited_s, began_s = 0.0, 0.0
        for step in range(WARM_STEPS + work.steps):
            if step == WARM_STEPS:
                waited_s, began_s = 0.0, time.perf_counter()
            waiting_s = time.perf_counter()
            batch = next(stream)
            batch.frames[:, :, ::4096].sum()  # one byte of every page: it is there
            waited_s += time.perf_counter() - waiting_s
            time.sleep(step_s)
        spent_s = time.perf_counter() - began_s
        return spent_s, waited_s / spent_s


@dataclass(frozen=True)
class Pipeline:
    """The whole path in one mode; the worker's process is kept."""

    work: Work
    read_in: Any
    worker: Any

    def seconds(self, step_s: float) -> tuple[float, float]:
        """Seconds of a round and the share spent waiting, with a mock step of `step_s`."""
        work = self.work
        last = WARM_STEPS + work.steps
        dataset = clip_dataset(work.reader, work.plan, first_step=0, last_step=last, workers=1, read_in=self.read_in)
        options = feed_options(work.reader, work.plan, read_in=self.read_in, steps_ahead=2)
        (shards,) = ray.train.DataConfig(execution_options=options).configure({"train": dataset}, 1, None, None)
        spent_s, waiting = ray.get(self.worker.take.remote(shards["train"], step_s))
        return spent_s, waiting


def pipelines(work: Work) -> dict[str, Pipeline]:
    """Both modes of the whole path."""
    return {
        f"pipeline, read in {place}": Pipeline(work, read_in, Worker.remote(work))
        for place, read_in in (("the worker", "worker"), ("tasks", "tasks"))
    }


def summary(work: Work, seconds: dict[str, float], waits: dict[str, float]) -> dict[str, Any]:
    """Rates and their ratios."""
    gb_per_s = {name: work.size_gb / value for name, value in seconds.items()}
    clips_per_s = {name: work.clips / value for name, value in seconds.items()}
    best = max(waits, key=lambda name: gb_per_s[name])
    return {
        "reader_share": gb_per_s["reader"] / gb_per_s["pread"],
        "reader_share_every_checksum": gb_per_s["reader, every checksum"] / gb_per_s["pread"],
        "pipeline_share": gb_per_s[best] / gb_per_s["pread"],
        "pipeline_shares": {name: gb_per_s[name] / gb_per_s["pread"] for name in waits},
        "ratio_to_baseline": clips_per_s["patches"] / clips_per_s["patches, released path"],
        "wait_fraction": waits[best],
        "wait_fractions": waits,
        "reader_clips_per_s": clips_per_s["reader"],
        "pipeline_clips_per_s": clips_per_s[best],
        "cores": os.cpu_count(),
        "gb_per_s": gb_per_s,
        "clips_per_s": clips_per_s,
    }


def show(figures: dict[str, Any], work: Work, options: argparse.Namespace) -> None:
    """The table."""
    clip_mb = work.reader.clip_bytes / 1e6
    print(f"{work.clips} clips of {clip_mb:.1f} MB, batches of {work.plan.global_batch}, {options.rounds} rounds\n")
    print(f"{'':<32}{'GB/s':>8}{'clips/s':>10}{'of pread':>10}")
    for name, rate in figures["gb_per_s"].items():
        share = rate / figures["gb_per_s"]["pread"]
        print(f"{name:<32}{rate:>8.2f}{figures['clips_per_s'][name]:>10.0f}{share:>10.2f}")
    print(f"\npatches against the released path: {figures['ratio_to_baseline']:.1f} times its clips/s")
    for name, waiting in figures["wait_fractions"].items():
        print(f"{name}: waits {waiting:.1%} of the time for a step of {options.step_clips_per_s:.0f} clips/s")


if __name__ == "__main__":
    sys.exit(main())
