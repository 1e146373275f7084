"""Ranks that save an engine at each ZeRO stage, and ranks that load what others saved; see ranks.py.

`save` trains two steps at every stage, saves in FOLDER/saved-STAGE-WORKERS and takes a third step, whose gradient norm
and weights it keeps. `load` loads each of those at every stage, saves again without a step, and takes the third step.
What it found is in FOLDER/loaded-STAGE-WORKERS-from-STAGE-WORKERS.pt.
"""

import os
import traceback
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from neurostorm.config import TrainConfig
from neurostorm.train.checkpoint.saved_state import MOMENTS, WEIGHT, read_state
from neurostorm.train.checkpoint.unpickle import tensors_only
from neurostorm.train.engine import Engine
from neurostorm.train.optimizer import parameter_groups

STAGES, WORKERS, GLOBAL_BATCH = range(4), (1, 2), 4


class Model(nn.Module):
    """Odd sizes, a frozen parameter, a buffer, and a parameter that never gets a gradient."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.first, self.norm, self.last = nn.Linear(7, 9), nn.LayerNorm(9), nn.Linear(9, 3)
        self.frozen = nn.Parameter(torch.randn(5, 3), requires_grad=False)
        self.unused = nn.Parameter(torch.randn(3))
        self.register_buffer("shift", torch.randn(7))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(self.norm(self.first(x + self.shift))) + self.frozen.sum(0)


def begin(rank: int, workers: int, meeting: Path) -> None:
    torch.set_num_threads(1)
    os.environ["LOCAL_RANK"] = str(rank)
    dist.init_process_group("gloo", f"file://{meeting}", rank=rank, world_size=workers)


def build(stage: int, workers: int, seed: int) -> Engine:
    train = TrainConfig(
        zero_stage=stage, micro_batch=2, global_batch=GLOBAL_BATCH, clip_norm=0.05, weight_decay=0.5, lr=1e-2
    )
    return Engine(Model(seed), train, GLOBAL_BATCH // workers, torch.device("cpu"))


def take_step(engine: Engine, number: int, rank: int, workers: int) -> float:
    values = torch.randn(GLOBAL_BATCH, 7, generator=torch.Generator().manual_seed(number))
    for micro in values.chunk(workers)[rank].split(2):
        engine.backward(engine(micro).square().mean())
    return engine.step(1e-2).gradient_norm


def parts(folder: Path) -> dict[str, Any]:
    """Everything in a checkpoint, whole."""
    groups = parameter_groups(model := Model(0), 0.5)
    names = {parameter: name for name, parameter in model.named_parameters()}
    shapes = {name: parameter.shape for name, parameter in model.named_parameters()}
    with tensors_only():
        state = read_state(folder / "state", [names[p] for group in groups for p in group["params"]])
    found: dict[str, Any] = {f"buffer {name}": value.clone() for name, value in state.buffers.items()}
    for name, parameter in state.parameters.items():
        for key in (WEIGHT, *MOMENTS):
            found[f"{key} {name}"] = parameter.whole(key, shapes[name])
        found[f"step {name}"] = parameter.step
    return found


def save(rank: int, workers: int, meeting: Path, folder: Path) -> None:
    begin(rank, workers, meeting)
    for stage in STAGES:
        place = folder / f"saved-{stage}-{workers}"
        engine = build(stage, workers, seed=1)
        for number in range(2):
            take_step(engine, number, rank, workers)
        engine.save(place)
        weights = engine.full_weights()
        norm = take_step(engine, 2, rank, workers)
        after = engine.full_weights()
        dist.barrier()
        if rank == 0:
            torch.save({"saved": weights, "norm": norm, "after": after}, place / "expected.pt")
        dist.barrier()


def load(rank: int, workers: int, meeting: Path, folder: Path) -> None:
    begin(rank, workers, meeting)
    for stage in STAGES:
        for source in (f"{before}-{ranks}" for before in STAGES for ranks in WORKERS):
            place = folder / f"again-{stage}-{workers}-from-{source}"
            try:
                engine = build(stage, workers, seed=2)
                decays = [group["weight_decay"] for group in engine._engine.optimizer.param_groups]
                engine.load(folder / f"saved-{source}", convert=True)
                weights = engine.full_weights()
                engine.save(place)
                dist.barrier()
                again = parts(place)
                dist.barrier()
                norm = take_step(engine, 2, rank, workers)
                result = {"saved": weights, "again": again, "norm": norm, "after": engine.full_weights()}
                result["decays"] = [decays, [group["weight_decay"] for group in engine._engine.optimizer.param_groups]]
            except Exception:
                result = {"error": traceback.format_exc()}
            if rank == 0:
                torch.save(result, folder / f"loaded-{stage}-{workers}-from-{source}.pt")
