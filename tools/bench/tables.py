#!/usr/bin/env python3
"""What the tables of masked clips cost, made from coordinates on the host or by sums over tables on the device.

tables.py                                  paper's clip, half of the windows hidden, batches of 1, 8 and 32
tables.py --preset base --device cuda

    masks --`subset_geometry` | `drawn_geometry`--> all levels, windows, merges, timed; and how often shapes change

`count` is what the second way leaves to the host. `slots` are rows of the finest level's windows, shifted or not, over
its tokens: what is above 1 is computed for nobody. `shapes` are the different ones among the masks.
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from bench_models import Step
from step import refuse_impossible, setting

from neurostorm.commands.options import refuse_missing_folder
from neurostorm.config.presets import PRESETS
from neurostorm.model.autoencoder import MaskedAutoencoder
from neurostorm.model.geometry.static import Whole
from neurostorm.model.geometry.tokens import SubsetGeometry, numbers_of


def main() -> int:
    """Measure, print, write."""
    options = parse()
    model = Step(setting(options)).model
    assert isinstance(model, MaskedAutoencoder)
    rows = []
    print(f"{'clips':>6}{'host ms':>10}{'device ms':>11}{'count ms':>10}{'slots':>13}{'shapes':>9}")
    for batch in options.batches:
        rows.append(measure(model, batch, options.masks, options.device))
        row = rows[-1]
        slots = " / ".join(f"{share:.2f}" for share in row["slots"])
        times = f"{row['host_ms']:>10.1f}{row['device_ms']:>11.1f}{row['count_ms']:>10.2f}"
        print(f"{batch:>6}{times}{slots:>13}{row['shapes']:>5} / {options.masks}")
    if options.json:
        figures = {name: getattr(options, name) for name in ("preset", "ratio", "device", "threads")}
        options.json.write_text(json.dumps({**figures, "batches": rows}, indent=2) + "\n")
    return 0


def parse() -> argparse.Namespace:
    """The command line; exits with status 2 and the reason when it makes no sense."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    add = parser.add_argument
    add("--preset", choices=PRESETS, default="paper", help="shape of model, clip and mask (default: paper)")
    add("--ratio", type=float, help="share of the patches that is hidden (default: the preset's)")
    add("--batches", type=int, nargs="+", default=(1, 8, 32), help="clips of a step (default: 1 8 32)")
    add("--masks", type=int, default=20, help="batches of masks, all counted, five timed (default: 20)")
    add("--device", choices=("cpu", "cuda"), default="cpu")
    add("--threads", type=int, default=2, help="CPU threads of torch (default: 2)")
    add("--json", metavar="FILE", type=Path, help="write the figures there as well")
    options = parser.parse_args()
    refuse_impossible(parser, options, ("masks", "threads"))
    refuse_missing_folder(parser, "--json", options.json)
    always = {"model": "mae", "mixer": "attention", "geometry": "sparse", "dtype": "fp32", "batch": 1, "compile": False}
    return argparse.Namespace(**vars(options), **always)


def measure(model: MaskedAutoencoder, batch: int, count: int, device: str) -> dict[str, Any]:
    """Median milliseconds of a batch's tables by either way, slots per token, and how many shapes there were."""
    frames = model.config.frames
    whole = model.geometry(frames, device)
    masks = [model.draw_mask(batch, frames, torch.Generator().manual_seed(seed), "cpu") for seed in range(count)]

    def made(on_device: bool, mask: torch.Tensor) -> SubsetGeometry:
        model.visible.on_device = on_device
        geometry = model.visible_geometry(mask, whole)
        use(geometry, model)
        return geometry

    made(True, masks[0])  # what is kept
    kept = Whole(whole, model.config.windows)
    geometries = [made(True, mask) for mask in masks]
    slots = [sum(bucket.index.numel() for bucket in table.buckets) for table in tables(geometries[0], model)[:2]]
    return {
        "clips": batch,
        "host_ms": median_ms(lambda mask: made(False, mask), masks[:5]),
        "device_ms": median_ms(lambda mask: made(True, mask), masks[:5]),
        "count_ms": median_ms(lambda mask: kept.count(numbers_of(~mask).numpy()), masks[:5]),
        "slots": [number / len(geometries[0].levels[0]) for number in slots],
        "shapes": len({shapes(geometry, model) for geometry in geometries}),
    }


def tables(geometry: SubsetGeometry, model: MaskedAutoencoder) -> list[Any]:
    """All window tables, level by level."""
    levels = zip(geometry.levels, model.config.windows, strict=True)
    return [level.windows(window, shifted) for level, window in levels for shifted in (False, True)]


def use(geometry: SubsetGeometry, model: MaskedAutoencoder) -> None:
    """Make everything that a forward pass asks for."""
    for table in [*tables(geometry, model), *geometry.merges]:
        table.maps(1)
    if geometry.levels[0].windows(model.config.windows[0], False).buckets[0].index.is_cuda:
        torch.cuda.synchronize()


def shapes(geometry: SubsetGeometry, model: MaskedAutoencoder) -> tuple[Any, ...]:
    """Of every level and window table."""
    windows = [tuple(bucket.index.shape for bucket in table.buckets) for table in tables(geometry, model)]
    return (*map(len, geometry.levels), *windows)


def median_ms(work: Callable[[torch.Tensor], Any], masks: Sequence[torch.Tensor]) -> float:
    """Of one call for each mask."""
    times = []
    for mask in masks:
        begin_s = time.perf_counter()
        work(mask)
        times.append(1e3 * (time.perf_counter() - begin_s))
    return statistics.median(times)


if __name__ == "__main__":
    sys.exit(main())
