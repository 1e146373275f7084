"""One rank of runs without Ray whose reads meet faults, which follow one another; see ranks.py.

Each run comes with its faults: {"damaged": [(step, rank), ...] of two ranks, "away": {(step, rank): times}, "slow":
{(step, rank): seconds}}. What a run ended with is kept in RUN/error-RANK.txt, what its steps did in RUN/steps-RANK.txt.
"""

import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

os.environ["DS_ACCELERATOR"] = "cpu"  # DeepSpeed asks for it when it is loaded

import torch
import torch.distributed as dist

from neurostorm.config import Config
from neurostorm.data import storage_wait
from neurostorm.data.batch_stream import BatchStream
from neurostorm.data.corpus import open_corpus
from neurostorm.store.layout import ClipReadError, StoreUnavailableError
from neurostorm.tracking.tracker import Tracker
from neurostorm.train.build import assemble, export
from neurostorm.train.records.time_account import TimeAccount

Faults = dict[str, Any]


def main(rank: int, workers: int, meeting: Path, configs: Sequence[Config], faults: Sequence[Faults]) -> None:
    torch.set_num_threads(1)
    os.environ["LOCAL_RANK"] = str(rank)
    storage_wait.SHORTEST_S = 0.01
    dist.init_process_group("gloo", f"file://{meeting}", rank=rank, world_size=workers)
    for config, of_run in zip(configs, faults, strict=True):
        config.run.folder.mkdir(parents=True, exist_ok=True)
        try:
            train(config, rank, workers, of_run)
        except Exception as error:
            (config.run.folder / f"error-{rank}.txt").write_text(f"{type(error).__name__}: {error}")


def train(config: Config, rank: int, workers: int, faults: Faults) -> None:
    corpus, logged = open_corpus(config), []
    read, now = corpus.store.frames, {}
    damaged = {
        (step, corpus.runs[row["run"]], int(row["start"]))
        for step, of_rank in faults.get("damaged", ())
        for row in corpus.plan.step_rows(step, of_rank, 2)
    }
    left = dict(faults.get("away", {}))

    def faulty(run: str, start: int, count: int, **named: Any) -> Any:
        at = (now["step"], rank)
        if any((now["step"], run, frame) in damaged for frame in range(start, start + count)):
            raise ClipReadError(run, start, "chunk 0 is damaged")
        if left.get(at, 0) > 0:
            left[at] -= 1
            raise StoreUnavailableError("503 SlowDown")
        return read(run, start, count, **named)

    corpus.store.frames = faulty

    def feed(first_step: int) -> BatchStream:
        def make() -> Any:
            for step in range(first_step, corpus.plan.total_steps(config.train.epochs, config.train.max_steps)):
                now["step"] = step
                time.sleep(faults.get("slow", {}).get((step, rank), 0))
                yield corpus.reader.batch(corpus.plan.step_rows(step, rank, workers))

        return BatchStream(make())

    tracker = Tracker()
    tracker.observe(lambda values, step: logged.append((step, values)))
    loop = assemble(config, corpus, tracker, TimeAccount(), feed, rank=rank, device=torch.device("cpu"))
    validate = loop.validation.run

    def undisturbed(done: int) -> Any:
        now["step"] = None
        return validate(done)

    object.__setattr__(loop, "validation", type("Undisturbed", (), {"run": staticmethod(undisturbed)}))
    watch(loop, now)
    loop.run()
    waits = [values["data/storage_wait_s"] for _, values in logged if "data/storage_wait_s" in values]
    (config.run.folder / f"waited-{rank}.txt").write_text(str(sum(waits)))
    export(loop, corpus, config.run.folder / "model")


def watch(loop: Any, now: dict[str, Any]) -> None:
    """Notes which steps changed the weights."""
    step = loop.step

    def watched(batch: Any, at: int, clips: Any) -> Any:
        before = loop.engine.full_weights()
        done = step(batch, at, clips)
        after = loop.engine.full_weights()
        changed = any(not torch.equal(before[name], after[name]) for name in before)
        with (loop.folder / f"steps-{loop.rank}.txt").open("a") as file:
            file.write(f"{at} counted={clips.counted} applied={done[2].applied} changed={changed}\n")
        return done

    loop.step = watched
