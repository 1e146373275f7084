"""Who is held out: whole subjects, the same ones in any order and beside any others."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from neurostorm.data.plan.split import split


@settings(deadline=None, max_examples=100)
@given(
    st.lists(st.tuples(st.integers(0, 9), st.integers(20, 60)), min_size=2, max_size=30),
    st.floats(0.01, 0.9),
    st.integers(0, 9),
)
def test_no_subject_is_on_both_sides_and_no_run_is_lost(runs, held_out, seed):
    subjects = [f"ds/sub-{subject}" for subject, _ in runs]
    if len(set(subjects)) < 2:
        return
    parted = split(subjects, [frames for _, frames in runs], clip_frames=20, held_out=held_out, seed=seed)
    train = {subjects[run] for run in parted.train.run}
    held = {subjects[run] for run in parted.validation.run}
    assert not train & held
    assert sorted([*parted.train.run, *parted.validation.run]) == list(range(len(runs)))
    assert len(held) == min(max(1, round(held_out * len(set(subjects)))), len(set(subjects)) - 1)


def test_who_is_held_out_does_not_depend_on_order_or_on_later_runs():
    subjects = [f"ds/sub-{number:02d}" for number in range(20)]
    frames = [50] * 20
    one = split(subjects, frames, clip_frames=8, held_out=0.2, seed=3)
    two = split(subjects[::-1], frames, clip_frames=8, held_out=0.2, seed=3)
    assert {subjects[run] for run in one.validation.run} == {subjects[::-1][run] for run in two.validation.run}


def test_one_subject_is_parted_in_time_with_a_gap():
    parted = split(["ds/sub-1"] * 2, [200, 100], clip_frames=10, held_out=0.2, seed=0)
    train_end = parted.train.first + parted.train.frames
    assert (train_end + 10 <= parted.validation.first).all()
    assert (parted.validation.first + parted.validation.frames == [200, 100]).all()
    assert (parted.validation.frames == [40, 20]).all()
    assert "one subject" in parted.description


def test_too_short_runs_are_refused_with_the_field():
    with pytest.raises(ValueError, match=r"data\.clip_frames=20"):
        split(["a", "b"], [10, 12], clip_frames=20, held_out=0.5, seed=0)
    with pytest.raises(ValueError, match="no runs"):
        split([], [], clip_frames=20, held_out=0.5, seed=0)
