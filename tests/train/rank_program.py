"""One rank of runs without Ray, which follow one another; see ranks.py.

The clips of a run's poisoned step hold infinite values on rank 0, and those of two steps before it do so at the first
try alone; -1 poisons none. The last validation is kept in RUN/final.json. With `last` a run ends with the checkpoint of
as many steps.
"""

import json
import os
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

os.environ["DS_ACCELERATOR"] = "cpu"  # DeepSpeed asks for it when it is loaded

import torch
import torch._dynamo  # which an optimizer loads
import torch.distributed as dist

from neurostorm.config import Config
from neurostorm.data.batch_stream import BatchStream
from neurostorm.io.atomic import atomic_write
from neurostorm.tracking.tracker import Tracker
from neurostorm.train.build import assemble, export
from neurostorm.train.engine import import_deepspeed
from neurostorm.train.records.pinned_manifest import planned
from neurostorm.train.records.time_account import TimeAccount

import_deepspeed()


class Left(Exception):
    """A run that ended before its last step, as was asked for."""


def main(
    rank: int, workers: int, meeting: Path, configs: Sequence[Config], poisons: Sequence[int], last: int | None = None
) -> None:
    torch.set_num_threads(1)
    os.environ["LOCAL_RANK"] = str(rank)
    dist.init_process_group("gloo", f"file://{meeting}", rank=rank, world_size=workers)
    for config, poison in zip(configs, poisons, strict=True):
        with suppress(Left):
            train(config, rank, workers, poison, last)


def train(config: Config, rank: int, workers: int, poison: int, last: int | None) -> None:
    config.run.folder.mkdir(parents=True, exist_ok=True)
    account = TimeAccount(config.run.folder if rank == 0 else None)
    corpus = planned(config)

    def feed(first_step: int) -> BatchStream:
        steps = range(first_step, corpus.plan.total_steps(config.train.epochs, config.train.max_steps))
        return BatchStream(corpus.reader.batch(corpus.plan.step_rows(step, rank, workers)) for step in steps)

    loop = assemble(config, corpus, Tracker(), account, feed, rank=rank, device=torch.device("cpu"))
    if poison >= 0:
        poison_step(loop, poison)
    if last is not None and last < loop.total_steps:
        leave_after(loop, last)
    final = loop.run()
    if rank == 0:
        atomic_write(config.run.folder / "final.json", json.dumps(final).encode())
    export(loop, corpus, config.run.folder / "model")


def leave_after(loop, step: int) -> None:
    """Ends the run once the checkpoint of these finished steps is saved."""
    save = loop.save

    def saved(done):
        save(done)
        if done == step:
            raise Left

    loop.save = saved


def poison_step(loop, step: int) -> None:
    """Makes the loss of one step infinite on rank 0, that of another once, and records what steps did to parameters."""
    forward_backward, engine_step, now = loop.forward_backward, loop.engine.step, {}
    passing = [step - 2]

    def unpack_infinite(batch):
        patches = type(loop.unpack).forward(loop.unpack, batch)
        return type(patches)(patches.values * float("inf"), patches.centre, patches.inside)

    def poisoned(batch, at, clips):
        now["step"] = at
        if loop.rank == 0 and (at == step or at in passing):
            passing.clear()
            loop.unpack.forward = unpack_infinite
        try:
            return forward_backward(batch, at, clips)
        finally:
            loop.unpack.__dict__.pop("forward", None)

    def watched(lr):
        before = loop.engine.full_weights()
        outcome = engine_step(lr)
        after = loop.engine.full_weights()
        changed = any(not torch.equal(before[name], after[name]) for name in before)
        with (loop.folder / f"steps-{loop.rank}.txt").open("a") as file:
            file.write(f"{now['step']} applied={outcome.applied} changed={changed}\n")
        return outcome

    loop.forward_backward, loop.engine.step = poisoned, watched
