"""Random faults on one run for some minutes: how many useful steps come of it, beside a run that nothing strikes.

    run:   start -- worker -- nan -- driver -- hang -- corrupt -- ... -- killed when the time is over, at step N
    twin:  start --------------------------------> killed at step N: the same losses? how fast is it?

Useful steps are those that count in the end, however often they were done. The share is the run's useful steps per
second of wall time, first start-up included, over the twin's steps per second from its first step to its last.
"""

import random
import statistics
import sys
import time
from collections.abc import Sequence
from typing import Any

from chaos.check import clip_problems, loss_problems, replays
from chaos.faults import LOCAL
from chaos.job import JobError
from chaos.scene import STEPS_PER_EPOCH, Scene, Setting

KINDS = ("worker", "driver", "hang", "mid-checkpoint", "corrupt", "nan")
CALM_S = 60.0  # mean time from a run's being back to the next fault
EPOCHS = 10_000  # more than there is time for


def soak(setting: Setting, minutes: float, seed: int, kinds: Sequence[str] | None) -> tuple[dict[str, Any], bool]:
    """The figures, and whether something is wrong."""
    draw = random.Random(seed)
    endless = Setting(setting.folder, setting.store, EPOCHS * STEPS_PER_EPOCH)
    scene = Scene(endless, endless.config("soak", {"scale": {"max_failures": -1}}), draw)
    kinds = [kind for kind in kinds or KINDS if kind in KINDS]
    struck, recovery_s, problems = [], [], []
    for kind in kinds:
        LOCAL[kind].prepare(scene)
    began_s = time.monotonic()
    end_s = began_s + 60 * minutes
    try:
        scene.start()
        scene.at(1)
        while True:
            calm_s = draw.expovariate(1 / CALM_S)
            if time.monotonic() + calm_s > end_s:
                break
            time.sleep(calm_s)
            kind = draw.choice(kinds)
            LOCAL[kind].strike(scene)
            recovery_s.append(scene.back())
            struck.append(kind)
            print(f"chaos: {kind}, back after {recovery_s[-1]:.1f} s", file=sys.stderr, flush=True)
        time.sleep(max(0.0, end_s - time.monotonic()))
        steps, wall_s = scene.job.steps(), time.monotonic() - began_s
    except JobError as error:
        problems.append(str(error))
        steps, wall_s = scene.job.steps(), time.monotonic() - began_s
    finally:
        scene.close()
    last = max(steps, default=0)  # of which the other rank may not have written yet
    words = {step: word for step, word in scene.words().items() if step < last}
    rate, expected = twin_of(scene, last)
    problems += scene.problems + clip_problems(expected, words) + loss_problems(expected, words)
    useful = len(set(steps))
    result = {
        "minutes": wall_s / 60, "faults": {kind: struck.count(kind) for kind in kinds}, "useful_steps": useful,
        "repeated_steps": sum(replays(steps)), "useful_steps_per_s": useful / wall_s, "unfaulted_steps_per_s": rate,
        "of_unfaulted": useful / wall_s / rate, "median_recovery_s": statistics.median(recovery_s or [0.0]),
        "problems": problems,
    }  # fmt: skip
    show(result)
    return result, bool(problems)


def twin_of(scene: Scene, steps: int) -> tuple[float, dict[int, tuple[float, list[int]]]]:
    """The rate in steps per second, and the losses, of the same run without a fault, up to `steps`."""
    config = scene.config.model_copy(update={"run": scene.config.run.model_copy(update={"name": "soak-twin"})})
    twin = Scene(scene.setting, config, scene.random)
    try:
        twin.start()
        twin.at(1)
        began_s, begun = time.monotonic(), twin.job.reached()
        twin.job.wait_for(lambda: twin.job.reached() >= steps, f"step {steps}", timeout_s=7200, pause_s=0.1)
        rate = (twin.job.reached() - begun) / (time.monotonic() - began_s)
    finally:
        twin.close()
    return rate, {step: word for step, word in twin.words().items() if step < steps}


def show(result: dict[str, Any]) -> None:
    """The figures for people."""
    faults = ", ".join(f"{times} {kind}" for kind, times in result["faults"].items())
    print(
        f"{result['minutes']:.0f} minutes, {sum(result['faults'].values())} faults: {faults}\n"
        f"{result['useful_steps']} useful steps, {result['repeated_steps']} done again; "
        f"{result['useful_steps_per_s']:.2f} a second, {result['unfaulted_steps_per_s']:.2f} without faults: "
        f"{result['of_unfaulted']:.0%}; back after {result['median_recovery_s']:.1f} s (median)"
    )
    for problem in result["problems"]:
        print(f"FAILED: {problem}")
