"""The whole corpus without its frames: what planning, slicing and the driver's memory come to at full size.

    python tools/bench/corpus.py --json FILE

    five datasets, 66,000 runs, 28.65 M frames -> a store's folder with its manifest, no frames
       -> a process that has what a driver has loaded: open it, plan epochs, slice at random steps, watch the memory
       -> a process that has what a worker has loaded: requests up to its first clip, memory once every run is known
       -> files and bytes that the store would have, the data state of a checkpoint, a model of the feed by nodes

The measured code is the jobs' own (`open_corpus`, `ClipPlan`), plain and with a mixture, units and a cap. `plan_s` and
`slice_s` are the worst of all of these: a plan's first epoch with all tables it needs, and one worker's share of one
step in an epoch that is planned. `driver_mib` is the peak of the whole process, Python, torch and Ray included;
`worker_index_mib` is what a worker holds of store, runs and plan (tools/bench/corpus_worker.py).
"""

import argparse
import json
import multiprocessing
import os
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import corpus_worker
import feed_model

MIB = 2**20
TR_S = 0.8
TABLES = 2  # participants.parquet and quarantine.parquet, which a filled store has as well


@dataclass(frozen=True)
class Cohort:
    """A dataset of the corpus: its people, its runs and the frames of a complete run at 0.8 s."""

    name: str
    subjects: int
    runs: int
    frames: int


# Subjects as published; runs so that there are 66,000; frames from each study's protocol (UKB 490 x .735 s and so on),
# which `--frames` then scales: not every run of the protocol is complete.
COHORTS = (
    Cohort("abcd", 9_449, 14_826, 383),
    Cohort("hcp-aging", 725, 2_900, 478),
    Cohort("hcp-development", 652, 2_608, 478),
    Cohort("hcp-ya", 1_206, 4_824, 1080),
    Cohort("ukb", 40_842, 40_842, 450),
)
SETTINGS: dict[str, dict[str, Any]] = {
    "plain": {},
    "mixture": {"weights": {"hcp-ya": 2.0, "ukb": 0.5}, "temperature": 2.0},
    "units": {"clips_per_read": 4, "masks_per_clip": 2},
    "cap": {"max_clips_per_subject": 20},
    "all": {
        "weights": {"hcp-ya": 2.0, "ukb": 0.5}, "temperature": 5.0, "max_clips_per_subject": 20, "clips_per_read": 4,
        "masks_per_clip": 2,
    },
}  # fmt: skip


def main(argv: Sequence[str] | None = None) -> int:
    """Exit status 0; wrong options end with status 2 and the reason."""
    options = parse(argv)
    with tempfile.TemporaryDirectory(prefix="simulate-corpus-") as folder:
        store = Path(folder) / "corpus.zarr"
        size = build_store(store, options)
        config = configuration(store, options, {}, output=Path(folder))
        rows = in_new_process(corpus_worker.prepare, store, config)["rows"]
        worker = in_new_process(corpus_worker.measure, store, config, rows)
        result = {**size, **worker, **in_new_process(measure, store, options)}
    feed = feed_model.Feed(
        result["clip_bytes"], options.clips_per_s_per_core, options.cores_per_node, options.network_gb_s,
        options.storage_gb_s, options.shared_gb_s,
    )  # fmt: skip
    demand = {"gpus": options.gpus, "clips_per_s_per_gpu": options.clips_per_s_per_gpu}
    result["feed_clips_per_s"] = {str(nodes): feed.rate(nodes)[0] for nodes in feed_model.NODES}
    result["feed_nodes"] = feed.nodes_for(options.gpus * options.clips_per_s_per_gpu)
    for line in [*lines(result), "", *feed_model.lines(feed, **demand)]:
        print(line)
    if options.json:
        options.json.write_text(json.dumps(result, indent=2) + "\n")
    return 0


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line; exits with status 2 and the reason when it makes no sense."""
    parser = argparse.ArgumentParser(description="Plan the whole corpus, without its frames, and model its feed.")
    add = parser.add_argument
    add("--runs", type=int, default=66_000, help="runs of the five datasets together (default: 66000)")
    add("--frames", type=int, default=28_650_000, help="frames of all runs together (default: 28650000)")
    add("--grid", choices=("2mm", "4mm"), default="2mm", help="the store's grid (default: 2mm)")
    add("--clip-frames", type=int, default=20, help="frames per clip (default: 20)")
    add("--workers", type=int, default=64, help="training workers (default: 64)")
    add("--clips-per-worker", type=int, default=8, help="clips of one worker in one step (default: 8)")
    add("--slices", type=int, default=200, help="random steps that are sliced (default: 200)")
    feed = parser.add_argument_group("feed", "the model of feed rate against nodes")
    feed.add_argument("--feed", metavar="FILE", type=Path, help="take clips/s per core from feed.py's JSON")
    feed.add_argument("--clips-per-s-per-core", type=float, default=240.0, help="without it (default: 240, 1.1 GB/s)")
    feed.add_argument("--cores-per-node", type=int, default=32, help="cores of a node that read (default: 32)")
    feed.add_argument("--network-gb-s", type=float, default=12.5, help="GB/s into a node (default: 12.5, 100 Gbit/s)")
    feed.add_argument("--storage-gb-s", type=float, default=5.0, help="GB/s from the store, per node (default: 5)")
    feed.add_argument("--shared-gb-s", type=float, help="GB/s from the store, all nodes together (default: no limit)")
    feed.add_argument("--gpus", type=int, default=8, help="GPUs to be fed (default: 8)")
    feed.add_argument("--clips-per-s-per-gpu", type=float, default=500.0, help="what each takes (default: 500)")
    add("--json", metavar="FILE", type=Path, help="write the figures there as well")
    options = parser.parse_args(argv)
    for name, value in vars(options).items():
        if isinstance(value, int | float) and value <= 0:
            parser.error(f"--{name.replace('_', '-')} {value}: must be above 0")
    if options.runs < 10 * len(COHORTS) or options.frames < options.runs:
        parser.error(f"--runs {options.runs} --frames {options.frames}: at least 50 runs, and a frame for each")
    if options.json and not options.json.absolute().parent.is_dir():
        parser.error(f"--json {options.json}: there is no folder {options.json.absolute().parent}")
    if options.feed:
        try:
            options.clips_per_s_per_core = feed_model.rate_per_core(options.feed)
        except ValueError as error:
            parser.error(f"--feed {error}")
    return options


def build_store(store: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Makes the store's folder, mask and manifest, and returns what the filled store would measure."""
    # Here and not above, as in all functions: the process that is measured imports this file.
    import pyarrow.parquet as pq

    from neurostorm.ingest.resample.template import brain_mask
    from neurostorm.store import GRIDS, create_store
    from neurostorm.store.layout import MANIFEST
    from neurostorm.store.shard import default_chunk_frames, run_bytes, run_files

    mask = brain_mask(GRIDS[options.grid])
    create_store(store, grid=GRIDS[options.grid], mask=mask, tr_s=TR_S, recipe="simulated")
    voxels = int(mask.sum())
    table = manifest(options.runs, options.frames, default_chunk_frames(voxels))
    pq.write_table(table, store / MANIFEST, compression="zstd")
    lengths = table["frames"].to_pylist()
    subjects = {run.rsplit("/", 1)[0] for run in table["run"].to_pylist()}
    groups = 1 + len({subject.rsplit("/", 1)[0] for subject in subjects}) + len(subjects)  # runs/, datasets, subjects
    here = [file for file in store.rglob("*") if file.is_file()]
    return {
        "runs": len(lengths), "frames": sum(lengths), "subjects": len(subjects), "voxels": voxels,
        "clip_bytes": options.clip_frames * voxels, "manifest_bytes": (store / MANIFEST).stat().st_size,
        "files": len(here) + TABLES + groups + run_files() * len(lengths),
        "bytes": sum(file.stat().st_size for file in here) + sum(run_bytes(length, voxels) for length in lengths),
    }  # fmt: skip


def manifest(runs: int, frames: int, chunk_frames: int = 1, seed: int = 0) -> Any:
    """A manifest of `runs` runs with `frames` frames together: the datasets by their share, every tenth run cut short.

    Other figures than the lengths are those of an ordinary run in chunks of `chunk_frames`. Returns a `pyarrow.Table`
    with `MANIFEST_SCHEMA`, sorted by run.
    """
    import numpy as np
    import pyarrow as pa

    from neurostorm.store import MANIFEST_SCHEMA, run_path

    rng = random.Random(seed)
    total = sum(cohort.runs for cohort in COHORTS)
    rows: list[tuple[str, str, str, str, int]] = []
    for cohort in COHORTS:
        count = round(runs * cohort.runs / total) if cohort is not COHORTS[-1] else runs - len(rows)
        people = max(1, round(count * cohort.subjects / cohort.runs))
        for number in range(count):
            subject, session = f"sub-{1_000_000 + number % people}", f"ses-{1 + number // people}"
            length = round(cohort.frames * (rng.uniform(0.3, 1) if rng.random() < 0.1 else 1))
            entities = f"{session}_task-rest"
            rows.append((run_path(cohort.name, subject, entities), cohort.name, subject, session, length))
    rows.sort()
    run, dataset, subject, session, lengths = (list(column) for column in zip(*rows, strict=True))
    ends = np.cumsum(lengths) * frames // sum(lengths)  # scaled, with nothing lost to rounding
    known: dict[str, Any] = {
        "run": run, "dataset": dataset, "subject": subject, "session": session, "task": ["rest"] * runs,
        "frames": np.diff(ends, prepend=0), "chunk_frames": [chunk_frames] * runs, "compression": ["none"] * runs,
        "source": [f"{path.removeprefix('runs/')}_space-MNI152NLin6Asym_desc-preproc_bold.nii.gz" for path in run],
        "source_sha256": [f"{rng.getrandbits(256):064x}" for _ in run],
    }  # fmt: skip
    for column in MANIFEST_SCHEMA:
        plain = [""] * runs if pa.types.is_string(column.type) else np.arange(1, runs + 1)
        known.setdefault(column.name, plain)
    columns = [pa.array(known[column.name]).cast(column.type) for column in MANIFEST_SCHEMA]
    return pa.Table.from_arrays(columns, schema=MANIFEST_SCHEMA)


def in_new_process(function: Callable[..., dict[str, Any]], *arguments: Any) -> dict[str, Any]:
    """`function(*arguments)` in a process that did nothing before, so that its memory is its own."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


def measure(store: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Times and memory of a driver on the store."""
    import neurostorm.train.launch  # noqa: F401  all that a driver has loaded: torch, Ray, DeepSpeed
    from neurostorm.data.corpus import open_corpus

    before = peak_mib()
    found: dict[str, Any] = {}
    for name, data in SETTINGS.items():
        config = configuration(store, options, data)
        corpus, open_s = timed(lambda config=config: open_corpus(config))
        _, hash_s = timed(corpus.store.content_hash)
        plan = corpus.plan
        _, plan_s = timed(lambda plan=plan: plan.rows(0, 1))
        _, next_s = timed(lambda plan=plan: plan.rows(2 * plan.clips_per_epoch, 1))
        slices = slice_times(plan, options)
        found[name] = {
            "open_s": open_s, "hash_s": hash_s, "plan_s": plan_s, "next_plan_s": next_s,
            "slice_s": statistics.median(slices), "slowest_slice_s": max(slices), "clips": plan.clips_per_epoch,
            "shares": plan.clips_by_dataset, "driver_mib": max(before, peak_mib()),  # which is counted to some pages
        }  # fmt: skip
    return {
        "plan_s": max(one["plan_s"] for one in found.values()),
        "slice_s": max(one["slowest_slice_s"] for one in found.values()),
        "driver_mib": max(one["driver_mib"] for one in found.values()),
        "driver_mib_before": before,
        "state_bytes": len(data_state(config, corpus.store.content_hash())),
        "settings": found,
        "machine_cores": os.cpu_count(),
    }


def configuration(store: Path, options: argparse.Namespace, data: dict[str, Any], **run: Any) -> Any:
    """The configuration of a pretraining run on the store; `run` are fields of that section."""
    from neurostorm.config import Config

    share = options.clips_per_worker
    return Config.model_validate(
        {
            "data": {"store": store, "clip_frames": options.clip_frames, **data},
            "train": {"global_batch": share * options.workers, "micro_batch": share},
            "scale": {"workers": options.workers},
            "run": run,
        }
    )


def slice_times(plan: Any, options: argparse.Namespace) -> list[float]:
    """Seconds that one worker's rows of one step take, at random places of the epoch that was planned last."""
    rng = random.Random(1)
    first = -(-2 * plan.clips_per_epoch // plan.global_batch)
    last = max(3 * plan.clips_per_epoch // plan.global_batch, first + 1)
    calls = [(rng.randrange(first, last), rng.randrange(options.workers)) for _ in range(options.slices)]
    return [timed(lambda step=step, rank=rank: plan.step_rows(step, rank, options.workers))[1] for step, rank in calls]


def data_state(config: Any, store_sha256: str) -> str:
    """What a checkpoint's trainer.json keeps that the clip order follows from."""
    tree = config.model_dump(mode="json")
    kept = {"run": {"seed": tree["run"]["seed"]}, "data": tree["data"]}
    kept["train"] = {"global_batch": tree["train"]["global_batch"]}
    return json.dumps({"step": 1_000_000, "store_sha256": store_sha256, "config": kept})


def timed(function: Callable[[], Any]) -> tuple[Any, float]:
    """What `function` returns, and its seconds."""
    begin = time.perf_counter()
    value = function()
    return value, time.perf_counter() - begin


def peak_mib() -> float:
    """Peak memory of this process so far."""
    status = Path("/proc/self/status")
    if status.exists():  # getrusage's figure would start with that of the process that started this one
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM:"))
        return int(line.split()[1]) / 1024
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / MIB if sys.platform == "darwin" else peak / 1024


def lines(result: dict[str, Any]) -> list[str]:
    """The measured figures as a table."""
    size = {name: f"{result[name]:,}" for name in ("runs", "frames", "subjects", "voxels", "files", "state_bytes")}
    peak, before = result["driver_mib"], result["driver_mib_before"]
    table = [
        f"{size['runs']} runs, {size['frames']} frames, {size['subjects']} subjects, {size['voxels']} voxels",
        f"store         {size['files']} files, {result['bytes'] / 1e12:.2f} TB, "
        f"manifest {result['manifest_bytes'] / MIB:.1f} MiB",
        f"checkpoint    {size['state_bytes']} bytes of data state",
        f"driver        peak {peak:.0f} MiB, of which {before:.0f} MiB before it opened the store",
        f"worker        {result['worker_index_mib']:.1f} MiB of store, runs and plan; "
        f"{result['requests_before_first_clip']} requests before its first clip, with it",
        "",
        "              open s   hash s   plan s  epoch s   slice ms  slowest ms   clips per epoch",
    ]
    for name, one in result["settings"].items():
        table.append(
            f"{name:12s} {one['open_s']:7.2f}  {one['hash_s']:7.2f}  {one['plan_s']:7.2f}  {one['next_plan_s']:7.2f}  "
            f"{1e3 * one['slice_s']:9.3f}  {1e3 * one['slowest_slice_s']:10.3f}  {one['clips']:16,}"
        )
    return table


if __name__ == "__main__":
    sys.exit(main())
