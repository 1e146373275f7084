"""One rank that compares an engine's bf16 gradients with fp32 sums of what each micro-batch gives; see ranks.py.

For every stage of ZeRO it writes the largest relative difference of any parameter to FOLDER/stage-STAGE-RANK.txt.
"""

import os
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn

from neurostorm.config import TrainConfig
from neurostorm.train.engine import Engine

MICRO_BATCHES = 8


def main(rank: int, workers: int, meeting: Path, folder: Path) -> None:
    torch.set_num_threads(1)
    os.environ["LOCAL_RANK"] = str(rank)
    dist.init_process_group("gloo", f"file://{meeting}", rank=rank, world_size=workers)
    for stage in range(4):
        difference = compare(stage, rank, workers)
        (folder / f"stage-{stage}-{rank}.txt").write_text(str(difference))


def build() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv3d(2, 6, 1), nn.Flatten(), nn.Linear(48, 8), nn.LayerNorm(8), nn.Linear(8, 3))


def compare(stage: int, rank: int, workers: int) -> float:
    generator = torch.Generator().manual_seed(rank)
    inputs = [torch.randn(2, 2, 2, 2, 2, generator=generator) for _ in range(MICRO_BATCHES)]
    expected = reference(inputs, workers)
    train = TrainConfig(zero_stage=stage, dtype="bf16", micro_batch=2, global_batch=2 * MICRO_BATCHES * workers)
    engine = Engine(build(), train, 2 * MICRO_BATCHES, torch.device("cpu"))
    for values in inputs[:-1]:
        engine.backward(loss_of(engine, values))
    engine.backward(loss_of(engine, inputs[-1]))
    from deepspeed.utils import safe_get_full_grad

    worst = 0.0
    for name, parameter in engine.module.named_parameters():
        gradient = safe_get_full_grad(parameter)
        difference = (gradient - expected[name]).abs().max() / expected[name].abs().max()
        worst = max(worst, float(difference))
    engine.step(1e-3)
    return worst


def loss_of(model: nn.Module, values: torch.Tensor) -> torch.Tensor:
    return model(values).float().square().mean()


def reference(inputs: list[torch.Tensor], workers: int) -> dict[str, torch.Tensor]:
    """The mean over micro-batches and ranks, added up in fp32, of gradients that autocast to bf16 computes."""
    model = build()
    parameters = dict(model.named_parameters())
    sums = {name: torch.zeros_like(parameter) for name, parameter in parameters.items()}
    for values in inputs:
        with torch.autocast("cpu", torch.bfloat16):
            loss = loss_of(model, values)
        gradients = torch.autograd.grad(loss / len(inputs), list(parameters.values()))
        for name, gradient in zip(sums, gradients, strict=True):
            sums[name] += gradient
    for value in sums.values():
        dist.all_reduce(value)
        value /= workers
    return sums
