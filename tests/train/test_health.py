"""What stops a run: steps that stay non-finite, and too many clips that cannot be read; both say which clips."""

import json

import pytest
import torch

from neurostorm.data.clips import ClipBatch
from neurostorm.places import place
from neurostorm.train.health import BadClips, NonFiniteError, SkipGuard, UnreadableClipsError, clip_names

RUNS = ("runs/a/sub-0/rest", "runs/a/sub-1/rest")


def batch(bad, first=0):
    """A batch of which `bad` says which clips hold no data; clip i is of run i mod 2 and starts at first + 10 i."""
    index = torch.arange(len(bad))
    frames = torch.zeros(len(bad), 1, 1, dtype=torch.int8)
    none = torch.zeros(len(bad), dtype=torch.bool)
    return ClipBatch(index, (index % 2).int(), (first + 10 * index).int(), torch.tensor(bad), none, frames)


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


def test_unreadable_clips_are_counted_and_named_in_the_workers_own_file(tmp_path):
    clips = BadClips(tmp_path, 3, max_fraction=0.5)
    clips.note(batch([False, False]), RUNS, 4)
    assert not list(tmp_path.iterdir())
    clips.note(batch([False, True, True]), RUNS, 5)
    clips.note(batch([True], first=7), RUNS, 6)
    assert (clips.bad, clips.seen) == (3, 6)
    assert noted(tmp_path, 3) == [
        {"step": 5, "clip": f"{RUNS[1]}[10]"},
        {"step": 5, "clip": f"{RUNS[0]}[20]"},
        {"step": 6, "clip": f"{RUNS[0]}[7]"},
    ]


def test_the_first_hundred_clips_are_judged_as_a_hundred(tmp_path):
    clips = BadClips(tmp_path, 0, max_fraction=0.02)
    clips.note(batch([True, True]), RUNS, 0)  # 2 of 2, but 2 % of a hundred
    with pytest.raises(UnreadableClipsError) as stopped:
        clips.note(batch([True], first=80), RUNS, 1)
    for words in ("3 of 3", "data.max_bad_fraction=0.02", f"{RUNS[0]}[80]", "unreadable-0.jsonl"):
        assert words in str(stopped.value)
    assert len(noted(tmp_path)) == 3, "the last ones are named before the run stops"


def test_after_a_hundred_the_share_counts(tmp_path):
    clips = BadClips(tmp_path, 0, max_fraction=0.02)
    clips.note(batch([False] * 198), RUNS, 0)
    clips.note(batch([True] * 4), RUNS, 1)  # 4 of 202: within
    with pytest.raises(UnreadableClipsError, match="5 of 203"):
        clips.note(batch([True]), RUNS, 2)


def test_a_share_of_zero_stops_at_the_first_and_a_share_of_one_never(tmp_path):
    with pytest.raises(UnreadableClipsError):
        BadClips(tmp_path, 0, max_fraction=0.0).note(batch([True]), RUNS, 0)
    patient = BadClips(tmp_path, 1, max_fraction=1.0)
    patient.note(batch([True] * 500), RUNS, 0)
    assert patient.bad == 500


def test_in_an_object_store_names_are_kept_at_a_checkpoint_and_when_the_run_stops(make_bucket):
    folder = place(make_bucket()) / "run"
    clips = BadClips(folder, 1, max_fraction=0.02)
    clips.note(batch([True]), RUNS, 3)
    assert not folder.exists()
    clips.keep(5)
    clips.note(batch([True]), RUNS, 6)
    with pytest.raises(UnreadableClipsError, match=f"all are in {folder}/unreadable-1"):
        clips.note(batch([True]), RUNS, 7)
    files = sorted((folder / "unreadable-1").iterdir())
    assert [file.name for file in files] == ["step-00000005.jsonl", "step-00000008.jsonl"]
    lines = [json.loads(line) for file in files for line in file.read_text().splitlines()]
    assert [line["step"] for line in lines] == [3, 6, 7]
