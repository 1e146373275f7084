"""How long a training step will about take on this CPU, and a warning when that is too long to wait for."""

import math

import torch

from neurostorm.config import Config
from neurostorm.config.presets import PRESETS
from neurostorm.data.corpus import Corpus
from neurostorm.model.cost import clip_cost, measured_peak
from neurostorm.store import GRIDS, Grid
from neurostorm.train.build import build_model

SLOW_STEP_S, LOOK_STEPS = 3.0, 5
CPU_SHARE = 0.06  # of a matrix product's rate, in steps of `tiny`: .10 to .12 of one worker alone, .05 of two


def step_s(config: Config, corpus: Corpus) -> float:
    """Seconds that a step will about take on CPUs like this machine's; 0 on GPUs, of which nothing is estimated.

    The model's operations (on no device, so nothing is allocated) at the share of this processor's matrix product that
    steps of `tiny` reach; takes about a second.
    """
    scale = config.scale
    if scale.gpus_per_worker or config.mask.kind == "atlas":  # an atlas is not read twice for an estimate
        return 0.0
    with torch.device("meta"):
        model = build_model(config, corpus.store)
    before = torch.get_num_threads()
    torch.set_num_threads(scale.threads_per_worker)
    try:
        peak = measured_peak("cpu", torch.bfloat16 if config.train.dtype == "bf16" else torch.float32)
    finally:
        torch.set_num_threads(before)
    return config.clips_per_worker * clip_cost(model, config.data.clip_frames).train_flops / (CPU_SHARE * peak)


def slow_words(config: Config, grid: Grid, steps: int, seconds: float) -> str:
    """The warning for `steps` steps of so many seconds each, with what is faster; empty when they are not slow."""
    if seconds < SLOW_STEP_S:
        return ""
    times = math.prod(grid.shape) / math.prod(GRIDS["4mm"].shape)
    faster = ["use a GPU"]
    if times > 1:
        shape = "x".join(map(str, grid.shape))
        faster.append(f"ingest with --grid 4mm, as {shape} voxels are {times:.0f} times the work of its 48x48x48")
    if config.model.embed_dim > PRESETS["tiny"]["model"]["embed_dim"]:
        faster.append("use --preset tiny")
    look = f"for a first look use --train.max_steps {LOOK_STEPS}; to train, " if steps > LOOK_STEPS else "to train, "
    return (
        f"about {seconds:.0f} s a step on this machine's CPU, {_duration(steps * seconds)} for {steps} steps: "
        f"{look}{', or '.join(faster)}"
    )


def _duration(seconds: float) -> str:
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:,.1f} h"
