"""A run trains, stops and goes on: what the loop charges to the account of its time."""

import json
import shutil

from neurostorm.train.goodput import ACCOUNT

STEPS = 6
SETTINGS = {
    "train": {"max_steps": STEPS, "log_every": 2, "validate_every": 100}, "checkpoint": {"every": 4},
    "tracking": {"pictures": False}, "scale": {"workers": 1},
}  # fmt: skip


def account(config):
    return json.loads((config.run.folder / ACCOUNT).read_text())


def test_steps_that_a_resumed_run_does_again_are_no_useful_ones(ball_config, run_ranks):
    config = ball_config(**SETTINGS)
    run_ranks([config], [-1])
    first = account(config)
    assert first["reached"] == STEPS
    done = {"step", "wait", "checkpoint", "validation", "startup", "log"}
    assert {part for part, spent_ns in first["spent_ns"].items() if spent_ns} == done

    for name in ("step-00000006", "copy-00000006"):  # as if it had been killed before this was saved
        shutil.rmtree(config.run.folder / "checkpoints" / name)
    run_ranks([config], [-1])
    second = account(config)
    assert second["reached"] == STEPS
    assert second["spent_ns"]["step"] == first["spent_ns"]["step"], "all its steps had been done before"
    more = {part for part, spent_ns in second["spent_ns"].items() if spent_ns > first["spent_ns"][part]}
    assert more == done - {"step"} | {"repeated", "down"}
    assert first["alive_ns"] - first["started_ns"] == sum(first["spent_ns"].values())
    assert second["alive_ns"] - first["started_ns"] == sum(second["spent_ns"].values())
