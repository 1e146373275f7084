"""What a sweep left, as typed rows: tasks, trials, predictions.

    Results --at--> the trials of (task, method, fraction), one per seed --values--> {Pair: metric}

A trial is one training. Of the trials of one (task, method, fraction, seed) the sweep selected one on validation data;
only that one saw the test data, and only such trials make numbers of the report.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from neurostorm.downstream.statistics.metrics import higher_is_better
from neurostorm.io.errors import UserError
from neurostorm.report.methods import ordered

REGRESSION, CLASSIFICATION, IDENTIFICATION = "regression", "classification", "identification"
KINDS = (REGRESSION, CLASSIFICATION, IDENTIFICATION)


class ReportError(UserError, ValueError):
    """A report cannot be made from what lies in MLflow; the message names the run, the field and the fix."""


class Pair(NamedTuple):
    """What makes two trials of different methods comparable: the same seed on the same split."""

    seed: int
    split_sha256: str


@dataclass(frozen=True)
class TaskRow:
    """One question. `metric` is the primary one, `unit` that of a regression's target, `classes` a classification's."""

    name: str
    kind: str
    metric: str
    unit: str = ""
    classes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Predictions:
    """Predictions of one trial for its test units (N runs or subjects).

    Attributes:
        units: N names, each once in a trial.
        subjects: N, `dataset/sub-001` of each.
        target: (N) float64, or int64 indices of the task's classes.
        output: (N) float64 in the target's unit, or (N, K) probabilities.
    """

    units: tuple[str, ...]
    subjects: tuple[str, ...]
    target: NDArray[Any]
    output: NDArray[np.float64]


@dataclass(frozen=True)
class TrialRow:
    """One child run of the sweep.

    Attributes:
        run_id, experiment_id, name: of the MLflow run.
        status: FINISHED, FAILED, KILLED, RUNNING or SCHEDULED.
        task, method: names.
        fraction: of the training labels, in (0, 1].
        seed: of split and training.
        selected: whether validation chose it.
        error: what a failed one said.
        split_sha256: of the ids of train, validation and test.
        overlap: share of test subjects that pretraining saw; None if nobody knows.
        hyperparameters: as text, without `hp.`.
        validation, test: metrics by name; `test` is empty unless selected.
        chance: of the primary metric, nan if it has none.
        seconds, parameters: wall time of the training and trainable parameters; nan if not logged.
        predictions: read for trials with all labels only.
    """

    run_id: str
    experiment_id: str
    name: str
    status: str
    task: str
    method: str
    fraction: float
    seed: int
    selected: bool
    error: str = ""
    split_sha256: str = ""
    overlap: float | None = None
    hyperparameters: Mapping[str, str] = field(default_factory=dict)
    validation: Mapping[str, float] = field(default_factory=dict)
    test: Mapping[str, float] = field(default_factory=dict)
    chance: float = float("nan")
    seconds: float = float("nan")
    parameters: float = float("nan")
    predictions: Predictions | None = None

    @property
    def pair(self) -> Pair:
        return Pair(self.seed, self.split_sha256)


@dataclass(frozen=True)
class Results:
    """A whole sweep.

    Attributes:
        uri: of MLflow, without credentials.
        run_id, experiment_id, name, status: of the parent run.
        date: when the sweep began, ISO 8601 in UTC.
        revision: of the code that ran it, "" if it did not say.
        parameters: of the parent run.
        tasks: by name.
        trials: by task, method, fraction, seed.
    """

    uri: str
    run_id: str
    experiment_id: str
    name: str
    status: str
    date: str
    revision: str
    parameters: Mapping[str, str]
    tasks: tuple[TaskRow, ...]
    trials: tuple[TrialRow, ...]

    @cached_property
    def _cells(self) -> dict[tuple[str, str, float], tuple[TrialRow, ...]]:
        cells: dict[tuple[str, str, float], list[TrialRow]] = {}
        for trial in self.trials:
            if trial.test:
                cells.setdefault((trial.task, trial.method, trial.fraction), []).append(trial)
        return {cell: tuple(trials) for cell, trials in cells.items()}

    @cached_property
    def fraction(self) -> float:
        """The share of labels of the main tables: the largest that was tested, 1 but for odd sweeps."""
        return max(trial.fraction for trial in self.trials if trial.test)

    @property
    def fractions(self) -> tuple[float, ...]:
        """All shares of labels that were tested, rising."""
        return tuple(sorted({trial.fraction for trial in self.trials if trial.test}))

    def methods(self, *tasks: str) -> tuple[str, ...]:
        """Methods with a tested trial in one of `tasks` (without names: in any task), in the report's order."""
        return ordered({one.method for one in self.trials if one.test and (not tasks or one.task in tasks)})

    def at(self, task: str, method: str, fraction: float | None = None) -> tuple[TrialRow, ...]:
        """The tested trials of one cell, by seed; without `fraction` those of the main tables."""
        return self._cells.get((task, method, self.fraction if fraction is None else fraction), ())

    def values(self, task: str, method: str, metric: str, fraction: float | None = None) -> dict[Pair, float]:
        """The replicates of one number; what is nan or was not logged is left out."""
        found = {trial.pair: trial.test.get(metric, np.nan) for trial in self.at(task, method, fraction)}
        return {pair: value for pair, value in found.items() if np.isfinite(value)}

    def mean(self, task: str, method: str, metric: str, fraction: float | None = None) -> float:
        """The mean of `values`; nan if there are none."""
        found = list(self.values(task, method, metric, fraction).values())
        return float(np.mean(found)) if found else np.nan

    def chance(self, task: str) -> float:
        """Chance level of a task's primary metric: the mean over its trials, nan if the metric has none."""
        levels = [one.chance for one in self.trials if one.task == task and np.isfinite(one.chance)]
        return float(np.mean(levels)) if levels else np.nan

    def best(self, task: TaskRow, among: tuple[str, ...] | None = None) -> str:
        """The method with the best mean of the primary metric, "" if none has one; the first in order among equals."""
        sign = 1 if higher_is_better(task.metric) else -1
        methods = self.methods(task.name) if among is None else among
        means = {one: sign * self.mean(task.name, one, task.metric) for one in methods}
        means = {one: mean for one, mean in means.items() if np.isfinite(mean)}
        return max(means, key=lambda one: means[one]) if means else ""

    def replicates(self, task: TaskRow) -> int:
        """How many replicates the best method of a task has; with fewer than two, differences may be noise."""
        return len(self.values(task.name, self.best(task), task.metric))

    @property
    def single(self) -> tuple[str, ...]:
        """Names of the tasks whose best method has one replicate only."""
        return tuple(task.name for task in self.tasks if self.replicates(task) == 1)
