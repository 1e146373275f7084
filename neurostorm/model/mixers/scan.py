"""The selective scan of one block of windows: a recurrence over tokens, in chunks, without storing its states.

    a_t = exp(delta_t A)          (N, D) per window, in [0, 1]
    h_t = a_t h_{t-1} + (delta_t u_t) B_t
    y_t = C_t . h_t

    forward    chunk of K tokens -> a, (delta u) B in one operation each -> h, token by token -> y in one product
               keeps h before each chunk, nothing else
    backward   last chunk first: h of the chunk again from the state before it -> g_t = dL/dh_t, token by token,
               g_t = C_t dy_t + a_{t+1} g_{t+1} -> the gradients, one operation each per chunk

Tokens are the slowest axis, (L, W, ...): one token of all windows is contiguous. The states are (N, D), so that every
sum over n or d is a batched product with a contiguous matrix. Nothing is divided by a product of decays, which is what
overflows in scans that work with cumulative sums of logarithms: a decay of exp(-1e6) is simply 0.

Float32 is scanned by the same recurrence in one pass where it can be: on a CPU in C (``scan_kernel.py``; 16 states, a
compiler is found), which keeps no states at all, and on a GPU in Triton (``scan_triton.py``), which comes with torch
there. NEUROSTORM_SCAN=torch in the environment switches both off.

Recurrence: Gu and Dao 2023, "Mamba: Linear-Time Sequence Modeling with Selective State Spaces", equation 2 with the
simplified discretisation of B of the released models.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from neurostorm.model.mixers import scan_kernel
from neurostorm.model.ops.dispatch import SCAN, triton_may

CHUNK_TOKENS = 16  # a state is kept every so many tokens; the working set of a chunk should fit a cache


class ScanInputs(NamedTuple):
    """What a scan takes, all of one dtype, float32 or float64; also used for the gradients of the same.

    L tokens, W windows, D channels, N states per channel.
    """

    u: Tensor  # (L, W, D)
    delta: Tensor  # (L, W, D), step sizes > 0
    A: Tensor  # (D, N), < 0
    B: Tensor  # (L, W, N)
    C: Tensor  # (L, W, N)


def empty_states(tokens: int, windows: int, A: Tensor, chunk: int = CHUNK_TOKENS) -> Tensor:
    """Room for the states that ``scan_forward`` keeps: (chunks, windows, N, D); no chunk where the kernel scans."""
    chunks = 0 if scan_kernel.applies_to(A, A.shape[1]) else math.ceil(tokens / chunk)
    return A.new_empty(chunks, windows, A.shape[1], A.shape[0])


def triton_applies_to(u: Tensor, states: int) -> bool:
    """Whether the scan in Triton takes tensors like ``u``: float32 on a GPU, a power of two states."""
    return u.is_cuda and u.dtype == torch.float32 and states & (states - 1) == 0 and triton_may(SCAN)


def scan_forward(inputs: ScanInputs, states: Tensor | None = None, chunk: int = CHUNK_TOKENS) -> Tensor:
    """y (L, W, D) of a block of windows.

    Args:
        inputs: see there.
        states: (chunks, W, N, D) to fill with the state before each chunk, for ``scan_backward``; None keeps none.
        chunk: tokens K per chunk; the result does not depend on it but for rounding.
    """
    if scan_kernel.applies_to(inputs.u, inputs.A.shape[1]):
        return scan_kernel.forward(*inputs)
    if triton_applies_to(inputs.u, inputs.A.shape[1]):
        from neurostorm.model.mixers import scan_triton

        return scan_triton.forward(*inputs, states, chunk)
    work = _Chunk(inputs, chunk)
    y = torch.empty_like(work.step)
    state = torch.zeros_like(work.decay[0])
    for number, tokens in enumerate(work.slices):
        if states is not None:
            states[number] = state
        _, h = work.fill(tokens, state)
        _over_states(inputs.C[tokens], h, y[tokens])
        state.copy_(h[-1])
    return y


def scan_backward(
    inputs: ScanInputs, states: Tensor, dy: Tensor, chunk: int = CHUNK_TOKENS
) -> tuple[Tensor, ScanInputs]:
    """y again, and the gradients of all inputs.

    Args:
        inputs, chunk: those of the forward pass.
        states: what the forward pass kept.
        dy: (L, W, D), gradient of y.
    """
    if scan_kernel.applies_to(inputs.u, inputs.A.shape[1]):
        y, gradients_of_all = scan_kernel.backward(*inputs, dy)
        return y, ScanInputs(*gradients_of_all)
    if triton_applies_to(inputs.u, inputs.A.shape[1]):
        from neurostorm.model.mixers import scan_triton

        y, gradients_of_all = scan_triton.backward(*inputs, states, dy, chunk)
        return y, ScanInputs(*gradients_of_all)
    u, delta, _, B, C = inputs
    work = _Chunk(inputs, chunk)
    gradients = torch.empty_like(work.state)
    later = torch.zeros_like(gradients[0])  # a_{t+1} g_{t+1} of the last token of a chunk
    y, dstep, ddelta = torch.empty_like(u), torch.empty_like(u), torch.empty_like(u)
    dA, dB, dC = torch.zeros_like(work.A), torch.empty_like(B), torch.empty_like(C)
    for number, tokens in reversed(list(enumerate(work.slices))):
        a, h = work.fill(tokens, states[number])
        _over_states(C[tokens], h, y[tokens])
        _over_channels(dy[tokens], h, dC[tokens])
        g = torch.mul(dy[tokens].unsqueeze(2), C[tokens].unsqueeze(3), out=gradients[: len(h)])
        _run_back(a, g, later)
        _over_channels(work.step[tokens], g, dB[tokens])
        _over_states(B[tokens], g, dstep[tokens])
        # a becomes dL/d(delta A) = g_t a_t h_{t-1}; after that the buffers of h and g are free.
        a.mul_(g)
        later.copy_(a[0])
        a[0].mul_(states[number])
        a[1:].mul_(h[:-1])
        dA += torch.mul(a, delta[tokens].unsqueeze(2), out=g).sum((0, 1))
        torch.sum(torch.mul(a, work.A, out=h), 2, out=ddelta[tokens])
    return y, ScanInputs(dstep * delta, ddelta.addcmul_(dstep, u), dA.mT, dB, dC)


class _Chunk:
    """Decays and states of one chunk of a block of windows, in buffers that are filled anew for every chunk."""

    def __init__(self, inputs: ScanInputs, chunk: int) -> None:
        self._inputs = inputs
        self.step = inputs.delta * inputs.u
        self.A = inputs.A.mT.contiguous()  # (N, D), as the states
        # exp2 of arguments scaled once takes a CPU .6 of the time of exp.
        self._A_log2 = self.A * math.log2(math.e)
        tokens, windows, _ = inputs.u.shape
        self.slices = [slice(start, min(start + chunk, tokens)) for start in range(0, tokens, chunk)]
        self.decay = self.A.new_empty(min(chunk, tokens), windows, *self.A.shape)
        self.state = torch.empty_like(self.decay)

    def fill(self, tokens: slice, before: Tensor) -> tuple[Tensor, Tensor]:
        """a and h (K, W, N, D) of some tokens, from the state (W, N, D) before them; valid until the next call."""
        size = tokens.stop - tokens.start
        a, h = self.decay[:size], self.state[:size]
        torch.mul(self._inputs.delta[tokens].unsqueeze(2), self._A_log2, out=a)
        torch.exp2(a, out=a)
        torch.mul(self.step[tokens].unsqueeze(2), self._inputs.B[tokens].unsqueeze(3), out=h)
        for a_t, h_t in zip(a.unbind(0), h.unbind(0), strict=True):
            before = h_t.addcmul_(a_t, before)
        return a, h


def _run_back(a: Tensor, g: Tensor, later: Tensor) -> None:
    """Last token first, g_t += a_{t+1} g_{t+1}, in place; ``later`` is that product from the chunk behind."""
    decays, gradients = a.unbind(0), g.unbind(0)
    after = gradients[-1].add_(later)
    for a_after, g_t in zip(reversed(decays[1:]), reversed(gradients[:-1]), strict=True):
        after = g_t.addcmul_(a_after, after)


def _over_states(weights: Tensor, states: Tensor, out: Tensor) -> None:
    """out[k, w, d] = sum over n of weights[k, w, n] states[k, w, n, d]."""
    torch.bmm(weights.flatten(0, 1).unsqueeze(1), states.flatten(0, 1), out=out.flatten(0, 1).unsqueeze(1))


def _over_channels(weights: Tensor, states: Tensor, out: Tensor) -> None:
    """out[k, w, n] = sum over d of weights[k, w, d] states[k, w, n, d]."""
    torch.bmm(weights.flatten(0, 1).unsqueeze(1), states.flatten(0, 1).mT, out=out.flatten(0, 1).unsqueeze(1))
