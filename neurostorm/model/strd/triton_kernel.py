"""Redundancy-dropout attention on a GPU: nothing of N x N ever leaves the processor (Triton; float32 and bfloat16).

    program (window, head): 16 or 32 queries i at a time against all its keys j, N <= 256; tiles are keys x queries
    forward    k q^T -> softmax A -> its largest and its sum over the neighbours, from coordinates -> gain g of a query
               keep = Philox(seed, element) >= g A -> (A keep)^T v;  kept: log of each softmax's sum, and g
    backward   k q^T -> A -> the same keep -> dv += (A keep) do -> ds = A keep (v do^T), less its mean -> dq, dk += ds q

In plain torch the scores, the draw and a dozen operations between them are tensors of windows x heads x N x N, and
their way to memory and back takes most of a block's time. Here the draw is a function of the seed and of the element's
place, so that the backward pass makes it again; the seed is a tensor on the device, for which no host waits. Both
passes get g A by the same operations, so that they agree on every element. No sum depends on the order in which
programs run: the same seed gives the same bits. The formulas are those of `strd.py`, with scores in float32 throughout,
and 0 for what a window without any key attends to.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

_QUERIES = {torch.float32: 16, torch.bfloat16: 32}  # at a time: what registers and shared memory hold
_SMALLEST = 16  # extent of a matrix product
_EPSILON = tl.constexpr(1e-8)  # as in strd.py
_LOWEST = tl.constexpr(-3.0e38)  # score of what is no key
_LOG2_E = tl.constexpr(1.4426950408889634)


class Kept(NamedTuple):
    """What the backward pass needs besides the inputs, both float32 (windows, heads, N)."""

    level: Tensor  # of each query, log2 of the sum of its exponentials
    gain: Tensor  # g of ``strd.drop_gain``


def forward(
    q: Tensor, k: Tensor, v: Tensor, cells: Tensor, reach: tuple[int, int], present: Tensor | None, seed: Tensor
) -> tuple[Tensor, Tensor, Kept]:
    """(output, number of dropped elements, what to keep) of redundancy attention without a rate.

    Args:
        q, k, v: (windows, heads, N, d) of one dtype, windows batch x the bucket's, batch slowest.
        cells: int16 (W, N, 4), coordinates of the bucket's slots.
        reach: of the neighbourhoods, in patches and in frames.
        present: bool (W, N) or None.
        seed: int64 (1,), decides the draw.
    """
    q, k, v = _alike(q, k, v)
    windows, heads, tokens, _ = q.shape
    out = torch.empty_like(q)
    kept = Kept(*torch.empty(2, windows, heads, tokens, dtype=torch.float32, device=q.device))
    dropped = torch.empty(windows * heads, dtype=torch.int32, device=q.device)
    _forward[(windows * heads,)](
        q, k, v, cells.contiguous(), *_presence(present, cells), seed, out, *kept, dropped, len(cells), *reach,
        *_shape(q), *q.stride()[:3], *out.stride()[:3], **_launch(q),
    )  # fmt: skip
    return out, dropped.sum(), kept


def backward(
    q: Tensor, k: Tensor, v: Tensor, present: Tensor | None, seed: Tensor, kept: Kept, grad: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v; the arguments as the forward pass had and kept them."""
    q, k, v = _alike(q, k, v)
    dq, dk, dv = torch.empty_like(q), torch.empty_like(q), torch.empty_like(q)
    if grad.stride() != dq.stride():
        grad = torch.empty_like(dq).copy_(grad)
    places = 1 if present is None else len(present)
    _backward[(q.shape[0] * q.shape[1],)](
        q, k, v, *_presence(present, q), seed, *kept, grad, dq, dk, dv, places, *_shape(q), *q.stride()[:3],
        *dq.stride()[:3], **_launch(q),
    )  # fmt: skip
    return dq, dk, dv


def _alike(*tensors: Tensor) -> list[Tensor]:
    """The tensors with the same strides, the last of them 1: as they are where they are parts of one projection."""
    if len({tensor.stride() for tensor in tensors}) == 1 and tensors[0].stride(-1) == 1:
        return list(tensors)
    return [tensor.contiguous() for tensor in tensors]


def _presence(present: Tensor | None, other: Tensor) -> tuple[Tensor, bool]:
    """Bytes to read, and whether to read them."""
    return (other, False) if present is None else (present.contiguous().view(torch.uint8), True)


def _shape(q: Tensor) -> tuple[int, int, int, float]:
    _, heads, tokens, width = q.shape
    return heads, tokens, width, width**-0.5


def _launch(q: Tensor) -> dict[str, int]:
    keys, width = (max(_SMALLEST, triton.next_power_of_2(size)) for size in q.shape[2:])
    queries, warps = min(_QUERIES[q.dtype], keys), max(1, keys // 32)
    return {"KEYS": keys, "WIDTH": width, "QUERIES": queries, "num_warps": warps, "num_stages": 1}


@triton.jit
def _exponential(scores, factor, level, key):  # type: ignore[no-untyped-def]
    """exp2(scores * factor - level), rounded as one operation; 0 for what is no key."""
    return tl.where(key[:, None], tl.exp2(tl.fma(scores, factor, -level[None, :])), 0.0)


@triton.jit
def _keep(seed, program, first, chance, KEYS: tl.constexpr, QUERIES: tl.constexpr):  # type: ignore[no-untyped-def]
    """The draw for all keys of the queries from ``first``, four queries to a counter."""
    four = first // 4 + tl.arange(0, QUERIES // 4)
    counter = (program * KEYS + tl.arange(0, KEYS)[:, None]) * (KEYS // 4) + four[None, :]
    a, b, c, d = tl.rand4x(seed, counter)
    return tl.reshape(tl.join(tl.join(a, b), tl.join(c, d)), (KEYS, QUERIES)) >= chance


@triton.jit
def _distance(cells, one, other, one_there, other_there, axis: tl.constexpr):  # type: ignore[no-untyped-def]
    a = tl.load(cells + one * 4 + axis, mask=one_there, other=0).to(tl.int32)
    b = tl.load(cells + other * 4 + axis, mask=other_there, other=0).to(tl.int32)
    return tl.abs(a[:, None] - b[None, :])


@triton.jit
def _over(near, weights):  # type: ignore[no-untyped-def]
    """The largest weight of each query to its neighbours, the sum of them, and whether it has any."""
    local = tl.where(near, weights, 0.0)
    return tl.max(local, 0), tl.sum(local, 0), tl.max(near.to(tl.int32), 0) != 0


@triton.jit(do_not_specialize=["places"])
def _forward(  # type: ignore[no-untyped-def]
    q, k, v, cells, present, HAS_ABSENT: tl.constexpr, seed, out, level, gain, dropped, places, patches, frames, heads,
    tokens, width, scale, from_window, from_head, from_row, to_window, to_head, to_row,
    KEYS: tl.constexpr, WIDTH: tl.constexpr, QUERIES: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0).to(tl.int64)
    window, head = program // heads, program % heads
    given, made = window * from_window + head * from_head, window * to_window + head * to_head
    own = window % places * tokens
    factor = scale * _LOG2_E
    j, c = tl.arange(0, KEYS), tl.arange(0, WIDTH)
    slot = j < tokens
    inside_keys = slot[:, None] & (c < width)[None, :]
    at = given + j[:, None] * from_row + c[None, :]
    keys = tl.load(k + at, mask=inside_keys, other=0.0)
    values = tl.load(v + at, mask=inside_keys, other=0.0)
    key = slot
    if HAS_ABSENT:
        key = slot & (tl.load(present + own + j, mask=slot, other=0) != 0)
    number = tl.load(seed)
    count = tl.zeros((QUERIES,), tl.int32)
    for first in range(0, tokens, QUERIES):
        i = first + tl.arange(0, QUERIES)
        there = i < tokens
        inside = there[:, None] & (c < width)[None, :]
        rows = tl.load(q + given + i[:, None] * from_row + c[None, :], mask=inside, other=0.0)
        scores = tl.where(key[:, None], tl.dot(keys, tl.trans(rows), input_precision="ieee"), _LOWEST)
        top = tl.max(scores, 0) * factor
        total = tl.sum(_exponential(scores, factor, top, key), 0)
        top += tl.log2(tl.where(total == 0.0, 1.0, total))  # no key at all
        weights = _exponential(scores, factor, top, key)

        query = there
        if HAS_ABSENT:
            query = there & (tl.load(present + own + i, mask=there, other=0) != 0)
        far = _distance(cells, own + j, own + i, slot, there, 0)
        far = tl.maximum(far, _distance(cells, own + j, own + i, slot, there, 1))
        far = tl.maximum(far, _distance(cells, own + j, own + i, slot, there, 2))
        late = _distance(cells, own + j, own + i, slot, there, 3)
        pairs = key[:, None] & query[None, :]
        in_space = pairs & (late == 0) & (far > 0) & (far <= patches)
        in_time = pairs & (far == 0) & (late > 0) & (late <= frames)
        f_space, sum_space, any_space = _over(in_space, weights)
        f_time, sum_time, any_time = _over(in_time, weights)
        by_space = tl.where(any_space, f_time / (sum_space + _EPSILON), 0.0)
        by_time = tl.where(any_time, f_space / (sum_time + _EPSILON), 0.0)
        g = 0.5 * (by_space + by_time)
        keep = _keep(number, program, first, weights * g[None, :], KEYS, QUERIES)

        kept = weights * keep.to(tl.float32)
        mixed = tl.dot(tl.trans(kept.to(values.dtype)), values, input_precision="ieee")
        tl.store(out + made + i[:, None] * to_row + c[None, :], mixed.to(values.dtype), mask=inside)
        tl.store(level + program * tokens + i, top, mask=there)
        tl.store(gain + program * tokens + i, g, mask=there)
        count += tl.sum(tl.where(keep, 0, (slot[:, None] & there[None, :]).to(tl.int32)), 0)
    tl.store(dropped + program, tl.sum(count, 0))


@triton.jit(do_not_specialize=["places"])
def _backward(  # type: ignore[no-untyped-def]
    q, k, v, present, HAS_ABSENT: tl.constexpr, seed, level, gain, grad, dq, dk, dv, places, heads, tokens, width,
    scale, from_window, from_head, from_row, to_window, to_head, to_row,
    KEYS: tl.constexpr, WIDTH: tl.constexpr, QUERIES: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0).to(tl.int64)
    window, head = program // heads, program % heads
    given, made = window * from_window + head * from_head, window * to_window + head * to_head
    factor = scale * _LOG2_E
    j, c = tl.arange(0, KEYS), tl.arange(0, WIDTH)
    key = j < tokens
    inside_keys = key[:, None] & (c < width)[None, :]
    at = given + j[:, None] * from_row + c[None, :]
    keys = tl.load(k + at, mask=inside_keys, other=0.0)
    values = tl.load(v + at, mask=inside_keys, other=0.0)
    if HAS_ABSENT:
        key = key & (tl.load(present + window % places * tokens + j, mask=key, other=0) != 0)
    number = tl.load(seed)
    to_keys = tl.zeros((KEYS, WIDTH), tl.float32)
    to_values = tl.zeros((KEYS, WIDTH), tl.float32)
    for first in range(0, tokens, QUERIES):
        i = first + tl.arange(0, QUERIES)
        there = i < tokens
        inside = there[:, None] & (c < width)[None, :]
        rows = tl.load(q + given + i[:, None] * from_row + c[None, :], mask=inside, other=0.0)
        slope = tl.load(grad + made + i[:, None] * to_row + c[None, :], mask=inside, other=0.0)
        top = tl.load(level + program * tokens + i, mask=there, other=0.0)
        g = tl.load(gain + program * tokens + i, mask=there, other=0.0)
        scores = tl.where(key[:, None], tl.dot(keys, tl.trans(rows), input_precision="ieee"), _LOWEST)
        weights = _exponential(scores, factor, top, key)
        keep = _keep(number, program, first, weights * g[None, :], KEYS, QUERIES)

        kept = weights * keep.to(tl.float32)
        to_values += tl.dot(kept.to(values.dtype), slope, input_precision="ieee")
        weighted = tl.dot(values, tl.trans(slope), input_precision="ieee") * kept
        by_score = ((weighted - weights * tl.sum(weighted, 0)[None, :]) * scale).to(values.dtype)
        to_keys += tl.dot(by_score, rows, input_precision="ieee")
        to_rows = tl.dot(tl.trans(by_score), keys, input_precision="ieee")
        tl.store(dq + made + i[:, None] * to_row + c[None, :], to_rows.to(values.dtype), mask=inside)
    at = made + j[:, None] * to_row + c[None, :]
    tl.store(dk + at, to_keys.to(values.dtype), mask=inside_keys)
    tl.store(dv + at, to_values.to(values.dtype), mask=inside_keys)
