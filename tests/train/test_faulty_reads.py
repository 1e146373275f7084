"""Damaged clips are left out and bounded, storage that is away is waited for, a slow rank does not end the others."""

import json
import math
from pathlib import Path

import pytest
import torch

from neurostorm.model.hub.pretrained import load_pretrained
from neurostorm.train.checkpoint import checkpoints
from tests.train.faulty_reads_program import main
from tests.train.ranks import run_together

STEPS = 5
DAMAGED = [(2, 1), (3, 0), (3, 1)]  # half of a step's clips, then all
FAULTS = {
    "reference": {},
    "damaged": {"damaged": DAMAGED},
    "away": {"away": {(2, 1): 5}},
    "slow": {"slow": {(2, 1): 4.0}},
    "tripped": {"damaged": [(step, 1) for step in range(2, STEPS)]},
    "gone": {"away": {(2, 1): 10**9}},  # the last: the other rank's group is broken
}


@pytest.fixture(scope="module")
def folders(ball_config_in, tmp_path_factory) -> dict[str, Path]:
    """The folders of two-rank runs with each of FAULTS; and of `alone`, one rank with the damaged clips of two."""
    made = tmp_path_factory.mktemp("reads")

    def config(name: str, **data: object):
        return ball_config_in(
            made, run={"name": name}, data=data,
            model={"embed_dim": 8, "depths": (2, 1), "heads": (1, 2)},
            train={"max_steps": STEPS, "global_batch": 4, "micro_batch": 1, "validate_every": 100, "log_every": 1,
                   "warmup_fraction": 0.0, "lr": 1e-3},
            checkpoint={"every": 1}, tracking={"clip_ledger": True, "pictures": False},
            scale={"workers": 2, "min_collective_timeout_s": 1},
        )  # fmt: skip

    special = {"tripped": {"max_bad_fraction": 0.0}, "gone": {"unavailable_s": 1}}
    configs = {name: config(name, **special.get(name, {})) for name in FAULTS}
    run_together(main, 2, list(configs.values()), list(FAULTS.values()))
    alone = config("alone").for_workers(1)
    run_together(main, 1, [alone], [FAULTS["damaged"]])
    return {name: made / name for name in (*FAULTS, "alone")}


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_pretrained(folder / "model").state_dict()


@pytest.fixture
def read_ledger_of():
    """step -> the mean loss, of a run's folder."""

    def read(folder: Path) -> dict[int, float]:
        lines = (folder / "ledger" / "rank-0.jsonl").read_text().splitlines()
        return {entry["step"]: entry["loss"] for entry in map(json.loads, lines)}

    return read


def steps_of(folder: Path) -> list[str]:
    both = [(folder / f"steps-{rank}.txt").read_text().splitlines() for rank in range(2)]
    assert both[0] == both[1], "ranks take the same decisions"
    return both[0]


def test_a_step_without_any_clip_changes_nothing_and_the_others_go_on(folders):
    assert steps_of(folders["damaged"]) == [
        "0 counted=4 applied=True changed=True",
        "1 counted=4 applied=True changed=True",
        "2 counted=2 applied=True changed=True",
        "3 counted=0 applied=False changed=False",
        "4 counted=4 applied=True changed=True",
    ]


def test_the_mean_is_over_what_counted_whichever_rank_lost_its_clips(folders, read_ledger_of):
    two, one, reference = (read_ledger_of(folders[name]) for name in ("damaged", "alone", "reference"))
    for step in (0, 1, 2, 4):
        assert two[step] == pytest.approx(one[step], rel=1e-6), f"step {step}"
    assert math.isnan(two[3]) or two[3] == 0
    assert two[0] == reference[0]
    assert two[2] == pytest.approx(reference[2], rel=0.3), "not half of it, as with zeros in the mean"
    for name, value in weights(folders["alone"]).items():
        torch.testing.assert_close(weights(folders["damaged"])[name], value, rtol=1e-4, atol=1e-5, msg=name)


@pytest.mark.parametrize("name", ["away", "slow"])
def test_storage_that_comes_back_and_a_slow_rank_change_nothing(name, folders):
    assert steps_of(folders[name]) == steps_of(folders["reference"])
    for key, value in weights(folders["reference"]).items():
        assert torch.equal(weights(folders[name])[key], value), key


def test_the_wait_for_storage_is_a_metric_on_all_ranks(folders):
    waited = {name: float((folders[name] / "waited-0.txt").read_text()) for name in ("reference", "away")}
    assert waited["reference"] == 0 < waited["away"]


def test_too_much_damage_ends_all_ranks_at_the_same_step_and_saves_nothing(folders):
    folder = folders["tripped"]
    for rank in range(2):
        error = (folder / f"error-{rank}.txt").read_text()
        assert error.startswith("UnreadableClipsError: step 2: 2 of the last 12 clips"), error
    assert checkpoints.newest(folder / "checkpoints").step == 2
    assert len((folder / "unreadable-1.jsonl").read_text().splitlines()) == 2
    assert not (folder / "unreadable-0.jsonl").exists()


def test_storage_that_stays_away_ends_the_run_and_saves_nothing(folders):
    error = (folders["gone"] / "error-1.txt").read_text()
    assert error.startswith("StorageAwayError: 503 SlowDown. Its storage was away for 1 s (data.unavailable_s=1)")
    assert checkpoints.newest(folders["gone"] / "checkpoints").step == 2
