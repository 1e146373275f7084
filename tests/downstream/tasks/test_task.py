"""Tasks: clips, units and targets of each kind, a class of one's own in one file, and what is refused with its fix."""

import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from ray import cloudpickle

from neurostorm.config import ConfigError
from neurostorm.downstream.cohort import Cohort, CohortRun
from neurostorm.downstream.tasks.find import find_task
from neurostorm.downstream.tasks.task import REGISTRY, Age, Classification, Cut, Task, class_weights, event_starts

CASES = settings(deadline=None, max_examples=100)
OWN = """
from neurostorm.downstream.tasks.task import Regression

class ReactionTime(Regression):
    name, column, unit = "reaction_time", "rt_ms", "ms"
    def target(self, label, classes):
        return HALF * float(label)

HALF = 0.5
"""


def cohort_of(*runs: CohortRun, events: dict[str, list[list[Any]]] | None = None, tr_s: float = 0.8) -> Cohort:
    """Runs of a store that is not on disk; `events` by path."""
    store = SimpleNamespace(
        path="stores/made", tr_s=tr_s, run_attributes=lambda path: {"events": (events or {}).get(path, [])}
    )
    return Cohort(store, runs)  # type: ignore[arg-type]  # all that tasks ask of a store


def run_of(subject: str, session: str = "", frames: int = 40, number: int = 0) -> CohortRun:
    return CohortRun(f"runs/{subject}/{session}-{number}", subject, session, "rest", frames, "")


def starts_by_unit(examples) -> dict[str, list[int]]:
    return {unit: examples.start[examples.unit == number].tolist() for number, unit in enumerate(examples.units)}


def test_a_number_of_each_subject_comes_with_the_clips_of_all_of_its_runs() -> None:
    cohort = cohort_of(run_of("d/b"), run_of("d/a", number=1), run_of("d/a", number=2, frames=9), run_of("d/c"))
    examples = Age().examples(cohort, {"d/a": "31.5", "d/b": 40.0}, Cut(10, 15))
    assert (examples.units, examples.subjects) == (("d/a", "d/b"), ("d/a", "d/b"))
    assert examples.targets.tolist() == [31.5, 40.0] and examples.classes == ()
    assert starts_by_unit(examples) == {"d/a": [0, 15, 30], "d/b": [0, 15, 30]}
    assert [examples.runs[run].path for run in np.unique(examples.run)] == ["runs/d/b/-0", "runs/d/a/-1"]


def test_classes_are_those_of_subjects_with_clips_by_name() -> None:
    cohort = cohort_of(run_of("d/a"), run_of("d/b"), run_of("d/c", frames=9))
    examples = find_task("sex").examples(cohort, {"d/a": "M", "d/b": "F", "d/c": "X"}, Cut(10, 10))
    assert examples.classes == ("F", "M"), "X has no clip, so it is no class that anybody could be taken for"
    assert dict(zip(examples.units, examples.targets.tolist(), strict=True)) == {"d/a": 1, "d/b": 0}
    assert examples.targets.dtype == np.int64


@pytest.mark.parametrize(
    ("labels", "clip_frames", "message"),
    [
        ({}, 10, "diagnosis: it needs labels; give their column, --task diagnosis:COLUMN"),
        ({"d/a": "x", "d/b": "x"}, 10, "one class only, 'x'"),
        ({"d/a": "x", "d/b": "y"}, 41, "no run of a labelled subject in stores/made has 41 frames"),
        ({"d/z": "x"}, 10, "no run of a labelled subject"),
    ],
)
def test_labels_that_no_task_can_be_made_of_are_refused(labels, clip_frames, message) -> None:
    with pytest.raises(ConfigError, match=message):
        find_task("diagnosis").examples(cohort_of(run_of("d/a"), run_of("d/b")), labels, Cut(clip_frames, 10))


@pytest.mark.parametrize(
    ("onset_s", "duration_s", "starts"),
    [
        (
            3.0,
            20.0,
            [10, 15, 20, 25],
        ),  # blood answers from 8 to 28 s: frames 10 to 35 of .8 s
        (3.1, 20.0, [11, 16, 21]),  # frame 10 is before 8.1 s, and a clip from 26 ends after frame 35
        (2.9, 19.0, [10, 15, 20]),
        (0.0, 0.0, [7]),  # an instant: one clip, from the first frame after 5 s
        (30.0, 4.0, [44]),  # shorter than a clip, which reaches beyond it
        (59.0, 4.0, []),  # from frame 80: only 9 frames are left
        (58.0, 4.0, [79]),
        (-5.0, 9.0, [0]),  # began before the recording, and its answer with it
        (-9.0, 20.0, [0, 5, 10]),  # the answer is under way until 16 s, frame 20
        (-9.0, 2.0, []),  # its answer was over 2 s before the recording
        (-6.0, 0.0, []),
        (1000.0, 5.0, []),
    ],
)
def test_clips_of_an_event_begin_when_its_answer_does(onset_s, duration_s, starts) -> None:
    cut = Cut(clip_frames=10, stride_frames=5, delay_s=5.0)
    assert event_starts(onset_s, duration_s, 89, 0.8, cut) == starts


@CASES
@given(
    st.integers(-400, 1200), st.integers(0, 400), st.integers(5, 120), st.sampled_from([1, 5, 8, 20, 22]),
    st.integers(1, 12), st.integers(1, 12), st.integers(0, 80),
)  # fmt: skip
@example(30, 200, 89, 8, 10, 5, 50)
def test_clips_of_an_event_are_the_brute_force_ones(onset, duration, frames, tr, clip, stride, delay) -> None:
    """All times in tenths of a second, so that the comparison is exact."""
    found = event_starts(onset / 10, duration / 10, frames, tr / 10, Cut(clip, stride, delay / 10))
    answer, end = onset + delay, onset + delay + duration
    after = [frame for frame in range(frames + 200) if frame * tr >= answer]
    first = after[0] if after else frames
    inside = [first + n * stride for n in range(1, frames) if (first + n * stride + clip) * tr <= end]
    over = answer <= -tr and end < tr
    assert found == ([] if over else [start for start in (first, *inside) if start + clip <= frames])


def test_states_are_events_of_a_run_each_with_its_own_clips() -> None:
    runs = run_of("d/a", frames=60), run_of("d/b", frames=60), run_of("d/c", frames=60)
    events = {
        runs[0].path: [[1234.5678, 9.0, "rest"], [3.0, 20.0, "tap"], [20.0, 0.0, "rest"], [20.0, 4.0, "blink"]],
        runs[1].path: [[3.00001, 4.0, "tap"], [3.0, 4.0, "tap"]],
    }
    examples = find_task("state").examples(cohort_of(*runs, events=events), {}, Cut(10, 5, states=("tap", "rest")))
    assert examples.classes == ("rest", "tap")
    found = {
        (subject, examples.classes[target], tuple(starts))
        for subject, target, starts in zip(
            examples.subjects, examples.targets, starts_by_unit(examples).values(), strict=True
        )
    }
    assert found == {
        ("d/a", "tap", (10, 15, 20, 25)), ("d/a", "rest", (32,)), ("d/b", "tap", (10,)),
    }  # fmt: skip
    assert all(
        examples.runs[run].subject == examples.subjects[unit]
        for run, unit in zip(examples.run, examples.unit, strict=True)
    )


def test_two_states_that_begin_at_one_time_are_two_units() -> None:
    run = run_of("d/a")
    events = {run.path: [[3.0, 20.0, "tap"], [3.0, 0.0, "cue"], [3.0, 0.0, "cue"]]}
    examples = find_task("state").examples(cohort_of(run, events=events), {}, Cut(10, 15))
    assert sorted(zip(examples.targets.tolist(), starts_by_unit(examples).values(), strict=True)) == [
        (0, [10]), (1, [10, 25]),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("events", "cut", "message"),
    [
        ([], Cut(10, 5), r"0 kinds of event, .*ingest finds \*_events.tsv"),
        ([[3.0, 4.0, "tap"], [9.0, 4.0, "cue"]], Cut(10, 5, states=("tap",)), r"1 kinds of event of \['tap'\]"),
        (
            [[3.0, 4.0, "tap"], [900.0, 4.0, "cue"]],
            Cut(10, 5),
            r"of 2 kinds .* 1 leave.* 10 frames.*clip_frames",
        ),
        ([[3.0, 4.0, "tap"], [9.0, 4.0, "cue"]], Cut(41, 5), "0 leave.* clip of 41 frames"),
    ],
)
def test_events_that_are_no_two_states_are_refused(events, cut, message) -> None:
    run = run_of("d/a")
    with pytest.raises(ConfigError, match=message):
        find_task("state").examples(cohort_of(run, events={run.path: events}), {}, cut)


def test_people_are_told_apart_by_runs_of_several_sessions() -> None:
    runs = (
        run_of("d/b", "1"), run_of("d/b", "2"), run_of("d/b", "2", number=1), run_of("d/a", "1"), run_of("d/a", "2"),
        run_of("d/once", "1"), run_of("d/once", "1", number=1), run_of("d/short", "1"),
        run_of("d/short", "2", frames=9),
    )  # fmt: skip
    examples = find_task("reid").examples(cohort_of(*runs), {}, Cut(10, 20))
    assert examples.classes == ("d/a", "d/b"), "one session, or a second one without a clip, finds nobody"
    assert dict(zip(examples.units, examples.targets.tolist(), strict=True)) == {
        "runs/d/a/1-0": 0, "runs/d/a/2-0": 0, "runs/d/b/1-0": 1, "runs/d/b/2-0": 1, "runs/d/b/2-1": 1,
    }  # fmt: skip
    assert set(map(tuple, starts_by_unit(examples).values())) == {(0, 20)}
    with pytest.raises(ConfigError, match=r"1 subject\(s\) .* runs in two sessions"):
        find_task("reid").examples(cohort_of(*runs[:3], *runs[5:]), {}, Cut(10, 20))


@pytest.fixture
def registry() -> Iterator[None]:
    """Puts back the known tasks."""
    before = dict(REGISTRY)
    yield
    REGISTRY.clear()
    REGISTRY.update(before)


def written(folder: Path, text: str, name: str = "reaction_time.py") -> Path:
    file = folder / name
    file.write_text(text)
    return file


@pytest.mark.parametrize("asked", ["reaction_time", "reaction_time.py", "{folder}/reaction_time.py"])
def test_a_class_in_a_file_is_a_task(asked, registry, tmp_path, monkeypatch) -> None:
    written(tmp_path, OWN)
    monkeypatch.chdir(tmp_path)
    text = asked.format(folder=tmp_path)
    task = find_task(text)
    assert (task.name, task.kind, task.metric, task.column, task.unit) == (
        "reaction_time", "regression", "r", "rt_ms", "ms",
    )  # fmt: skip
    assert task.label == "reaction_time" and task.needs_labels and task.numeric
    other = find_task(f"{text}:rt2")
    assert (other.column, other.label, find_task(text, "rt3").column) == ("rt2", "reaction_time:rt2", "rt3")
    assert other.examples(cohort_of(run_of("d/a")), {"d/a": 8.0}, Cut(10, 10)).targets.tolist() == [4.0]


def test_a_file_that_was_changed_is_read_anew_and_two_of_one_name_are_two(registry, tmp_path) -> None:
    file = written(tmp_path, OWN)
    assert find_task(str(file)).unit == "ms"
    written(tmp_path, OWN.replace('"reaction_time", "rt_ms", "ms"', '"speed", "rt_s", "s"'))
    assert find_task(str(file)).unit == "s"
    (tmp_path / "other").mkdir()
    with pytest.raises(ConfigError, match="the name 'speed' belongs to another task"):
        find_task(str(written(tmp_path / "other", file.read_text())))


def test_a_task_of_a_file_travels_to_a_process_without_the_file(registry, tmp_path) -> None:
    file = written(tmp_path, OWN)
    (tmp_path / "task.pickle").write_bytes(cloudpickle.dumps(find_task(f"{file}:rt2")))
    file.unlink()
    program = (
        "from ray import cloudpickle; from pathlib import Path\n"
        "task = cloudpickle.loads(Path('task.pickle').read_bytes())\n"
        "print(type(task).__name__, task.name, task.column, task.metric, task.target(8, ()))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=tmp_path, env={"PYTHONPATH": str(Path(__file__).parents[3])},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert (done.stdout, done.returncode) == ("ReactionTime reaction_time rt2 r 4.0\n", 0), done.stderr


HEAD = "from neurostorm.downstream.tasks.task import Classification, Regression, SubjectTask, Task\n"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (f"{HEAD}class A(Regression): name = 'a'\nclass B(Regression): name = 'b'\n", "2 tasks .* have a `name`; one"),
        (f"{HEAD}class A(Regression): pass\n", "0 tasks in it"),
        (f"{HEAD}class A(Task): name, kind = 'a', 'ranking'\n", "kind is 'ranking': one of regression"),
        (f"{HEAD}class A(Regression): name, metric = 'a', 'speed'\n", "metric 'speed' is unknown: take one of mae"),
        (f"{HEAD}class A(SubjectTask): name, kind, metric = 'a', 'regression', 'r'\n", "A lacks classes, target"),
        (f"{HEAD}class A(Regression) name = 'a'\n", r"cannot be imported as a task \(SyntaxError"),
        ("import no_such_module\n", "ModuleNotFoundError: No module named 'no_such_module'"),
        (f"{HEAD}class A(Regression): name = 'a'\n1 / 0\n", "ZeroDivisionError"),
        (
            f"{HEAD}class A(Regression): name = 'age'\n",
            "the name 'age' belongs to another task; give",
        ),
    ],
)
def test_a_file_that_is_no_task_is_refused_and_leaves_nothing(registry, tmp_path, text, message) -> None:
    before = dict(REGISTRY)
    file = written(tmp_path, text, "mine.py")
    with pytest.raises(ConfigError, match=message) as refused:
        find_task(str(file))
    assert str(refused.value).startswith(str(file))
    assert before == REGISTRY and find_task("age").unit == "years"


def test_of_several_tasks_the_one_called_as_the_file_is_taken(registry, tmp_path) -> None:
    text = f"{HEAD}class A(Regression): name = 'a'\nclass B(Classification): name = 'mine'\n"
    assert isinstance(find_task(str(written(tmp_path, text, "mine.py"))), Classification)


@pytest.mark.parametrize(
    ("asked", "hint"),
    [
        ("aeg", "did you mean age"),
        ("diagnoses:dx", "did you mean diagnosis"),
        ("qqq", "tasks are age, diagnosis, phenotype, reid"),
        ("nowhere/mine.py", "no file nowhere/mine.py"),
    ],
)
def test_a_name_that_is_not_known_is_refused_with_the_nearest(asked, hint, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=hint) as refused:
        find_task(asked)
    assert str(refused.value).startswith(f"task.name={asked}: no such task") and str(tmp_path) in str(refused.value)


def test_a_column_makes_a_phenotype_and_a_name_of_its_own() -> None:
    assert not find_task("phenotype").needs_labels
    task = find_task("phenotype:iq", "other")
    assert (task.column, task.label, task.needs_labels) == ("iq", "phenotype:iq", True)
    assert (find_task("age").label, find_task("age", "years").label) == ("age", "age:years")


@CASES
@given(st.lists(st.integers(0, 4), min_size=1, max_size=40))
def test_each_class_that_is_there_counts_alike(targets: list[int]) -> None:
    given = np.array(targets)
    weights = class_weights(given, 5)
    present = np.unique(given)
    sums = [weights[given[given == number]].sum() for number in present]
    np.testing.assert_allclose(sums, len(given) / len(present), rtol=1e-5)
    assert not weights[np.setdiff1d(np.arange(5), present)].any() and weights.dtype == np.float32


def test_every_known_task_says_what_it_is() -> None:
    assert {"age", "sex", "diagnosis", "phenotype", "state", "reid"} <= set(REGISTRY)
    for name, task in REGISTRY.items():
        assert issubclass(task, Task) and task.name == name and task.metric
    assert replace(Cut(5, 5)).delay_s == 5.0
