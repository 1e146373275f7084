"""Faults that strike a run on one machine: lost and stopped processes, damaged files, losses that are not finite.

    worker           SIGKILL of a training worker                    Ray Train starts the workers again
    driver           SIGKILL of the driver and its Ray               the same command again
    hang             SIGSTOP of a training worker                    the collective times out, workers start again
    mid-checkpoint   SIGKILL while a checkpoint is not committed     resumed from the one before
    corrupt          driver killed, newest checkpoint damaged        the same command resumes from its copy
    shard            frames of the store damaged                     the job ends at once, names the run; mended, again
    nan              a loss that is not finite, once, on one rank    the step is computed once more
    second-driver    the same command while the run trains           it is refused and names the first, which goes on

A fault is a function of a Scene: it strikes, calls `struck`, and starts the job again where a person would have to.
"""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

from chaos.job import ROOT, Job, JobError, Ledger, entries
from chaos.scene import EVERY, Scene, end

REPEATED = "repeating step="  # what a run says when it computes a step once more
HOOK = Path(__file__).resolve().parent / "hook"
SENT_S = 1.0  # what a stopped process has sent to an object store has arrived by then


def fine(scene: Scene) -> None:
    """No more to be checked at the end."""


@dataclass(frozen=True)
class Fault:
    """A fault and what a run needs for it.

    strike     what it does, every round
    overrides  of the configuration, on which no loss depends
    alters     of the configuration, for a fault with a twin of its own
    allowed    steps that may be done again
    fresh      every round wants a run of its own
    prepare    before the run starts; returns what ends what it began, and may say that the fault cannot be tried
    check      after the run's end
    reference  of a run that has ended, and its twin's ledger: the ledger that it is compared with
    """

    strike: Callable[[Scene], None]
    overrides: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    alters: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    allowed: int = EVERY
    fresh: bool = False
    scene: type[Scene] = Scene
    prepare: Callable[[Scene], Callable[[], None]] = lambda scene: lambda: None
    check: Callable[[Scene], None] = fine
    reference: Callable[[Scene, Ledger], Ledger] = lambda scene, twin: twin


class CannotTry(RuntimeError):
    """This machine or user cannot have this fault; the message says why."""


def kill_worker(scene: Scene) -> None:
    workers = two_workers(scene)
    scene.random.choice(workers).kill()
    scene.struck()


def kill_driver(scene: Scene) -> None:
    scene.job.kill()
    scene.struck()
    scene.start()


def stop_worker(scene: Scene) -> None:
    stopped = scene.random.choice(two_workers(scene))
    stopped.suspend()
    scene.struck()
    scene.back()
    end([stopped])


def kill_in_checkpoint(scene: Scene) -> None:
    workers = hold_in_checkpoint(scene)
    if scene.random.random() < 0.5:
        kill_driver(scene)
        return
    victim = scene.random.choice(workers)
    victim.kill()
    at_s = time.monotonic()
    for worker in workers:
        if worker is not victim:
            worker.resume()
    scene.struck(at_s=at_s)


def hold_in_checkpoint(scene: Scene) -> list[psutil.Process]:
    """Stops the workers while a checkpoint is being written, so that a kill is sure to fall into it; gives them."""
    workers = two_workers(scene)
    while True:
        scene.job.wait_for(lambda: bool(scene.begun()), "a checkpoint that is being written", pause_s=0.001)
        for worker in workers:
            worker.suspend()
        time.sleep(SENT_S)
        if scene.begun():
            return workers
        for worker in workers:
            worker.resume()


def damage_checkpoint(scene: Scene) -> None:
    scene.job.kill()
    scene.struck()
    newest = scene.committed()[-1]
    damage(newest)
    scene.start()
    scene.back()
    said = scene.job.output()
    scene.note("passing over checkpoint" in said and newest.name in said, f"{newest.name} was not passed over aloud")


def damage_shard(scene: Scene) -> None:
    """The run whose clips come next is damaged from its first frame to its last."""
    last = entries(scene.job.folder / "ledger" / "rank-0.jsonl")[-1]
    run = last["clips"][0].partition("[")[0]
    shard = Path(str(scene.config.data.store), run, "0.0")
    whole = shard.read_bytes()
    with shard.open("r+b") as file:
        file.write(bytes(byte ^ 0xFF for byte in whole))
    try:
        scene.struck()
        scene.job.wait_for_end()
    finally:
        with shard.open("r+b") as file:
            file.write(whole)
    said = scene.job.output()
    scene.note(scene.job.process.returncode != 0, "the job ended well with a damaged store")
    scene.note("clips are damaged or missing" in said and run in said, f"the job did not name {run}")
    scene.job.kill()
    scene.start()


def poison(scene: Scene) -> None:
    file = Path(scene.environment["CHAOS_POISON"])
    file.touch()
    scene.job.wait_for(lambda: not file.exists(), "a poisoned step", pause_s=0.001)
    scene.struck(goes_on=True)


def may_be_poisoned(scene: Scene) -> Callable[[], None]:
    scene.environment |= {
        "CHAOS_POISON": str(scene.setting.folder / f"{scene.config.run.name}.poison"), "PYTHONPATH": f"{HOOK}:{ROOT}",
    }  # fmt: skip
    return lambda: None


def was_repeated(scene: Scene) -> None:
    said = scene.job.output()
    scene.note(REPEATED in said, "no step was said to be repeated")


def start_second(scene: Scene) -> None:
    first, notes = scene.job.process.pid, scene.setting.folder / "notes" / "second"
    scene.struck(goes_on=True)
    second = Job(scene.config, scene.command(), notes, **scene.setting.environment, **scene.environment)
    try:
        status = second.wait_for_end()
    finally:
        if second.process.poll() is None:
            second.kill()
    said = second.output()
    scene.note(status != 0, "a second driver ran")
    scene.note(f"in use by process {first} on " in said, f"the second driver did not name the first: {said[-2000:]}")


def two_workers(scene: Scene) -> list[psutil.Process]:
    """The training workers that train now."""
    workers = [worker for worker in scene.workers() if worker.status() != psutil.STATUS_ZOMBIE]
    if len(workers) < 2:
        raise JobError(f"found {len(workers)} training workers instead of 2")
    return workers[-2:]


def damage(checkpoint: Path) -> None:
    """One bit of its largest file."""
    flip(max((path for path in checkpoint.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size))


def flip(file: Path) -> None:
    """One bit of the byte in the middle."""
    with file.open("r+b") as opened:
        opened.seek(file.stat().st_size // 2)
        byte = opened.read(1)[0]
        opened.seek(-1, 1)
        opened.write(bytes([byte ^ 1]))


LOCAL: dict[str, Fault] = {
    "worker": Fault(kill_worker),
    "driver": Fault(kill_driver),
    "hang": Fault(stop_worker),
    "mid-checkpoint": Fault(kill_in_checkpoint),
    "corrupt": Fault(damage_checkpoint),
    "shard": Fault(damage_shard, {"data": {"max_bad_fraction": 0.0, "verify": "always"}}),
    "nan": Fault(poison, allowed=0, prepare=may_be_poisoned, check=was_repeated),
    "second-driver": Fault(start_second, allowed=0),
}
