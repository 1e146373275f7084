"""Inputs: which clips an epoch takes, in which batches, and that the network is given the store's own clips."""

import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from neurostorm.data.clips import ClipReader
from neurostorm.data.plan.clip_plan import ROW
from neurostorm.downstream.cohort import Cohort, open_cohort
from neurostorm.downstream.methods.inputs import (
    ClipInputs,
    HeldInputs,
    Index,
    batches,
    batches_of_views,
    draw,
    draw_pairs,
    evenly,
)
from neurostorm.downstream.tasks.examples import Examples, build_examples
from neurostorm.downstream.tasks.task import Age, Cut
from neurostorm.model.encoder import SwinEncoder
from neurostorm.model.hub.pretrained import NeuroStorm
from neurostorm.store import StoreError
from neurostorm.store.shard import SHARD_FILE

CASES = settings(deadline=None, max_examples=30)


def sized(sizes: list[int]) -> Examples:
    """Units with so many clips."""
    clips = [(0, start, f"{unit:02d}") for unit, size in enumerate(sizes) for start in range(size)]
    names = {f"{unit:02d}": f"{unit}" for unit in range(len(sizes))}
    return build_examples([], 5, clips, names, dict.fromkeys(names, 1.0))


SIZES = st.lists(st.integers(1, 12), min_size=1, max_size=8)


@CASES
@given(SIZES, st.integers(1, 14))
def test_evenly_takes_as_many_clips_as_there_are_from_end_to_end(sizes: list[int], most: int) -> None:
    examples = sized(sizes)
    chosen = evenly(examples, most)
    assert len(set(chosen)) == len(chosen) and np.all(np.diff(chosen) > 0)
    for unit, size in enumerate(sizes):
        places = examples.start[chosen[examples.unit[chosen] == unit]]
        assert len(places) == min(most, size)
        if most > 1:
            assert (places[0], places[-1]) == (0, size - 1)
            assert np.ptp(np.diff(places)) <= 1 if len(places) > 1 else True
    assert np.array_equal(evenly(examples, most), chosen)


def lists(views: Sequence[Index]) -> list[list[int]]:
    return [view.tolist() for view in views]


@CASES
@given(SIZES, st.integers(1, 14), st.integers(0, 99), st.integers(0, 99))
def test_an_epochs_draw_is_a_view_of_each_unit_of_up_to_so_many_clips_without_repeats(sizes, most, seed, epoch) -> None:
    examples = sized(sizes)
    views = lists(draw(examples, most, seed=seed, epoch=epoch))
    assert sorted(examples.unit[view[0]] for view in views) == list(range(len(sizes)))
    for view in views:
        (unit,) = {int(examples.unit[clip]) for clip in view}
        assert len(view) == len(set(view)) == min(most, sizes[unit])
    assert lists(draw(examples, most, seed=seed, epoch=epoch)) == views


def test_draws_of_other_epochs_and_seeds_are_others_and_come_mixed() -> None:
    examples = sized([40, 40, 40])
    drawn = [lists(draw(examples, 5, seed=seed, epoch=epoch)) for seed in range(3) for epoch in range(3)]
    assert len({str(views) for views in drawn}) == 9
    assert len({tuple(examples.unit[view[0]] for view in views) for views in drawn}) > 2, "units are shuffled"
    assert any(view != sorted(view) for views in drawn for view in views), "and their clips"
    seen = {clip for epoch in range(100) for view in draw(examples, 5, seed=0, epoch=epoch) for clip in view.tolist()}
    assert seen == set(range(120)), "epoch by epoch all clips come"


def test_a_draw_does_not_look_at_torchs_or_numpys_own_state() -> None:
    torch.manual_seed(0)
    np.random.seed(0)
    first = lists(draw(sized([9, 9]), 3, seed=1, epoch=2))
    np.random.seed(5)
    assert lists(draw(sized([9, 9]), 3, seed=1, epoch=2)) == first


@CASES
@given(st.integers(1, 5), st.integers(1, 3), st.integers(2, 5), st.integers(1, 5), st.integers(0, 99))
def test_pairs_are_of_one_person_and_of_two_sessions_where_there_are_two(
    make_runs, people, sessions, clips, most, seed
) -> None:
    examples = make_runs(people, sessions=sessions, clips=clips)
    views = draw_pairs(examples, most, seed=seed, epoch=3)
    assert lists(draw_pairs(examples, most, seed=seed, epoch=3)) == lists(views)
    assert len(views) == 2 * people
    whose = np.array(examples.subjects)[examples.unit]
    session = np.array([run.session for run in examples.runs])[examples.run]
    for first, second in zip(views[::2], views[1::2], strict=True):
        assert len(set(whose[first]) | set(whose[second])) == 1
        assert len(set(first) | set(second)) == len(first) + len(second), "no clip twice"
        if sessions > 1:
            assert len(first) == len(second) == min(most, clips)
            (one,), (other,) = set(session[first]), set(session[second])
            assert one != other
        else:
            assert (len(first), len(second)) == (min(most, (clips + 1) // 2), min(most, clips // 2))
    assert sorted(whose[first[0]] for first in views[::2]) == sorted(set(whose)), "each person once"


def test_pairs_change_with_epoch_and_seed_and_leave_out_who_has_one_clip(make_runs) -> None:
    examples = make_runs(4, clips=6)
    drawn = {str(lists(draw_pairs(examples, 3, seed=seed, epoch=epoch))) for seed in range(3) for epoch in range(3)}
    assert len(drawn) == 9
    single = make_runs(3, sessions=1, clips=1)
    assert draw_pairs(single, 3, seed=0, epoch=0) == []


def test_of_a_session_with_several_runs_a_view_is_of_one_of_them(make_runs) -> None:
    examples = make_runs(2, sessions=6, clips=4)
    runs = tuple(replace(run, session=str(int(run.session) // 2)) for run in examples.runs)  # three, of two runs each
    examples = replace(examples, runs=runs)
    seen = set()
    for epoch in range(40):
        views = draw_pairs(examples, 3, seed=0, epoch=epoch)
        for view in views:
            (unit,) = set(examples.unit[view].tolist())
            assert len(view) == 3
            seen.add(unit)
        sessions = [runs[examples.run[view[0]]].session for view in views]
        assert all(one != other for one, other in zip(sessions[::2], sessions[1::2], strict=True))
    assert seen == set(range(12)), "epoch by epoch each run comes"


def test_of_one_session_with_several_runs_the_views_are_of_two_runs(make_runs) -> None:
    examples = make_runs(3, sessions=4, clips=4)
    examples = replace(examples, runs=tuple(replace(run, session="1") for run in examples.runs))
    views = draw_pairs(examples, 8, seed=0, epoch=1)
    units = [set(examples.unit[view].tolist()) for view in views]
    assert len(views) == 6 and all(len(unit) == 1 for unit in units)
    assert all(one != other for one, other in zip(units[::2], units[1::2], strict=True))


@CASES
@given(st.integers(0, 40), st.integers(1, 12))
def test_batches_are_the_clips_in_their_order(count: int, size: int) -> None:
    found = list(batches(np.arange(count), size))
    assert [clip for part in found for clip in part] == list(range(count))
    assert all(len(part) == size for part in found[:-1])


def views_of(sizes: Sequence[int]) -> list[Index]:
    return np.split(np.arange(sum(sizes)), np.cumsum(sizes)[:-1]) if sizes else []


def clips_in(views: Sequence[Sequence[int]]) -> int:
    return sum(len(view) for view in views)


@CASES
@given(st.lists(st.integers(1, 9), max_size=12), st.integers(1, 13))
def test_batches_hold_whole_views_in_their_order_and_as_many_as_fit(sizes: list[int], size: int) -> None:
    views = views_of(sizes)
    found = [lists(part) for part in batches_of_views(views, size)]
    assert [view for part in found for view in part] == lists(views)
    for number, part in enumerate(found):
        assert len(part) == 1 or clips_in(part) <= size
        if number + 1 < len(found):
            assert clips_in(part) + len(found[number + 1][0]) > size, "the next one had found no room"


@CASES
@given(st.lists(st.tuples(st.integers(1, 5), st.integers(1, 5)), max_size=15), st.integers(1, 25))
def test_batches_of_pairs_never_part_a_pair_and_hold_two_at_least(pairs: list[tuple[int, int]], size: int) -> None:
    views = views_of([length for pair in pairs for length in pair])
    found = [lists(part) for part in batches_of_views(views, size, pairs=True)]
    kept = [view for part in found for view in part]
    assert kept == lists(views)[: len(kept)]
    assert len(views) - len(kept) in (0, 2), "one pair has nobody to differ from"
    for number, part in enumerate(found):
        assert len(part) >= 4 and len(part) % 2 == 0
        assert len(part) == 4 or clips_in(part) <= size
        if number + 1 < len(found):
            assert clips_in(part) + clips_in(found[number + 1][:2]) > size


def test_held_rows_are_given_by_index() -> None:
    rows = np.arange(24, dtype=np.float32).reshape(4, 2, 3)
    given = HeldInputs(rows, "cpu").batch(np.array([3, 0, 3]))
    assert given.dtype == torch.float32 and np.array_equal(given.numpy(), rows[[3, 0, 3]])


def cut(cohort: Cohort, clip_frames: int, stride: int) -> Examples:
    return Age().examples(cohort, dict.fromkeys(cohort.subjects, 1.0), Cut(clip_frames, stride))


@pytest.fixture(scope="module")
def encoder(model: Path) -> SwinEncoder:
    return NeuroStorm.from_pretrained(model).network.encoder()


@pytest.mark.parametrize("normalise", ["voxel", "global"])
def test_clips_are_the_patches_of_the_stored_frames(ball_store: Path, encoder, normalise: str) -> None:
    cohort = open_cohort(ball_store)
    examples, store = cut(cohort, 10, 7), cohort.store
    clips = np.array([8, 0, 35, 17])
    rows = np.zeros(4, ROW)
    rows["run"], rows["start"] = examples.run[clips], examples.start[clips]
    columns = ClipReader(store, tuple(run.path for run in examples.runs), 10, normalise).read(rows)
    volume = np.zeros((4, 1, *store.mask.shape, 10), np.float32)
    for number, clip in enumerate(clips):
        run = examples.runs[examples.run[clip]].path
        z = store.frames(run, int(examples.start[clip]), 10) / np.float32(16)  # (L, V)
        if normalise == "global":
            volume[number, 0] = columns["fill"][number]
            z = z * columns["scale"][number] + columns["shift"][number]
        volume[number, 0][store.mask] = z.T
    expected = encoder.to_patches(torch.from_numpy(volume))
    found = ClipInputs(store, examples, encoder, normalise, "cpu").batch(clips)
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=0)
    assert found.std() > 0.1


def test_shorter_clips_than_the_models_are_given_too(ball_store: Path, encoder) -> None:
    cohort = open_cohort(ball_store)
    examples = cut(cohort, 6, 6)
    found = ClipInputs(cohort.store, examples, encoder, "voxel", "cpu").batch(np.array([0, 1]))
    assert found.shape[:2] == (2, encoder.geometry(6).levels[0].space_of_token.numel())


def test_a_clip_that_cannot_be_read_is_named(ball_store: Path, encoder, tmp_path: Path) -> None:
    damaged = tmp_path / "damaged.zarr"
    shutil.copytree(ball_store, damaged)
    cohort = open_cohort(damaged)
    shard = damaged / cohort.runs[2].path / SHARD_FILE
    content = bytearray(shard.read_bytes())
    content[40 * cohort.store.voxel_count] ^= 1
    shard.write_bytes(content)
    examples = cut(cohort, 10, 10)
    inputs = ClipInputs(cohort.store, examples, encoder, "voxel", "cpu")
    whole, broken = np.flatnonzero(examples.run == 1), np.flatnonzero(examples.run == 2)
    inputs.batch(whole)
    with pytest.raises(StoreError, match=rf"{cohort.runs[2].path}, clip from frame \d+, cannot be read: .*verify"):
        inputs.batch(np.concatenate([whole, broken]))
