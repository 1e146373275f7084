"""A fake sweep in an SQLite MLflow with planted numbers: 5 tasks x 6 methods x 3 seeds x 2 shares of labels.

The means and spreads of every cell are known: a trial's primary metric is LEVEL[task] + GAIN[method] + SHIFT[seed].
"""

import itertools
import json
import time
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from mlflow import MlflowClient
from mlflow.entities import Metric, Param
from sqlalchemy import event
from sqlalchemy.engine import Engine

from neurostorm.report.collect import collect
from neurostorm.report.results import Results

TASKS = {
    "age": ("regression", "r", "years", ()),
    "fluid": ("regression", "r", "", ()),
    "<b>sex & co</b>": ("classification", "balanced_accuracy", "", ("F", "M")),
    "state": ("classification", "balanced_accuracy", "", ("rest", "motor", "language")),
    "reid": ("identification", "rank1", "", ()),
}
LEVEL = {"age": 0.5, "fluid": 0.2, "<b>sex & co</b>": 0.6, "state": 0.5, "reid": 0.3}
CHANCE = {"age": 0.0, "fluid": 0.0, "<b>sex & co</b>": 0.5, "state": 1 / 3, "reid": 0.05}
GAIN = {"full": 0.12, "linear": 0.08, "random_full": 0.0, "random_linear": -0.02, "fc": 0.06, "constant": -0.1}
SHIFT = (-0.01, 0.0, 0.02)
FRACTIONS = (1.0, 0.25)
OTHERS = {
    "regression": ("mae", "rmse", "r2"),
    "classification": ("accuracy", "macro_f1", "auroc"),
    "identification": ("map",),
}
SUBJECTS = 12
FAILED = ("age", "full", 1.0, 0)  # one more trial of this cell failed


def planted(task: str, method: str, fraction: float, seed: int) -> float:
    """The primary test metric of a trial."""
    noise = zlib.crc32(f"{task} {method} {seed}".encode()) % 1000 * 1e-5  # or differences have no variance
    return LEVEL[task] + GAIN[method] * fraction + SHIFT[seed] + noise


@dataclass
class Sweep:
    """A sweep that can be written to."""

    client: MlflowClient
    uri: str
    experiment: str
    parent: str
    run_of: dict[tuple[str, str, float, int], str] = field(default_factory=dict)
    failed: str = ""

    def trial(
        self,
        cell: tuple[str, str, float, int],
        *,
        metrics: dict[str, float],
        status: str = "FINISHED",
        tags: dict[str, str] | None = None,
        params: dict[str, str] | None = None,
        rows: pa.Table | None = None,
    ) -> str:
        task, method, fraction, seed = cell
        kind, metric, unit, classes = TASKS[task]
        given = {
            "mlflow.parentRunId": self.parent, "neurostorm.kind": "trial", "neurostorm.task": task,
            "neurostorm.task_kind": kind, "neurostorm.metric": metric, "neurostorm.unit": unit,
            "neurostorm.classes": json.dumps(classes), "neurostorm.method": method,
            "neurostorm.fraction": f"{fraction:g}", "neurostorm.seed": str(seed),
        } | (tags or {})  # fmt: skip
        kept = {name: value for name, value in given.items() if value}
        run = self.client.create_run(self.experiment, run_name=f"{task} {method}", tags=kept)
        run_id, now = str(run.info.run_id), int(time.time() * 1000)
        known = {"split_sha256": f"{seed:064x}", "pretraining_overlap": "0.25", "hp.lr": "0.001"} | (params or {})
        self.client.log_batch(
            run_id,
            metrics=[Metric(name, value, now, 0) for name, value in metrics.items()],
            params=[Param(name, value) for name, value in known.items()],
        )
        if rows is not None:
            folder = Path(urlparse(run.info.artifact_uri).path)  # as log_artifact would, in a tenth of the time
            folder.mkdir(parents=True)
            pq.write_table(rows, folder / "predictions.parquet")
        self.client.set_terminated(run_id, status)
        return run_id


def predictions(task: str, method: str, seed: int) -> pa.Table | None:
    """Predictions for 12 test subjects, the better the larger the method's gain."""
    kind, _, _, classes = TASKS[task]
    generator = np.random.default_rng(seed * 100 + list(GAIN).index(method))
    names = [f"toy/sub-{(seed * 5 + number) % 30:03d}" for number in range(SUBJECTS)]
    table = {"unit": names, "subject": names}
    if kind == "regression":
        target = np.linspace(20, 60, SUBJECTS)
        guess = target + generator.normal(0, 6 - 20 * GAIN[method], SUBJECTS)
        return pa.table(table | {"target": target, "prediction": guess, "scores": pa.nulls(SUBJECTS)})
    if kind == "identification":
        return None
    truth = np.arange(SUBJECTS) % len(classes)
    scores = (
        generator.dirichlet(np.ones(len(classes)), SUBJECTS) + 4 * (0.2 + GAIN[method]) * np.eye(len(classes))[truth]
    )
    scores /= scores.sum(1, keepdims=True)
    text = {"target": [classes[one] for one in truth], "prediction": [classes[one] for one in scores.argmax(1)]}
    return pa.table(table | text | {"scores": list(scores)})


@pytest.fixture(scope="session")
def hasty() -> Iterator[None]:
    """SQLite that does not wait for the disk: a thousand small commits would take most of the tests' time."""

    def hurry(connection: Any, _: object) -> None:
        connection.execute("PRAGMA synchronous=OFF")

    event.listen(Engine, "connect", hurry)
    yield
    event.remove(Engine, "connect", hurry)


@pytest.fixture(scope="session")
def new_sweep(hasty: None, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Sweep]:
    """Makes parent runs in one database: `new_sweep(kind="sweep", status="FINISHED")`."""
    folder = tmp_path_factory.mktemp("report")
    uri = f"sqlite:///{folder / 'mlflow.db'}"
    client = MlflowClient(tracking_uri=uri)
    experiment = client.create_experiment("downstream", artifact_location=(folder / "artifacts").as_uri())

    def make(name: str = "five tasks", kind: str = "sweep", status: str = "FINISHED") -> Sweep:
        tags = {"neurostorm.kind": kind, "code_revision": "abc123"}
        run = client.create_run(experiment, run_name=name, tags=tags)
        client.log_batch(
            run.info.run_id, params=[Param("sweep.seeds", "3"), Param("note", "<script>alert(1)</script>")]
        )
        client.set_terminated(run.info.run_id, status)
        return Sweep(client, uri, experiment, run.info.run_id)

    return make


@pytest.fixture(scope="session")
def sweep(new_sweep: Callable[..., Sweep]) -> Sweep:
    """The whole fake sweep. Tests read it; what they log goes to the parent's artifacts only."""
    made = new_sweep()
    for cell in itertools.product(TASKS, GAIN, FRACTIONS, range(len(SHIFT))):
        task, method, fraction, seed = cell
        if task == "reid" and method in ("fc", "constant"):
            continue
        kind, metric, _, _ = TASKS[task]
        value = planted(*cell)
        metrics: dict[str, Any] = {f"validation/{metric}": value + 0.01, f"test/{metric}": value}
        metrics |= {f"test/{other}": value + 0.05 for other in OTHERS[kind]}
        metrics |= {"test/chance": CHANCE[task], "cost/seconds": 60.0 + seed, "model/trainable_parameters": 1234567.0}
        rows = predictions(task, method, seed) if fraction == 1 else None
        made.run_of[cell] = made.trial(cell, metrics=metrics, tags={"neurostorm.selected": "true"}, rows=rows)
    error = "CUDA out of memory <at step 3>"
    made.failed = made.trial(FAILED, metrics={}, status="FAILED", tags={"neurostorm.error": error})
    return made


@pytest.fixture(scope="session")
def results(sweep: Sweep) -> Results:
    """The fake sweep as it is read back."""
    return collect(sweep.uri, sweep.parent)
