#!/usr/bin/env python3
"""A training step in every form that a GPU has: geometry, mixer, dtype and torch.compile, beside the card's limits.

gpu.py --preset base --json FILE                       2 x 2 x 2 x 2 steps
gpu.py --geometry sparse --dtype bf16 --batch 64       some of them, with more clips

    forms -> one process each, all warmed up at once (most of that is compiling) -> rounds in turns -> medians
    of each: clips/s, forward, backward, optimizer, peak memory, share of a matrix product's and of a copy's rate

A form that does not fit the card's memory, or fails, is a line that says so. All models stay in memory while they take
turns. A step is that of `bench/step.py`: mask, tables, encoder, decoder, loss, backward pass, AdamW.
"""

import argparse
import itertools
import json
import statistics
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from bench_models import DTYPES, Step, Worker
from step import GEOMETRIES, refuse_impossible, setting

from neurostorm.commands.options import refuse_missing_folder
from neurostorm.config.presets import PRESETS

Form = tuple[str, str, str, bool]  # geometry, mixer, dtype, compiled
WARM_UP = 4  # steps: compiled blocks see a shape twice before they take it for a changing one


def main() -> int:
    """Exit status 0, or 1 when no form could be measured."""
    options = parse()
    rows = measure(options)
    for line in lines(options, rows):
        print(line)
    if options.json:
        figures = {name: getattr(options, name) for name in ("preset", "batch", "ratio", "device", "rounds")}
        options.json.write_text(json.dumps({**figures, "torch": torch.__version__, "forms": rows}, indent=2) + "\n")
    return 0 if any("clips_per_s" in row for row in rows) else 1


def parse() -> argparse.Namespace:
    """The command line; exits with status 2 and the reason when it makes no sense."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    add = parser.add_argument
    add("--preset", choices=PRESETS, default="base", help="shape of model, clip and mask (default: base)")
    add("--geometry", nargs="+", choices=tuple(GEOMETRIES), default=tuple(GEOMETRIES), help="default: both")
    add("--mixer", nargs="+", choices=("attention", "mamba"), default=("attention", "mamba"), help="default: both")
    add("--dtype", nargs="+", choices=tuple(DTYPES), default=tuple(DTYPES), help="default: both")
    add("--compile", nargs="+", choices=("off", "on"), default=("off", "on"), help="default: both")
    add("--ratio", type=float, help="share of the patches that is hidden (default: the preset's)")
    add("--strd", choices=("off", "on"), help="redundancy dropout (default: the preset's)")
    add("--batch", type=int, default=8, help="clips per step (default: 8)")
    add("--rounds", type=int, default=10, help="timed steps of each form (default: 10)")
    add("--device", choices=("cpu", "cuda"), default="cuda")
    add("--threads", type=int, default=2, help="CPU threads of torch in each process (default: 2)")
    add("--json", metavar="FILE", type=Path, help="write the figures there as well")
    options = parser.parse_args()
    refuse_impossible(parser, options, ("batch", "rounds", "threads"))
    refuse_missing_folder(parser, "--json", options.json)
    return options


def measure(options: argparse.Namespace) -> list[dict[str, Any]]:
    """A row for every form: its figures, or under ``reason`` why there are none."""
    forms: list[Form] = list(
        itertools.product(options.geometry, options.mixer, options.dtype, [way == "on" for way in options.compile])
    )
    with ThreadPoolExecutor(len(forms)) as pool:
        workers = dict(zip(forms, pool.map(lambda form: begun(form, options), forms), strict=True))
    rounds: dict[Form, list[tuple[float, float, float]]] = {form: [] for form, worker in workers.items() if worker}
    for _ in range(options.rounds):
        for form in rounds:
            rounds[form].append(workers[form].ask("round"))
    return [row(form, workers[form], rounds.get(form, []), options) for form in forms]


def begun(form: Form, options: argparse.Namespace) -> Worker | None:
    """The process of a form, warm; None if it ended on the way there."""
    geometry, mixer, dtype, compiled = form
    chosen = {"geometry": geometry, "mixer": mixer, "dtype": dtype, "compile": compiled, "model": "mae"}
    built = setting(argparse.Namespace(**{**vars(options), **chosen}))
    if options.strd:
        built = replace(built, strd=replace(built.strd, enabled=options.strd == "on"))
    worker = Worker(Step, built)
    try:
        for _ in range(WARM_UP):
            worker.ask("round")
    except RuntimeError:
        worker.close()
        return None
    return worker


def row(
    form: Form, worker: Worker | None, rounds: list[tuple[float, ...]], options: argparse.Namespace
) -> dict[str, Any]:
    """The figures of one form, after its rounds; its process ends."""
    found: dict[str, Any] = dict(zip(("geometry", "mixer", "dtype", "compiled"), form, strict=True))
    if worker is None:
        return {**found, "reason": "its process ended; what it said is above"}
    figures = worker.ask("figures")
    worker.close()
    parts_s = [statistics.median(part) for part in zip(*rounds, strict=True)]
    step_s = statistics.median(map(sum, rounds))
    return {
        **found, **dict(zip(("forward_s", "backward_s", "optimizer_s"), parts_s, strict=True)), "step_s": step_s,
        "clips_per_s": options.batch / step_s, "peak_mib": figures["peak_mib"],
        "matmul_share": options.batch * figures["train_flops_per_clip"] / step_s / figures["matmul_flops_per_s"],
        "copy_share": figures["moved_bytes"] / step_s / figures["copy_bytes_per_s"],
        **{name: figures[name] for name in ("train_flops_per_clip", "matmul_flops_per_s", "copy_bytes_per_s")},
        "device_name": figures["device_name"],
    }  # fmt: skip


def lines(options: argparse.Namespace, rows: list[dict[str, Any]]) -> Iterator[str]:
    """The table."""
    name = next((row["device_name"] for row in rows if "device_name" in row), options.device)
    yield f"{options.preset}, {options.batch} clips a step, on {name}, torch {torch.__version__}"
    yield ""
    heads = ("clips/s", "forward", "backward", "AdamW", "MiB", "matmul", "copy")
    yield f"{'form':<34}" + "".join(f"{head:>10}" for head in heads)
    for row in rows:
        form = f"{row['geometry']} {row['mixer']} {row['dtype']}{' compiled' if row['compiled'] else ''}"
        if "reason" in row:
            yield f"{form:<34}  {row['reason']}"
            continue
        parts_ms = "".join(f"{1e3 * row[f'{part}_s']:>8.1f}ms" for part in ("forward", "backward", "optimizer"))
        shares = "".join(f"{row[share]:>10.1%}" for share in ("matmul_share", "copy_share"))
        yield f"{form:<34}{row['clips_per_s']:>10.1f}{parts_ms}{row['peak_mib']:>10,.0f}{shares}"


if __name__ == "__main__":
    sys.exit(main())
