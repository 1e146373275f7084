"""Read a sweep back from MLflow: the parent run, its trials, and the predictions of those that were selected.

    parent id --search children--> tags, params, metrics --checked--> TrialRow --predictions.parquet--> Results

Nothing but MLflow is read, so a report can be made on another machine, years later. What contradicts itself (two
selected trials of one seed, a task with two metrics) is refused by run id rather than averaged.
"""

import json
import os
import re
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
from numpy.typing import NDArray

from neurostorm.downstream.statistics.metrics import higher_is_better
from neurostorm.report.results import (
    CLASSIFICATION,
    IDENTIFICATION,
    KINDS,
    Predictions,
    ReportError,
    Results,
    TaskRow,
    TrialRow,
)
from neurostorm.runtime.progress import tracked

PREDICTIONS = "predictions.parquet"
READERS = 8  # artifacts fetched at once from a server
NAN = float("nan")
os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")  # hundreds of files of a few kB
_CREDENTIALS = re.compile(r"(?<=://)[^/@]*@")
_NUMBERED = {"fraction": float, "seed": int}


def collect(uri: str, parent_run_id: str) -> Results:
    """Everything that the report needs of the sweep `parent_run_id` in the MLflow of `uri`.

    Raises:
        ReportError: no such run, or it is no sweep; no trials, or none with test metrics; trials that contradict each
            other; a tag or a table of predictions that cannot be read.
        MlflowException: the server does not answer.
    """
    from mlflow import MlflowClient

    client = MlflowClient(tracking_uri=uri)
    parent = _parent(client, uri, parent_run_id)
    children = list(_children(client, parent))
    if not children:
        raise ReportError(f"the sweep {parent_run_id} has no trials in MLflow: run it before it is reported")
    tasks = _tasks(children)
    trials = sorted((_trial(run) for run in children), key=lambda t: (t.task, t.method, t.fraction, t.seed, t.run_id))
    if not any(trial.test for trial in trials):
        raise ReportError(
            f"none of the {len(trials)} trials of the sweep {parent_run_id} has test metrics: they are logged for the "
            "trial that validation selects; let the sweep end, or look at why its trials failed"
        )
    _refuse_twice_selected(trials)
    results = Results(
        uri=without_credentials(uri),
        run_id=parent.info.run_id,
        experiment_id=str(parent.info.experiment_id),
        name=parent.info.run_name or parent.info.run_id,
        status=parent.info.status,
        date=datetime.fromtimestamp(parent.info.start_time / 1000, UTC).isoformat(timespec="minutes"),
        revision=parent.data.tags.get("code_revision", ""),
        parameters=dict(sorted(parent.data.params.items())),
        tasks=tuple(tasks[name] for name in sorted(tasks)),
        trials=tuple(trials),
    )
    return replace(results, trials=_with_predictions(client, results, tasks))


def without_credentials(uri: str) -> str:
    """The URI without a user's name and password, which belong on no page."""
    return _CREDENTIALS.sub("", uri)


def _parent(client: Any, uri: str, run_id: str) -> Any:
    from mlflow.exceptions import MlflowException

    try:
        run = client.get_run(run_id)
    except MlflowException as error:
        if error.error_code not in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
            raise
        raise ReportError(
            f"there is no run {run_id!r} in {without_credentials(uri)}: give the id of the sweep's parent run"
        ) from error
    kind, above = run.data.tags.get("neurostorm.kind"), run.data.tags.get("mlflow.parentRunId")
    if kind != "sweep":
        hint = f"it is a trial of the sweep {above}" if above else "its tag neurostorm.kind is not `sweep`"
        raise ReportError(f"the run {run_id} is no sweep ({hint}): give the id of a sweep's parent run")
    return run


def _children(client: Any, parent: Any) -> Iterator[Any]:
    """The trials of the sweep, page by page; a run that somebody deleted is not among them."""
    wanted = f"tags.`mlflow.parentRunId` = '{parent.info.run_id}' and tags.`neurostorm.kind` = 'trial'"
    token = None
    while True:
        page = client.search_runs([parent.info.experiment_id], wanted, max_results=1000, page_token=token)
        yield from page
        token = page.token
        if not token:
            return


def _tag(run: Any, name: str, choices: Sequence[str] = ()) -> str:
    value = run.data.tags.get(f"neurostorm.{name}", "")
    if not value or (choices and value not in choices):
        needed = f"one of {', '.join(choices)}" if choices else "a value"
        raise ReportError(f"run {run.info.run_id}: the tag neurostorm.{name} is {value!r} and needs {needed}; set it")
    return str(value)


def _number(run: Any, name: str) -> Any:
    text, kind = _tag(run, name), _NUMBERED[name]
    try:
        return kind(text)
    except ValueError as error:
        raise ReportError(
            f"run {run.info.run_id}: the tag neurostorm.{name} is {text!r}, no number ({kind.__name__}); set it anew"
        ) from error


def _tasks(runs: Iterable[Any]) -> dict[str, TaskRow]:
    tasks: dict[str, tuple[TaskRow, str]] = {}
    for run in runs:
        name, kind, metric = _tag(run, "task"), _tag(run, "task_kind", KINDS), _tag(run, "metric")
        try:
            higher_is_better(metric)
        except ValueError as error:
            raise ReportError(f"run {run.info.run_id}: the tag neurostorm.metric: {error}") from error
        task = TaskRow(name, kind, metric, run.data.tags.get("neurostorm.unit", ""), _classes(run, kind))
        known, first = tasks.setdefault(name, (task, run.info.run_id))
        if known != task:
            raise ReportError(
                f"the task {name} is {known} in run {first} but {task} in run {run.info.run_id}: one sweep asks one "
                "question under one name; delete the runs that are not of it"
            )
    return {name: task for name, (task, _) in tasks.items()}


def _classes(run: Any, kind: str) -> tuple[str, ...]:
    if kind != CLASSIFICATION:
        return ()
    text = _tag(run, "classes")
    try:
        found = json.loads(text)
    except ValueError:
        found = None
    if not isinstance(found, list) or len(found) < 2 or len(set(map(str, found))) < len(found):
        raise ReportError(f"run {run.info.run_id}: the tag neurostorm.classes is {text!r}, no JSON list of class names")
    return tuple(map(str, found))


def _trial(run: Any) -> TrialRow:
    tags, params, metrics = run.data.tags, run.data.params, run.data.metrics

    def under(prefix: str, values: dict[str, Any]) -> dict[str, Any]:
        return {name.removeprefix(prefix): value for name, value in values.items() if name.startswith(prefix)}

    selected, test = tags.get("neurostorm.selected") == "true", under("test/", metrics)
    return TrialRow(
        run_id=run.info.run_id,
        experiment_id=str(run.info.experiment_id),
        name=run.info.run_name or "",
        status=run.info.status,
        task=_tag(run, "task"),
        method=_tag(run, "method"),
        fraction=_number(run, "fraction"),
        seed=_number(run, "seed"),
        selected=selected,
        error=tags.get("neurostorm.error", ""),
        split_sha256=params.get("split_sha256", ""),
        overlap=_overlap(run),
        hyperparameters=under("hp.", params),
        validation=under("validation/", metrics),
        test={name: value for name, value in test.items() if name != "chance"} if selected else {},
        chance=test.get("chance", NAN),
        seconds=metrics.get("cost/seconds", NAN),
        parameters=metrics.get("model/trainable_parameters", NAN),
    )


def _overlap(run: Any) -> float | None:
    text = run.data.params.get("pretraining_overlap", "unknown")
    if text == "unknown":
        return None
    try:
        return float(text)
    except ValueError as error:
        raise ReportError(
            f"run {run.info.run_id}: the parameter pretraining_overlap is {text!r}, neither a share nor `unknown`"
        ) from error


def _refuse_twice_selected(trials: Iterable[TrialRow]) -> None:
    chosen: dict[tuple[str, str, float, int], str] = {}
    for trial in trials:
        if trial.selected:
            first = chosen.setdefault((trial.task, trial.method, trial.fraction, trial.seed), trial.run_id)
            if first != trial.run_id:
                raise ReportError(
                    f"runs {first} and {trial.run_id} are both selected for {trial.task}, {trial.method}, fraction "
                    f"{trial.fraction:g}, seed {trial.seed}: remove the tag neurostorm.selected from one of them"
                )


def _with_predictions(client: Any, results: Results, tasks: dict[str, TaskRow]) -> tuple[TrialRow, ...]:
    """The trials, those with all labels with their predictions; identification keeps embeddings instead."""

    def read(trial: TrialRow) -> TrialRow:
        task = tasks[trial.task]
        if not trial.test or trial.fraction != results.fraction or task.kind == IDENTIFICATION:
            return trial
        if not any(one.path == PREDICTIONS for one in client.list_artifacts(trial.run_id)):
            return trial
        with tempfile.TemporaryDirectory() as folder:
            return replace(trial, predictions=_predictions(client, trial.run_id, task, folder))

    with ThreadPoolExecutor(READERS) as pool:
        found = pool.map(read, results.trials)
        return tuple(tracked(found, len(results.trials), "report: predictions", "trial"))


def _predictions(client: Any, run_id: str, task: TaskRow, folder: str) -> Predictions:
    where = f"run {run_id}: {PREDICTIONS}"
    try:
        rows = pq.read_table(Path(client.download_artifacts(run_id, PREDICTIONS, folder)))
        units, subjects = (tuple(rows[name].to_pylist()) for name in ("unit", "subject"))
        if task.kind == CLASSIFICATION:
            index = {name: number for number, name in enumerate(task.classes)}
            target: NDArray[Any] = np.array([index[name] for name in rows["target"].to_pylist()], np.int64)
            output = np.array(rows["scores"].to_pylist(), np.float64)
        else:
            output = np.array(rows["prediction"].to_pylist(), np.float64)
            target = np.array(rows["target"].to_pylist(), np.float64)
    except (KeyError, ValueError, TypeError, OSError) as error:
        raise ReportError(f"{where} cannot be read as predictions of {task.name}: {error!r}; train it anew") from error
    wanted = (len(units), len(task.classes)) if task.kind == CLASSIFICATION else (len(units),)
    if not units or output.shape != wanted or not np.isfinite(output).all():
        raise ReportError(f"{where} holds outputs of shape {output.shape}, not finite numbers {wanted}; train it anew")
    if len(set(units)) < len(units):
        raise ReportError(f"{where} names a unit twice: predictions are of runs or subjects, pooled over clips")
    return Predictions(units, subjects, target, output)
