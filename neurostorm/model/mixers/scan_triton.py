"""The selective scan on a GPU: one pass for each window and 32 channels, states in registers (Triton, float32).

    forward    program (window, channels): token after token h = a h + (delta u) B, y = C h; h is kept before each chunk
    backward   last chunk first: its states once more from the one kept --> scratch; then token by token backwards

In plain torch every token is an operation of its own, and the launches cost more than the work. The arguments, what is
kept and the results are those of `scan.py`. Sums over channels come in parts, one of every 32 channels, and are added
up in a fixed order, so that a scan gives the same bits every time. Triton comes with the CUDA builds of torch.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

CHANNELS = 32  # of a program: one warp, sixteen states of one channel to a thread
_LOG2_E = tl.constexpr(math.log2(math.e))


def forward(u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, states: Tensor | None, chunk: int) -> Tensor:
    """y (L, W, D); the arguments are those of ``scan.scan_forward``."""
    u, delta, A, B, C = (tensor.contiguous() for tensor in (u, delta, A, B, C))
    tokens, windows, width = u.shape
    y = torch.empty_like(u)
    _forward[windows, triton.cdiv(width, CHANNELS)](
        u, delta, A, B, C, u if states is None else states, y, tokens, windows, width, chunk, A.shape[1], CHANNELS,
        states is not None, num_warps=1,
    )  # fmt: skip
    return y


def backward(
    u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, states: Tensor, dy: Tensor, chunk: int
) -> tuple[Tensor, list[Tensor]]:
    """y again, and the gradients of the five inputs; ``states`` (chunks, W, N, D) as the forward pass filled them."""
    u, delta, A, B, C, states, dy = (tensor.contiguous() for tensor in (u, delta, A, B, C, states, dy))
    tokens, windows, width = u.shape
    parts, count = triton.cdiv(width, CHANNELS), A.shape[1]
    y, du, ddelta = torch.empty_like(u), torch.empty_like(u), torch.empty_like(u)
    dA = A.new_empty(windows, width, count)
    dB, dC = B.new_empty(parts, *B.shape), C.new_empty(parts, *C.shape)
    scratch = u.new_empty(windows, parts, chunk, count, CHANNELS)
    _backward[windows, parts](
        u, delta, A, B, C, states, dy, y, du, ddelta, dA, dB, dC, scratch, tokens, windows, width, chunk, count,
        CHANNELS, num_warps=1,
    )  # fmt: skip
    return y, [du, ddelta, dA.sum(0), dB.sum(0), dC.sum(0)]


@triton.jit
def _forward(  # type: ignore[no-untyped-def]
    u, delta, A, B, C, states, y, tokens, windows, width, chunk,
    STATES: tl.constexpr, CHANNELS: tl.constexpr, KEPT: tl.constexpr,
):  # fmt: skip
    window = tl.program_id(0).to(tl.int64)
    d = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    n = tl.arange(0, STATES)
    there = d < width
    both = there[None, :] & (n[:, None] >= 0)
    log2_a = tl.load(A + d[None, :] * STATES + n[:, None], mask=both, other=0.0) * _LOG2_E
    h = tl.zeros((STATES, CHANNELS), tl.float32)
    for token in range(tokens):
        if KEPT:  # noqa: SIM102  # known when this is compiled, the other is not
            if token % chunk == 0:
                at = (token // chunk * windows + window) * STATES
                tl.store(states + (at + n[:, None]) * width + d[None, :], h, mask=both)
        row = token * windows + window
        step = tl.load(delta + row * width + d, mask=there, other=0.0)
        x = tl.load(u + row * width + d, mask=there, other=0.0)
        b = tl.load(B + row * STATES + n)
        c = tl.load(C + row * STATES + n)
        h = tl.exp2(step[None, :] * log2_a) * h + (step * x)[None, :] * b[:, None]
        tl.store(y + row * width + d, tl.sum(h * c[:, None], 0), mask=there)


@triton.jit
def _backward(  # type: ignore[no-untyped-def]
    u, delta, A, B, C, states, dy, y, du, ddelta, dA, dB, dC, scratch, tokens, windows, width, chunk,
    STATES: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    window = tl.program_id(0).to(tl.int64)
    part = tl.program_id(1).to(tl.int64)
    lane = tl.arange(0, CHANNELS)
    d = part * CHANNELS + lane
    n = tl.arange(0, STATES)
    there = d < width
    both = there[None, :] & (n[:, None] >= 0)
    a_of = tl.load(A + d[None, :] * STATES + n[:, None], mask=both, other=0.0)
    log2_a = a_of * _LOG2_E
    own = scratch + (window * tl.num_programs(1) + part) * chunk * STATES * CHANNELS
    place = n[:, None] * CHANNELS + lane[None, :]
    partial = part * tokens * windows * STATES
    g = tl.zeros((STATES, CHANNELS), tl.float32)  # a_{t+1} g_{t+1} of the token behind
    sum_a = tl.zeros((STATES, CHANNELS), tl.float32)
    chunks = tl.cdiv(tokens, chunk)
    for back in range(chunks):
        first = (chunks - 1 - back) * chunk
        length = tl.minimum(chunk, tokens - first)
        at = ((chunks - 1 - back) * windows + window) * STATES
        h = tl.load(states + (at + n[:, None]) * width + d[None, :], mask=both, other=0.0)
        for k in range(length):
            tl.store(own + k * STATES * CHANNELS + place, h)
            row = (first + k) * windows + window
            step = tl.load(delta + row * width + d, mask=there, other=0.0)
            x = tl.load(u + row * width + d, mask=there, other=0.0)
            b = tl.load(B + row * STATES + n)
            h = tl.exp2(step[None, :] * log2_a) * h + (step * x)[None, :] * b[:, None]
        tl.debug_barrier()  # what the warp wrote is read below
        for i in range(length):
            k = length - 1 - i
            row = (first + k) * windows + window
            before = tl.load(own + k * STATES * CHANNELS + place)
            step = tl.load(delta + row * width + d, mask=there, other=0.0)
            x = tl.load(u + row * width + d, mask=there, other=0.0)
            out = tl.load(dy + row * width + d, mask=there, other=0.0)
            b = tl.load(B + row * STATES + n)
            c = tl.load(C + row * STATES + n)
            a = tl.exp2(step[None, :] * log2_a)
            h = a * before + (step * x)[None, :] * b[:, None]
            tl.store(y + row * width + d, tl.sum(h * c[:, None], 0), mask=there)
            tl.store(dC + partial + row * STATES + n, tl.sum(h * out[None, :], 1))
            g += out[None, :] * c[:, None]
            tl.store(dB + partial + row * STATES + n, tl.sum(g * (step * x)[None, :], 1))
            dstep = tl.sum(g * b[:, None], 0)  # of the product delta u
            g *= a
            before *= g  # the gradient of delta A
            sum_a += before * step[None, :]
            tl.store(du + row * width + d, dstep * step, mask=there)
            tl.store(ddelta + row * width + d, dstep * x + tl.sum(before * a_of, 0), mask=there)
        tl.debug_barrier()  # the next chunk writes over it
    tl.store(dA + (window * width + d[None, :]) * STATES + n[:, None], sum_a, mask=both)
