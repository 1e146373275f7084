"""Random views of clips, on the device that trains and a batch at a time.

    clip (B, C, X, Y, Z, T) --one rotation and scaling per clip, all frames alike--> trilinear, the border goes on
        --noise of its own for each voxel and frame, in some clips, inside the brain-->
        --Gaussian of a width of its own, in some clips--> another clip of that shape

The steps and their sizes are those of SwiFT's contrastive pretraining (Kim et al. 2023), which takes them from MONAI:
RandAffine, RandGaussianNoise, RandGaussianSmooth. Two things that the released code does are not done here: its noise
is the same in all frames of a clip, and it writes into its input, so that views of one clip build on each other.
Nothing here waits for a GPU: clips that are to stay as they are get zero noise and a Gaussian of no width.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn.functional import affine_grid, grid_sample

_TRUNCATE = 4.0  # standard deviations at which a Gaussian ends, as MONAI's and SciPy's
_NO_WIDTH = 1e-2  # voxels: the neighbours' weight, exp(-5000), is zero in float32


@dataclass(frozen=True)
class AugmentConfig:
    """What is drawn for each clip.

    Attributes:
        rotate_rad: each of three angles lies within +- this.
        scale: each axis is scaled by a factor within 1 +- this.
        noise_probability: share of the clips that get noise.
        noise_std: its standard deviation, in the units of the clip.
        smooth_probability: share of the clips that are smoothed.
        smooth_sigma: smallest and largest standard deviation of the Gaussian, voxels.
    """

    rotate_rad: float = 0.175
    scale: float = 0.1
    noise_probability: float = 0.3
    noise_std: float = 0.1
    smooth_probability: float = 0.1
    smooth_sigma: tuple[float, float] = (0.0, 0.5)

    def validate(self) -> None:
        """Raises ValueError naming the field and what is wrong with it."""
        if self.rotate_rad < 0 or not 0 <= self.scale < 1:
            raise ValueError(f"rotate_rad = {self.rotate_rad}, scale = {self.scale}: at least 0, and in [0, 1)")
        for name in ("noise_probability", "smooth_probability"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} = {getattr(self, name)}: a probability lies in [0, 1]")
        if self.noise_std < 0:
            raise ValueError(f"noise_std = {self.noise_std}: at least 0")
        if not 0 <= self.smooth_sigma[0] <= self.smooth_sigma[1]:
            raise ValueError(
                f"smooth_sigma = {self.smooth_sigma}: smallest and largest width, 0 <= smallest <= largest"
            )


class View(NamedTuple):
    """One clip's turn and noise, drawn without its volume."""

    affine: Tensor  # (3, 3), as in ``Draws``
    noise_std: float  # 0: none


class Draws(NamedTuple):
    """What was drawn for a batch; None for what the configuration never does."""

    affine: Tensor | None  # (B, 3, 3): where an output voxel is read, in voxels from the centre of the box
    noise: Tensor | None  # as the clips: standard normal
    noise_std: Tensor | None  # (B,): 0 for clips without noise
    sigma_voxels: Tensor | None  # (B,): 0 for clips that are not smoothed


class Augment(nn.Module):
    """Draws and makes one view of each clip: ``augment(clips, generator)``.

    Args:
        config: validated here.
        brain: bool (X, Y, Z), where noise is added; None: everywhere. It stays where it is when a clip is rotated.

    Raises:
        ValueError: a field has an impossible value.
    """

    brain: Tensor | None

    def __init__(self, config: AugmentConfig = AugmentConfig(), brain: Tensor | None = None) -> None:
        super().__init__()
        config.validate()
        self.config = config
        self.register_buffer("brain", brain, persistent=False)

    def forward(self, volume: Tensor, generator: torch.Generator) -> Tensor:
        """One view of each clip, a new tensor.

        Args:
            volume: (B, C, X, Y, Z, T), float32 or float64 (places in the box need that precision); left as it is.
            generator: on the device of ``volume``; the view follows from its state.

        Raises:
            ValueError: ``volume`` is no batch of clips of such a dtype, or its grid is not the brain's.
        """
        if volume.ndim != 6 or volume.dtype not in (torch.float32, torch.float64):
            raise ValueError(
                f"volume of shape {tuple(volume.shape)}, {volume.dtype}: clips (B, C, X, Y, Z, T) in float32 or "
                "float64 are needed"
            )
        if self.brain is not None and self.brain.shape != volume.shape[2:5]:
            raise ValueError(f"volume of shape {tuple(volume.shape)}: the brain mask has {tuple(self.brain.shape)}")
        return self.apply_draws(volume, self.draw(volume, generator))

    def draw(self, volume: Tensor, generator: torch.Generator) -> Draws:
        """What :meth:`apply_draws` needs for clips of the shape, dtype and device of ``volume``."""
        config, clips = self.config, len(volume)

        def uniform(low: float, high: float, *shape: int) -> Tensor:
            return torch.rand(clips, *shape, generator=generator, device=volume.device) * (high - low) + low

        affine = noise = noise_std = sigma = None
        if config.rotate_rad or config.scale:
            affine = draw_affine(config, clips, generator)
        if config.noise_probability and config.noise_std:
            noise_std = (uniform(0, 1) < config.noise_probability) * config.noise_std
            noise = torch.randn(volume.shape, generator=generator, device=volume.device, dtype=volume.dtype)
        if config.smooth_probability and config.smooth_sigma[1]:
            sigma = (uniform(0, 1) < config.smooth_probability) * uniform(*config.smooth_sigma)
        return Draws(affine, noise, noise_std, sigma)

    def apply_draws(self, volume: Tensor, draws: Draws) -> Tensor:
        """The view that the draws stand for, a new tensor; each clip's depends on its own draws only."""
        view = volume
        if draws.affine is not None:
            view = resample(view, draws.affine)
        if draws.noise is not None and draws.noise_std is not None:
            view = add_noise(view, draws.noise, draws.noise_std, self.brain)
        if draws.sigma_voxels is not None:
            view = smooth(view, draws.sigma_voxels, radius_of(self.config.smooth_sigma[1]))
        return view.clone() if view is volume else view


def draw_affine(config: AugmentConfig, clips: int, generator: torch.Generator) -> Tensor:
    """(B, 3, 3): turned about three axes, each axis stretched; on the generator's device."""

    def uniform(most: float, *shape: int) -> Tensor:
        return (torch.rand(clips, *shape, generator=generator, device=generator.device) * 2 - 1) * most

    return rotations(uniform(config.rotate_rad, 3)) * (1 + uniform(config.scale, 1, 3))


def draw_view(config: AugmentConfig, generator: torch.Generator) -> View:
    """What one clip is seen through; of ``config`` all but the smoothing."""
    affine = draw_affine(config, 1, generator)[0]
    noisy = bool(torch.rand((), generator=generator) < config.noise_probability)
    return View(affine, config.noise_std if noisy else 0.0)


def rotations(angles_rad: Tensor) -> Tensor:
    """Angles (B, 3) about the axes x, y, z -> (B, 3, 3): Rx Ry Rz, the order in which MONAI composes them."""
    (c0, c1, c2), (s0, s1, s2) = angles_rad.cos().unbind(-1), angles_rad.sin().unbind(-1)
    # Written out, as a GPU may multiply matrices in TF32.
    entries = [
        c1 * c2, -c1 * s2, s1,
        c0 * s2 + s0 * s1 * c2, c0 * c2 - s0 * s1 * s2, -s0 * c1,
        s0 * s2 - c0 * s1 * c2, s0 * c2 + c0 * s1 * s2, c0 * c1,
    ]  # fmt: skip
    return rearrange(entries, "(i j) b -> b i j", i=3)


def resample(volume: Tensor, affine: Tensor) -> Tensor:
    """Clips seen through linear maps about the centre of their box, trilinear; beyond the box its border goes on.

    Args:
        volume: (B, C, X, Y, Z, T), any frames.
        affine: (B, 3, 3): the output at voxel ``o`` is the input at ``affine (o - centre) + centre``.
    """
    frames, size = volume.shape[-1], volume.shape[2:5]
    # grid_sample counts from -1 to 1 along each axis, and names the last axis first.
    unit = torch.tensor([[size[j] / size[i] for j in range(3)] for i in range(3)], dtype=affine.dtype)
    theta = (affine * unit.to(affine.device, non_blocking=True)).flip(1, 2)
    theta = torch.cat([theta, theta.new_zeros(len(theta), 3, 1)], -1).to(volume.dtype)
    channels = rearrange(volume, "b c x y z t -> b (c t) x y z")
    where = affine_grid(theta, list(channels.shape), align_corners=False)
    seen = grid_sample(channels, where, mode="bilinear", padding_mode="border", align_corners=False)
    return rearrange(seen, "b (c t) x y z -> b c x y z t", t=frames)


def add_noise(volume: Tensor, noise: Tensor, std: Tensor, brain: Tensor | None = None) -> Tensor:
    """``volume`` (B, C, X, Y, Z, T) plus ``std`` (B,) times ``noise`` of its shape, where ``brain`` (X, Y, Z) is."""
    amount = rearrange(std.to(volume.dtype), "b -> b 1 1 1 1 1")
    if brain is not None:
        amount = amount * rearrange(brain, "x y z -> 1 1 x y z 1")
    return torch.addcmul(volume, noise, amount)


def radius_of(sigma_voxels: float) -> int:
    """Voxels that a Gaussian reaches to each side."""
    return int(_TRUNCATE * sigma_voxels + 0.5)


def smooth(volume: Tensor, sigma_voxels: Tensor, radius: int) -> Tensor:
    """Each clip under its own Gaussian in space, sampled at the voxels; beyond the box its border goes on.

    Args:
        volume: (B, C, X, Y, Z, T).
        sigma_voxels: (B,); a clip with 0 stays exactly as it is.
        radius: voxels that the kernels of all clips reach to each side, and where their weights end.
    """
    reach = torch.arange(-radius, radius + 1, device=volume.device)
    weights = torch.exp(-0.5 * (reach / sigma_voxels.clamp(min=_NO_WIDTH).unsqueeze(-1)).square())
    weights = rearrange(weights / weights.sum(-1, keepdim=True), "b k -> k b 1 1 1 1 1").to(volume.dtype)
    # A sum over shifted copies: five times as fast on a CPU as a grouped convolution, and never in TF32.
    for axis in (2, 3, 4):
        size = volume.shape[axis]
        places = torch.arange(-radius, size + radius, device=volume.device).clamp(0, size - 1)
        padded = volume.index_select(axis, places)
        volume = torch.zeros_like(volume)
        for shift, weight in enumerate(weights):
            volume.addcmul_(padded.narrow(axis, shift, size), weight)
    return volume
