"""One method on one task, from the command line's configuration to test metrics: what `jobs/finetune.py` runs.

    config --prepare--> Trial --a Ray task--> trained, chosen on validation --> tested --> MLflow, summary.json

Started again with the same settings it resumes: what is trained is kept, what is tested is not tested again. Other
settings under the same name are refused.
"""

import json
import logging
import time
from dataclasses import asdict, dataclass
from typing import Any

import ray

from neurostorm.config import Config, ConfigError
from neurostorm.downstream.errors import TrialsFailed, keep_traceback
from neurostorm.downstream.evaluation import task_of
from neurostorm.downstream.methods.training import State
from neurostorm.downstream.prepare import Wanted, prepare
from neurostorm.downstream.record import record_end, record_epoch, record_start, record_test, uri_of
from neurostorm.downstream.statistics.metrics import chance_text
from neurostorm.downstream.trial import PREDICTIONS, Outcome, Trial, test_trial, train_trial
from neurostorm.io.atomic import atomic_write
from neurostorm.io.errors import UserError, reason_of
from neurostorm.io.paths import AnyPath
from neurostorm.runtime.lease import hold_lease
from neurostorm.runtime.run_folder import keep_config, refuse_other
from neurostorm.tracking.tracker import closing_words

logger = logging.getLogger(__name__)
Result = tuple[list[tuple[int, dict[str, float]]], Outcome, dict[str, float]]

SUMMARY = "summary.json"
JOB, SECTIONS = "finetune", ("run", "task", "split", "adapt")

FEW = 20  # test subjects below which a number comes with a caution


@dataclass(frozen=True)
class Finetuned:
    """What a run gave: the trial's folder, what validation chose, metrics on the test subjects, MLflow's ids.

    `subjects` are the numbers of those who trained, validated and tested; `not_logged` says what MLflow did not take.
    """

    folder: AnyPath
    metric: str
    unit: str
    outcome: Outcome
    test: dict[str, float]
    subjects: tuple[int, int, int]
    mlflow_uri: str
    mlflow_run_id: str
    not_logged: tuple[str, ...] = ()

    def lines(self) -> list[str]:
        """The closing words."""
        train, validation, test = self.subjects
        unit = f" {self.unit}" if self.unit else ""
        units = {"mae": unit, "rmse": unit}
        shown = {name: f" {value:.4g}{units.get(name, '')}" for name, value in self.test.items()}
        if self.metric == "r" and self.test.get("chance") == 0:
            shown["chance"] = f" {chance_text('r', 0)}"
        tested = ", ".join(f"{name}{value}" for name, value in shown.items())
        chosen = ", ".join(f"{name} {value:g}" for name, value in self.outcome.chosen.items())
        return [
            f"trained on {train} subjects, chosen on {validation} ({chosen}; {self.metric} "
            f"{self.outcome.validation[self.metric]:.4f}), tested on {test}: {tested}",
            *([f"  caution      {test} test subjects are too few to tell a method from chance"] if test < FEW else []),
            f"  predictions  {self.folder / PREDICTIONS}, ids of the split beside it (split.json)",
            f"  MLflow       {self.mlflow_uri}, run {self.mlflow_run_id or '(not open)'}",
            *self.not_logged,
        ]


def finetune(config: Config) -> Finetuned:
    """Train, choose, test.

    Raises:
        ConfigError: the folder holds another run or other settings, or another driver is at work on it.
        TrialsFailed: training or testing failed, with the reason and the file of its traceback.
        Others as `prepare.prepare`, and what the trial's data do not allow.
    """
    with hold_lease(config.run.folder):
        return _finetune(config)


def _finetune(config: Config) -> Finetuned:
    task = task_of(config.task.name, config.task)
    try:
        uri_of(config)
    except ValueError as error:
        raise ConfigError(str(error)) from error
    refuse_other(config, JOB, SECTIONS)
    prepared = prepare(config, [Wanted(task, config.adapt, config.run.seed)], say=_say)
    trial = prepared.trials[0]
    keep_config(config, JOB)
    tracker = record_start(trial)
    status = "FAILED"
    try:
        history, outcome, tested = _result(config, trial)
        for epoch, measured in history:
            record_epoch(tracker, measured, epoch)
        record_end(tracker, trial, outcome)
        record_test(tracker, trial, tested)
        tracker.artifact(prepared.labels)
        status = "FINISHED"
    finally:
        tracker.close(status)
    split = trial.split
    done = Finetuned(
        trial.folder, task.metric, task.unit, outcome, tested,
        (len(split.train), len(split.validation), len(split.test)), uri_of(config), tracker.run_id,
        tuple(closing_words(tracker.facts())),
    )  # fmt: skip
    facts = {**asdict(outcome), "test": tested, "trial": str(trial.folder), **tracker.facts()}
    atomic_write(config.run.folder / SUMMARY, (json.dumps(facts, indent=1) + "\n").encode())
    return done


def _result(config: Config, trial: Trial) -> Result:
    """Metrics by epoch, what training gave and what the test gave; made by a Ray task."""
    settings = config.adapt
    remote: Any = ray.remote(num_cpus=settings.cpus, num_gpus=settings.gpus or None, max_retries=1)(_train_and_test)
    try:
        result: Result = ray.get(remote.remote(trial))
    except ray.exceptions.RayError as error:
        file = keep_traceback(config.run.folder, trial.key, str(error))
        cause = getattr(error, "cause", None)
        if isinstance(cause, UserError):
            raise cause from None
        raise TrialsFailed(f"{trial.key} failed: {reason_of(error)} (traceback: {file})") from None
    return result


def _train_and_test(trial: Trial) -> Result:
    history: list[tuple[int, dict[str, float]]] = []
    epochs, begun = trial.config.adapt.epochs, []

    def note(epoch: int, measured: dict[str, float], state: State | None) -> None:
        history.append((epoch, measured))
        begun.append(time.monotonic())
        metric = trial.task.metric
        better = ", the best so far" if state is not None else ""
        how = f"epoch {epoch}/{epochs}: loss {measured['loss']:.4f}" if epoch else "epoch 0, the linear probe alone"
        left_s = (begun[-1] - begun[0]) / max(1, len(begun) - 1) * (epochs - epoch)
        left = f"; at most {left_s:.0f} s left" if len(begun) > 1 else ""
        _say(f"{how}, validation {metric} {measured[metric]:.4f}{better}{left}")

    outcome = train_trial(trial, note)
    return history, outcome, test_trial(trial)


def _say(line: str) -> None:
    """Also from a worker, whose output Ray brings to the driver."""
    print(line, flush=True)
