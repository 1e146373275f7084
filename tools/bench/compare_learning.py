#!/usr/bin/env python3
"""Does the fast way learn as much? The same clips through the dense model, brain tokens, and visible tokens alone.

compare_learning.py                        a synthetic cohort, preset tiny, 600 steps, probes of age, sex and reid
compare_learning.py --store STORE --steps 2000 --output DIR
compare_learning.py --json FILE            the figures for a machine

    store --jobs/pretrain.py, once for each side--> held-out masked loss --jobs/sweep.py, linear probes--> test metrics

    dense    every patch through the paper's encoder and decoder
    brain    the patches with brain through the same
    sparse   visible patches with brain through the encoder, hidden ones through the light decoder

All sides take the same clips in the same order, hide the same share, and are judged on the same held-out clips by the
error of hidden brain voxels (brain and sparse under the very same masks). Started again with the same --output it goes
on where it was.
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

from end_to_end import command
from step import GEOMETRIES

from neurostorm.commands.options import refuse_missing_folder
from neurostorm.config.presets import PRESETS

ROOT = Path(__file__).resolve().parents[1]
SIDES = {"dense": GEOMETRIES["dense"], "brain": {"tokens": "brain", "decoder": "paper"}, "sparse": GEOMETRIES["sparse"]}
METRICS = {"age": "r", "sex": "balanced_accuracy", "reid": "map"}


def main() -> int:
    """Compare, print, write; exit status 1 with the end of its output when a job fails."""
    options = parse()
    with tempfile.TemporaryDirectory(prefix="compare_learning_") as folder:
        output = (options.output or Path(folder)).absolute()
        output.mkdir(parents=True, exist_ok=True)
        try:
            store = options.store.absolute() if options.store else make_store(output, options.preset)
            sides = {side: measure(options, side, store, output) for side in SIDES}
        except subprocess.CalledProcessError as error:
            print(f"compare_learning: {error}\n{error.output[-3000:]}", file=sys.stderr)
            return 1
    result = {
        **sides,
        "loss_over_dense": {side: one["loss"] / sides["dense"]["loss"] for side, one in sides.items()},
        **{name: getattr(options, name) for name in ("preset", "steps", "ratio", "mask", "lr")},
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
    add("--store", type=Path, help="a frame store with labels (default: made, 60 synthetic subjects)")
    add("--preset", choices=PRESETS, default="tiny", help="of the model (default: tiny)")
    add("--steps", type=int, default=600, help="of each side (default: 600)")
    add("--mask", default="window-tube", help="mask.kind (default: window-tube)")
    add("--window", default="1,1,1,4", help="mask.window (default: 1,1,1,4)")
    add("--ratio", type=float, default=0.75, help="share of the patches that is hidden (default: 0.75)")
    add("--lr", type=float, help="train.lr of every side (default: the preset's)")
    add("--output", type=Path, help="keep everything here (default: nothing is kept)")
    add("--json", type=Path, help="write the figures here")
    options = parser.parse_args()
    refuse_missing_folder(parser, "--json", options.json)
    return options


def make_store(output: Path, preset: str) -> Path:
    """The synthetic cohort on the preset's grid, without task runs."""
    store = output / "store"
    if not (store / "manifest.parquet").exists():
        command(ROOT / "tools" / "make_cohort.py", output / "cohort", "--subjects", 60, "--frames", 150, "--no-task")
    command(ROOT / "jobs" / "ingest.py", "--preset", preset, "--source", output / "cohort", "--store", store)
    return store


def measure(options: argparse.Namespace, side: str, store: Path, output: Path) -> dict[str, Any]:
    """Held-out loss, and each probe's metric over three folds: values, mean, standard error."""
    settings = {
        "run.output": output, "run.name": side, "data.store": store, "mask.kind": options.mask,
        "mask.window": options.window, "mask.ratio": options.ratio, "strd.enabled": "false",
        "train.max_steps": options.steps, "train.validate_every": options.steps, "checkpoint.every": options.steps,
        "tracking.pictures": "false", **({} if options.lr is None else {"train.lr": options.lr}),
        **{f"model.{name}": value for name, value in SIDES[side].items()},
    }  # fmt: skip
    flags = [str(part) for name, value in settings.items() for part in (f"--{name}", value)]
    command(ROOT / "jobs" / "pretrain.py", "--preset", options.preset, *flags)
    command(
        ROOT / "jobs" / "sweep.py", "--store", store, "--model", output / side, "--output", output, "--name",
        f"probes-{side}", "--tasks", ",".join(METRICS), "--methods", "linear", "--replicates", 3, "--split.scheme",
        "kfold", "--split.folds", 3, "--split.group_column", "family_id", "--sweep.report", "false",
    )  # fmt: skip
    summary = json.loads((output / side / "summary.json").read_text())
    probes = {task: probe(output / f"probes-{side}" / "trials", task, metric) for task, metric in METRICS.items()}
    return {"loss": summary["loss/validation"], "mean_loss": summary["loss/validation_predicting_mean"], **probes}


def probe(trials: Path, task: str, metric: str) -> dict[str, Any]:
    """A task's test metric in each fold."""
    values = [json.loads(file.read_text())[metric] for file in sorted(trials.glob(f"{task}_*/test.json"))]
    return {
        "values": values, "mean": statistics.fmean(values),
        "standard_error": statistics.stdev(values) / len(values) ** 0.5,
    }  # fmt: skip


def show(r: dict[str, Any]) -> None:
    """The table."""
    print(f"preset {r['preset']}, {r['steps']} steps, {r['mask']} masks of {r['ratio']:g}\n")
    print(
        f"{'':<8}{'loss':>8}{'/ dense':>9}" + "".join(f"{f'{task} {metric}':>24}" for task, metric in METRICS.items())
    )
    for side in SIDES:
        probes = [f"{r[side][task]['mean']:.3f} +- {r[side][task]['standard_error']:.3f}" for task in METRICS]
        loss = f"{r[side]['loss']:>8.4f}{r['loss_over_dense'][side]:>9.3f}"
        print(f"{side:<8}{loss}" + "".join(f"{words:>24}" for words in probes))
    print(f"\npredicting each voxel's mean: {r['dense']['mean_loss']:.4f}; +- is the standard error over three folds")


if __name__ == "__main__":
    sys.exit(main())
