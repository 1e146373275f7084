"""A run goes on with another number of workers: the same clips, the same losses, the same weights."""

import pytest
import torch

from neurostorm.config import Config
from neurostorm.model.hub import load_pretrained
from neurostorm.train import checkpoint

STEPS = 4
TRAIN = {"max_steps": STEPS, "global_batch": 4, "micro_batch": 2, "validate_every": 100, "log_every": 100}
MODEL = {"embed_dim": 8, "depths": (2, 1), "heads": (1, 2), "tokens": "brain", "decoder": "light"}


def test_two_workers_become_one(ball_config_in, run_ranks, read_ledger, tmp_path):
    """Dropout, here that of redundancy, is drawn by each worker for its own clips, so it is off."""
    twin = ball_config_in(
        tmp_path, run={"name": "twin"}, model=MODEL, strd={"enabled": False}, train=TRAIN, checkpoint={"every": 2}
    )
    run_ranks([twin], [-1])
    changed = Config.model_validate({**twin.model_dump(), "run": {**twin.run.model_dump(), "name": "changed"}})
    for workers, until in ((2, 2), (1, STEPS)):
        run_ranks([changed.for_workers(workers)], [-1], until)
        found = checkpoint.newest(changed.run.folder / "checkpoints")
        assert (found.step, found.workers) == (until, workers)
    expected, steps = read_ledger(twin), read_ledger(changed)
    assert sorted(steps) == sorted(expected) == list(range(STEPS))
    for step in range(STEPS):
        assert sorted(steps[step]["rows"]) == sorted(expected[step]["rows"])
        assert steps[step]["loss"] == pytest.approx(expected[step]["loss"], rel=1e-5), f"step {step}"
    one, other = (load_pretrained(config.run.folder / "model").state_dict() for config in (twin, changed))
    for name, value in one.items():
        if not name.endswith("qkv.bias"):  # the softmax does not feel the keys' bias, see test_engine.py
            torch.testing.assert_close(other[name], value, rtol=1e-3, atol=1e-5, msg=name)
