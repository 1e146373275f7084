"""The released attention encoder written straightforwardly: what `bench/step.py --compare` is measured against.

    volume (B, C, X, Y, Z, T) -> grid (B, C', d, h, w, T) -> per stage, on (B, d, h, w, T, C'):
        + positions -> mask of -100 built anew
        blocks: norm -> pad -> roll -> windows -> softmax(q k^T + mask) v -> grid -> roll back -> crop; norm -> MLP
        2 x 2 x 2 neighbours concatenated, normalised, reduced

It follows the description of the released models step by step and shares nothing with `neurostorm.model` but the shape
(`SwinConfig`) and the names of the parameters, so that one state dict loads into both. Not for training.
"""

import itertools

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn.functional import gelu, pad

from neurostorm.model.config import SwinConfig

Axes = tuple[int, ...]


class BaselineEncoder(nn.Module):
    """The released encoder with the attention mixer: (B, C, X, Y, Z, T) -> (B, C', d, h, w, T)."""

    def __init__(self, config: SwinConfig) -> None:
        super().__init__()
        self.patch = config.patch_size
        self.patch_embed = nn.ModuleDict({"fc": nn.Linear(config.patch_voxels, config.embed_dim)})
        grids = [(*(n // 2**stage for n in config.grid), config.frames) for stage in range(config.stages)]
        self.pos_embeds = nn.ModuleList(_Positions(config.width(i), grid) for i, grid in enumerate(grids))
        self.layers = nn.ModuleList(_Stage(config, stage) for stage in range(config.stages))

    def forward(self, volume: Tensor) -> Tensor:
        p, q, r, s = self.patch
        patches = rearrange(volume, "b c (d p) (h q) (w r) (t s) -> b d h w t (p q r s c)", p=p, q=q, r=r, s=s)
        x = rearrange(self.patch_embed["fc"](patches), "b d h w t c -> b c d h w t")
        for positions, stage in zip(self.pos_embeds, self.layers, strict=True):
            x = stage(positions(x).contiguous())
        return x


class _Positions(nn.Module):
    def __init__(self, width: int, grid: Axes) -> None:
        super().__init__()
        d, h, w, frames = grid
        self.pos_embed = nn.Parameter(torch.zeros(1, width, d, h, w, 1))
        self.time_embed = nn.Parameter(torch.zeros(1, width, 1, 1, 1, frames))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.pos_embed + self.time_embed[..., : x.shape[-1]]


class _Stage(nn.Module):
    def __init__(self, config: SwinConfig, stage: int) -> None:
        super().__init__()
        self.window = config.windows[stage]
        self.shifts = config.shifts(stage)
        self.blocks = nn.ModuleList(_Block(config, stage) for _ in range(config.depths[stage]))
        self.downsample = _Merging(config, stage) if stage + 1 < config.stages else None

    def forward(self, x: Tensor) -> Tensor:
        grid = tuple(x.shape[2:])
        window = tuple(min(g, w) for g, w in zip(grid, self.window, strict=True))
        shift = tuple(w // 2 if self.shifts and g > w else 0 for g, w in zip(grid, self.window, strict=True))
        mask = _shift_mask(grid, window, shift, x.device)
        x = rearrange(x, "b c d h w t -> b d h w t c")
        for number, block in enumerate(self.blocks):
            x = block(x, window, shift if number % 2 else (0, 0, 0, 0), mask)
        if self.downsample is not None:
            x = self.downsample(x)
        return rearrange(x, "b d h w t c -> b c d h w t")


class _Block(nn.Module):
    def __init__(self, config: SwinConfig, stage: int) -> None:
        super().__init__()
        width = config.width(stage)
        self.norm1 = nn.LayerNorm(width)
        self.attn = _Attention(width, config.heads[stage], config.qkv_bias)
        self.norm2 = nn.LayerNorm(width)
        hidden = int(width * config.mlp_ratio)
        self.mlp = nn.ModuleDict({"linear1": nn.Linear(width, hidden), "linear2": nn.Linear(hidden, width)})

    def forward(self, x: Tensor, window: Axes, shift: Axes, mask: Tensor) -> Tensor:
        x = x + self.mix(self.norm1(x), window, shift, mask)
        return x + self.mlp["linear2"](gelu(self.mlp["linear1"](self.norm2(x))))

    def mix(self, x: Tensor, window: Axes, shift: Axes, mask: Tensor) -> Tensor:
        batch, *grid, _ = x.shape
        beyond = [-g % w for g, w in zip(grid, window, strict=True)]
        x = pad(x, (0, 0, *itertools.chain.from_iterable((0, n) for n in reversed(beyond))))
        padded = x.shape[1:5]
        if any(shift):
            x = x.roll([-s for s in shift], (1, 2, 3, 4))
        mixed = self.attn(_windows(x, window), mask if any(shift) else None)
        x = _grid(mixed, window, (batch, *padded))
        if any(shift):
            x = x.roll(shift, (1, 2, 3, 4))
        d, h, w, t = grid
        return x[:, :d, :h, :w, :t].contiguous()


class _Attention(nn.Module):
    def __init__(self, width: int, heads: int, bias: bool) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width, bias=bias)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        """(windows, N, C) and the mask (windows of one sample, N, N) of shifted blocks -> (windows, N, C)."""
        q, k, v = rearrange(self.qkv(x), "n i (three h c) -> three n h i c", three=3, h=self.heads)
        scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)
        if mask is not None:
            scores = rearrange(scores, "(b n) h i j -> b n h i j", n=len(mask)) + mask[None, :, None]
            scores = rearrange(scores, "b n h i j -> (b n) h i j")
        return self.proj(rearrange(scores.softmax(-1) @ v, "n h i c -> n i (h c)"))


class _Merging(nn.Module):
    def __init__(self, config: SwinConfig, stage: int) -> None:
        super().__init__()
        width = config.width(stage)
        self.norm = nn.LayerNorm(8 * width)
        self.reduction = nn.Linear(8 * width, config.width(stage + 1), bias=False)

    def forward(self, x: Tensor) -> Tensor:
        corners = itertools.product((0, 1), repeat=3)
        return self.reduction(self.norm(torch.cat([x[:, i::2, j::2, k::2] for i, j, k in corners], -1)))


def _shift_mask(grid: Axes, window: Axes, shift: Axes, device: torch.device) -> Tensor:
    """(windows, N, N): -100 between tokens that only the roll has brought together, else 0."""
    padded = [-(-g // w) * w for g, w in zip(grid, window, strict=True)]
    region = torch.zeros((1, *padded, 1), device=device)
    cuts = [(slice(-w), slice(-w, -s), slice(-s, None)) for w, s in zip(window, shift, strict=True)]
    for number, (d, h, w, t) in enumerate(itertools.product(*cuts)):
        region[:, d, h, w, t, :] = number
    of_token = _windows(region, window).squeeze(-1)
    other = of_token.unsqueeze(1) - of_token.unsqueeze(2)
    return other.masked_fill(other != 0, -100.0).masked_fill(other == 0, 0.0)


def _windows(x: Tensor, window: Axes) -> Tensor:
    """(B, d, h, w, T, C) -> (B * windows, N, C)."""
    i, j, k, m = window
    pattern = "b (d i) (h j) (w k) (t m) c -> (b d h w t) (i j k m) c"
    return rearrange(x, pattern, i=i, j=j, k=k, m=m).contiguous()


def _grid(windows: Tensor, window: Axes, size: Axes) -> Tensor:
    """(B * windows, N, C) -> (B, d, h, w, T, C) for ``size`` (B, d, h, w, T)."""
    (i, j, k, m), (b, d, h, w, t) = window, size
    pattern = "(b d h w t) (i j k m) c -> b (d i) (h j) (w k) (t m) c"
    counts = {"b": b, "d": d // i, "h": h // j, "w": w // k, "t": t // m}
    return rearrange(windows, pattern, i=i, j=j, k=k, m=m, **counts).contiguous()
