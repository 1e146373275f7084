#!/usr/bin/env python3
"""How fast a training step is, and what share of this machine it uses.

step.py --preset base --mixer mamba --geometry sparse --device cuda --dtype bf16     one step in detail
step.py --compare --json FILE         sparse steps beside dense ones; the attention encoder beside a baseline

    preset + options --> model, clips --> forward, backward, AdamW, timed in rounds --> medians
    cost.py: operations and bytes of the same step --> beside a matrix product and a copy, measured by the same process

Every model runs in a process of its own, so that peak memory is that of one model, torch included. With --compare the
processes take turns, round by round: whatever else the machine does hits all of them alike, and the ratios are medians
over rounds. Nothing is read from a store; the brain is the template's, on the preset's grid.
"""

import argparse
import json
import os
import statistics
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import sparse
import torch
from bench_models import DTYPES, Setting, Side, Step, Worker
from torch import Tensor

from neurostorm.commands.options import refuse_missing_folder
from neurostorm.config.presets import PRESETS
from neurostorm.model.config import SwinConfig
from neurostorm.model.masking.masks import MaskConfig
from neurostorm.model.strd.dropout import StrdConfig

TOLERANCE = 1e-4  # of the largest value; float32 rounding is about 1e-6
SIDES = ("baseline", "dense", "brain")
GEOMETRIES: dict[str, dict[str, Any]] = {
    "dense": {"tokens": "dense", "decoder": "paper"},
    "sparse": {"tokens": "brain", "decoder": "light", "layout": "clean"},
}
# How torch's CPU threads wait: asleep, as other processes use the cores too, but not before some 0.1 ms, which the next
# operation comes within. Falling asleep at once costs a model of many short operations a fifth of its speed.
WAITING = {"OMP_WAIT_POLICY": "PASSIVE", "GOMP_SPINCOUNT": "20000"}


def main(argv: Sequence[str] | None = None) -> int:
    """Exit status 0, or 1 with the reason on stderr."""
    options = parse(argv)
    os.environ.update({name: os.environ.get(name, value) for name, value in WAITING.items()})
    try:
        both = options.compare
        result = {**compare(options), **sparse.compare(options, setting)} if both else one_step(options)
    except RuntimeError as error:
        print(f"step: {error}", file=sys.stderr)
        return 1
    for line in [*sparse.lines(result), *compare_lines(result)] if options.compare else step_lines(result):
        print(line)
    if options.json:
        options.json.write_text(json.dumps(result, indent=2) + "\n")
    return 0


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line; exits with status 2 and the reason when it makes no sense."""
    parser = argparse.ArgumentParser(description="Time a training step, and say what share of the machine it uses.")
    add = parser.add_argument
    add("--preset", choices=PRESETS, default="paper", help="shape of model, clip and mask (default: paper)")
    add("--model", choices=("mae", "encoder"), default="mae", help="what is trained (default: mae)")
    add("--mixer", choices=("attention", "mamba"), help="what mixes a window's tokens (default: the preset's)")
    add(
        "--geometry",
        choices=("dense", "sparse"),
        help="dense: all patches through the paper's encoder and decoder; sparse: visible brain patches through the "
        "encoder, hidden ones through the light decoder; of --model encoder all brain patches (default: the preset's)",
    )
    add("--ratio", type=float, help="share of the patches that is hidden (default: the preset's)")
    add("--device", choices=("cpu", "cuda"), default="cpu")
    add("--dtype", choices=DTYPES, default="fp32", help="bf16 is autocast with float32 weights, as in training")
    add("--compile", action="store_true", help="torch.compile of every block, as train.compile does")
    add("--batch", type=int, default=1, help="clips per step (default: 1)")
    add("--rounds", type=int, default=5, help="timed steps after one to warm up (default: 5)")
    add("--threads", type=int, default=os.cpu_count(), help="CPU threads of torch (default: the cores)")
    add(
        "--compare",
        action="store_true",
        help="fp32 and one clip: a training step, sparse beside dense; and the encoder with attention, in the released "
        "layout, forward and backward: straightforward baseline, dense tokens, brain tokens (of the options above, "
        "--preset, --device, --rounds and --threads apply)",
    )
    add("--json", metavar="FILE", type=Path, help="write the figures there as well")
    options = parser.parse_args(argv)
    refuse_impossible(parser, options, ("batch", "rounds", "threads"))
    refuse_missing_folder(parser, "--json", options.json)
    return options


def refuse_impossible(parser: argparse.ArgumentParser, options: argparse.Namespace, counts: Sequence[str]) -> None:
    """End with the reason if a count is below 1, the ratio no share, or the device not there."""
    for name in counts:
        if getattr(options, name) < 1:
            parser.error(f"--{name} {getattr(options, name)}: at least 1")
    if options.ratio is not None and not 0 < options.ratio < 1:
        parser.error(f"--ratio {options.ratio}: above 0 and below 1")
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch finds no CUDA device here; use --device cpu")


def setting(options: argparse.Namespace) -> Setting:
    """The preset's model on the preset's grid, with the options' mixer, geometry and ratio."""
    # Here and not above: the processes that are measured import this file, and shall not load these libraries.
    from neurostorm.config import Config
    from neurostorm.ingest.resample.template import brain_mask
    from neurostorm.store import GRIDS

    preset = PRESETS[options.preset]
    chosen = {} if options.mixer is None else {"mixer": options.mixer}
    chosen |= {} if options.geometry is None else GEOMETRIES[options.geometry]
    hidden = {} if options.ratio is None else {"ratio": options.ratio}
    merged = {"model": {**preset.get("model", {}), **chosen}, "mask": {**preset.get("mask", {}), **hidden}}
    config = Config.model_validate({**preset, **merged})
    grid, model, mask = GRIDS[config.ingest.grid], config.model, config.mask
    shape = SwinConfig(
        img_size=(*grid.shape, config.data.clip_frames), patch_size=model.patch, embed_dim=model.embed_dim,
        depths=model.depths, heads=model.heads, window=model.window, first_window=model.first_window,
        full_last=model.full_last, drop_path=model.drop_path, mixer=model.mixer, layout=model.layout,
        tokens=model.tokens,
    )  # fmt: skip
    return Setting(
        shape=shape, brain=brain_mask(grid), mask=MaskConfig(mask.kind, mask.ratio, mask.window, mask.tube_frames),
        strd=StrdConfig(**config.strd.model_dump()), loss_on=model.loss_on, decoder=model.decoder, model=options.model,
        device=options.device, threads=options.threads, dtype=options.dtype, batch=options.batch,
        compiled=options.compile,
    )  # fmt: skip


def one_step(options: argparse.Namespace) -> dict[str, Any]:
    """Every figure of a training step: times, memory, operations, shares of the machine."""
    worker = Worker(Step, setting(options))
    try:
        rounds = [worker.ask("round") for _ in range(options.rounds + 1)][1:]
        figures = worker.ask("figures")
    finally:
        worker.close()
    forward_s, backward_s, optimizer_s = (statistics.median(part) for part in zip(*rounds, strict=True))
    step_s = statistics.median(sum(parts) for parts in rounds)
    flops_per_s = options.batch * figures["train_flops_per_clip"] / step_s
    bytes_per_s = figures["moved_bytes"] / step_s
    return {
        **{name: getattr(options, name) for name in ("preset", "model", "device", "dtype", "batch", "threads")},
        "compile": options.compile, "rounds": options.rounds, "torch": torch.__version__, **figures,
        "clips_per_s": options.batch / step_s,
        "step_s": step_s, "forward_s": forward_s, "backward_s": backward_s, "optimizer_s": optimizer_s,
        "flops_per_s": flops_per_s, "bytes_per_s": bytes_per_s,
        "matmul_share": flops_per_s / figures["matmul_flops_per_s"],
        "copy_share": bytes_per_s / figures["copy_bytes_per_s"],
    }  # fmt: skip


def compare(options: argparse.Namespace) -> dict[str, Any]:
    """Times of the three sides in turns, their ratios and peak memory.

    First our dense side is checked against the baseline; RuntimeError when the two do not compute the same.
    """
    both = setting(options)
    both = replace(both, shape=replace(both.shape, mixer="attention", layout="paper", tokens="dense"))
    workers = {side: Worker(Side, both, side) for side in SIDES}
    try:
        error = largest_difference(workers["baseline"].ask("outcome"), workers["dense"].ask("outcome"))
        for worker in workers.values():
            worker.ask("round")
        rounds = [{side: sum(workers[side].ask("round")) for side in SIDES} for _ in range(options.rounds)]
        peak_mib = {side: workers[side].ask("peak_mib") for side in SIDES}
        name = workers["dense"].ask("device_name")
    finally:
        for worker in workers.values():
            worker.close()
    return {
        "dense_vs_baseline": statistics.median(times["baseline"] / times["dense"] for times in rounds),
        "brain_vs_dense": statistics.median(times["dense"] / times["brain"] for times in rounds),
        "peak_mib": peak_mib["dense"],
        "peak_mib_of": peak_mib,
        "seconds": {side: statistics.median(times[side] for times in rounds) for side in SIDES},
        "largest_relative_difference": error,
        "preset": options.preset, "rounds": options.rounds, "device": options.device, "device_name": name,
        "threads": options.threads, "torch": torch.__version__,
    }  # fmt: skip


def largest_difference(expected: dict[str, Tensor], actual: dict[str, Tensor]) -> float:
    """Of features and gradients, each over its largest value. RuntimeError where it is more than rounding."""
    errors = {name: ((actual[name] - e).abs().max() / e.abs().max()).item() for name, e in expected.items()}
    if not max(errors.values()) <= TOLERANCE:
        raise RuntimeError(
            f"our dense encoder and the baseline differ by {errors}; more than {TOLERANCE} is no rounding"
        )
    return max(errors.values())


def step_lines(r: dict[str, Any]) -> Iterator[str]:
    """The table of one step."""
    forward = r["forward_flops_per_clip"]
    parts = ", ".join(f"{kind} {flops / 1e9:.2f}" for kind, flops in forward.items() if flops)
    network = f"{r['mixer']} mixer, {r['layout']} layout, {r['tokens']} tokens, {r['decoder']} decoder"
    yield f"{r['preset']}, {r['model']}, {network}, {r['dtype']}{', compiled' if r['compile'] else ''}"
    yield f"on {r['device_name']} ({r['device']}, {r['threads']} CPU threads), torch {r['torch']}"
    yield ""
    yield f"parameters    {r['parameters']:,}"
    yield f"tokens        {r['tokens_per_clip']:,} per clip, {r['batch']} clips per step"
    yield f"speed         {r['clips_per_s']:.3g} clips/s, {r['step_s']:.4g} s per step (median of {r['rounds']})"
    for name in ("forward", "backward", "optimizer"):
        seconds = r[f"{name}_s"]
        yield f"  {name:<11} {seconds:.4g} s, {seconds / r['step_s']:.0%}"
    yield f"peak memory   {r['peak_mib']:,.0f} MiB ({'CUDA allocator' if r['device'] == 'cuda' else 'whole process'})"
    yield f"operations    {r['train_flops_per_clip'] / 1e9:.1f} GF per clip forward and backward; forward: {parts}"
    yield (
        f"  achieved    {r['flops_per_s'] / 1e9:,.1f} GF/s, {r['matmul_share']:.1%} of a matrix product's "
        f"{r['matmul_flops_per_s'] / 1e9:,.1f}"
    )
    yield f"memory moved  {r['moved_bytes'] / 1e9:.2f} GB per step, estimated"
    yield (
        f"  achieved    {r['bytes_per_s'] / 1e9:,.1f} GB/s, {r['copy_share']:.1%} of a copy's "
        f"{r['copy_bytes_per_s'] / 1e9:,.1f}"
    )


def compare_lines(r: dict[str, Any]) -> Iterator[str]:
    """The table of the comparison."""
    yield f"{r['preset']}, attention encoder, paper layout, forward + backward of one clip, fp32"
    yield f"on {r['device_name']} ({r['device']}, {r['threads']} CPU threads), torch {r['torch']}"
    yield ""
    yield f"{'side':<10}{'seconds':>9}{'peak MiB':>10}"
    for side in SIDES:
        yield f"{side:<10}{r['seconds'][side]:>9.3f}{r['peak_mib_of'][side]:>10,.0f}"
    yield ""
    yield f"dense is {r['dense_vs_baseline']:.2f} times as fast as the baseline, brain tokens"
    yield f"{r['brain_vs_dense']:.2f} times as fast as dense (medians of {r['rounds']} rounds in turns)"
    yield f"dense and baseline agree to {r['largest_relative_difference']:.1e} of the largest feature and gradient"


if __name__ == "__main__":
    sys.exit(main())
