#!/usr/bin/env python3
"""What an epoch costs: GPU-hours and money for presets on a corpus, from the model's operations and the bytes to read.

    epoch_cost.py --price 2.50
    epoch_cost.py --presets base --share 0.01 --gb-per-s 2 -- --model.mixer mamba --mask.ratio 0.75

    preset + settings --> the model, on no device --> cost.py: operations per clip --> hours at a share of a GPU's peak
    clips of the epoch x their bytes in the store  -->  hours at what one GPU is fed    --> the longer counts

Nothing is measured here. The share of the peak and the rate of the feed are assumptions of whoever calls (the default
share is what one H200 reached with `base`, tools/BENCHMARKS.md); a run logs `speed/clips_per_s`. Validation,
checkpoints, idle machines and the head come on top. What follows `--` are settings as jobs/pretrain.py takes them.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from neurostorm.commands.command import Job
from neurostorm.config import Config, ConfigError
from neurostorm.config.presets import PRESETS
from neurostorm.ingest.resample.template import brain_mask
from neurostorm.model.cost import clip_cost
from neurostorm.store import GRIDS
from neurostorm.train.build import build_model

CORPUS_FRAMES = 28_650_000
H100_BF16 = 989e12  # operations per second of an H100 SXM, dense bfloat16, as NVIDIA publishes it
JOB = Job("pretrain", "", ("data", "model", "mask", "strd", "scale"), presets=True)


@dataclass(frozen=True)
class EpochCost:
    """One epoch of one preset; hours are those of a single GPU, `wall_hours` those of the preset's workers."""

    preset: str
    parameters: int
    clip_flops: int  # forward and backward
    clips: int
    read_bytes: int
    compute_hours: float
    read_hours: float
    workers: int
    price: float  # of an hour of one GPU

    @property
    def gpu_hours(self) -> float:
        return max(self.compute_hours, self.read_hours)

    @property
    def wall_hours(self) -> float:
        return self.gpu_hours / self.workers

    @property
    def cost(self) -> float:
        return self.gpu_hours * self.price


def epoch_cost(preset: str, config: Config, options: argparse.Namespace) -> EpochCost:
    """The cost of one pass over `options.frames` frames, clip after clip without overlap."""
    grid, data = GRIDS[config.ingest.grid], config.data
    mask = brain_mask(grid)
    with torch.device("meta"):
        model = build_model(config, SimpleNamespace(grid=grid, mask=mask))
    cost = clip_cost(model, data.clip_frames)
    clips = options.frames // (data.clip_stride_frames or data.clip_frames)
    read_bytes = clips * data.clip_frames * int(mask.sum())  # int8: a byte per voxel of the mask and frame
    return EpochCost(
        preset=preset, parameters=cost.parameters, clip_flops=cost.train_flops, clips=clips, read_bytes=read_bytes,
        compute_hours=clips * cost.train_flops / (options.share * options.peak) / 3600,
        read_hours=read_bytes / (options.gb_per_s * 1e9) / 3600,
        workers=max(1, config.scale.workers), price=options.price,
    )  # fmt: skip


def table(costs: Sequence[EpochCost], options: argparse.Namespace) -> str:
    """The costs as lines of Markdown, after a sentence with what was assumed."""
    lines = [
        f"{options.frames:,} frames; {options.share:.1%} of {options.peak / 1e12:,.0f} TFLOP/s and "
        f"{options.gb_per_s:g} GB/s per GPU, {options.price:.2f} per GPU-hour: assumed, not measured",
        "| preset | parameters | GFLOP/clip | GPU-hours, computing | GPU-hours, reading | wall hours x GPUs | cost |",
        "|---|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {c.preset} | {c.parameters / 1e6:.1f} M | {c.clip_flops / 1e9:.0f} | {c.compute_hours:.2f} | "
        f"{c.read_hours:.2f} | {c.wall_hours:.2f} x {c.workers} | {c.cost:.2f} |"
        for c in costs
    ]
    return "\n".join(lines)


def parse(argv: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    """The options, and the settings after `--`."""
    words = list(argv)
    cut = words.index("--") if "--" in words else len(words)
    parser = argparse.ArgumentParser(description="GPU-hours and money of one epoch, from the model's operations.")
    add: Any = parser.add_argument
    add("--presets", nargs="+", choices=PRESETS, default=["base", "large"], help="default: base large")
    add("--frames", type=int, default=CORPUS_FRAMES, help="frames of the corpus (default: 28.65 million)")
    add("--share", type=float, default=0.005, help="of the peak that is reached (default: .005, see BENCHMARKS.md)")
    add("--peak", type=float, default=H100_BF16, help="operations per second of a GPU (default: H100, bf16: 989e12)")
    add("--gb-per-s", type=float, default=1.0, help="GB/s of clips that one GPU is fed (default: 1, an assumption)")
    add("--price", type=float, default=2.5, help="of an hour of one GPU (default: 2.50, an assumption)")
    add("--json", metavar="FILE", type=Path, help="write the figures there as well")
    options = parser.parse_args(words[:cut])
    if not 0 < options.share <= 1:
        parser.error(f"--share {options.share}: above 0, at most 1")
    for name in ("frames", "peak", "gb_per_s"):
        if getattr(options, name) <= 0:
            parser.error(f"--{name.replace('_', '-')} {getattr(options, name)}: above 0")
    if options.price < 0:
        parser.error(f"--price {options.price}: not below 0")
    return options, words[cut + 1 :]


def main(argv: Sequence[str] | None = None) -> int:
    """Exit status 0, or 1 with the reason on stderr."""
    options, settings = parse(sys.argv[1:] if argv is None else argv)
    try:
        costs = [epoch_cost(name, JOB.load(["--preset", name, *settings]), options) for name in options.presets]
    except ConfigError as error:
        print(f"epoch_cost: {error}", file=sys.stderr)
        return 1
    print(table(costs, options))
    if options.json:
        rows = [{**asdict(c), "gpu_hours": c.gpu_hours, "wall_hours": c.wall_hours, "cost": c.cost} for c in costs]
        assumed = {name: value for name, value in vars(options).items() if name not in ("json", "presets")}
        options.json.write_text(json.dumps({**assumed, "epochs": rows}, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
