"""`jobs/sweep.py` on a local Ray: killed among its trials and started again, with trials that cannot end well.

start --- SIGKILL of driver and Ray    start --> every cell tested but those of the damaged run --> report
"""

import json
import os
import re
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from neurostorm.downstream.evaluation import open_evaluation, split_of
from neurostorm.downstream.tasks.find import find_task
from neurostorm.downstream.trial import RESULT, TEST
from neurostorm.store.shard import SHARD_FILE
from tests.people_store import CLIP_FRAMES, write_model, write_people
from tests.people_trials import people_config

pytestmark = pytest.mark.integration

ROOT = Path(__file__).parents[2]
METHODS = ("constant", "full")
KILLED = 2  # trials are done
TRIALS = 2 * (1 + 2)  # seeds x (constant, full with two learning rates)


def damage(store: Path) -> None:
    """One run at rest of a subject who trains in the first replicate and tests in the second."""
    config = people_config(store, store.parent, task={"name": "sex"})
    evaluation = open_evaluation(find_task("sex"), config.task, config.split, CLIP_FRAMES)
    first, second = (split_of(evaluation, config.split, seed=seed) for seed in (0, 1))
    subject = sorted(set(first.train) & set(second.test))[0]
    shard = store / "runs" / subject / "ses-1_task-rest" / SHARD_FILE
    content = shard.read_bytes()
    shard.write_bytes(content[:200] + b"\x55" * 20 + content[220:])


class Sweep:
    """Starts of one sweep, whose output goes to a file each."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.output = folder, folder / "outputs"
        store = write_people(folder / "people.zarr")
        damage(store)
        model = write_model(folder / "model", store)
        tuned = {"tasks": ("sex",), "methods": METHODS, "replicates": 2, "lr": (1e-3, 1e-2), "retries": 0}
        adapt = {"epochs": 3, "cpus": 2.0}
        config = people_config(store, self.output, model, run={"name": "sweep"}, sweep=tuned, adapt=adapt)
        self.file = folder / "sweep.yaml"
        self.file.write_text(config.to_yaml())
        self.started: list[subprocess.Popen[bytes]] = []

    @property
    def trials(self) -> Path:
        return self.output / "sweep" / "trials"

    def start(self) -> tuple["subprocess.Popen[bytes]", Path]:
        log = self.folder / f"start{len(self.started)}.log"
        environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
        command = [sys.executable, str(ROOT / "jobs" / "sweep.py"), "--config", str(self.file)]
        self.started.append(
            subprocess.Popen(
                command,
                stdout=log.open("w"),
                stderr=subprocess.STDOUT,
                env={**environment, "PYTHONUNBUFFERED": "1", "OMP_NUM_THREADS": "1"},
            )
        )
        return self.started[-1], log

    def kill(self) -> None:
        """The driver first, then what it started."""
        for process in self.started:
            if process.poll() is None:
                family = psutil.Process(process.pid).children(recursive=True)
                process.kill()
                process.wait()
                for child in family:
                    if child.is_running():
                        child.kill()

    def done(self) -> dict[str, int]:
        """Trial -> when its result was written, of those that are done."""
        files = list(self.trials.glob(f"*/{RESULT}"))
        return {file.parent.name: file.stat().st_mtime_ns for file in files if json.loads(file.read_text())["done"]}


@pytest.fixture
def sweep(tmp_path: Path) -> Iterator[Sweep]:
    made = Sweep(tmp_path)
    yield made
    made.kill()


def children(sweep: Sweep) -> tuple[Any, list[Any]]:
    """The sweep's MLflow run, of which there is one, and those of its trials."""
    from mlflow import MlflowClient

    client = MlflowClient(tracking_uri=f"sqlite:///{sweep.output / 'mlflow.db'}")
    experiment = client.get_experiment_by_name("neurostorm")
    runs = client.search_runs([experiment.experiment_id])
    (parent,) = [run for run in runs if run.data.tags["neurostorm.kind"] == "sweep"]
    below = [run for run in runs if run.data.tags.get("mlflow.parentRunId") == parent.info.run_id]
    assert len(below) == len(runs) - 1
    return parent, below


def test_a_killed_sweep_goes_on_and_failures_stay_with_their_trials(sweep: Sweep) -> None:
    process, log = sweep.start()
    end_s = time.monotonic() + 500
    while len(sweep.done()) < KILLED:
        assert process.poll() is None and time.monotonic() < end_s, log.read_text()[-4000:]
        time.sleep(0.05)
    sweep.kill()
    before = sweep.done()
    assert KILLED <= len(before) < TRIALS

    process, log = sweep.start()
    status, said = process.wait(timeout=600), log.read_text()
    assert status == 1, said[-4000:]
    assert f"{TRIALS} trials, {len(before)} done before, {TRIALS - len(before)} to run" in said
    after = sweep.done()
    assert {name: after[name] for name in before} == before, "a trial that was done was done again"
    assert len(after) == TRIALS - 2, "all but those that train on the damaged run"
    failed = re.findall(r"^\S* ?(sex_full_1_s\d)_\w+ failed: ", said, re.MULTILINE)
    assert sorted(failed) == ["sex_full_1_s0", "sex_full_1_s0", "sex_full_1_s1"]
    assert re.findall(r"^  (\d) trial\(s\) failed: ", said, re.MULTILINE) == ["2", "1"], (
        "training and test say it apart"
    )
    assert "Traceback" not in said
    assert len(list((sweep.output / "sweep" / "errors").glob("sex_full_1_s*.txt"))) == 3
    assert said.count("  no result: sex full, 100% of the labels, seed ") == 2
    check_mlflow(sweep)
    report = sweep.output / "sweep" / "report"
    assert {"report.html"} <= {file.name for file in report.iterdir()} and list(report.glob("tables/*.csv"))
    summary = json.loads((sweep.output / "sweep" / "summary.json").read_text())
    assert (summary["cells"], summary["tested"]) == (4, 2) and len(summary["failed"]) == 3


def check_mlflow(sweep: Sweep) -> None:
    """Every trial has one run, which has ended; of each cell that could be tested exactly one is selected."""
    parent, below = children(sweep)
    assert parent.info.status == "FINISHED" and len(below) == TRIALS
    status = Counter(run.info.status for run in below)
    assert status == {"FINISHED": TRIALS - 3, "FAILED": 3}
    for run in below:
        tags, failed = run.data.tags, run.info.status == "FAILED"
        assert failed == (tags["neurostorm.task"] == "sex" and "store.py verify" in tags.get("neurostorm.error", ""))
        tested = [name for name in run.data.metrics if name.startswith("test/")]
        assert bool(tested) == (tags["neurostorm.selected"] == "true")
        assert failed or "validation/balanced_accuracy" in run.data.metrics
    cell = ("task", "method", "fraction", "seed")
    selected = [run.data.tags for run in below if run.data.tags["neurostorm.selected"] == "true"]
    cells = Counter(tuple(tags[f"neurostorm.{name}"] for name in cell) for tags in selected)
    assert len(cells) == 2 and set(cells.values()) == {1}
    assert len(list(sweep.trials.glob(f"*/{TEST}"))) == 2
