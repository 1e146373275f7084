"""Examples: clips stay with their units however units are chosen, and the hash follows what a result follows from."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from neurostorm.downstream.cohort import CohortRun
from neurostorm.downstream.tasks.examples import Examples, build_examples, starts_of

CASES = settings(deadline=None, max_examples=30)
SUBJECTS = ("d/sub-1", "d/sub-2", "e/sub-1")


@st.composite
def studies(draw: st.DrawFn) -> Examples:
    """Up to 8 units, each of one of three subjects with up to 5 clips of up to 4 runs; units in the order of names."""
    runs = [
        CohortRun(f"runs/{n}", SUBJECTS[n % 3], str(n // 3), "rest", 40, f"{n:064x}")
        for n in range(draw(st.integers(1, 4)))
    ]
    units = [f"unit {number}" for number in range(draw(st.integers(1, 8)))]
    place = st.tuples(st.integers(0, len(runs) - 1), st.integers(0, 35))
    clips = [(*at, unit) for unit in units for at in draw(st.sets(place, min_size=1, max_size=5))]
    subject_of = {unit: draw(st.sampled_from(SUBJECTS)) for unit in units}
    target_of = {unit: draw(st.floats(-9, 9)) for unit in units}
    return build_examples(runs, 5, draw(st.permutations(clips)), subject_of, target_of)


def described(examples: Examples) -> list[tuple[Any, ...]]:
    """Of each unit its name, subject, target and clips (path of the run, first frame), in their order."""
    clips: list[list[tuple[str, int]]] = [[] for _ in examples.units]
    for run, start, unit in zip(examples.run, examples.start, examples.unit, strict=True):
        clips[unit].append((examples.runs[run].path, int(start)))
    return list(zip(examples.units, examples.subjects, examples.targets.tolist(), clips, strict=True))


@CASES
@given(studies(), st.sets(st.sampled_from(SUBJECTS)))
def test_the_units_of_subjects_keep_their_clips(examples: Examples, wanted: set[str]) -> None:
    chosen = examples.of(wanted)
    assert described(chosen) == [unit for unit in described(examples) if unit[1] in wanted]
    assert (chosen.runs, chosen.clip_frames) == (examples.runs, 5)


@CASES
@given(studies(), st.data())
def test_units_that_are_taken_come_in_the_order_asked_for_with_their_clips(examples: Examples, data: st.DataObject):
    order = data.draw(st.permutations(range(len(examples.units))))[: data.draw(st.integers(0, len(examples.units)))]
    taken = examples.take(np.array(order, np.int64))
    assert described(taken) == [described(examples)[unit] for unit in order]
    assert len(taken) == sum(len(clips) for *_, clips in described(taken))
    assert np.all(np.diff(taken.unit) >= 0)
    clips = examples.clips_of(order)
    assert np.array_equal(examples.run[clips], taken.run) and np.array_equal(examples.start[clips], taken.start)


@CASES
@given(studies())
def test_one_clip_each_is_the_first_of_each_unit(examples: Examples) -> None:
    single = examples.one_clip_each()
    assert described(single) == [(*unit, clips[:1]) for *unit, clips in described(examples)]


@CASES
@given(studies())
def test_clips_by_run_are_those_of_all_units_once(examples: Examples) -> None:
    wanted: dict[str, set[int]] = {}
    for *_, clips in described(examples):
        for path, start in clips:
            wanted.setdefault(path, set()).add(start)
    found = {examples.runs[run].path: starts.tolist() for run, starts in examples.clips_of_run().items()}
    assert found == {path: sorted(starts) for path, starts in wanted.items()}


def test_clips_are_collected_once_in_the_order_of_units_runs_and_frames() -> None:
    runs = [CohortRun(f"runs/{n}", "d/sub-1", "", "rest", 40, "") for n in range(2)]
    given = [(1, 5, "b"), (0, 9, "b"), (1, 0, "b"), (0, 3, "a"), (1, 5, "b")]
    examples = build_examples(runs, 5, given, {"a": "x", "b": "y"}, {"a": 1.0, "b": 0.0}, ("no", "yes"))
    assert described(examples) == [
        ("a", "x", 1, [("runs/0", 3)]),
        ("b", "y", 0, [("runs/0", 9), ("runs/1", 0), ("runs/1", 5)]),
    ]
    assert examples.targets.dtype == np.int64
    assert build_examples(runs, 5, given, {"a": "x", "b": "y"}, {"a": 1.5, "b": 0.0}).targets.tolist() == [1.5, 0.0]


@CASES
@given(st.integers(0, 40), st.integers(1, 12), st.integers(1, 12))
def test_starts_are_all_multiples_of_the_stride_at_which_a_whole_clip_fits(frames, clip_frames, stride) -> None:
    brute = [start for start in range(0, frames + 1, stride) if start + clip_frames <= frames]
    assert list(starts_of(frames, clip_frames, stride)) == brute


CHANGES: dict[str, Callable[[Examples], dict[str, Any]]] = {
    "a label": lambda given: {"targets": np.nextafter(given.targets, 9)},
    "a class": lambda given: {"classes": ("no", "yes")},
    "a start": lambda given: {"start": np.where(np.arange(len(given)) == 4, 4, given.start)},
    "a clip of another run": lambda given: {"run": np.where(np.arange(len(given)) == 4, 0, given.run)},
    "whose a clip is": lambda given: {"unit": np.where(np.arange(len(given)) == 3, 0, given.unit)},
    "frames of a clip": lambda given: {"clip_frames": 4},
    "a unit": lambda given: {"units": ("another", *given.units[1:])},
    "a subject": lambda given: {"subjects": (*given.subjects[:2], "d/sub-009")},
    "a run's source": lambda given: {"runs": (replace(given.runs[0], source_sha256="f"), *given.runs[1:])},
    "a run's length": lambda given: {"runs": (*given.runs[:2], replace(given.runs[2], frames=99))},
    "a run's place": lambda given: {"runs": (*given.runs[:2], replace(given.runs[2], path="runs/new"))},
}


@pytest.mark.parametrize("what", CHANGES)
def test_the_hash_changes_with_whatever_a_result_follows_from(make_subjects, what: str) -> None:
    given = make_subjects([0.5, 1.0, 2.0])
    assert replace(given, **CHANGES[what](given)).sha256 != given.sha256


def test_the_hash_is_the_same_for_the_same_examples_and_what_no_result_follows_from(make_subjects) -> None:
    given, again = make_subjects([0.5, 1.0, 2.0]), make_subjects([0.5, 1.0, 2.0])
    assert again.sha256 == given.sha256
    assert given.take(np.arange(3)).sha256 == given.sha256
    renamed = tuple(replace(run, task="REST") for run in given.runs)
    assert replace(given, runs=renamed).sha256 == given.sha256


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"targets": np.zeros(2)}, "3 units, 3 subjects, 2 targets"),
        ({"subjects": ("a", "b")}, "3 units, 2 subjects, 3 targets"),
        ({"start": np.zeros(2, np.int64)}, "9 runs, 2 starts, 9 units"),
        ({"unit": np.repeat([0, 2, 2], 3)}, "every unit needs a clip"),
        ({"unit": np.repeat([0, 1, 3], 3)}, "every unit needs a clip"),
        ({"units": ("a", "b", "a")}, "two units have one name"),
    ],
)
def test_what_does_not_fit_together_is_refused(make_subjects, change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(make_subjects([0.5, 1.0, 2.0]), **change)


def test_a_unit_is_taken_once(make_subjects) -> None:
    with pytest.raises(ValueError, match="two units"):
        make_subjects([0.5, 1.0, 2.0]).take(np.array([1, 1]))
