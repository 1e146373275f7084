"""A trial in MLflow: who it is, how it went, and, if it was selected, how it did on the test subjects.

    record_start -> Tracker -> metrics by epoch -> record_end ... record_test (the selected trial only)

Tags and metrics are what the report reads (`report/collect.py`); a driver logs for all of its trials, so that a
database with a single writer is enough.
"""

import json
from typing import Any

from neurostorm.config import Config
from neurostorm.downstream.trial import PREDICTIONS, SPLIT, Outcome, Trial
from neurostorm.tracking.tracker import Tracker, code_revision, open_run, tracking_uri

KIND, SELECTED = "neurostorm.kind", "neurostorm.selected"


def record_start(trial: Trial, parent: Tracker | None = None) -> Tracker:
    """The trial's MLflow run, new or continued; named by what it is in a sweep (`parent`), by run.name alone."""
    config, task = trial.config, trial.task
    label, method, fraction, seed = trial.cell
    trial.folder.mkdir(parents=True, exist_ok=True)
    tags = {
        KIND: "trial" if parent else "finetune",
        "neurostorm.task": label,
        "neurostorm.task_kind": task.kind,
        "neurostorm.metric": task.metric,
        "neurostorm.unit": task.unit,
        "neurostorm.classes": json.dumps(list(trial.classes)),
        "neurostorm.method": method,
        "neurostorm.fraction": f"{fraction:g}",
        "neurostorm.seed": str(seed),
        SELECTED: "false",
        "code_revision": code_revision(),
    }
    return open_run(
        trial.folder,
        uri=uri_of(config),
        experiment=config.tracking.experiment,
        name=f"{label} {method} {fraction:.0%} seed {seed}" if parent else config.run.name,
        parameters=_parameters(trial),
        tags=tags,
        artifacts=config.run.output / "artifacts",
        parent=parent,
    )


def record_epoch(tracker: Tracker, measured: dict[str, float], epoch: int) -> None:
    """The metrics of one epoch: the training loss, and validation."""
    named = {name if name == "loss" else f"validation/{name}": value for name, value in measured.items()}
    tracker.metrics({"loss/train" if name == "loss" else name: value for name, value in named.items()}, epoch)


def record_end(tracker: Tracker, trial: Trial, outcome: Outcome) -> None:
    """What training gave, and the ids it was given."""
    record_epoch(tracker, outcome.validation, int(outcome.chosen.get("epoch", 0)))
    tracker.metrics({f"chosen/{name}": value for name, value in outcome.chosen.items()}, 0)
    tracker.metrics({"cost/seconds": outcome.seconds, "model/trainable_parameters": outcome.parameters}, 0)
    tracker.artifact(trial.folder / SPLIT)


def record_test(tracker: Tracker, trial: Trial, measured: dict[str, float]) -> None:
    """Metrics and predictions on the test subjects; the run counts as selected from now on."""
    tracker.metrics({f"test/{name}": value for name, value in measured.items()}, 0)
    tracker.artifact(trial.folder / PREDICTIONS)
    tracker.tag(SELECTED, "true")


def uri_of(config: Config) -> str:
    """Where the trials of this configuration are logged."""
    return tracking_uri(config.tracking.uri, config.run.output)


def _parameters(trial: Trial) -> dict[str, Any]:
    split, overlap = trial.split, trial.backbone.overlap(trial.split.test) if trial.backbone else 0.0
    counts = {f"subjects_{part}": len(getattr(split, part)) for part in ("train", "validation", "test")}
    return {
        **{f"hp.{name}": value for name, value in trial.hyper.items()},
        **trial.config.flat("task", "split"),
        **counts,
        "split_sha256": split.sha256,
        "pretraining_overlap": "unknown" if overlap is None else f"{overlap:.4g}",
        "backbone": trial.backbone.key if trial.backbone else "none",
    }
