"""Reading a sweep back: what was logged is what the rows hold, and what contradicts itself is refused by run id."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from neurostorm.report.collect import collect, without_credentials
from neurostorm.report.compare import comparisons
from neurostorm.report.results import ReportError, Results

pytestmark = pytest.mark.filterwarnings("ignore:.*noload:DeprecationWarning")  # MLflow's use of its database library
CELL = ("age", "full", 1.0, 0)
SELECTED = {"neurostorm.selected": "true"}


def test_every_trial_is_a_row_with_what_was_logged(results: Results, sweep: Any) -> None:
    assert {trial.run_id for trial in results.trials} == {*sweep.run_of.values(), sweep.failed}
    trial = next(one for one in results.trials if one.run_id == sweep.run_of["age", "linear", 0.25, 2])
    assert (trial.task, trial.method, trial.fraction, trial.seed) == ("age", "linear", 0.25, 2)
    assert trial.selected and trial.status == "FINISHED"
    assert trial.overlap == 0.25 and trial.split_sha256 == f"{2:064x}"
    assert trial.hyperparameters == {"lr": "0.001"}
    assert set(trial.test) == {"r", "mae", "rmse", "r2"} and set(trial.validation) == {"r"}
    assert (trial.chance, trial.seconds, trial.parameters) == (0.0, 62.0, 1234567.0)


def test_the_sweep_says_what_it_was(results: Results, sweep: Any) -> None:
    assert (results.run_id, results.name, results.status) == (sweep.parent, "five tasks", "FINISHED")
    assert results.revision == "abc123"
    assert results.parameters["sweep.seeds"] == "3"
    assert [task.name for task in results.tasks] == ["<b>sex & co</b>", "age", "fluid", "reid", "state"]
    assert results.tasks[-1].classes == ("rest", "motor", "language")
    assert results.fractions == (0.25, 1.0) and results.fraction == 1.0


def test_predictions_are_read_where_all_labels_were_used(results: Results) -> None:
    for trial in results.trials:
        wanted = trial.fraction == 1 and trial.task != "reid" and trial.selected
        assert (trial.predictions is not None) == wanted, trial
    rows = results.at("state", "full")[0].predictions
    assert rows is not None
    assert rows.output.shape == (12, 3) and rows.target.tolist() == [0, 1, 2] * 4
    assert rows.subjects[0] == "toy/sub-000"


def test_a_failed_trial_keeps_its_error(results: Results, sweep: Any) -> None:
    failed = next(one for one in results.trials if one.run_id == sweep.failed)
    assert failed.status == "FAILED" and failed.error == "CUDA out of memory <at step 3>"
    assert not failed.test and not failed.selected


@pytest.mark.parametrize("wrong", ["0" * 32, "no id at all"])
def test_an_unknown_id_is_refused(sweep: Any, wrong: str) -> None:
    with pytest.raises(ReportError, match=rf"no run '{wrong}' in sqlite.*parent"):
        collect(sweep.uri, wrong)


def test_a_trials_id_is_refused_with_its_parents(sweep: Any) -> None:
    with pytest.raises(ReportError, match=f"trial of the sweep {sweep.parent}"):
        collect(sweep.uri, sweep.failed)


def test_a_sweep_without_trials_is_refused(new_sweep: Callable[..., Any]) -> None:
    empty = new_sweep()
    with pytest.raises(ReportError, match="has no trials"):
        collect(empty.uri, empty.parent)


def test_trials_without_test_metrics_are_refused(new_sweep: Callable[..., Any]) -> None:
    made = new_sweep()
    made.trial(CELL, metrics={"validation/r": 0.3})
    made.trial(("age", "fc", 1.0, 0), metrics={"test/r": 0.3})  # not selected: no number of the report
    with pytest.raises(ReportError, match="none of the 2 trials"):
        collect(made.uri, made.parent)


def test_two_selected_trials_of_one_seed_are_refused_by_id(new_sweep: Callable[..., Any]) -> None:
    made = new_sweep()
    ids = [made.trial(CELL, metrics={"test/r": value}, tags=SELECTED) for value in (0.3, 0.4)]
    with pytest.raises(ReportError, match="both selected for age, full") as refused:
        collect(made.uri, made.parent)
    assert all(one in str(refused.value) for one in ids)


@pytest.mark.parametrize(
    ("tags", "words"),
    [
        ({"neurostorm.seed": "first"}, "neurostorm.seed is 'first'"),
        ({"neurostorm.task_kind": "riddle"}, "task_kind is 'riddle' and needs one of regression"),
        ({"neurostorm.metric": "luck"}, "neurostorm.metric: metric 'luck' is unknown"),
        ({"neurostorm.unit": "months"}, "the task age is"),
    ],
)
def test_tags_that_cannot_be_are_refused(new_sweep: Callable[..., Any], tags: dict[str, str], words: str) -> None:
    made = new_sweep()
    made.trial(CELL, metrics={"test/r": 0.3}, tags=SELECTED)
    made.trial(("age", "fc", 1.0, 0), metrics={"test/r": 0.3}, tags=SELECTED | tags)
    with pytest.raises(ReportError, match=words):
        collect(made.uri, made.parent)


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        ({"unit": ["a"], "subject": ["a"], "target": [1.0]}, "cannot be read as predictions of age"),
        ({"unit": ["a", "a"], "subject": ["a", "a"], "target": [1.0, 1], "prediction": [1.0, 1]}, "names a unit twice"),
        ({"unit": ["a"], "subject": ["a"], "target": [1.0], "prediction": [np.nan]}, "not finite"),
    ],
)
def test_predictions_that_are_none_are_refused(new_sweep: Callable[..., Any], rows: Any, words: str) -> None:
    made = new_sweep()
    run_id = made.trial(CELL, metrics={"test/r": 0.3}, tags=SELECTED, rows=pa.table(rows))
    with pytest.raises(ReportError, match=words) as refused:
        collect(made.uri, made.parent)
    assert run_id in str(refused.value)


def test_two_methods_with_other_targets_for_one_subject_are_refused(new_sweep: Callable[..., Any]) -> None:
    made = new_sweep()
    for method, value in (("full", 1.0), ("fc", 2.0)):
        rows = {"unit": ["a", "b"], "subject": ["a", "b"], "target": [value, 5.0], "prediction": [1.0, 2.0]}
        made.trial(("age", method, 1.0, 0), metrics={"test/r": 0.3}, tags=SELECTED, rows=pa.table(rows))
    with pytest.raises(ReportError, match="different targets for a in the task age"):
        comparisons(collect(made.uri, made.parent), draws=5)


def test_a_password_is_on_no_page() -> None:
    assert without_credentials("postgresql://me:secret@host/db") == "postgresql://host/db"
    assert without_credentials("http://host:5000") == "http://host:5000"
