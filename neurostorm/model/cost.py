"""What one clip costs: parameters, floating-point operations and memory traffic, from the shape of the model alone.

    model (on any device, meta too) + frames --> its window tables (W, N) --> Flops of every block, merge, expansion
                                                                          --> values kept for the backward pass
    Cost = parameters, Flops forward and backward, values --> bytes of a step, share of a machine's peak (MFU)

Everything is counted on the tables that the network really uses, so that brain tokens, padded windows, absent slots,
prompts and the windows that a shift cuts are what they are. Conventions:

    linear       2 operations per multiply-accumulate, over all rows that are computed (padding, absent slots, prompts)
    attention    q k^T and the weighted sum of v: 4 N^2 C per window of N keys; softmax is not counted
    convolution  2 per tap, token and channel
    scan         7 per token, channel and state (delta A, its exp, (delta u) B, a h, the sum of the two, C h, its sum)
                 and 3 per token and channel (delta u, D u, their sum); a channel is one of the scan's 2C
    backward     twice the forward pass (gradients of both factors of a product, likewise for the scan); once for the
                 patch embedding, whose input needs no gradient

Norms, activations, residual sums and the loss are not counted (about one operation per byte they move). Nor is anything
that is computed again in the backward pass: a kernel that recomputes does the same model's work in more operations.
"""

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, fields

import torch
from torch import Tensor, nn

from neurostorm.model.autoencoder import MaskedAutoencoder
from neurostorm.model.decoders import DECODERS
from neurostorm.model.decoders.paper import PatchExpanding
from neurostorm.model.encoder import SwinEncoder
from neurostorm.model.geometry.tokens import TokenGeometry
from neurostorm.model.geometry.windows import WindowTable
from neurostorm.model.mixers import scan_kernel
from neurostorm.model.mixers.attention import WindowAttention
from neurostorm.model.mixers.mamba import Mamba
from neurostorm.model.mixers.scan import CHUNK_TOKENS
from neurostorm.model.ops.blocks import Block, BlockStack, Stage

_SCAN_PER_STATE, _SCAN_PER_CHANNEL = 7, 3
_ADAMW_PASSES = 7  # reads weight, gradient and two moments, writes all but the gradient
_LONG_PRODUCT_S = 0.01


@dataclass(frozen=True)
class Flops:
    """Floating-point operations of a forward pass by kind; see the module for what counts."""

    linear: int = 0
    attention: int = 0
    convolution: int = 0
    scan: int = 0

    def __add__(self, other: "Flops") -> "Flops":
        return Flops(*(getattr(self, f.name) + getattr(other, f.name) for f in fields(self)))

    @property
    def total(self) -> int:
        return self.linear + self.attention + self.convolution + self.scan


@dataclass(frozen=True)
class Cost:
    """Cost of one clip; bytes are asked for with the size of a value (4 for float32, 2 for bfloat16).

    Attributes:
        parameters: of the whole model, trained or not.
        tokens: tokens of the first stage.
        forward: operations of the encoder's and, for an autoencoder, the decoder's forward pass.
        backward: operations of the backward pass when every parameter is trained.
        kept_values: activations that are alive between forward and backward, without activation checkpointing.
    """

    parameters: int
    tokens: int
    forward: Flops
    backward: int
    kept_values: int

    @property
    def train_flops(self) -> int:
        """Forward and backward operations of one clip; times clips per second over a peak rate it is the MFU."""
        return self.forward.total + self.backward

    def kept_bytes(self, value_bytes: int = 4) -> int:
        """Memory of the activations that one clip keeps for its backward pass."""
        return self.kept_values * value_bytes

    @property
    def state_bytes(self) -> int:
        """Memory of weights, gradients and AdamW's two moments, all float32 (also with autocast to bfloat16)."""
        return 4 * 4 * self.parameters

    def moved_bytes(self, batch: int, value_bytes: int = 4) -> int:
        """Bytes that a training step of ``batch`` clips moves, when nothing is fused and no cache holds a tensor.

        A kept activation is written, read by the next operation and read again in the backward pass, where its gradient
        is written and read; weights are read twice, gradients written, and AdamW passes over all of its state.
        """
        return 5 * batch * self.kept_bytes(value_bytes) + 4 * (3 + _ADAMW_PASSES) * self.parameters


@dataclass
class Count:
    """Sums over the parts of a network."""

    flops: Flops = Flops()
    kept: int = 0

    def linear(self, modules: Iterable[nn.Module], rows: int) -> None:
        """The linear layers among ``modules``, each over ``rows`` rows; keeps no values."""
        for module in modules:
            if isinstance(module, nn.Linear):
                self.flops += Flops(linear=2 * rows * module.in_features * module.out_features)

    def blocks(self, stage: BlockStack, tables: list[WindowTable]) -> None:
        """The blocks of a stage, over the windows of `tables`: without and with the shift."""
        for number, block in enumerate(stage.blocks):
            assert isinstance(block, Block)
            _count_block(self, block, tables[number % 2])

    def expansion(self, expanding: PatchExpanding, parents: int) -> None:
        """The expansion of so many tokens into their children."""
        self.linear(expanding.modules(), parents)
        self.kept += parents * (expanding.expand.in_features + expanding.expand.out_features)


def clip_cost(model: SwinEncoder, frames: int | None = None) -> Cost:
    """Cost of one clip of an encoder or a masked autoencoder.

    Args:
        model: on any device, whose tables count; on "meta" nothing is allocated, and those of a CPU count, as they do
            for the light decoder: elsewhere tables of visible tokens have room to spare, which is no useful work.
        frames: of the clip; None for the longest.

    Of the light decoder one mask is drawn: how a mask cuts the windows changes the attention's share a little. A mask
    of atlas regions needs the atlas, so such a model is counted on a real device.
    """
    config, device = model.config, model.patch_embed.fc.weight.device
    frames = config.frames if frames is None else frames
    decoder = DECODERS[model.decoder] if isinstance(model, MaskedAutoencoder) else None
    alone = decoder is not None and decoder.visible_alone
    where = "cpu" if alone or device.type == "meta" else device
    whole = model.geometry(frames, where)
    seen: TokenGeometry = whole
    count, hidden = Count(), 0
    if isinstance(model, MaskedAutoencoder) and alone:
        mask = model.draw_mask(1, frames, torch.Generator().manual_seed(0), where)
        seen, hidden = model.visible_geometry(mask, whole), int(mask.sum())
    tokens = [len(level) for level in seen.levels]
    count.linear([model.patch_embed.fc], tokens[0])
    embedding = count.flops.linear
    count.kept += tokens[0] * config.patch_voxels
    _count_encoder(count, model, seen, tokens)
    if isinstance(model, MaskedAutoencoder):
        assert decoder is not None
        decoder.count(count, model, whole, hidden)
    return Cost(
        parameters=sum(p.numel() for p in model.parameters()),
        tokens=len(whole.levels[0]),
        forward=count.flops,
        backward=2 * count.flops.total - embedding,
        kept_values=count.kept,
    )


def _count_encoder(count: Count, model: SwinEncoder, geometry: TokenGeometry, tokens: list[int]) -> None:
    config = model.config
    for i, stage in enumerate(model.layers):
        assert isinstance(stage, Stage)
        level = geometry.levels[i]
        count.blocks(stage, [level.windows(config.windows[i], shift) for shift in (False, config.shifts(i))])
        if stage.downsample is not None:
            count.linear(stage.downsample.modules(), tokens[i + 1])
            count.kept += 2 * 8 * config.width(i) * tokens[i + 1]  # children gathered, and normalised


def _count_block(count: Count, block: Block, table: WindowTable) -> None:
    prompts = 0 if block.prompt is None else block.prompt.shape[1]
    for mixer in block.children():
        if isinstance(mixer, WindowAttention):
            _count_attention(count, mixer, table, prompts)
        elif isinstance(mixer, Mamba):
            _count_scan(count, mixer, table, prompts)
    width, hidden = block.mlp.linear1.in_features, block.mlp.linear1.out_features
    count.linear(block.mlp.modules(), table.tokens)
    # Both norms' inputs and moments, the MLP's input; its hidden values before and after GELU, which a CPU makes again.
    made_again = block.mlp.linear1.weight.device.type != "cuda"
    count.kept += table.tokens * (3 * width + 4 + (0 if made_again else 2 * hidden))


def _count_attention(count: Count, mixer: WindowAttention, table: WindowTable, prompts: int) -> None:
    width = mixer.proj.in_features
    windows, rows = _windows(table, 0)
    count.linear([mixer.qkv], rows + prompts)  # prompts are projected once, not in each window
    count.linear([mixer.proj], rows)
    joined = prompts > 0 or len(windows) > 1  # else the results are already one tensor
    count.kept += rows * width * (2 if joined else 1)  # inputs of both projections
    windows, rows = _windows(table, prompts)
    count.flops += Flops(attention=4 * width * sum(number * size**2 for number, size in windows))
    count.kept += rows * (4 * width + mixer.heads)  # q, k, v, result, the softmax's log-sums


def _count_scan(count: Count, mixer: Mamba, table: WindowTable, prompts: int) -> None:
    windows, rows = _windows(table, prompts)
    channels, states = mixer.A_log.shape
    count.linear(mixer.modules(), rows)
    count.flops += Flops(
        convolution=2 * rows * mixer.conv1d.weight.numel(),
        scan=rows * channels * (_SCAN_PER_STATE * states + _SCAN_PER_CHANNEL),
    )
    in_one_pass = scan_kernel.applies_to(mixer.A_log, states)
    chunks = 0 if in_one_pass else sum(number * -(-size // CHUNK_TOKENS) for number, size in windows)
    count.kept += rows * mixer.in_proj.in_features + chunks * channels * states  # input, the state before each chunk


def _windows(table: WindowTable, prompts: int) -> tuple[list[tuple[int, int]], int]:
    """(windows, rows in each) per bucket of a table, and all rows, with ``prompts`` more in each window."""
    windows = [(len(bucket.index), bucket.index.shape[1] + prompts) for bucket in table.buckets]
    return windows, sum(number * size for number, size in windows)


def measured_peak(device: torch.device | str, dtype: torch.dtype = torch.float32) -> float:
    """Operations per second of the machine's own square matrix product, the best of several; about .3 s on a CPU.

    The second factor is transposed, as a linear layer's weight is. The product is only as large as takes a while: some
    processors have no bfloat16 arithmetic to speak of.
    """
    device = torch.device(device)
    size, largest, rate = 256, 8192 if device.type == "cuda" else 1024, 0.0
    while True:
        seconds = _product_s(size, device, dtype)
        rate = max(rate, 2 * size**3 / seconds)
        if size == largest or seconds > _LONG_PRODUCT_S:
            return rate
        size *= 2


def _product_s(size: int, device: torch.device, dtype: torch.dtype) -> float:
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    out = torch.empty_like(a)
    return _best_s(lambda: torch.mm(a, b.T, out=out), device)


def copy_rate(device: torch.device | str) -> float:
    """Bytes per second, read and written together, of a copy that no cache holds; the best of several."""
    device = torch.device(device)
    size = 2**30 if device.type == "cuda" else 2**26
    source = torch.zeros(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source).fill_(0)
    return 2 * size / _best_s(lambda: target.copy_(source), device)


def _best_s(work: Callable[[], Tensor], device: torch.device, rounds: int = 5) -> float:
    """Shortest time of ``work``, seconds, after one call to warm up."""
    best = float("inf")
    for number in range(rounds + 1):
        _wait(device)
        start = time.perf_counter()
        work()
        _wait(device)
        if number:
            best = min(best, time.perf_counter() - start)
    return best


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
