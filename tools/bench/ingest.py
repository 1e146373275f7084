#!/usr/bin/env python3
"""How fast runs come into the store, where the time goes, and how much of two cores an ingest uses.

ingest.py                              three kinds of run, 200 stored frames each; 24 of the first on two cores
ingest.py --frames 1200 490 240        frames of each kind
ingest.py --json FILE --spread-runs 0  without the part that starts Ray

    synthetic .nii.gz ──ingest_run, one thread──> run in a store, flushed to disk    seconds, frames/s, share of steps
                      └─the released steps──────> one .pt file, torch on one thread  seconds: the baseline
    24 such files ──fanout.ingest on two Ray CPUs, warm──> CPU seconds of all its processes over 2 x wall seconds

Both sides take turns, round by round, in this process; figures are medians over rounds, after one that is not counted.
The shares come from extra passes with a clock around the real functions, where a function's time is its own without
that of the clocked ones that it calls. As in a real ingest, the plan of a grid is made once and then remembered.
Frames are those of the store, at its TR, and so are the 28.65 million of the corpus.
"""

import argparse
import json
import logging
import os
import shutil
import statistics
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")  # per core is what is compared

import psutil
import torch
from ingest_runs import KINDS, make_run, released_steps

from neurostorm.ingest import convert
from neurostorm.ingest.layouts.discover import Source
from neurostorm.ingest.resample import blocks, frame_buffer, standardize, target
from neurostorm.ingest.resample.template import brain_mask
from neurostorm.runtime.session import start_local
from neurostorm.store import GRIDS, create_store
from neurostorm.store.codec import FrameCodec

CORPUS_FRAMES = 28_650_000
RAY_CPUS = 2
RUN_NAME = "task-rest_space-MNI152NLin6Asym_desc-preproc_bold.nii.gz"
GRID, TR_S = "2mm", 0.8
FRAMES = [222, 161, 81]  # acquired; each makes 200 stored ones
OTHER = "other"  # header, plans, attributes, the store's bookkeeping
# Functions with a clock, and the step that their own time counts for.
CLOCKED: tuple[tuple[Any, str, str], ...] = (
    (frame_buffer, "_take", "take, cast"), (frame_buffer, "as_values", "take, cast"),
    (frame_buffer.VoxelBuffer, "block", "take, cast"),
    (frame_buffer.SourceBuffer, "add", "take, cast"), (frame_buffer.ResampledBuffer, "block", "take, cast"),
    (frame_buffer.SourceBuffer, "block", "space"), (frame_buffer.ResampledBuffer, "add", "space"),
    (standardize, "pack", "time"),
    (blocks, "finite_series", "z, round"), (blocks, "standard_scores", "z, round"), (FrameCodec, "encode", "z, round"),
    (target, "standardise", "z, round"),
    (FrameCodec, "count_clipped", "figures"), (FrameCodec, "signal_to_noise_db", "figures"),
    (standardize, "_summary", "figures"),
    (convert, "write_run", "write"),
)  # fmt: skip
STEPS = ("read, inflate, hash", "take, cast", "space", "time", "z, round", "figures", "write", OTHER)


def main(argv: Sequence[str] | None = None) -> int:
    options = parse(argv)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(prefix="bench-ingest-", dir=options.folder) as folder:
        files = {}
        for name, frames in zip(KINDS, options.frames, strict=True):
            files[name] = Path(folder, f"{name.replace(' ', '')}.nii.gz")
            make_run(files[name], KINDS[name], frames)
        kinds = measure(files, Path(folder), options.rounds)
        spread = measure_spread(next(iter(files.values())), Path(folder), options.spread_runs)
    result = {
        "ratio_to_baseline": statistics.median(kind["ratio_to_baseline"] for kind in kinds.values()),
        **spread,
        "kinds": kinds,
        "rounds": options.rounds,
        "machine": {"cores": os.cpu_count(), "torch": torch.__version__},
    }
    for line in lines(result):
        print(line)
    if options.json:
        options.json.write_text(json.dumps(result, indent=1) + "\n")
    return 0


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line; exits with status 2 and the reason when it makes no sense."""
    parser = argparse.ArgumentParser(description="Time the ingest of synthetic runs against the released steps.")
    add = parser.add_argument
    add("--frames", type=int, nargs="+", default=FRAMES, help=f"one number, or one for each of {list(KINDS)}; {FRAMES}")
    add("--rounds", type=int, default=3, help="rounds after one to warm up (default: 3)")
    add("--spread-runs", type=int, default=24, help="runs that two Ray CPUs share, 0 for none (default: 24)")
    add("--folder", metavar="DIR", type=Path, help="where the files and stores are made for the time (default: TMPDIR)")
    add("--json", metavar="FILE", type=Path, help="write the figures there as well")
    options = parser.parse_args(argv)
    if len(options.frames) == 1:
        options.frames *= len(KINDS)
    if len(options.frames) != len(KINDS) or min(options.frames) < 2:
        parser.error(f"--frames {options.frames}: one number or {len(KINDS)}, each at least 2")
    if options.rounds < 1 or options.spread_runs < 0:
        parser.error("--rounds at least 1, --spread-runs at least 0")
    if options.json and not options.json.absolute().parent.is_dir():
        parser.error(f"--json {options.json}: there is no folder {options.json.absolute().parent}")
    return options


def measure(files: dict[str, Path], folder: Path, rounds: int) -> dict[str, dict[str, Any]]:
    """Both sides in turns for every kind, then the clocked passes."""
    store, saved = folder / "store", folder / "data.pt"
    create_store(store, grid=GRIDS[GRID], mask=target_mask(), tr_s=TR_S, recipe=convert.RECIPE)
    seconds: dict[str, list[tuple[float, float]]] = defaultdict(list)
    clocked: dict[str, dict[str, float]] = {name: dict.fromkeys(STEPS, 0.0) for name in files}
    stored: dict[str, int] = {}
    for number in range(rounds + 1):
        for name, file in files.items():
            source = _source(file, number)
            began = time.perf_counter()
            released_steps(file, saved)
            baseline_s = time.perf_counter() - began
            began = time.perf_counter()
            stored[name] = convert.ingest_run(source, store).frames
            ours_s = time.perf_counter() - began
            shutil.rmtree(store / source.run)
            if number:
                seconds[name].append((baseline_s, ours_s))
                with clocks(clocked[name]):
                    convert.ingest_run(source, store)
                shutil.rmtree(store / source.run)
    return {name: _figures(seconds[name], clocked[name], stored[name]) for name in files}


@contextmanager
def clocks(spent: dict[str, float]) -> Iterator[None]:
    """Adds the own time of every clocked function to its step, and the rest to OTHER, while the context is open."""
    running: list[str] = [OTHER]
    since = time.perf_counter()

    def turn() -> None:
        nonlocal since
        now = time.perf_counter()
        spent[running[-1]] += now - since
        since = now

    def clocked(function: Callable[..., Any], step: str) -> Callable[..., Any]:
        def call(*arguments: Any, **named: Any) -> Any:
            turn()
            running.append(step)
            try:
                return function(*arguments, **named)
            finally:
                turn()
                running.pop()

        return call

    def reading(*arguments: Any, **named: Any) -> Iterator[Any]:
        step = clocked(original_read(*arguments, **named).__next__, STEPS[0])
        while True:
            try:
                frame = step()
            except StopIteration:
                return
            yield frame

    original_read = target.read_stored
    originals = [(owner, name, getattr(owner, name)) for owner, name, _ in CLOCKED]
    target.read_stored = reading
    for owner, name, step in CLOCKED:
        setattr(owner, name, clocked(getattr(owner, name), step))
    try:
        yield
    finally:
        turn()
        target.read_stored = original_read
        for owner, name, function in originals:
            setattr(owner, name, function)


def measure_spread(file: Path, folder: Path, runs: int) -> dict[str, Any]:
    """CPU seconds of this process and all below it over those of two cores, while `fanout.ingest` spreads `runs`.

    Ray and its workers are started and have ingested two other runs before.
    """
    if not runs:
        return {}
    import ray

    from neurostorm.config import Config
    from neurostorm.ingest import job

    def ingest(name: str, count: int) -> None:
        source = folder / name
        source.mkdir()
        for number in range(count):
            os.link(file, source / f"sub-{number:03d}_{RUN_NAME}")
        settings = {"ingest": {"source": source, "dataset": "bench", "grid": GRID, "tr_s": TR_S}}
        report = job.ingest(Config.model_validate({**settings, "data": {"store": folder / f"{name}.store"}}))
        if report.in_store != count:
            raise RuntimeError("\n".join(report.lines()))
        slots.append(sum(outcome.seconds for outcome in report.outcomes))

    def watched(*arguments: Any, **named: Any) -> Iterator[Any]:
        began, cpu_s = time.perf_counter(), _cpu_seconds()
        yield from spread(*arguments, **named)
        spans.append((time.perf_counter() - began, _cpu_seconds() - cpu_s))

    started = not ray.is_initialized()
    if started:
        start_local(num_cpus=RAY_CPUS, logging_level=logging.ERROR, log_to_driver=False)
        logging.getLogger("ray.data._internal").setLevel(logging.ERROR)
    spread, spans, slots = job.map_runs, [], []
    job.map_runs = watched
    try:
        ingest("warm", RAY_CPUS)
        ingest("spread", runs)
    finally:
        job.map_runs = spread
        if started:
            ray.shutdown()
    wall_s, cpu_s = spans[-1]
    return {
        "cpu_utilisation": cpu_s / (RAY_CPUS * wall_s), "slot_utilisation": slots[-1] / (RAY_CPUS * wall_s),
        "spread_runs": runs, "spread_s": wall_s,
    }  # fmt: skip


def target_mask() -> Any:
    """The brain of the store that runs are brought to, bool on GRID."""
    return brain_mask(GRIDS[GRID])


def _source(file: Path, number: int) -> Source:
    facts = {"session": "", "task": "rest", "run_label": "", "stem": "task-rest", "format": "plain"}
    return Source(file, dataset="bench", subject=f"sub-{number}", **facts)


def _cpu_seconds() -> float:
    """User and system seconds of this process, all below it, and those of them that have ended."""
    here = psutil.Process()
    total = 0.0
    for process in (here, *here.children(recursive=True)):
        try:
            total += sum(process.cpu_times()[:4])  # user, system, and both of children that were waited for
        except psutil.NoSuchProcess:
            continue
    return total


def _figures(seconds: list[tuple[float, float]], clocked: dict[str, float], stored: int) -> dict[str, Any]:
    ours_s = statistics.median(ours for _, ours in seconds)
    total = sum(clocked.values())
    return {
        "ours_s": ours_s,
        "baseline_s": statistics.median(baseline for baseline, _ in seconds),
        "ratio_to_baseline": statistics.median(baseline / ours for baseline, ours in seconds),
        "stored_frames": stored,
        "frames_per_s_per_core": stored / ours_s,
        "corpus_core_hours": CORPUS_FRAMES * ours_s / stored / 3600,
        "shares": {step: spent / total for step, spent in clocked.items()},
    }


def lines(result: dict[str, Any]) -> Iterator[str]:
    """The table."""
    kinds = result["kinds"]
    yield f"{'one core':<22}" + "".join(f"{name:>12}" for name in kinds)
    for title, key, form in (
        ("stored frames", "stored_frames", "12,d"),
        ("seconds per run", "ours_s", "12.2f"),
        ("  released steps", "baseline_s", "12.2f"),
        ("times as fast", "ratio_to_baseline", "12.1f"),
        ("frames/s per core", "frames_per_s_per_core", "12.0f"),
        ("core-hours, corpus", "corpus_core_hours", "12.0f"),
    ):
        yield f"{title:<22}" + "".join(format(kind[key], form) for kind in kinds.values())
    for step in STEPS:
        yield f"  {step:<20}" + "".join(f"{kind['shares'][step]:>12.1%}" for kind in kinds.values())
    yield f"\n{result['ratio_to_baseline']:.1f} times as fast as the released steps (median of the kinds)"
    if "cpu_utilisation" in result:
        yield (
            f"{result['spread_runs']} runs on {RAY_CPUS} cores in {result['spread_s']:.1f} s: the processes use "
            f"{result['cpu_utilisation']:.0%} of them, the runs' tasks {result['slot_utilisation']:.0%}"
        )


if __name__ == "__main__":
    sys.exit(main())
