#!/usr/bin/env python3
"""Time and memory of the Mamba mixer, forward and backward, beside the plain loop over tokens that autograd records.

scan.py                                     the four stages of one 96^3 x 20 clip of the `paper` model
scan.py --json FILE --rounds 9 --threads 1  the same, and FILE with all numbers
scan.py --shapes 4x32x36 2x16x72            other shapes: windows x tokens x channels; the first one counts

Both sides are the same module with the same parameters and the same projections; they differ in the scan. The loop
forms exp(delta A) and delta B u for all tokens and lets autograd keep every state, as a scan is first written down.

Time: both sides in turn in this process, median over the rounds after one that is not counted. Memory: each side once
in a fresh process of its own, the peak of its resident memory (VmHWM of /proc/self/status) over what was resident with
the module, its input and the libraries in place. So outputs, gradients and the allocator's slack count, weights do not.
"""

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # spinning threads make times meaningless on a shared machine

import torch
from einops import rearrange
from torch import Tensor
from torch.nn.functional import linear

from neurostorm.model.mixers.mamba import Mamba, MambaWeights, gate, mix_windows, project

Shape = tuple[int, int, int]  # windows, tokens, channels
Side = Callable[[Tensor, MambaWeights], Tensor]

# 16 x 16 x 16 x 20 patches in windows of 4^4, merged three times; the last stage's window is 2 x 2 x 2 x 4.
PAPER_SHAPES: tuple[Shape, ...] = ((320, 256, 36), (40, 256, 72), (5, 256, 144), (5, 32, 288))


def main(argv: Sequence[str] | None = None) -> int:
    options = parse(argv)
    torch.set_num_threads(options.threads)
    print(f"Mamba mixer, forward + backward, float32, {options.threads} threads, torch {torch.__version__}")
    print(f"{'windows x tokens x C':>22} {'mixer s':>9} {'loop s':>9} {'faster':>8} {'mixer MiB':>10} {'loop MiB':>9}")
    rows = []
    for shape in options.shapes:
        rows.append(measure(shape, options.rounds, options.threads))
        row = rows[-1]
        print(
            f"{' x '.join(map(str, shape)):>22} {row['mixer_s']:9.3f} {row['loop_s']:9.3f} {row['speedup']:7.2f}x"
            f" {row['mixer_mib']:10.0f} {row['loop_mib']:9.0f}",
            flush=True,
        )
    first = rows[0]
    result = {
        "shapes": rows,
        "speedup_vs_loop": first["speedup"],
        "memory_vs_loop": first["memory_ratio"],
        "rounds": options.rounds,
        "machine": {"cores": os.cpu_count(), "threads": options.threads, "torch": torch.__version__},
    }
    print(
        f"\nfirst shape: {first['speedup']:.2f} times faster than the loop in {first['memory_ratio']:.3f} of its memory"
    )
    if options.json:
        options.json.write_text(json.dumps(result, indent=1) + "\n")
        print(f"wrote {options.json}")
    return 0


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all numbers there")
    parser.add_argument("--rounds", type=positive, default=5, metavar="R", help="timed rounds per side (5)")
    parser.add_argument(
        "--threads", type=positive, default=torch.get_num_threads(), metavar="T", help="torch's threads"
    )
    parser.add_argument(
        "--shapes", type=shape_of, nargs="+", default=PAPER_SHAPES, metavar="WxNxC", help="windows x tokens x channels"
    )
    return parser.parse_args(argv)


def positive(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r}: a number of at least 1")
    return int(text)


def shape_of(text: str) -> Shape:
    parts = text.split("x")
    if len(parts) != 3 or not all(part.isdigit() and int(part) > 0 for part in parts):
        raise argparse.ArgumentTypeError(f"{text!r}: windows, tokens and channels, as in 320x256x36")
    return int(parts[0]), int(parts[1]), int(parts[2])


def mix_by_loop(x: Tensor, weights: MambaWeights) -> Tensor:
    """The same mixer with the recurrence as a plain loop over tokens.

    Tokens are taken apart once: indexing them in the loop would make autograd fill a gradient of all tokens for each.
    """
    (u, delta, A, B, C), z = project(rearrange(x, "w n c -> n w c"), weights)
    decays = torch.exp(delta.unsqueeze(3) * A).unbind(0)  # N times (W, D, states)
    steps = ((delta * u).unsqueeze(3) * B.unsqueeze(2)).unbind(0)
    state, outputs = torch.zeros_like(steps[0]), []
    for decay, step, readout in zip(decays, steps, C.unbind(0), strict=True):
        state = decay * state + step
        outputs.append((state @ readout.unsqueeze(2)).squeeze(2))
    mixed = linear(gate(torch.stack(outputs), u, z, weights.D), weights.out_proj)
    return rearrange(mixed, "n w c -> w n c")


SIDES: dict[str, Side] = {"mixer": mix_windows, "loop": mix_by_loop}


def measure(shape: Shape, rounds: int, threads: int) -> dict[str, Any]:
    """Medians of seconds, peak MiB over base, and the mixer against the loop."""
    problem = problem_of(shape)
    seconds: dict[str, list[float]] = {name: [] for name in SIDES}
    for number in range(rounds + 1):
        for name, side in SIDES.items():
            elapsed_s = run(side, *problem)
            if number:
                seconds[name].append(elapsed_s)
    row: dict[str, Any] = {"windows": shape[0], "tokens": shape[1], "channels": shape[2]}
    row |= {f"{name}_s": statistics.median(values) for name, values in seconds.items()}
    row |= {f"{name}_mib": in_fresh_process(name, shape, threads) for name in SIDES}
    row["speedup"] = row["loop_s"] / row["mixer_s"]
    row["memory_ratio"] = row["mixer_mib"] / row["loop_mib"]
    return row


def problem_of(shape: Shape) -> tuple[Tensor, MambaWeights]:
    """Seeded input and freshly initialised weights, all wanting gradients."""
    torch.manual_seed(0)
    windows, tokens, channels = shape
    return torch.randn(windows, tokens, channels, requires_grad=True), Mamba(channels).weights()


def run(side: Side, x: Tensor, weights: MambaWeights) -> float:
    """Seconds of one forward and backward pass."""
    for tensor in (x, *weights):
        tensor.grad = None
    start = time.perf_counter()
    side(x, weights).square().sum().backward()
    return time.perf_counter() - start


def in_fresh_process(name: str, shape: Shape, threads: int) -> float:
    """Peak MiB of one side in a process started for it."""
    with ProcessPoolExecutor(1, get_context("spawn")) as pool:
        return pool.submit(peak_mib, name, shape, threads).result()


def peak_mib(name: str, shape: Shape, threads: int) -> float:
    """Peak resident MiB of one forward and backward pass over what was resident before it.

    RuntimeError for a shape so small that the allocator had room for all of it.
    """
    torch.set_num_threads(threads)
    run(SIDES[name], *problem_of((2, 4, 16)))  # the libraries load what they need
    problem = problem_of(shape)
    base = resident_kib("VmRSS")
    run(SIDES[name], *problem)
    peak = (resident_kib("VmHWM") - base) / 1024
    if peak <= 0:
        raise RuntimeError(f"{name}, {shape}: too small for its memory to be seen; take a larger shape")
    return peak


def resident_kib(field: str) -> int:
    """VmRSS (now) or VmHWM (the peak so far) of this process."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{field}:"))


if __name__ == "__main__":
    raise SystemExit(main())
