"""Runs that stop and go on, without Ray: with another number of workers, from a damaged checkpoint's copy, and after
steps that have to be done again.

one worker:   whole and muon, to their end      account, to its end, then without its last checkpoint
two workers:  stages 1, 3, 2, and muon, to step 2        stage 1's checkpoint is damaged
one worker:   stages 1, 3, 3, and muon, from there to their end      account, once more

The runs of a line share their processes, which take longer to start than to train.
"""

import json
import shutil
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from chaos.faults import damage

from neurostorm.config import Config
from neurostorm.model.hub.pretrained import load_pretrained
from neurostorm.train.checkpoint import checkpoints
from neurostorm.train.records.time_account import ACCOUNT

STEPS, CHANGED = 4, 2
ACCOUNT_STEPS = 6
STAGES = ("1-1", "3-3", "2-3")  # of ZeRO: before and after
SETTINGS = {
    "model": {"embed_dim": 8, "depths": (2, 1), "heads": (1, 2), "tokens": "brain", "decoder": "light"},
    "strd": {"enabled": True},
    "train": {
        "max_steps": STEPS, "global_batch": 4, "micro_batch": 2, "validate_every": 100, "log_every": 100,
        "clip_norm": 0.01,  # every step is clipped, by a norm of gradients that the workers part
    },
    "checkpoint": {"every": CHANGED}, "tracking": {"clip_ledger": True, "pictures": False}, "scale": {"workers": 1},
}  # fmt: skip


class Runs(NamedTuple):
    """Configurations of runs that have ended, and the account's run after its first and second end."""

    whole: Config
    changed: dict[str, Config]
    muon: tuple[Config, Config]
    accounts: tuple[dict, dict]


@pytest.fixture(scope="module")
def runs(ball_config_in, run_ranks, tmp_path_factory) -> Runs:
    made = tmp_path_factory.mktemp("goes_on")

    def config(name: str, **train: object) -> Config:
        settings = {**SETTINGS, "train": {**SETTINGS["train"], **train}}
        return ball_config_in(made, run={"name": name}, **settings)

    whole = config("whole")
    counted = config("account", max_steps=ACCOUNT_STEPS, log_every=2)
    counted = counted.model_copy(update={"checkpoint": counted.checkpoint.model_copy(update={"every": 4})})
    changed = {stages: config(f"stages-{stages}", zero_stage=int(stages[-1])) for stages in STAGES}

    muon = {"optimizer": "muon", "zero_stage": 0, "lr": 1e-3}
    alone, two_to_one = config("muon", **muon), config("muon-changed", **muon)

    run_ranks([whole, alone, counted], [-1, -1, -1])
    first = account(counted)
    for name in ("step-00000006", "copy-00000006"):  # as if it had been killed before this was saved
        shutil.rmtree(counted.run.folder / "checkpoints" / name)
    before = [config(f"stages-{stages}", zero_stage=int(stages[0])) for stages in STAGES]
    two = [run.for_workers(2) for run in (*before, two_to_one)]
    run_ranks(two, [-1] * len(two), CHANGED)
    for run in two:
        found = checkpoints.newest(run.run.folder / "checkpoints")
        assert (found.step, found.workers) == (CHANGED, 2)
    found = checkpoints.newest(changed["1-1"].run.folder / "checkpoints")
    damage(found.path)
    assert checkpoints.newest(changed["1-1"].run.folder / "checkpoints").path != found.path, "its copy is what is left"
    run_ranks([*changed.values(), two_to_one, counted], [-1] * (len(changed) + 2))
    return Runs(whole, changed, (alone, two_to_one), (first, account(counted)))


def account(config: Config) -> dict:
    return json.loads(Path(config.run.folder / ACCOUNT).read_text())


@pytest.mark.parametrize("stages", STAGES)
def test_two_workers_become_one(stages, runs, read_ledger):
    """The same clips, the same losses, the same weights, to the last bit: micro-batches are the same ones."""
    changed = runs.changed[stages]
    found = checkpoints.newest(changed.run.folder / "checkpoints")
    assert (found.step, found.workers) == (STEPS, 1)
    expected, steps = read_ledger(runs.whole), read_ledger(changed)
    assert sorted(steps) == sorted(expected) == list(range(STEPS))
    for step in range(STEPS):
        assert sorted(steps[step]["rows"]) == sorted(expected[step]["rows"])
        assert steps[step]["loss"] == expected[step]["loss"], f"step {step}"
    one, other = (load_pretrained(config.run.folder / "model").state_dict() for config in (runs.whole, changed))
    assert [name for name, value in one.items() if not torch.equal(other[name], value)] == []


def test_muon_keeps_its_momentum_when_two_workers_become_one(runs, read_ledger):
    alone, changed = (read_ledger(config) for config in runs.muon)
    assert sorted(alone) == sorted(changed) == list(range(STEPS))
    assert [changed[step]["loss"] for step in changed] == pytest.approx([alone[step]["loss"] for step in changed], 1e-5)
    one, other = (load_pretrained(config.run.folder / "model").state_dict() for config in runs.muon)
    for name, value in one.items():
        torch.testing.assert_close(other[name], value, rtol=1e-3, atol=1e-5, msg=name)


def test_steps_that_a_resumed_run_does_again_are_no_useful_ones(runs):
    first, second = runs.accounts
    assert first["reached"] == second["reached"] == ACCOUNT_STEPS
    done = {"step", "wait", "checkpoint", "validation", "startup", "log"}
    assert {part for part, spent_ns in first["spent_ns"].items() if spent_ns} == done
    assert second["spent_ns"]["step"] == first["spent_ns"]["step"], "all its steps had been done before"
    more = {part for part, spent_ns in second["spent_ns"].items() if spent_ns > first["spent_ns"][part]}
    assert more == done - {"step"} | {"repeated", "down"}
    assert first["alive_ns"] - first["started_ns"] == sum(first["spent_ns"].values())
    assert second["alive_ns"] - first["started_ns"] == sum(second["spent_ns"].values())
