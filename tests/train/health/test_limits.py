"""What stops a run: steps that stay non-finite, and too many clips that cannot be read; both say which clips."""

import json

import pytest
import torch

from neurostorm.data.clips import ClipBatch
from neurostorm.io.paths import to_path
from neurostorm.train.health.barrier import StepClips
from neurostorm.train.health.limits import DamagedClips, NonFiniteError, SkipGuard, UnreadableClipsError, clip_names

RUNS = ("runs/a/sub-0/rest", "runs/a/sub-1/rest")


def batch(bad, first=0):
    """A batch of which `bad` says which clips hold no data; clip i is of run i mod 2 and starts at first + 10 i."""
    index = torch.arange(len(bad))
    frames = torch.zeros(len(bad), 1, 1, dtype=torch.int8)
    none, waited_s = torch.zeros(len(bad), dtype=torch.bool), torch.zeros(len(bad))
    run, start = (index % 2).int(), (first + 10 * index).int()
    return ClipBatch(index, run, start, torch.tensor(bad), none, waited_s, frames)


def test_clips_are_named_by_run_and_start():
    assert clip_names(batch([False] * 3), RUNS) == [f"{RUNS[0]}[0]", f"{RUNS[1]}[10]", f"{RUNS[0]}[20]"]


def test_skipped_steps_stop_the_run_only_in_a_row():
    guard = SkipGuard(3)
    for step, applied in enumerate([False, False, True, False, False, True]):
        guard.check(applied, step=step, clips=[])
    assert (guard.total, guard.in_a_row) == (4, 0)
    guard.check(False, step=6, clips=["x[0]"])
    guard.check(False, step=7, clips=["y[0]"])
    with pytest.raises(NonFiniteError) as stopped:
        guard.check(False, step=8, clips=["z[0]", "z[20]"])
    for words in ("step 8", "3 steps in a row", "train.lr", "z[0], z[20]"):
        assert words in str(stopped.value)


def test_a_limit_of_one_stops_at_the_first():
    with pytest.raises(NonFiniteError, match="step 0"):
        SkipGuard(1).check(False, step=0, clips=[])


def noted(folder, rank=0):
    file = folder / f"unreadable-{rank}.jsonl"
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def step_of(total, damaged=0):
    return StepClips(total, damaged, 0.0)


def test_damaged_clips_are_counted_over_all_ranks_and_named_in_the_workers_own_file(tmp_path):
    clips = DamagedClips(tmp_path, 3, max_fraction=0.5)
    clips.note(batch([False, False]), RUNS, 4, step_of(4))
    assert not list(tmp_path.iterdir())
    clips.note(batch([False, True, True]), RUNS, 5, step_of(6, 3))
    clips.note(batch([True], first=7), RUNS, 6, step_of(2, 1))
    assert clips.total == 4
    assert noted(tmp_path, 3) == [
        {"step": 5, "clip": f"{RUNS[1]}[10]"},
        {"step": 5, "clip": f"{RUNS[0]}[20]"},
        {"step": 6, "clip": f"{RUNS[0]}[7]"},
    ]


def test_a_few_damaged_clips_after_a_start_are_not_too_many(tmp_path):
    clips = DamagedClips(tmp_path, 0, max_fraction=0.01)
    clips.note(batch([True, True]), RUNS, 0, step_of(2, 2))
    for step in range(1, 9):
        clips.note(batch([True]), RUNS, step, step_of(2, 1))
    with pytest.raises(UnreadableClipsError) as stopped:
        clips.note(batch([True], first=80), RUNS, 9, step_of(2, 1))
    words = ["step 9", "11 of the last 20 clips", "data.max_bad_fraction=0.01", f"{RUNS[0]}[80]", "verify STORE"]
    for word in [*words, "unreadable-*"]:
        assert word in str(stopped.value)
    assert len(noted(tmp_path)) == 11, "the last ones are named before the run stops"


def test_many_good_clips_long_ago_do_not_excuse_damage_now(tmp_path):
    clips = DamagedClips(tmp_path, 0, max_fraction=0.01)
    good = batch([False])
    for step in range(1000):
        clips.note(good, RUNS, step, step_of(100))
    with pytest.raises(UnreadableClipsError, match="step 1001"):
        for step in range(1000, 1600):
            clips.note(good, RUNS, step, step_of(100, 100))


def test_damage_that_has_left_the_window_does_not_count(tmp_path):
    clips = DamagedClips(tmp_path, 0, max_fraction=0.01)
    good = batch([False])
    for step in range(2000):  # half a percent, for ever
        clips.note(good, RUNS, step, step_of(200, 1))
    assert clips.total == 2000


def test_a_share_of_zero_stops_at_the_first_and_a_share_of_one_never(tmp_path):
    with pytest.raises(UnreadableClipsError):
        DamagedClips(tmp_path, 0, max_fraction=0.0).note(batch([True]), RUNS, 0, step_of(1, 1))
    patient = DamagedClips(tmp_path, 1, max_fraction=1.0)
    for step in range(30):
        patient.note(batch([True] * 500), RUNS, step, step_of(500, 500))
    assert patient.total == 15_000


def test_ranks_without_damage_of_their_own_stop_with_the_others(tmp_path):
    with pytest.raises(UnreadableClipsError, match=r"step 3: 9 of the last 16 clips .* allows\. All are named"):
        DamagedClips(tmp_path, 0, max_fraction=0.0).note(batch([False] * 8), RUNS, 3, step_of(16, 9))
    assert noted(tmp_path) == []


def test_in_an_object_store_names_are_kept_at_a_checkpoint_and_when_the_run_stops(make_bucket):
    folder = to_path(make_bucket()) / "run"
    clips = DamagedClips(folder, 1, max_fraction=0.002)
    clips.note(batch([True]), RUNS, 3, step_of(1, 1))
    assert not folder.exists()
    clips.keep(5)
    clips.note(batch([True]), RUNS, 6, step_of(1, 1))
    with pytest.raises(UnreadableClipsError, match=f"All are named in {folder}/unreadable-"):
        clips.note(batch([True]), RUNS, 7, step_of(1, 1))
    files = sorted((folder / "unreadable-1").iterdir())
    assert [file.name for file in files] == ["step-00000005.jsonl", "step-00000008.jsonl"]
    lines = [json.loads(line) for file in files for line in file.read_text().splitlines()]
    assert [line["step"] for line in lines] == [3, 6, 7]
