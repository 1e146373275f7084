"""A fine-tuning and a sweep without an MLflow server: results are kept, and a command uploads the rest."""

import json
from pathlib import Path
from typing import Any

import pytest

from neurostorm.config import Config
from neurostorm.downstream import finetune as finetuning
from neurostorm.downstream.errors import TrialsFailed
from neurostorm.downstream.prepare import Prepared
from neurostorm.downstream.splits import Split
from neurostorm.downstream.tasks.task import Age
from neurostorm.downstream.trial import PREDICTIONS, SPLIT, Outcome, Trial
from neurostorm.tracking import tracker, unsent, upload
from neurostorm.tracking.async_logger import AsyncLogger
from neurostorm.tune import sweep as sweeping
from neurostorm.tune.logbook import Logbook

NOWHERE = "http://127.0.0.1:1"
SPLITS = Split(("d/a",), ("d/b",), ("d/c",), {})
OUTCOME = Outcome({"r": 0.5}, {"epoch": 2}, 10, 1.0)

pytestmark = pytest.mark.filterwarnings("ignore:.*noload:DeprecationWarning")  # MLflow's use of its database library


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """A server that is away is not waited for."""
    log = AsyncLogger("MLflow", patience_s=0.1, pause_s=0.05, longest_pause_s=0.05)
    monkeypatch.setitem(tracker._loggers, NOWHERE, log)


def trial_in(folder: Path, lr: float = 0.01) -> Trial:
    tree = {
        "run": {"output": folder, "name": "s"}, "adapt": {"method": "attention", "lr": lr},
        "tracking": {"uri": NOWHERE}, "sweep": {"tasks": ("age",), "methods": ("fc",)},
    }  # fmt: skip
    return Trial(Config.model_validate(tree), Age(), SPLITS, None, folder / "cache", folder / "s" / "trials", "data")


def prepared_in(folder: Path, monkeypatch: pytest.MonkeyPatch, module: Any, count: int = 1) -> list[Trial]:
    trials = [trial_in(folder, (n + 1) / 100) for n in range(count)]
    labels = folder / "labels.txt"
    labels.write_text("labels")
    monkeypatch.setattr(module, "prepare", lambda config, wanted, say: Prepared(trials, labels))
    return trials


def test_finetuning_keeps_its_results_and_uploads_them_later(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from mlflow import MlflowClient

    (trial,) = prepared_in(tmp_path, monkeypatch, finetuning)

    def result(config: Config, trial: Trial) -> Any:
        for name in (SPLIT, PREDICTIONS):
            (trial.folder / name).write_text(name)
        return [(1, {"loss": 2.0, "r": 0.4}), (2, {"loss": 1.0, "r": 0.5})], OUTCOME, {"r": 0.3}

    monkeypatch.setattr(finetuning, "_result", result)
    done = finetuning.finetune(trial.config)
    summary = json.loads((tmp_path / "s" / "summary.json").read_text())
    assert summary["test"] == {"r": 0.3} and summary["mlflow_run_id"] == "" and summary["mlflow_unsent"] > 0
    said = "\n".join(done.lines())
    assert f"python -m neurostorm upload {tmp_path}/s" in said and "run (not open)" in said

    uri = f"sqlite:///{tmp_path / 'mlflow.db'}"
    assert upload.main([str(tmp_path / "s"), "--uri", uri]) == 0
    client = MlflowClient(tracking_uri=uri)
    (run,) = client.search_runs([client.get_experiment_by_name("neurostorm").experiment_id])
    assert run.data.metrics["test/r"] == 0.3 and run.data.tags["neurostorm.selected"] == "true"
    assert run.info.status == "FINISHED"
    assert {file.path for file in client.list_artifacts(run.info.run_id)} == {SPLIT, PREDICTIONS, "labels.txt"}


def test_a_sweep_keeps_what_its_trials_logged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trials = prepared_in(tmp_path, monkeypatch, sweeping, count=3)

    def run(config: Config, trials: list[Trial], left: list[int], logbook: Logbook) -> None:
        with logbook.watching(len(left)):
            for index in left:
                logbook.fail(index, f"KeyError: {'abc'[index]}")

    monkeypatch.setattr(sweeping, "_run", run)
    with pytest.raises(TrialsFailed, match="none of 3 trial"):
        sweeping.sweep(trials[0].config)
    summary = json.loads((tmp_path / "s" / "summary.json").read_text())
    assert summary["mlflow_unsent"] == 1 + 3 * 3 and summary["mlflow_run_id"] == ""
    folders = upload.waiting(tmp_path / "s")
    assert folders == [tmp_path / "s", *sorted(trial.folder for trial in trials)]
    ends = [
        entry.facts["status"]
        for folder in folders
        for part in unsent.parts_in(folder)
        for entry in unsent.read_part(folder, part)
        if entry.kind == unsent.END
    ]
    assert ends == ["FAILED"] * 4
