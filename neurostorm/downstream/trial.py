"""One trial: one method on one task, split and setting; trained without the test subjects, tested once.

    Trial --train_trial--> FOLDER/trained.safetensors, result.json   validation metrics, what was chosen
          --test_trial---> FOLDER/predictions.parquet, test.json     only of the trial that was selected

Both follow from the trial alone. `result.json` says whether the training is done; until then it holds the best epoch so
far, which counts where somebody stops the training (`settle_trial`). `test.json` is created once and never again, so
that test data are read once, however often a job is started.
"""

import hashlib
import json
import re
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from safetensors.torch import load_file, save_file

from neurostorm.config import Config, ConfigError
from neurostorm.downstream.evaluation import Evaluation, open_evaluation
from neurostorm.downstream.methods import fitting
from neurostorm.downstream.methods.backbone import Backbone
from neurostorm.downstream.methods.fitting import Chosen, FitData
from neurostorm.downstream.methods.inputs import Index
from neurostorm.downstream.methods.method import Method, find_method
from neurostorm.downstream.methods.objective import objective_of
from neurostorm.downstream.methods.training import OnEpoch, State
from neurostorm.downstream.splits import Split
from neurostorm.downstream.statistics.reid import same_scan_released
from neurostorm.downstream.tasks.examples import Examples
from neurostorm.downstream.tasks.task import Task
from neurostorm.io.atomic import atomic_write as put
from neurostorm.io.atomic import put_if_absent
from neurostorm.io.local_copies import local_copy, upload_folder
from neurostorm.io.paths import AnyPath
from neurostorm.train.schedule import seed_for

RESULT, TEST, TRAINED, PREDICTIONS, SPLIT = (
    "result.json", "test.json", "trained.safetensors", "predictions.parquet", "split.json",
)  # fmt: skip


@dataclass(frozen=True)
class Trial:
    """What one process is told; it may be sent to another.

    Attributes:
        config: `run.seed` is the replicate's; of the sections task, split and adapt all fields hold.
        task: what is predicted.
        split: who trains, validates, tests.
        backbone: the network under the method, or None.
        cache, home: places of what is shared, and of the trials' folders.
        data: hash of the task's clips, units and targets.
        classes: of a classification, in the order of its scores.
    """

    config: Config
    task: Task
    split: Split
    backbone: Backbone | None
    cache: AnyPath
    home: AnyPath
    data: str
    classes: tuple[str, ...] = ()

    @property
    def method(self) -> Method:
        return find_method(self.config.adapt.method)

    @property
    def seed(self) -> int:
        """Of the replicate."""
        return self.config.run.seed

    @property
    def hyper(self) -> dict[str, Any]:
        """Settings of the method that change its result, by name."""
        settings = self.config.adapt.model_dump(mode="json")
        return {name: settings[name] for name in fitting.settings_of(self.method)}

    @property
    def cell(self) -> tuple[str, str, float, int]:
        """Task, method, fraction, seed: what trials with other hyperparameters share; one of them is selected."""
        return self.task.label, self.method.name, self.config.adapt.fraction, self.seed

    @property
    def key(self) -> str:
        """Names the trial by all that its result follows from; equal keys, equal results."""
        gallery = self.config.task.gallery, self.config.task.gallery_repeats
        facts = {
            "cell": self.cell, "hyper": self.hyper, "data": self.data,
            "gallery": gallery, "split": self.split.sha256,
            "backbone": self.backbone and self.backbone.key, "version": fitting.VERSION,
        }  # fmt: skip
        digest = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:12]
        label, method, fraction, seed = self.cell
        return f"{file_name(label)}_{method}_{fraction:g}_s{seed}_{digest}"

    @property
    def folder(self) -> AnyPath:
        return self.home / self.key


def file_name(label: str) -> str:
    """A task's label as part of a file's name: a column may be called anything."""
    return re.sub(r"[^\w.-]", "-", label)


@dataclass(frozen=True)
class Outcome:
    """What training a trial gave.

    Attributes:
        validation: metrics of the best epoch or setting.
        chosen: that epoch, or the setting ("strength").
        parameters: how many numbers were trained; of methods in closed form those of the last map.
        seconds: it took.
    """

    validation: dict[str, float]
    chosen: dict[str, float]
    parameters: int
    seconds: float


def train_trial(trial: Trial, on_epoch: OnEpoch | None = None) -> Outcome:
    """Train on the split's training subjects, choose on its validation subjects; what an earlier call kept is taken.

    Args:
        trial: which.
        on_epoch: told of each epoch: number from 1, metrics, and what was trained if it is the best so far. What is
            kept on disk when it raises is the best epoch so far.

    Raises:
        ConfigError, LabelError, StoreError, ReidError, ValueError: the data do not allow it, with the reason.
    """
    kept = read_outcome(trial)
    if kept is not None:
        return kept
    started = time.monotonic()
    torch.set_num_threads(trial.config.adapt.threads)
    problem, train, validation, _ = _problem(trial, with_test=False)
    trial.folder.mkdir(parents=True, exist_ok=True)
    put(trial.folder / SPLIT, trial.split.to_json().encode())

    def keep(epoch: int, measured: dict[str, float], state: State | None) -> None:
        if state is not None:
            judged = {name: value for name, value in measured.items() if name != "loss"}
            chosen = Chosen({"epoch": float(epoch)}, judged, state, fitting.counted(state))
            _keep(trial, chosen, time.monotonic() - started)
        if on_epoch is not None:
            on_epoch(epoch, measured, state)

    chosen = fitting.fit(problem, train, validation, keep)
    return _keep(trial, chosen, time.monotonic() - started, done=True)


def test_trial(trial: Trial) -> dict[str, float]:
    """Predict the test units with what `train_trial` kept; their metrics. What an earlier call found is taken."""
    file = trial.folder / TEST
    if file.is_file():
        return dict(json.loads(file.read_text()))
    outcome = read_outcome(trial)
    if outcome is None:
        raise FileNotFoundError(f"{trial.folder / RESULT} is not there: train the trial first")
    torch.set_num_threads(trial.config.adapt.threads)
    problem, train, _, test = _problem(trial, with_test=True)
    state: State = {}
    if trial.method.by_gradient:
        with local_copy(trial.folder / TRAINED) as local:
            state = load_file(local)
    predictions = fitting.predict(problem, train, test, outcome.chosen, state)
    units = problem.examples.take(test)
    measured = _plain(problem.objective.measure(units, predictions))
    if trial.task.kind == "identification":
        measured |= _as_released(problem, train, test, state)
    sink = pa.BufferOutputStream()
    pq.write_table(predictions_table(units, predictions, trial.task.kind), sink)
    put(trial.folder / PREDICTIONS, sink.getvalue().to_pybytes())
    put_if_absent(file, json.dumps(measured, indent=1).encode())
    return measured


def read_outcome(trial: Trial) -> Outcome | None:
    """What `train_trial` gave; None if it has not finished."""
    found = _kept(trial)
    return Outcome(**found) if found and found.pop("done") else None


def settle_trial(trial: Trial) -> Outcome | None:
    """The best epoch that a stopped training kept, which counts as its result from now on; None if it kept none.

    So a trial that was judged to be worse than others stays so: it is not trained again when the sweep goes on.
    """
    found = _kept(trial)
    if found is None:
        return None
    put(trial.folder / RESULT, json.dumps(found | {"done": True}, indent=1).encode())
    return read_outcome(trial)


def predictions_table(units: Examples, predictions: np.ndarray, kind: str) -> pa.Table:
    """A row per unit: unit, subject, target, prediction, scores; of identification run, subject, session, embedding."""
    if kind == "identification":
        session = {run.path: run.session for run in units.runs}
        return pa.table(
            {
                "run": list(units.units),
                "subject": list(units.subjects),
                "session": [session[unit] for unit in units.units],
                "embedding": pa.array(predictions.tolist(), pa.list_(pa.float64())),
            }
        )
    common = {"unit": list(units.units), "subject": list(units.subjects)}
    if kind == "regression":
        none = pa.nulls(len(units.units), pa.list_(pa.float64()))
        return pa.table(common | {"target": units.targets, "prediction": predictions, "scores": none})
    named = np.array(units.classes)
    return pa.table(
        common
        | {
            "target": named[units.targets].tolist(),
            "prediction": named[predictions.argmax(1)].tolist(),
            "scores": pa.array(predictions.tolist(), pa.list_(pa.float64())),
        }
    )


def _problem(trial: Trial, *, with_test: bool) -> tuple[FitData, Index, Index, Index]:
    """The trial's problem and the units that train, validate and test; without the last no test clip is in it."""
    config, frames = trial.config, trial.backbone.clip_frames if trial.backbone else None
    evaluation = _evaluation(trial.task, config, frames)
    if evaluation.examples.sha256 != trial.data:
        raise ConfigError(
            f"{evaluation.cohort.store.path}: runs, labels or clips of {trial.task.label} are not those that the trial "
            "was prepared with: start again under another run.name"
        )
    split = trial.split
    used = [*split.train, *split.validation, *(split.test if with_test else ())]
    examples = evaluation.examples.of(used)
    subject = np.array(examples.subjects)
    train, validation, test = (np.flatnonzero(np.isin(subject, part)) for part in _parts(split))
    settings = config.adapt
    objective = objective_of(
        trial.task.kind, examples.take(train), embedding=settings.embedding, temperature=settings.temperature,
        gallery=config.task.gallery, repeats=config.task.gallery_repeats, seed=trial.seed,
    )  # fmt: skip
    problem = FitData(
        method=trial.method,
        settings=settings,
        metric=trial.task.metric,
        cohort=evaluation.cohort,
        examples=examples,
        objective=objective,
        backbone=trial.backbone,
        cache=trial.cache,
        seed=seed_for(trial.seed, *trial.method.name.encode()),
        device="cuda" if settings.gpus else "cpu",
    )
    return problem, train, validation, test


def _as_released(problem: FitData, train: Index, test: Index, state: State) -> dict[str, float]:
    """The released protocol, whose gallery holds clips of the query's own scan, under a name of its own."""
    found = fitting.clip_vectors(problem, train, test, state)
    if found is None:
        return {}
    unit, vectors = found
    subjects = problem.examples.take(test).subjects
    measured = same_scan_released(vectors, [subjects[number] for number in unit])
    return {f"same_scan_released_{name}": value for name, value in measured.items()}


def _parts(split: Split) -> tuple[tuple[str, ...], ...]:
    return split.train, split.validation, split.test


_EVALUATIONS: dict[str, Evaluation] = {}  # of this process, which may run many trials


def _evaluation(task: Task, config: Config, clip_frames: int | None) -> Evaluation:
    settings = config.task.model_copy(update={"name": task.label})
    name = f"{settings.model_dump_json()} {config.split.model_dump_json()} {clip_frames}"
    if name not in _EVALUATIONS:
        _EVALUATIONS[name] = open_evaluation(task, settings, config.split, clip_frames)
    return _EVALUATIONS[name]


def _kept(trial: Trial) -> dict[str, Any] | None:
    file = trial.folder / RESULT
    return dict(json.loads(file.read_text())) if file.is_file() else None


def _keep(trial: Trial, chosen: Chosen, seconds: float, *, done: bool = False) -> Outcome:
    outcome = Outcome(_plain(chosen.validation), chosen.setting, chosen.parameters, seconds)
    if chosen.state:
        with upload_folder(trial.folder) as folder:
            save_file(chosen.state, folder / TRAINED)
    put(trial.folder / RESULT, json.dumps(vars(outcome) | {"done": done}, indent=1).encode())
    return outcome


def _plain(values: Mapping[str, float]) -> dict[str, float]:
    return {name: float(value) for name, value in values.items()}
