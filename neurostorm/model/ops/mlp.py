"""The MLP of a block: each token widened, bent and narrowed again, linear2(gelu(linear1(x))).

On a CPU it runs over blocks of rows whose hidden layer stays in the cache, and the backward pass makes that layer
again: writing it to memory and reading it back takes longer than computing it twice, and it is most of what a network
would keep between forward and backward. On a GPU the two linear layers are called as they are.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.functional import gelu

from neurostorm.model.ops.dispatch import product_dtype

_CACHED_VALUES = 2**20  # of the hidden layer, per block of rows


class Mlp(nn.Module):
    """(..., C) -> (..., C) through ``hidden`` channels and the exact GELU."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.linear1 = nn.Linear(width, hidden)
        self.linear2 = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        if x.device.type != "cpu":
            return self.linear2(gelu(self.linear1(x)))
        weights = self.linear1.weight, self.linear1.bias, self.linear2.weight, self.linear2.bias
        dtype = product_dtype(x)
        rows = x.reshape(-1, x.shape[-1]).to(dtype)
        return _RowBlocks.apply(rows, *(weight.to(dtype) for weight in weights)).view(*x.shape[:-1], -1)


class _RowBlocks(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor) -> Tensor:
        ctx.save_for_backward(x, w1, b1, w2)
        out = x.new_empty(len(x), len(w2))
        for part in _parts(x, w1):
            out[part] = torch.addmm(b2, gelu(torch.addmm(b1, x[part], w1.mT)), w2.mT)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, w1, b1, w2 = ctx.saved_tensors
        want_x, *want_weights = ctx.needs_input_grad
        dx = torch.empty_like(x)
        # Sums over all rows, in float32 at least.
        wide = torch.promote_types(x.dtype, torch.float32)
        dw1, db1, dw2, db2 = (torch.zeros(t.shape, dtype=wide) for t in (w1, b1, w2, w2[:, 0]))
        for part in _parts(x, w1):
            hidden = torch.addmm(b1, x[part], w1.mT)
            if any(want_weights):
                dw2 += grad[part].mT @ gelu(hidden)
                db2 += grad[part].sum(0)
            dhidden = torch.ops.aten.gelu_backward(grad[part] @ w2, hidden)
            if any(want_weights):
                dw1 += dhidden.mT @ x[part]
                db1 += dhidden.sum(0)
            if want_x:
                torch.mm(dhidden, w1, out=dx[part])
        found = [
            d.to(x.dtype) if wanted else None for d, wanted in zip((dw1, db1, dw2, db2), want_weights, strict=True)
        ]
        return dx if want_x else None, *found


def _parts(x: Tensor, w1: Tensor) -> Iterator[slice]:
    rows = max(1, _CACHED_VALUES // len(w1))
    return (slice(start, start + rows) for start in range(0, len(x), rows))
