"""The clip plan: every clip once per pass, the same batches for any number of workers, mixtures to the clip."""

import math
import pickle
import zlib
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from neurostorm.data.plan.clip_plan import ClipPlan, validation_rows
from neurostorm.data.plan.mixture import Origin, Sampling, epoch_counts
from neurostorm.data.plan.split import Segments, clip_counts

DATASETS = ("abcd", "hcp", "ukb")


def segments_of(frames, first=None):
    count = len(frames)
    starts = np.zeros(count, np.int32) if first is None else np.asarray(first, np.int32)
    return Segments(np.arange(count, dtype=np.int32), starts, np.asarray(frames, np.int32))


def origin_of(dataset, subject=None):
    """The origin of runs by the numbers of their datasets; each run is a subject of its own unless given."""
    dataset = np.asarray(dataset, np.int32)
    return Origin(DATASETS, dataset, np.arange(len(dataset), dtype=np.int32) if subject is None else subject)


@st.composite
def plans(draw):
    """A plan over up to seven runs of three datasets, with any sampling; the second dataset always has a clip."""
    clip = draw(st.integers(1, 12))
    run = st.tuples(st.integers(0, 60), st.integers(0, 9), st.integers(0, 2), st.integers(0, 1))
    runs = draw(st.lists(run, max_size=6))
    frames, first, dataset, person = (np.array(column, np.int32) for column in zip(*runs, (clip, 3, 1, 0), strict=True))
    sampling = Sampling(
        {"hcp": draw(st.sampled_from([0.5, 1, 3])), "ukb": draw(st.sampled_from([0, 1, 2]))},
        draw(st.sampled_from([0.5, 1, 5])), draw(st.none() | st.integers(1, 8)), draw(st.integers(1, 4)),
        draw(st.integers(1, 3)),
    )  # fmt: skip
    return ClipPlan(
        segments_of(frames, first), clip, draw(st.integers(1, 15)), draw(st.integers(0, 2**31)),
        draw(st.integers(1, 12)), origin_of(dataset, dataset * 2 + person), sampling,
    )  # fmt: skip


def clips(plan, rows):
    """(run, place in it) of each row: the shift within the slack is always less than a stride."""
    nth = (rows["start"] - plan.segments.first[rows["run"]]) // plan.stride_frames
    return list(zip(rows["run"].tolist(), nth.tolist(), strict=True))


def counts_of(plan):
    return clip_counts(plan.segments.frames, plan.clip_frames, plan.stride_frames)


@settings(deadline=None, max_examples=100)
@given(plans(), st.integers(0, 3))
def test_with_equal_weights_an_epoch_holds_each_clip_once_and_inside_its_run(plan, epoch):
    plan = replace(plan, sampling=Sampling(clips_per_read=plan.sampling.clips_per_read))
    rows = plan.epoch(epoch)
    assert sorted(clips(plan, rows)) == [
        (run, nth) for run, count in enumerate(counts_of(plan)) for nth in range(count)
    ]
    first = plan.segments.first[rows["run"]]
    assert (rows["start"] >= first).all()
    assert (rows["start"] + plan.clip_frames <= first + plan.segments.frames[rows["run"]]).all()


@settings(deadline=None, max_examples=100)
@given(plans(), st.integers(1, 6))
def test_an_epochs_clips_of_each_dataset_are_its_share_and_in_turn(plan, epochs):
    sampling, dataset = plan.sampling, plan.origin.dataset
    available = Counter()
    for run, count in enumerate(counts_of(plan)):
        available[int(dataset[run]), int(plan.origin.subject[run])] += int(count)
    pass_of = np.zeros(3, np.int64)
    for (number, _), count in available.items():
        pass_of[number] += min(count, sampling.max_clips_per_subject or count)
    weights = np.array([sampling.weights.get(name, 1) for name in DATASETS], float)
    shares = epoch_counts(pass_of, weights, sampling.temperature)
    assert plan.clips_by_dataset == dict(zip(DATASETS, shares.tolist(), strict=True))
    assert plan.clips_per_epoch == pass_of[weights > 0].sum() * sampling.masks_per_clip
    used = Counter({(run, nth): 0 for run, count in enumerate(counts_of(plan)) for nth in range(count)})
    for epoch in range(epochs):
        drawn = plan.epoch(epoch)[:: sampling.masks_per_clip]
        assert (np.bincount(dataset[drawn["run"]], minlength=3) == shares).all()
        used.update(clips(plan, drawn))
    if sampling.max_clips_per_subject is None:  # a dataset's clips are used up before one comes again
        for number in range(3):
            times = [count for (run, _), count in used.items() if dataset[run] == number]
            assert max(times, default=0) - min(times, default=0) <= 1


@settings(deadline=None, max_examples=100)
@given(plans(), st.integers(0, 40), st.integers(0, 80))
def test_any_slice_of_the_stream_is_that_part_of_the_epochs_in_order(plan, first, count):
    epochs = range((first + count) // plan.clips_per_epoch + 1)
    whole = np.concatenate([plan.epoch(number) for number in epochs])
    assert (plan.rows(first, count) == whole[first : first + count]).all()
    assert (whole["row"] == np.arange(len(whole))).all()


@settings(deadline=None, max_examples=60)
@given(plans(), st.integers(0, 20), st.sampled_from([1, 2, 3, 4]))
def test_workers_share_the_global_batch_whatever_their_number(plan, step, workers):
    plan = replace(plan, global_batch=plan.global_batch * workers)
    shares = np.concatenate([plan.step_rows(step, rank, workers) for rank in range(workers)])
    assert (shares == plan.rows(step * plan.global_batch, plan.global_batch)).all()


@settings(deadline=None, max_examples=60)
@given(plans(), st.integers(0, 30))
def test_a_plan_made_again_goes_on_at_any_step_as_the_one_that_ran_from_the_start(plan, step):
    ran = [plan.step_rows(number, 0, 1) for number in range(step + 3)]
    resumed = replace(plan)
    for number in (step, step + 1, step + 2):
        assert (resumed.step_rows(number, 0, 1) == ran[number]).all()


@settings(deadline=None, max_examples=100)
@given(plans(), st.integers(0, 3))
def test_repeats_of_a_clip_follow_each_other_with_row_numbers_of_their_own(plan, epoch):
    rows, times = plan.epoch(epoch), plan.sampling.masks_per_clip
    once = replace(plan, sampling=replace(plan.sampling, masks_per_clip=1)).epoch(epoch)
    assert (rows["row"] == epoch * len(rows) + np.arange(len(rows))).all()
    for name in ("run", "start"):
        assert (rows[name].reshape(-1, times) == once[name][:, None]).all()


@settings(deadline=None, max_examples=100)
@given(plans(), st.integers(2, 5), st.integers(0, 3))
def test_clips_that_one_read_brings_in_follow_each_other(plan, together, epoch):
    plan = replace(plan, sampling=Sampling(clips_per_read=together))
    order = clips(plan, plan.epoch(epoch))
    starts = plan.epoch(epoch)["start"]
    for place, (run, nth) in enumerate(order):
        if nth % together:
            assert order[place - 1] == (run, nth - 1)
            assert starts[place] - starts[place - 1] == plan.stride_frames


def test_steps_use_every_clip_of_the_epochs_asked_for():
    plan = ClipPlan(segments_of([50, 70]), clip_frames=8, stride_frames=8, seed=0, global_batch=4)
    assert plan.clips_per_epoch == 14
    assert plan.total_steps(1.0, None) == math.ceil(14 / 4)
    assert plan.total_steps(3.0, None) == math.ceil(42 / 4)
    assert plan.total_steps(3.0, 5) == 5
    used = plan.rows(0, plan.total_steps(1.0, None) * 4)
    assert set(range(14)) <= set(used["row"].tolist())
    twice = replace(plan, sampling=Sampling(masks_per_clip=2))
    assert twice.total_steps(1.0, None) == 28 / 4


def test_a_batch_holds_the_datasets_by_their_share_give_or_take_chance():
    plan = ClipPlan(
        segments_of([20_000, 5_000, 1_000]), 1, 1, seed=4, global_batch=40, origin=origin_of([0, 1, 2]),
        sampling=Sampling({"hcp": 3}, temperature=2.0),
    )  # fmt: skip
    batches = plan.epoch(0)["run"].reshape(-1, 40)
    total = batches.size
    for number, count in enumerate(plan.clips_by_dataset.values()):
        found = (batches == number).sum(axis=1)
        share = count / total
        variance = 40 * share * (1 - share) * (total - 40) / (total - 1)  # of a hypergeometric draw
        assert found.mean() == pytest.approx(40 * share)
        # The mean of 650 squares has a standard error of 0.06: neither in lumps nor in step.
        assert 0.8 < ((found - 40 * share) ** 2 / variance).mean() < 1.2


def test_a_dataset_with_weight_0_is_never_seen_and_others_lose_nothing():
    plan = ClipPlan(segments_of([50, 70, 90]), 10, 10, 0, 4, origin_of([0, 1, 2]), Sampling({"hcp": 0}))
    assert plan.clips_per_epoch == 5 + 9
    assert set(plan.rows(0, 100)["run"]) == {0, 2}


def test_another_dataset_in_the_store_leaves_the_passes_of_the_first_as_they_were():
    alone = ClipPlan(segments_of([95, 103]), 10, 10, 7, 4, Origin(("ukb",), *(np.zeros(2, np.int32) for _ in "ds")))
    beside = ClipPlan(segments_of([95, 103, 400]), 10, 10, 7, 4, origin_of([2, 2, 0]))
    for epoch in range(4):
        expected, found = alone.epoch(epoch), beside.epoch(epoch)
        found = found[found["run"] < 2]
        assert sorted(expected[["run", "start"]].tolist()) == sorted(found[["run", "start"]].tolist())


def test_the_order_is_the_same_with_any_version_of_the_libraries():
    plan = ClipPlan(
        segments_of([300, 47, 133]), 7, 5, 5, 4, origin_of([0, 1, 1], np.array([0, 1, 1])),
        Sampling({"hcp": 2}, 2.0, 9, 3, 2),
    )  # fmt: skip
    rows = plan.rows(3, 200)
    assert rows[:4].tolist() == [(3, 0, 247), (4, 0, 252), (5, 0, 252), (6, 2, 106)]
    assert zlib.crc32(rows.tobytes()) == 1352367221


def test_a_plan_travels_without_the_epochs_it_has_drawn():
    plan = ClipPlan(segments_of([30_000]), 1, 1, 0, 4, sampling=Sampling(clips_per_read=2))
    fresh = pickle.dumps(plan)
    rows = plan.rows(10, 50)
    assert len(pickle.dumps(plan)) == len(fresh) < 2_000
    assert (pickle.loads(pickle.dumps(plan)).rows(10, 50) == rows).all()


def test_few_epochs_are_kept():
    plan = ClipPlan(segments_of([300]), 1, 1, 0, 4)
    for epoch in (0, 1, 2, 7):
        plan.epoch(epoch)
    assert sorted(plan._epochs) == [2, 7]


def test_what_cannot_be_planned_is_refused_with_the_field():
    with pytest.raises(ValueError, match=r"shorten data\.clip_frames"):
        ClipPlan(segments_of([5]), 6, 6, 0, 4).rows(0, 1)
    with pytest.raises(ValueError, match=r"data\.weights: there is no dataset 'ubk'; did you mean ukb"):
        ClipPlan(segments_of([5]), 2, 2, 0, 4, origin_of([0]), Sampling({"ubk": 1}))


@settings(deadline=None, max_examples=60)
@given(st.lists(st.integers(0, 50), min_size=1, max_size=8), st.integers(1, 9), st.integers(1, 40))
def test_validation_rows_are_distinct_fixed_and_inside(frames, clip, count):
    segments = segments_of([*frames, clip], [2] * (len(frames) + 1))
    rows = validation_rows(segments, clip_frames=clip, count=count)
    available = int(clip_counts(segments.frames, clip, clip).sum())
    assert len(rows) == min(count, available) == len({(r["run"], r["start"]) for r in rows})
    assert (rows["start"] >= 2).all()
    assert (rows["start"] + clip <= 2 + segments.frames[rows["run"]]).all()
