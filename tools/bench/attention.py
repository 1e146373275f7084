#!/usr/bin/env python3
"""Which attention is fastest in windows on a device: torch's choice, each of its kernels, FlexAttention, ragged.

attention.py                               the first two stages of a masked clip of the `paper` model, CPU, fp32
attention.py --device cuda --dtype bf16    where the choice matters
attention.py --shapes 120x256x3x12 --json FILE     windows x tokens x heads x channels of a head

    q, k, v (W, h, N, d), a key mask of windows that are full to three quarters on average --> forward + backward

Every side does the same work: each token attends to the tokens of its window that exist. `auto` is what the model
calls, `scaled_dot_product_attention` with the key mask; `flash`, `efficient`, `cudnn` and `math` are its kernels one by
one (`math` writes the scores); `flex` is FlexAttention over all windows in one sequence, compiled; `ragged` is
`varlen_attn` over tokens without padding. A side that a device or dtype does not have says why. Medians in turns.
"""

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # spinning threads make times meaningless on a shared machine

import torch
from step import refuse_impossible, refuse_missing_folder
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

Shape = tuple[int, int, int, int]
KERNELS = {
    "flash": SDPBackend.FLASH_ATTENTION, "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION, "math": SDPBackend.MATH,
}  # fmt: skip
SIDES = ("auto", *KERNELS, "flex", "ragged")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
SHAPES: tuple[Shape, ...] = ((90, 256, 3, 12), (14, 256, 6, 12), (90, 256, 2, 16), (90, 256, 1, 32))


def main() -> int:
    """Measure, print, write."""
    options = parse()
    torch.set_num_threads(options.threads)
    results = []
    for shape in options.shapes:
        results.append({"shape": shape, "sides": measure(shape, options)})
        print(f"{' x '.join(map(str, shape))}, {options.dtype} on {options.device}")
        for side, found in results[-1]["sides"].items():
            print(f"  {side:<10}" + (found["reason"] if "reason" in found else f"{found['ms']:9.2f} ms"))
    if options.json:
        settings = {name: getattr(options, name) for name in ("device", "dtype", "rounds", "threads")}
        options.json.write_text(
            json.dumps({**settings, "torch": torch.__version__, "shapes": results}, indent=2) + "\n"
        )
    return 0


def parse() -> argparse.Namespace:
    """The command line; exits with status 2 and the reason when it makes no sense."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    add = parser.add_argument
    add("--shapes", nargs="+", type=shape_of, default=SHAPES, help="windows x tokens x heads x channels of a head")
    add("--device", choices=("cpu", "cuda"), default="cpu")
    add("--dtype", choices=DTYPES, default="fp32")
    add("--rounds", type=int, default=5, help="timed rounds after one to warm up (default: 5)")
    add("--threads", type=int, default=os.cpu_count(), help="CPU threads of torch (default: the cores)")
    add("--json", metavar="FILE", type=Path, help="write the figures there as well")
    options = parser.parse_args()
    options.ratio = None
    refuse_impossible(parser, options, ("rounds", "threads"))
    refuse_missing_folder(parser, "--json", options.json)
    return options


def shape_of(text: str) -> Shape:
    """ "90x256x3x12" -> (90, 256, 3, 12)."""
    parts = tuple(int(part) for part in text.split("x"))
    if len(parts) != 4 or min(parts) < 1:
        raise argparse.ArgumentTypeError(f"{text}: windows x tokens x heads x channels, such as 90x256x3x12")
    return parts  # type: ignore[return-value]


def measure(shape: Shape, options: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """Median milliseconds, forward + backward, of each side that works here; of the others why they do not."""
    windows, tokens, heads, channels = shape
    generator = torch.Generator().manual_seed(0)
    qkv = torch.randn(3, windows, heads, tokens, channels, generator=generator).to(
        options.device, DTYPES[options.dtype]
    )
    size = torch.randint(tokens // 2, tokens + 1, (windows,), generator=generator).to(options.device)
    present = torch.arange(tokens, device=options.device) < size[:, None]
    leaf = qkv.requires_grad_()
    expected = scaled_dot_product_attention(*leaf.detach().float(), present[:, None, None])
    ways: dict[str, Callable[[], Tensor]] = {}
    found: dict[str, dict[str, Any]] = {}
    for side in SIDES:
        try:
            ways[side] = way_of(side, leaf, present)
            error = (ways[side]().float() - expected).masked_fill(~present[:, None, :, None], 0.0).abs().max()
            if not error < 0.05:
                raise RuntimeError(f"differs from the others by {error:.2g}")
            timed(ways[side], leaf)
        except (RuntimeError, ImportError, ValueError, AssertionError) as error:  # in as many ways do kernels decline
            ways.pop(side, None)
            found[side] = {"reason": (str(error).splitlines() or [type(error).__name__])[0][:90]}
    rounds = [{side: timed(way, leaf) for side, way in ways.items()} for _ in range(options.rounds)]
    for side in ways:
        found[side] = {"ms": 1e3 * statistics.median(times[side] for times in rounds)}
    return {side: found[side] for side in SIDES}


def way_of(side: str, qkv: Tensor, present: Tensor) -> Callable[[], Tensor]:
    """What computes (W, h, N, d) of ``qkv`` (3, W, h, N, d); absent slots get anything."""
    keys = present[:, None, None]
    if side == "flex":
        return flex(qkv, present)
    if side == "ragged":
        return ragged(qkv, present)
    if side == "auto":
        return lambda: scaled_dot_product_attention(*qkv, keys)

    def forced() -> Tensor:
        with sdpa_kernel(KERNELS[side]):
            return scaled_dot_product_attention(*qkv, keys)

    return forced


def flex(qkv: Tensor, present: Tensor) -> Callable[[], Tensor]:
    """All windows as one sequence, of which only blocks of the same window are visited."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    if qkv.device.type == "cpu":
        raise RuntimeError("no backward pass on a CPU")
    windows, tokens = present.shape
    exists = present.flatten()

    def same_window(_b: Tensor, _h: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (query // tokens == key // tokens) & exists[key]

    length = windows * tokens
    # Compiled, as otherwise it writes out the whole mask, of all windows with all others.
    mask = torch.compile(create_block_mask)(same_window, None, None, length, length, device=str(qkv.device))
    call = torch.compile(flex_attention)

    def whole() -> Tensor:
        q, k, v = (part.transpose(0, 1).flatten(1, 2)[None] for part in qkv)
        return call(q, k, v, block_mask=mask)[0].unflatten(1, (windows, tokens)).transpose(0, 1)

    return whole


def ragged(qkv: Tensor, present: Tensor) -> Callable[[], Tensor]:
    """The tokens that exist, window after window, without padding."""
    from torch.nn.attention.varlen import varlen_attn

    size = present.sum(1, dtype=torch.int32)
    ends = torch.nn.functional.pad(size.cumsum(0, dtype=torch.int32), (1, 0))
    longest = int(size.max())

    def whole() -> Tensor:
        q, k, v = (part.transpose(1, 2)[present] for part in qkv)  # (tokens, h, d)
        mixed = varlen_attn(q, k, v, ends, ends, longest, longest)
        return torch.zeros_like(qkv[0]).transpose(1, 2).masked_scatter(present[..., None, None], mixed).transpose(1, 2)

    return whole


def timed(way: Callable[[], Tensor], leaf: Tensor) -> float:
    """Seconds of one forward and backward pass."""
    leaf.grad = None
    wait(leaf)
    begin_s = time.perf_counter()
    out = way()
    out.backward(torch.ones_like(out))
    wait(leaf)
    return time.perf_counter() - begin_s


def wait(of: Tensor) -> None:
    """For a GPU to have done what it was asked for."""
    if of.is_cuda:
        torch.cuda.synchronize()


if __name__ == "__main__":
    sys.exit(main())
