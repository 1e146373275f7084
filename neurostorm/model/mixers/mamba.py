"""The Mamba mixer: one causal selective scan over the tokens of each window.

    x (windows, N, C) -> in_proj -> u, z (2C each)
                         u -> causal convolution over 4 tokens -> SiLU -> x_proj -> step (rank C/16), B, C (16 each)
                              delta = softplus(dt_proj(step)) -> scan with A = -exp(A_log) -> y
                         (y + D u) SiLU(z) -> out_proj -> (windows, N, C)

Everything but the scan is cheap to compute and large to keep. So the mixer runs over blocks of windows, from x to the
output, and keeps between forward and backward only x and a state every few tokens; the backward pass makes the rest of
a block again. Block after block its tensors fit a CPU's cache and no tensor grows with the number of windows.

Mamba: Gu and Dao 2023; names, shapes and initialisation are those of ``mamba_ssm.Mamba``, so that the released models'
parameters load. Where that package is installed its kernel scans on a CUDA device.
"""

import importlib
import importlib.util
import logging
import math
from collections.abc import Callable, Iterator
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.functional import conv1d, linear, silu, softplus

from neurostorm.model.geometry.windows import Bucket
from neurostorm.model.mixers import scan_kernel
from neurostorm.model.mixers.mixer import Mixer
from neurostorm.model.mixers.scan import ScanInputs, empty_states, scan_backward, scan_forward, triton_applies_to
from neurostorm.model.ops.dispatch import autocast_for, product_dtype, without_autocast
from neurostorm.model.strd.dropout import StageDropout

STATES = 16  # per channel
TAPS = 4  # tokens under the convolution
EXPAND = 2  # channels of the scan over those of the tokens
_DELTA_RANGE = (1e-3, 1e-1)  # of the initial step sizes
_DELTA_FLOOR = 1e-4

# States of one block (windows x 2C x 16): the scan's three chunk buffers fit a CPU's cache, or keep a GPU busy; the
# kernel in C has none, so that only the tensors round it count; the one on a GPU keeps 16 tokens' (1 GiB here).
_BLOCK_STATES = {"cpu": 2**15, "cpu kernel": 2**17, "cuda": 2**22, "cuda kernel": 2**24}

_log = logging.getLogger(__name__)


class Mamba(Mixer):
    """Selective state-space mixer with the parameters of the released models; it projects block by block itself.

    Args:
        width: channels C; the scan has 2C, its step sizes rank ceil(C / 16).
        heads, qkv_bias: ignored, a scan has neither; every mixer is built with the same arguments.
    """

    def __init__(self, width: int, heads: int = 1, qkv_bias: bool = True) -> None:
        super().__init__()
        inner, rank = EXPAND * width, math.ceil(width / 16)
        self.in_proj = nn.Linear(width, 2 * inner, bias=False)
        self.conv1d = nn.Conv1d(inner, inner, TAPS, groups=inner)  # holds the weights, (2C, 1, 4), last tap = now
        self.x_proj = nn.Linear(inner, rank + 2 * STATES, bias=False)
        self.dt_proj = nn.Linear(rank, inner)
        self.A_log = nn.Parameter(torch.empty(inner, STATES))
        self.D = nn.Parameter(torch.empty(inner))
        self.out_proj = nn.Linear(inner, width, bias=False)
        self.reset_scan()

    @torch.no_grad()
    def reset_scan(self) -> None:
        """Initialise what decides over the scan's memory: A_log, D and dt_proj.

        A = -1 ... -16 in each channel, D = 1, and a bias for which the step sizes start log-uniform in .001 ... .1. To
        be called again after anything that initialises all linear layers alike.
        """
        inner, rank = self.dt_proj.weight.shape
        self.A_log.copy_(torch.arange(1, STATES + 1).log().expand(inner, STATES))
        self.D.fill_(1.0)
        self.dt_proj.weight.uniform_(-(rank**-0.5), rank**-0.5)
        low, high = (math.log(bound) for bound in _DELTA_RANGE)
        delta = torch.empty(inner).uniform_(low, high).exp().clamp(min=_DELTA_FLOOR)
        self.dt_proj.bias.copy_(delta + torch.log(-torch.expm1(-delta)))  # the inverse of softplus

    def weights(self) -> "MambaWeights":
        """The parameters, for the functions below."""
        assert self.conv1d.bias is not None  # built with one
        return MambaWeights(
            self.in_proj.weight, self.conv1d.weight, self.conv1d.bias, self.x_proj.weight, self.dt_proj.weight,
            self.dt_proj.bias, self.A_log, self.D, self.out_proj.weight,
        )  # fmt: skip

    def forward(self, x: Tensor, bucket: Bucket, strd: StageDropout | None = None) -> Tensor:
        """Mix the tokens of each window, first to last.

        Args:
            x: (windows, N, C).
            bucket: needed by ``strd`` only. Absent tokens come last in their window, so what the scan makes of them
                reaches no token that is present.
            strd: drops whole tokens of the output; None outside training.
        """
        weights = self.weights()
        kernel = _cuda_kernel() if x.is_cuda and x.dtype != torch.float64 else None
        mixed = mix_windows(x, weights) if kernel is None else mix_with_kernel(x, weights, kernel)
        return mixed if strd is None else strd.drop_tokens(mixed, bucket)


class MambaWeights(NamedTuple):
    """The parameters of one mixer, in the order in which they are used."""

    in_proj: Tensor  # (4C, C)
    conv: Tensor  # (2C, 1, 4)
    conv_bias: Tensor  # (2C)
    x_proj: Tensor  # (rank + 32, 2C)
    dt_proj: Tensor  # (2C, rank)
    dt_bias: Tensor  # (2C)
    A_log: Tensor  # (2C, 16)
    D: Tensor  # (2C)
    out_proj: Tensor  # (C, 2C)


def mix_windows(x: Tensor, weights: MambaWeights) -> Tensor:
    """The mixer in plain torch, block of windows by block of windows: (windows, N, C) -> (windows, N, C).

    Under autocast its matrix products take the autocast dtype, like a linear layer's, and so does the output; the scan
    itself runs in float32. Float64 input stays float64 throughout, under autocast too.
    """
    if autocast_for(x):
        dtype = product_dtype(x)
        with without_autocast(x.device.type):
            return mix_windows(x.to(dtype), weights)
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (x, *weights)):
        return _WindowBlocks.apply(x, *weights)
    out = torch.empty_like(x)
    for part in _parts(x, weights):
        out[part] = _mix_block(x[part], weights, None)
    return out


def project(x: Tensor, weights: MambaWeights) -> tuple[ScanInputs, Tensor]:
    """What the scan takes, and the gate z (N, W, 2C), from tokens x (N, W, C) with the token as the slowest axis."""
    u, z = linear(x, weights.in_proj.to(x.dtype)).chunk(2, -1)
    u = silu(_CausalConv.apply(u, weights.conv.to(x.dtype), weights.conv_bias.to(x.dtype)))
    rank = weights.dt_proj.shape[1]
    step, B, C = linear(u, weights.x_proj.to(x.dtype)).split([rank, STATES, STATES], -1)
    wide = torch.promote_types(x.dtype, torch.float32)
    delta = softplus(linear(step, weights.dt_proj.to(x.dtype)).to(wide) + weights.dt_bias.to(wide))
    A = -torch.exp(weights.A_log.to(wide))
    return ScanInputs(u.to(wide), delta, A, B.to(wide), C.to(wide)), z


def gate(y: Tensor, u: Tensor, z: Tensor, D: Tensor) -> Tensor:
    """(y + D u) SiLU(z) in the dtype of z."""
    return (torch.addcmul(y, u, D.to(y.dtype)) * silu(z.to(y.dtype))).to(z.dtype)


def _mix_block(x: Tensor, weights: MambaWeights, states: Tensor | None) -> Tensor:
    inputs, z = project(_tokens_first(x), weights)
    gated = gate(scan_forward(inputs, states), inputs.u, z, weights.D)
    return rearrange(linear(gated, weights.out_proj.to(x.dtype)), "n w c -> w n c")


class _CausalConv(torch.autograd.Function):
    """Depthwise convolution over the first axis of x (N, W, D): each token with the three before it, zeros before.

    Weight (D, 1, 4) with the last tap for the token itself, bias (D). Autograd would copy all of the output for every
    tap that is added to a part of it.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        now, *earlier = weight[:, 0].unbind(1)[::-1]
        out = torch.addcmul(bias, x, now)
        for back, tap in enumerate(earlier, 1):
            out[back:].addcmul_(x[:-back], tap)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        x, weight = ctx.saved_tensors
        now, *earlier = weight[:, 0].unbind(1)[::-1]
        dx, taps = grad * now, [(grad * x).sum((0, 1))]
        for back, tap in enumerate(earlier, 1):
            dx[:-back].addcmul_(grad[back:], tap)
            taps.append((grad[back:] * x[:-back]).sum((0, 1)))
        return dx, torch.stack(taps[::-1], 1).unsqueeze(1), grad.sum((0, 1))


class _WindowBlocks(torch.autograd.Function):
    """The mixer over blocks of windows; keeps the input, the weights and the scan's sparse states."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, *tensors: Tensor) -> Tensor:
        weights = MambaWeights(*tensors)
        wide = torch.promote_types(x.dtype, torch.float32)
        states = empty_states(x.shape[1], len(x), weights.A_log.to(wide))
        out = torch.empty_like(x)
        for part in _parts(x, weights):
            out[part] = _mix_block(x[part], weights, states[:, part])
        ctx.save_for_backward(x, states, *weights)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, states, *tensors = ctx.saved_tensors
        want_x, *want_weights = ctx.needs_input_grad
        wide = states.dtype
        # Wide copies, so that the sum over the blocks is wide too; what autograd finds lands in their ``grad``.
        weights = MambaWeights(
            *(t.detach().to(wide).requires_grad_(w) for t, w in zip(tensors, want_weights, strict=True))
        )
        dx = torch.empty_like(x) if want_x else None
        with without_autocast(x.device.type):
            for part in _parts(x, weights):
                block = _tokens_first(x[part]).requires_grad_(want_x)
                _block_backward(block, weights, states[:, part], _tokens_first(grad[part]))
                if dx is not None and block.grad is not None:
                    dx[part] = rearrange(block.grad, "n w c -> w n c")
        return dx, *(w.grad if w.grad is None else w.grad.to(t.dtype) for t, w in zip(tensors, weights, strict=True))


def _block_backward(x: Tensor, weights: MambaWeights, states: Tensor, grad: Tensor) -> None:
    """Add the gradients of a block x (N, W, C) to the ``grad`` of x and of the weights, where they want one.

    Autograd goes through everything around the scan, made again here; the scan's own gradients enter from outside.
    """
    with torch.enable_grad():
        inputs, z = project(x, weights)
    dgated = (grad @ weights.out_proj.detach().to(grad.dtype)).to(states.dtype)
    known = ScanInputs(*(tensor.detach() for tensor in inputs))
    y, dinputs = scan_backward(known, states, dgated * silu(z.detach().to(states.dtype)))
    with torch.enable_grad():
        out = linear(gate(y, inputs.u, z, weights.D), weights.out_proj.to(x.dtype))
    ends = [pair for pair in zip((out, *inputs), (grad, *dinputs), strict=True) if pair[0].requires_grad]
    torch.autograd.backward([end for end, _ in ends], [gradient for _, gradient in ends])


def _tokens_first(x: Tensor) -> Tensor:
    """A contiguous copy (N, W, C) of windows (W, N, C)."""
    return rearrange(x.detach(), "w n c -> n w c").contiguous()


def _parts(x: Tensor, weights: MambaWeights) -> Iterator[slice]:
    """Slices of windows, equal but for one, each with a working set that suits the device."""
    scanned = weights.A_log.to(torch.promote_types(x.dtype, torch.float32))
    kernel = scan_kernel.applies_to(scanned, STATES) or triton_applies_to(scanned, STATES)
    device = "cpu" if x.device.type == "cpu" else "cuda"
    states = _BLOCK_STATES[f"{device} kernel" if kernel else device]
    most = max(1, states // weights.A_log.numel())
    size = max(1, math.ceil(len(x) / max(1, math.ceil(len(x) / most))))
    return (slice(start, min(start + size, len(x))) for start in range(0, max(1, len(x)), size))


def mix_with_kernel(x: Tensor, weights: MambaWeights, kernel: Callable[..., Tensor]) -> Tensor:
    """The mixer round a fused scan with the interface of mamba_ssm's ``selective_scan_fn``.

    The kernel takes channels before tokens: u, step sizes and gate (windows, 2C, N), B and C (windows, 16, N). It adds
    the bias of the step sizes, applies softplus, the skip D and the gate itself, and makes strides as it needs them.
    """
    u, z = rearrange(linear(x, weights.in_proj), "w n (two d) -> two w d n", two=2).unbind(0)
    u = conv1d(u, weights.conv, weights.conv_bias, padding=TAPS - 1, groups=len(weights.D))
    u = silu(u[..., : x.shape[1]])  # the padding stands on both sides, a causal convolution has it before
    scanned = linear(rearrange(u, "w d n -> w n d"), weights.x_proj)
    step, B, C = scanned.split([weights.dt_proj.shape[1], STATES, STATES], -1)
    y = kernel(
        u, rearrange(linear(step, weights.dt_proj), "w n d -> w d n"), -torch.exp(weights.A_log.float()),
        rearrange(B, "w n s -> w s n"), rearrange(C, "w n s -> w s n"), weights.D.float(),
        z=z, delta_bias=weights.dt_bias.float(), delta_softplus=True,
    )  # fmt: skip
    return linear(rearrange(y, "w d n -> w n d"), weights.out_proj)


@lru_cache(maxsize=1)
def _cuda_kernel() -> Callable[..., Tensor] | None:
    """mamba_ssm's scan, or None: not installed (the usual case), or installed and broken (said once)."""
    if importlib.util.find_spec("mamba_ssm") is None:
        return None
    try:
        return importlib.import_module("mamba_ssm.ops.selective_scan_interface").selective_scan_fn
    except (ImportError, OSError, RuntimeError, AttributeError) as error:
        _log.warning("mamba_ssm is installed but cannot be used (%s): scanning without it", error)
        return None
