#!/usr/bin/env python3
"""How fast a whole pretraining run is: the real feed, Ray Train, DeepSpeed, and how long its workers wait for clips.

end_to_end.py                              preset tiny, dense and sparse, on a store that is made for it
end_to_end.py --store STORE --preset base  a store of one's own
end_to_end.py --mixer mamba                the other mixer
end_to_end.py --json FILE                  the figures for a machine

    store --jobs/pretrain.py, once for each geometry--> MLflow metrics of every step --medians--> clips/s, wait fraction

A run is `jobs/pretrain.py` as anybody starts it, without pictures, validation and checkpoints on the way. Its first
steps, in which the feed and torch warm up, do not count. `wait_fraction` is the share of a step that rank 0 spends
waiting for its next batch.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from step import GEOMETRIES, WAITING, refuse_missing_folder

from neurostorm.config.presets import PRESETS

ROOT = Path(__file__).resolve().parents[1]
COHORT = ("--subjects", "16", "--frames", "100")


def main() -> int:
    """Measure, print, write; exit status 1 with the end of its output when a run fails."""
    options = parse()
    with tempfile.TemporaryDirectory(prefix="bench_end_to_end_", dir=options.folder) as folder:
        try:
            here = Path(folder).absolute()
            store = options.store.absolute() if options.store else make_store(here, options.preset)
            figures = {geometry: measure(options, geometry, store, here) for geometry in GEOMETRIES}
        except subprocess.CalledProcessError as error:
            print(f"end_to_end: {error}\n{error.output[-3000:]}", file=sys.stderr)
            return 1
    result = {
        **figures,
        "sparse_vs_dense": figures["sparse"]["clips_per_s"] / figures["dense"]["clips_per_s"],
        "wait_fraction": max(one["wait_fraction"] for one in figures.values()),
        **{name: getattr(options, name) for name in ("preset", "mixer", "steps", "workers")},
        "cores": os.cpu_count(),
    }
    show(result)
    if options.json:
        options.json.write_text(json.dumps(result, indent=2) + "\n")
    return 0


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    add = parser.add_argument
    add("--preset", choices=PRESETS, default="tiny", help="model, clip, mask and batch (default: tiny)")
    add("--mixer", choices=("attention", "mamba"), help="default: the preset's")
    add("--store", type=Path, help="a frame store (default: a synthetic cohort's, made on the preset's grid)")
    add("--folder", type=Path, help="where temporary files go (default: TMPDIR)")
    add("--steps", type=int, default=60, help="steps of a run (default: 60)")
    add("--warm", type=int, default=20, help="of these, the first that do not count (default: 20)")
    add("--workers", type=int, default=2, help="training workers (default: 2)")
    add("--json", type=Path, help="write the figures here")
    options = parser.parse_args()
    if not 0 <= options.warm < options.steps:
        parser.error(f"--warm {options.warm}: fewer than --steps {options.steps}")
    refuse_missing_folder(parser, "--json", options.json)
    return options


def make_store(folder: Path, preset: str) -> Path:
    """The synthetic cohort, small, on the preset's grid."""
    command(ROOT / "tools" / "make_cohort.py", folder / "cohort", *COHORT, "--no-task")
    store = folder / "store"
    command(ROOT / "jobs" / "ingest.py", "--preset", preset, "--source", folder / "cohort", "--store", store)
    return store


def measure(options: argparse.Namespace, geometry: str, store: Path, folder: Path) -> dict[str, float]:
    """Medians over a run's steps."""
    settings = {
        "run.output": folder, "run.name": geometry, "data.store": store, "train.max_steps": options.steps,
        "train.log_every": 1, "train.validate_every": options.steps, "checkpoint.every": options.steps,
        "tracking.pictures": "false", "scale.workers": options.workers, "strd.enabled": "false",
        **{f"model.{name}": value for name, value in GEOMETRIES[geometry].items()},
        **({} if options.mixer is None else {"model.mixer": options.mixer}),
    }  # fmt: skip
    flags = [str(part) for name, value in settings.items() for part in (f"--{name}", value)]
    command(ROOT / "jobs" / "pretrain.py", "--preset", options.preset, *flags)
    steps = [values for step, values in metrics_of(folder, geometry).items() if step > options.warm]
    return {
        short: statistics.median(values[name] for values in steps)
        for short, name in (
            ("clips_per_s", "speed/clips_per_s"), ("step_s", "speed/step_s"), ("wait_fraction", "data/wait_fraction"),
            ("mfu", "speed/mfu"),
        )
    }  # fmt: skip


def metrics_of(folder: Path, name: str) -> dict[int, dict[str, float]]:
    """Step -> metric -> value, of the MLflow run with this name."""
    from mlflow import MlflowClient

    client = MlflowClient(tracking_uri=f"sqlite:///{folder / 'mlflow.db'}")
    experiments = [experiment.experiment_id for experiment in client.search_experiments()]
    (run,) = [run for run in client.search_runs(experiments) if run.info.run_name == name]
    found: dict[int, dict[str, float]] = {}
    for metric in ("speed/clips_per_s", "speed/step_s", "data/wait_fraction", "speed/mfu"):
        for point in client.get_metric_history(run.info.run_id, metric):
            found.setdefault(point.step, {})[metric] = point.value
    return found


def command(*parts: Any) -> None:
    """A part of the project, started as its users do."""
    environment = {**WAITING, "RAY_USAGE_STATS_ENABLED": "0", "MLFLOW_DISABLE_TELEMETRY": "true", **os.environ}
    subprocess.run(
        [sys.executable, *map(str, parts)],
        check=True, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip


def show(r: dict[str, Any]) -> None:
    """The table."""
    mixer = f", {r['mixer']}" if r["mixer"] else ""
    print(f"preset {r['preset']}{mixer}, {r['workers']} workers on {r['cores']} cores, {r['steps']} steps\n")
    print(f"{'':<10}{'clips/s':>9}{'step s':>9}{'waiting':>9}{'MFU':>8}")
    for geometry in GEOMETRIES:
        one = r[geometry]
        print(
            f"{geometry:<10}{one['clips_per_s']:>9.2f}{one['step_s']:>9.3f}{one['wait_fraction']:>9.1%}{one['mfu']:>8.1%}"
        )
    print(f"\nsparse is {r['sparse_vs_dense']:.2f} times as fast as dense")


if __name__ == "__main__":
    sys.exit(main())
