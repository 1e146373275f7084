"""The shape of a 4D Swin network: every number that its parameters and token tables follow from."""

from dataclasses import dataclass, fields

from neurostorm.model.geometry.windows import Axes, Layout
from neurostorm.model.mixers import MIXERS

LAYOUTS = ("clean", "paper")
TOKENS = ("dense", "brain")

_COARSE, _FINER = 64, 32


@dataclass(frozen=True)
class SwinConfig:
    """Shape of the encoder.

    Attributes:
        img_size: voxels (X, Y, Z) and frames T of a clip; a shorter clip works, a longer one does not.
        patch_size: voxels per patch and frames per patch; the last is 1.
        in_chans: channels of the volume.
        embed_dim: width of the first stage; stage i has ``embed_dim * c_multiplier ** i``.
        depths: blocks per stage.
        heads: attention heads per stage.
        window: tokens (d, h, w, frames) that attend to each other.
        first_window: the same for the first stage; None takes ``window``.
        full_last: the last stage's window covers the whole volume (``window[3]`` frames) and never shifts.
        mlp_ratio: hidden width of the MLP over the stage's width.
        qkv_bias: whether query, key and value have a bias.
        drop_path: stochastic depth of the last block; it grows linearly from 0 over the blocks.
        c_multiplier: growth of the width at each merge.
        mixer: what mixes the tokens of a window, one of MIXERS.
        layout: "clean", or "paper" with the quirks of the released models: zero tokens that fill padded windows take
            part, the Mamba mixer's shifted windows wrap round, and a full last stage does not shift over the frames.
        tokens: "dense" (every patch) or "brain" (the patches that hold brain; the encoder is given the mask).
        prompts: learned vectors before the tokens of each window of each encoder block; 0 = none.
    """

    img_size: Axes
    patch_size: Axes = (6, 6, 6, 1)
    in_chans: int = 1
    embed_dim: int = 36
    depths: tuple[int, ...] = (2, 2, 6, 2)
    heads: tuple[int, ...] = (3, 6, 12, 24)
    window: Axes = (4, 4, 4, 4)
    first_window: Axes | None = None
    full_last: bool = False
    mlp_ratio: float = 4.0
    qkv_bias: bool = True
    drop_path: float = 0.0
    c_multiplier: int = 2
    mixer: str = "attention"
    layout: str = "clean"
    tokens: str = "dense"
    prompts: int = 0

    def __post_init__(self) -> None:
        for entry in fields(self):
            if isinstance(getattr(self, entry.name), list):
                object.__setattr__(self, entry.name, tuple(getattr(self, entry.name)))

    @property
    def stages(self) -> int:
        return len(self.depths)

    @property
    def grid(self) -> tuple[int, int, int]:
        """Patches along each spatial axis of the first stage."""
        return tuple(n // p for n, p in zip(self.img_size[:3], self.patch_size[:3], strict=True))  # type: ignore[return-value]

    @property
    def space(self) -> int:
        """Patches of one frame."""
        return self.grid[0] * self.grid[1] * self.grid[2]

    @property
    def frames(self) -> int:
        """Frames of the longest clip."""
        return self.img_size[3]

    @property
    def patch_voxels(self) -> int:
        """Values of one patch."""
        return self.patch_size[0] * self.patch_size[1] * self.patch_size[2] * self.in_chans

    def width(self, stage: int) -> int:
        return self.embed_dim * self.c_multiplier**stage

    @property
    def windows(self) -> tuple[Axes, ...]:
        """Nominal window of each stage."""
        windows = [self.first_window or self.window] + [self.window] * (self.stages - 1)
        if self.full_last:
            d, h, w = (n // 2 ** (self.stages - 1) for n in self.grid)
            windows[-1] = (d, h, w, self.window[3])
        return tuple(windows)

    def shifts(self, stage: int) -> bool:
        """Whether the odd blocks of an encoder stage shift (along the axes that are longer than their window)."""
        # Quirk of the released models: a last stage whose window spans all of space does not shift over frames either.
        return not (self.layout == "paper" and self.full_last and stage + 1 == self.stages)

    def window_layout(self, device_type: str) -> Layout:
        """How windows are cut, with the released quirks in the paper's layout only.

        A scan pays for every bucket with a loop over its tokens, and a GPU with kernel launches, so there the sizes of
        uneven windows are rounded to few; for attention on a CPU exact sizes are as fast.
        """
        paper, scan = self.layout == "paper", self.mixer == "mamba"
        round_to = _COARSE if device_type != "cpu" else _FINER if scan else 1
        return Layout(pad=paper, wrap=paper and scan, round_to=round_to)

    def drop_path_rates(self, stage: int) -> list[float]:
        """Stochastic depth of the blocks of a stage: 0 to ``drop_path`` in equal steps over all blocks."""
        steps, start = max(1, sum(self.depths) - 1), sum(self.depths[:stage])
        return [self.drop_path * number / steps for number in range(start, start + self.depths[stage])]

    def validate(self) -> None:
        """Raises ValueError naming the field and what is wrong with it."""
        for name in ("img_size", "patch_size", "window", "first_window"):
            axes = getattr(self, name)
            if axes is not None and (len(axes) != 4 or min(axes) < 1):
                raise ValueError(f"{name} = {axes}: four positive numbers (three axes and frames)")
        if self.patch_size[3] != 1:
            raise ValueError(f"patch_size = {self.patch_size}: the last entry is 1, frames are not patched")
        if len(self.depths) < 1 or min(self.depths) < 1:
            raise ValueError(f"depths = {self.depths}: at least one stage, each with at least one block")
        if len(self.heads) != self.stages:
            raise ValueError(f"heads = {self.heads}: one entry per stage, as depths = {self.depths}")
        for stage, heads in enumerate(self.heads):
            if heads < 1 or self.width(stage) % heads:
                raise ValueError(
                    f"heads = {self.heads}: heads[{stage}] must divide the stage's width {self.width(stage)}"
                )
        divisor = 2 ** (self.stages - 1)
        for n, p in zip(self.img_size[:3], self.patch_size[:3], strict=True):
            if n % (p * divisor):
                raise ValueError(f"img_size = {self.img_size}: {n} is no multiple of {p} voxels x {divisor} (merges)")
        for name in ("in_chans", "embed_dim", "c_multiplier"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} = {getattr(self, name)}: at least 1")
        if self.mlp_ratio <= 0 or not 0.0 <= self.drop_path < 1.0:
            raise ValueError(f"mlp_ratio = {self.mlp_ratio}, drop_path = {self.drop_path}: above 0, and in [0, 1)")
        for name, known in (("mixer", MIXERS), ("layout", LAYOUTS), ("tokens", TOKENS)):
            if getattr(self, name) not in known:
                raise ValueError(f"{name} = {getattr(self, name)!r}: one of {', '.join(known)}")
        if self.prompts < 0:
            raise ValueError(f"prompts = {self.prompts}: a number of vectors, 0 for none")
