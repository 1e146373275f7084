"""One rank that saves and loads engines; see ranks.py.

Each case, (stage, dtype, trap, convert), has a folder of its own, FOLDER/0, FOLDER/1, ..., where this rank writes how
it went to outcome-RANK.txt. A case saves after two steps, takes a third, loads, takes the third again; weights and
norms must come out the same. With a trap, part of a file's name, rank 0 puts code into such files before, and loading
must be refused. With convert it loads as if another number of workers had saved.
"""

import os
import traceback
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn

from neurostorm.config import TrainConfig
from neurostorm.train.engine import Engine


class Trap:
    """Makes the file `path` when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


def spring(folder: Path, name: str) -> None:
    """Adds a trap to the checkpoint's files whose name holds `name`; all else in them stays."""
    for file in folder.rglob(f"*{name}*.pt"):
        content = torch.load(file, weights_only=False)
        torch.save(content | {"trap": Trap(folder / "owned")}, file)


def main(
    rank: int, workers: int, meeting: Path, folder: Path, cases: Sequence[tuple[int, str, str | None, bool]]
) -> None:
    torch.set_num_threads(1)
    os.environ["LOCAL_RANK"] = str(rank)
    dist.init_process_group("gloo", f"file://{meeting}", rank=rank, world_size=workers)
    for number, case in enumerate(cases):
        place = folder / str(number)
        place.mkdir(exist_ok=True)
        try:
            save_and_load(place, rank, *case)
            said = "well"
        except Exception:
            said = traceback.format_exc()
        (place / f"outcome-{rank}.txt").write_text(said)


def save_and_load(folder: Path, rank: int, stage: int, dtype: str, trap: str | None, convert: bool) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.LayerNorm(8), nn.Linear(8, 3))
    train = TrainConfig(zero_stage=stage, dtype=dtype, micro_batch=2, global_batch=4)
    engine = Engine(model, train, 2, torch.device("cpu"))

    def step(number: int) -> tuple[float, dict[str, torch.Tensor]]:
        values = torch.randn(2, 6, generator=torch.Generator().manual_seed(10 * number + rank))
        engine.backward(engine(values).square().mean())
        return engine.step(1e-2).gradient_norm, engine.full_weights()

    saved = [step(0), step(1)][-1]
    engine.save(folder)
    dist.barrier()
    if trap is not None:
        if rank == 0:
            spring(folder, trap)
        dist.barrier()
    norm, weights = step(2)
    engine.load(folder, convert)
    restored = engine.full_weights()
    assert all(torch.equal(value, saved[1][name]) for name, value in restored.items()), "other weights"
    again, repeated = step(2)
    assert again == norm, (again, norm)
    assert all(torch.equal(value, weights[name]) for name, value in repeated.items()), "another third step"
    assert any(not torch.equal(value, restored[name]) for name, value in weights.items()), "the third step did nothing"
