#!/usr/bin/env python3
"""Strikes a pretraining run with faults and says what each one cost.

chaos.py                              every fault, three rounds each
chaos.py --faults worker driver       some
chaos.py --json FILE                  the figures for a machine
chaos.py soak --minutes 30            random faults on one run: useful steps per second, against a run without

    twin:  start -----------------------------------------------> end
    run:   start ---- fault -- back ---- fault -- back -- ... --> end   --> the same losses? each clip once? steps lost?

Each fault has a run of its own on two workers, which it strikes in the middle, `--rounds` times (or a run for every
round, where it takes long). `lost` are the most steps that a restart did again; `back after s` is the median time from
the fault to the first step that was not done before; `loss error` is the largest relative difference from the twin's
loss over all steps.
"""

import argparse
import json
import os
import random
import shutil
import signal
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from chaos.check import Outcome, table
from chaos.faults import LOCAL, CannotTry, Fault
from chaos.job import JobError, Ledger, make_store
from chaos.nodes import ON_NODES
from chaos.scene import EVERY, FRAMES, STEPS_PER_EPOCH, Scene, Setting
from chaos.services import OF_SERVICES
from chaos.soak import soak
from chaos.storage import OF_STORAGE
from chaos.withdrawn import WITHDRAWN
from neurostorm.commands.options import refuse_missing_folder

FAULTS: dict[str, Fault] = LOCAL | OF_STORAGE | OF_SERVICES | ON_NODES | WITHDRAWN
FIRST = 2 * EVERY + 5  # no fault strikes before: two checkpoints are there


def main(argv: Sequence[str] | None = None) -> int:
    """Exit status 1 if a run is not as it should be."""
    options = parse(argv)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that what was started is ended
    if options.folder is not None:
        options.folder.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix="chaos-", dir=options.folder))
    outcomes: list[Outcome] = []
    result: dict[str, Any] = {}
    try:
        setting = Setting(folder, make_store(folder / "store", FRAMES), options.steps)
        if options.what == "soak":
            result, failed = soak(setting, options.minutes, options.seed, options.faults)
        else:
            strike_all(setting, options, outcomes)
            failed = any(outcome.problems for outcome in outcomes)
    finally:
        if outcomes:  # of as many faults as there was time for
            print(f"\n{options.rounds} rounds, {options.steps} steps, a checkpoint every {EVERY}\n{table(outcomes)}")
            result = {outcome.fault: outcome.as_json() for outcome in outcomes}
        if options.json and result:
            shape = {"steps": options.steps, "every": EVERY, "rounds": options.rounds, "cores": os.cpu_count()}
            options.json.write_text(json.dumps(shape | {options.what: result}, indent=2) + "\n")
        if options.keep:
            print(f"logs: {folder}/notes", file=sys.stderr)
        else:
            shutil.rmtree(folder, ignore_errors=True)
    return int(failed)


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    add = parser.add_argument
    add("what", nargs="?", choices=("faults", "soak"), default="faults", help="default: faults")
    add("--faults", nargs="+", choices=FAULTS, metavar="NAME", help=f"of {', '.join(FAULTS)} (default: all)")
    add("--rounds", type=int, default=3, help="times that each fault strikes (default: 3)")
    add("--steps", type=int, default=2 * STEPS_PER_EPOCH, help=f"of a run, whole epochs of {STEPS_PER_EPOCH}")
    add("--minutes", type=float, default=30.0, help="of a soak (default: 30)")
    add("--seed", type=int, default=0, help="of the moments and victims that are drawn (default: 0)")
    add("--folder", type=Path, help="where temporary files go, a short path (default: TMPDIR)")
    add("--keep", action="store_true", help="leave them there")
    add("--json", type=Path, help="write the figures here")
    options = parser.parse_args(argv)
    if options.rounds < 1:
        parser.error(f"--rounds {options.rounds}: at least 1")
    if options.steps % STEPS_PER_EPOCH or options.steps < moments(options.rounds, random.Random(0))[-1] + 2 * EVERY:
        parser.error(f"--steps {options.steps}: whole epochs of {STEPS_PER_EPOCH}, and enough for the rounds")
    refuse_missing_folder(parser, "--json", options.json)
    return options


def moments(rounds: int, draw: random.Random) -> list[int]:
    """The steps at which a fault strikes, anywhere between two checkpoints."""
    return [FIRST + 2 * EVERY * nth + draw.randrange(EVERY) for nth in range(rounds)]


def strike_all(setting: Setting, options: argparse.Namespace, outcomes: list[Outcome]) -> None:
    """Runs every fault, after its twin; `outcomes` grows with each."""
    twins: dict[str, Ledger] = {}
    for name in options.faults or FAULTS:
        fault = FAULTS[name]
        like = json.dumps(fault.alters, sort_keys=True)
        if like not in twins:
            twins[like] = unstruck(setting, f"twin-{len(twins)}", fault)
        outcomes.append(try_fault(name, fault, setting, twins[like], options))
        say(f"{name}: {outcomes[-1].status}, back after {[round(s, 1) for s in outcomes[-1].recovery_s]} s")


def unstruck(setting: Setting, name: str, fault: Fault) -> Ledger:
    """The twin of a fault's runs."""
    twin = Scene(setting, setting.config(name, fault.alters), random.Random(0))
    try:
        say(f"{name}, without a fault")
        twin.start().finish(600)
    finally:
        twin.close()
    return twin.words()


def try_fault(name: str, fault: Fault, setting: Setting, expected: Ledger, options: argparse.Namespace) -> Outcome:
    """Its rounds, in one run or in as many."""
    outcome = Outcome(name, fault.allowed)
    runs = options.rounds if fault.fresh else 1
    for run in range(runs):
        draw = random.Random(f"{options.seed} {name} {run}")
        run_name = f"{name}-{run}" if fault.fresh else name
        scene = fault.scene(setting, setting.config(run_name, fault.alters, fault.overrides), draw)
        undo = None
        try:
            undo = fault.prepare(scene)
            scene.start()
            for step in moments(options.rounds // runs, draw):
                scene.at(step)
                fault.strike(scene)
                outcome.recovery_s.append(scene.back())
            scene.job.finish(600)
            fault.check(scene)
            outcome.judge(scene.job.steps(), fault.reference(scene, expected), scene.words())
        except CannotTry as reason:
            outcome.skipped = str(reason)
        except JobError as error:
            outcome.problems.append(str(error))
        finally:
            scene.close()
            if undo is not None:
                undo()
        outcome.problems += scene.problems
        if outcome.skipped:
            break
    return outcome


def say(line: str) -> None:
    """How far it is, for people who wait."""
    print(f"chaos: {line}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
