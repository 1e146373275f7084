"""The clip plan: every clip once per epoch, the same batches for any number of workers, held-out subjects never."""

import math
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from neurostorm.data.plan import ClipPlan, Segments, clip_counts, split, validation_rows


def segments_of(frames, first=None):
    count = len(frames)
    starts = np.zeros(count, np.int32) if first is None else np.asarray(first, np.int32)
    return Segments(np.arange(count, dtype=np.int32), starts, np.asarray(frames, np.int32))


plans = st.builds(
    lambda frames, first, clip, stride, seed, batch: ClipPlan(
        segments_of([*frames, clip], [*first[: len(frames)], 3]), clip, stride, seed, batch
    ),
    st.lists(st.integers(0, 60), min_size=1, max_size=6),
    st.lists(st.integers(0, 9), min_size=6, max_size=6),
    st.integers(1, 12),
    st.integers(1, 15),
    st.integers(0, 2**31),
    st.integers(1, 12),
)


@settings(deadline=None, max_examples=150)
@given(plans, st.integers(0, 3))
def test_an_epoch_holds_each_clip_of_each_segment_once_and_inside_it(plan, epoch):
    rows = plan.epoch(epoch)
    assert len(rows) == plan.clips_per_epoch == len({(r["run"], r["start"]) for r in rows})
    assert Counter(rows["run"].tolist()) == Counter(
        {run: int(count) for run, count in enumerate(plan.clips_per_segment) if count}
    )
    first = plan.segments.first[rows["run"]]
    assert (rows["start"] >= first).all()
    assert (rows["start"] + plan.clip_frames <= first + plan.segments.frames[rows["run"]]).all()
    for run in np.unique(rows["run"]):
        starts = np.sort(rows["start"][rows["run"] == run])
        assert (np.diff(starts) == plan.stride_frames).all()


@settings(deadline=None, max_examples=100)
@given(plans, st.integers(0, 40), st.integers(0, 80))
def test_any_slice_of_the_stream_is_that_part_of_the_epochs_in_order(plan, first, count):
    epochs = range((first + count) // plan.clips_per_epoch + 1)
    whole = np.concatenate([plan.epoch(number) for number in epochs])
    assert (plan.rows(first, count) == whole[first : first + count]).all()
    assert (whole["row"] == np.arange(len(whole))).all()


@settings(deadline=None, max_examples=60)
@given(plans, st.integers(0, 20), st.sampled_from([1, 2, 3, 4]))
def test_workers_share_the_global_batch_whatever_their_number(plan, step, workers):
    plan = ClipPlan(plan.segments, plan.clip_frames, plan.stride_frames, plan.seed, plan.global_batch * workers)
    shares = np.concatenate([plan.step_rows(step, rank, workers) for rank in range(workers)])
    assert (shares == plan.rows(step * plan.global_batch, plan.global_batch)).all()


def test_steps_use_every_clip_of_the_epochs_asked_for():
    plan = ClipPlan(segments_of([50, 70]), clip_frames=8, stride_frames=8, seed=0, global_batch=4)
    assert plan.clips_per_epoch == 14
    assert plan.total_steps(1.0, None) == math.ceil(14 / 4)
    assert plan.total_steps(3.0, None) == math.ceil(42 / 4)
    assert plan.total_steps(3.0, 5) == 5
    used = plan.rows(0, plan.total_steps(1.0, None) * 4)
    assert set(range(14)) <= set(used["row"].tolist())


def test_epochs_differ_in_order_and_move_the_clips_over_all_frames():
    plan = ClipPlan(segments_of([15]), clip_frames=10, stride_frames=10, seed=1, global_batch=1)
    starts = {int(plan.epoch(number)["start"][0]) for number in range(40)}
    assert starts == set(range(6))
    many = ClipPlan(segments_of([1000]), clip_frames=10, stride_frames=10, seed=1, global_batch=1)
    assert (many.epoch(0)["start"] != many.epoch(1)["start"]).any()
    other = ClipPlan(segments_of([1000]), clip_frames=10, stride_frames=10, seed=2, global_batch=1)
    assert (many.epoch(0)["start"] != other.epoch(0)["start"]).any()


def test_a_plan_is_the_same_when_made_again():
    one, two = (ClipPlan(segments_of([300, 40]), 7, 7, 5, 4) for _ in range(2))
    assert (one.rows(3, 200) == two.rows(3, 200)).all()


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


@settings(deadline=None, max_examples=60)
@given(st.lists(st.integers(0, 50), min_size=1, max_size=8), st.integers(1, 9), st.integers(1, 40))
def test_validation_rows_are_distinct_fixed_and_inside(frames, clip, count):
    segments = segments_of([*frames, clip], [2] * (len(frames) + 1))
    rows = validation_rows(segments, clip_frames=clip, count=count)
    available = int(clip_counts(segments.frames, clip, clip).sum())
    assert len(rows) == min(count, available) == len({(r["run"], r["start"]) for r in rows})
    assert (rows["start"] + clip <= 2 + segments.frames[rows["run"]]).all()
