"""The learning rate of a step and the seeds of what is random in it: pure functions, which a resumed run repeats."""

import math

import numpy as np
import torch

from neurostorm.config import Config
from neurostorm.data.augment import AugmentConfig, View, draw_view
from neurostorm.model.autoencoder import MaskedAutoencoder

MASK, DROPOUT, VALIDATION, VIEW = 1, 2, 3, 4  # what a seed is for


def learning_rate(step: int, total_steps: int, *, peak: float, warmup_fraction: float, min_fraction: float) -> float:
    """Linear warm-up over the first share of the steps, then half a cosine from `peak` to `min_fraction * peak`.

    `step` counts from 0; the first step of a warm-up already learns (peak / warm-up steps).
    """
    warmup = round(warmup_fraction * total_steps)
    if step < warmup:
        return peak * (step + 1) / warmup
    progress = (step - warmup) / max(1, total_steps - warmup)
    return peak * (min_fraction + (1 - min_fraction) * 0.5 * (1 + math.cos(math.pi * progress)))


def seed_for(*parts: int) -> int:
    """A 63-bit seed from integers, far apart for near inputs."""
    return int(np.random.SeedSequence(parts).generate_state(1, np.uint64)[0] >> 1)


def clip_generator(seed: int, purpose: int, row: int) -> torch.Generator:
    """The generator of one clip's mask or view: it follows from its place in the plan, whatever worker has it."""
    return torch.Generator().manual_seed(seed_for(seed, purpose, row))


def draw_masks(model: MaskedAutoencoder, rows: torch.Tensor, config: Config, purpose: int) -> torch.Tensor:
    """bool (B, P) on the CPU: each clip's own mask, from the run's seed and the clip's row in the plan."""
    generators = [clip_generator(config.run.seed, purpose, row) for row in rows.tolist()]
    return torch.cat([model.draw_mask(1, config.data.clip_frames, generator, "cpu") for generator in generators])


def draw_views(rows: torch.Tensor, config: Config) -> list[View]:
    """Each clip's own view, from the run's seed and the clip's row in the plan."""
    augment = config.augment
    drawn = AugmentConfig(augment.rotate_rad, augment.scale, augment.noise_probability, augment.noise_std)
    return [draw_view(drawn, clip_generator(config.run.seed, VIEW, row)) for row in rows.tolist()]
