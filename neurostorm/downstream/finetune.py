"""One method on one task, from the command line's configuration to test metrics: what `jobs/finetune.py` runs.

    config --prepare--> Trial --a Ray task--> trained, chosen on validation --> tested --> MLflow, summary.json

Started again it goes on: what is trained is kept, what is tested is not tested again.
"""

import json
import logging
from dataclasses import asdict, dataclass
from typing import Any

import ray

from neurostorm.config import Config, ConfigError
from neurostorm.downstream.prepare import Wanted, prepare
from neurostorm.downstream.record import record_end, record_epoch, record_start, record_test, uri_of
from neurostorm.downstream.tasks import find_task
from neurostorm.downstream.training import State
from neurostorm.downstream.trial import PREDICTIONS, Outcome, Trial, test_trial, train_trial
from neurostorm.places import Place, replace

logger = logging.getLogger(__name__)

SUMMARY = "summary.json"


@dataclass(frozen=True)
class Finetuned:
    """What a run gave: the trial's folder, what validation chose, metrics on the test subjects, MLflow's ids.

    `subjects` are the numbers of those who trained, validated and tested.
    """

    folder: Place
    metric: str
    unit: str
    outcome: Outcome
    test: dict[str, float]
    subjects: tuple[int, int, int]
    mlflow_uri: str
    mlflow_run_id: str

    def lines(self) -> list[str]:
        """The closing words."""
        train, validation, test = self.subjects
        unit = f" {self.unit}" if self.unit else ""
        units = {"mae": unit, "rmse": unit}
        tested = ", ".join(f"{name} {value:.4g}{units.get(name, '')}" for name, value in self.test.items())
        chosen = ", ".join(f"{name} {value:g}" for name, value in self.outcome.chosen.items())
        return [
            f"trained on {train} subjects, chosen on {validation} ({chosen}; {self.metric} "
            f"{self.outcome.validation[self.metric]:.4f}), tested on {test}: {tested}",
            f"  predictions  {self.folder / PREDICTIONS}, ids of the split beside it (split.json)",
            f"  MLflow       {self.mlflow_uri}, run {self.mlflow_run_id}",
        ]


def finetune(config: Config) -> Finetuned:
    """Train, choose, test. Errors as `prepare.prepare`, and those of the trial itself."""
    task = find_task(config.task.name, config.task.target_column)
    try:
        uri_of(config)
    except ValueError as error:
        raise ConfigError(str(error)) from error
    folder = config.run.folder
    if (folder / "checkpoints").is_dir():  # whose config.yaml and summary.json would be lost
        raise ConfigError(f"run.name={config.run.name}: {folder} holds a pretraining run; choose another --name")
    prepared = prepare(config, [Wanted(task, config.adapt, config.run.seed)], say=_say)
    trial = prepared.trials[0]
    replace(folder / "config.yaml", config.to_yaml().encode())
    tracker = record_start(trial)
    status = "FAILED"
    try:
        history, outcome, tested = ray.get(_remote(config).remote(trial))
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
    )  # fmt: skip
    facts = {**asdict(outcome), "test": tested, "trial": str(trial.folder), "mlflow_run_id": tracker.run_id}
    replace(folder / SUMMARY, (json.dumps(facts, indent=1) + "\n").encode())
    return done


def _remote(config: Config) -> Any:
    settings = config.adapt
    return ray.remote(num_cpus=settings.cpus, num_gpus=settings.gpus or None, max_retries=1)(_train_and_test)


def _train_and_test(trial: Trial) -> tuple[list[tuple[int, dict[str, float]]], Outcome, dict[str, float]]:
    history: list[tuple[int, dict[str, float]]] = []

    def note(epoch: int, measured: dict[str, float], state: State | None) -> None:
        history.append((epoch, measured))
        metric = trial.task.metric
        better = ", the best so far" if state is not None else ""
        how = f"epoch {epoch}: loss {measured['loss']:.4f}" if epoch else "epoch 0, as the linear probe begins it"
        _say(f"{how}, validation {metric} {measured[metric]:.4f}{better}")

    outcome = train_trial(trial, note)
    return history, outcome, test_trial(trial)


def _say(line: str) -> None:
    """Also from a worker, whose output Ray brings to the driver."""
    print(line, flush=True)
