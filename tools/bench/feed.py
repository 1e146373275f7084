#!/usr/bin/env python3
"""How fast clips come from the store to a training worker, beside what this machine can do. Runs of 2 mm size.

feed.py                          8 runs of 430 frames in a temporary folder, 5 rounds
feed.py --store STORE            the runs of a store of one's own
feed.py --json FILE              the figures for a machine

All sides bring the same clips, in batches, into new memory, and take turns within one start of the program:

    memcpy        the clips' bytes from one place in memory to another
    pread, mmap   their bytes from the shards, checksums and all, as the file system's cache gives them
    reader        ClipReader: to a batch of int8; the second reading of a frame, and one that compares every checksum
    zarr-python   the same clips by the library; also by zarrs and tensorstore where those are installed
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
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")

import ray
import ray.train
import torch
from feed_sides import Work, direct_sides, make_store, open_work, patch_sides

from neurostorm.data.loader import batches, clip_dataset, loader_options
from neurostorm.runtime.session import start_local
from neurostorm.store import FrameStore

WARM_STEPS = 4  # of a pipeline, before its clock starts


def main() -> int:
    """Measure, print, write."""
    options = parse()
    torch.set_num_threads(options.threads)
    with tempfile.TemporaryDirectory(prefix="bench_feed_", dir=options.folder) as folder:
        store = options.store or make_store(Path(folder), options.runs, options.frames)
        work = open_work(FrameStore.open(store), options.batch, options.steps)
        sides = direct_sides(work) | patch_sides(work, Path(folder), options.frames)
        start_local(logging_level=logging.ERROR, log_to_driver=False)
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
        options = loader_options(work.reader, work.plan, read_in=self.read_in, prefetch_steps=2)
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
