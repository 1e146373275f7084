"""Failures of a sweep: when it gives up, what it says, and what its MLflow runs are left as."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from neurostorm.config import Config
from neurostorm.downstream.errors import TrialsFailed, alike, count_alike, reason_in
from neurostorm.downstream.prepare import Prepared
from neurostorm.downstream.splits import Split
from neurostorm.downstream.tasks.task import Age
from neurostorm.downstream.trial import Trial
from neurostorm.tune import sweep as module
from neurostorm.tune.logbook import REASON, REFUSED, GiveUp, Logbook

SPLIT = Split(("d/a",), ("d/b",), ("d/c",), {})
BAD = "ray::train() (pid={n})\n  File x\nneurostorm.store.layout.StoreError: /data/run-{n}/0.0 has {n} damaged chunks"


def trials_in(folder: Path, count: int) -> list[Trial]:
    """Trials of one cell that differ in their learning rate."""
    configs = [
        Config.model_validate(
            {"run": {"output": folder, "name": "s"}, "adapt": {"method": "attention", "lr": (n + 1) / 100}}
        )
        for n in range(count)
    ]
    return [Trial(config, Age(), SPLIT, None, folder / "cache", folder / "s" / "trials", "data") for config in configs]


class Quiet(Logbook):
    """A logbook without MLflow, which remembers how runs were closed."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.closed: dict[int, str] = {}

    def tracker(self, index: int) -> Any:
        def close(status: str) -> None:
            self.closed[index] = status

        tracker = SimpleNamespace(tag=lambda *given: None, artifact=lambda *given: None, close=close)
        if index not in self._trackers:
            self._trackers[index] = tracker  # type: ignore[assignment]
            self._open.add(index)
        return tracker


def tune_trial(index: int, folder: Path, text: str = "") -> Any:
    """A trial as Tune's driver shows it, with the file where Tune writes its errors."""
    file = folder / f"error{index}.txt"
    file.write_text(f"Failure # 1 (occurred at noon)\nearlier\nFailure # 2 (occurred at one)\n{text}\n")
    return SimpleNamespace(config={"index": index}, error_file=str(file) if text else None, status="ERROR")


def test_a_reason_is_the_last_line_without_its_package_numbers_and_paths() -> None:
    assert reason_in(BAD.format(n=3)) == "StoreError: /data/run-3/0.0 has 3 damaged chunks"
    assert reason_in("") == "its process died"
    one, other = (reason_in(BAD.format(n=n)) for n in (3, 41))
    assert alike(one) == alike(other) != alike("StoreError: /data/run-3/0.0 is not there")
    assert alike("lr=1e-3 at s3://bucket/a") == alike("lr=0.5 at gs://other/b")
    assert count_alike(["a 1", "b", "a 2"]) == [("a 1", 2), ("b", 1)]


@pytest.mark.parametrize(
    ("texts", "options", "stops_after"),
    [
        ([BAD] * 5, {"give_up_after": 3}, 3),
        ([BAD] * 5, {"give_up_after": 0}, None),
        ([BAD] * 5, {"give_up_after": 3, "succeeded": True}, None),
        (["ValueError: x", BAD, BAD, BAD], {"give_up_after": 3}, None),
        ([BAD, BAD], {"give_up_after": 3}, None),
    ],
)
def test_it_gives_up_when_the_first_trials_all_fail_alike(
    tmp_path: Path, texts: list[str], options: dict[str, Any], stops_after: int | None
) -> None:
    book = Quiet(trials_in(tmp_path, len(texts)), "parent", tmp_path, **options)
    stopper, stopped = GiveUp(book), None
    for index, text in enumerate(texts):
        book.on_trial_error(0, [], tune_trial(index, tmp_path, text.format(n=index)))
        if stopper.stop_all() and stopped is None:
            stopped = index + 1
    assert stopped == stops_after
    assert set(book.closed.values()) == {"FAILED"}


def test_one_success_keeps_a_sweep_going(tmp_path: Path) -> None:
    trials = trials_in(tmp_path, 4)
    book = Quiet(trials, "parent", tmp_path, give_up_after=3)
    book.on_trial_complete(0, [], tune_trial(0, tmp_path))
    for index in (1, 2, 3):
        book.on_trial_error(0, [], tune_trial(index, tmp_path, BAD.format(n=index)))
    assert not book.gave_up and book.closed == {0: "FINISHED", 1: "FAILED", 2: "FAILED", 3: "FAILED"}


def test_a_traceback_goes_to_a_file_that_the_line_names(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trials = trials_in(tmp_path, 2)
    book = Quiet(trials, "parent", tmp_path)
    book.on_trial_error(0, [], tune_trial(0, tmp_path, BAD.format(n=7)))
    report = {"epoch": 0, REFUSED: "Traceback\n  deep\nLabelError: no label", REASON: "no label"}
    book.on_trial_result(0, [], tune_trial(1, tmp_path), report)
    book.on_trial_complete(0, [], tune_trial(1, tmp_path))
    files = [tmp_path / "errors" / f"{trial.key}.txt" for trial in trials]
    assert files[0].read_text().splitlines()[1:3] == ["ray::train() (pid=7)", "  File x"]
    assert "deep" in files[1].read_text()
    said = capsys.readouterr().out.splitlines()
    assert [line for line in said if line] == [
        f"{trials[0].key} failed: StoreError: /data/run-7/0.0 has 7 damaged chunks (traceback: {files[0]})",
        f"{trials[1].key} failed: no label (traceback: {files[1]})",
    ]
    assert book.errors[1] == "no label" and book.closed == {0: "FAILED", 1: "FAILED"}


def test_trials_that_had_not_ended_count_as_killed_and_the_bar_shows_what_runs(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    book = Quiet(trials_in(tmp_path, 3), "parent", tmp_path, give_up_after=1)
    with book.watching(3):
        for index in (0, 1):
            book.on_trial_start(0, [], tune_trial(index, tmp_path))
        book.on_trial_error(0, [], tune_trial(0, tmp_path, BAD.format(n=1)))
        book._bar.mininterval = 0  # type: ignore[union-attr]
        book.on_step_end(0, [SimpleNamespace(status="RUNNING"), SimpleNamespace(status="ERROR")])
    assert book.gave_up and book.closed == {0: "FAILED", 1: "KILLED"}
    assert "sweep:  33%|###3      | 1/3 " in (shown := capsys.readouterr().err) and "failed=1, running=1" in shown


@pytest.mark.filterwarnings("ignore:.*noload:DeprecationWarning")  # MLflow's use of its database library
@pytest.mark.parametrize(
    ("texts", "message"),
    [
        ([BAD] * 5, r"the first 3 trial\(s\) all failed for one reason, so the sweep stopped; 5 were to run:\n"
         r"  3 trial\(s\) failed: StoreError: \S+ has 0 damaged chunks \(traceback: \S+/errors/age_\S+\.txt\)\n"),
        (["KeyError: 'x'", BAD, BAD], r"none of 3 trial\(s\) gave a result:\n  2 trial\(s\) failed: StoreError"
         r"[^\n]*\n  1 trial\(s\) failed: KeyError: 'x'"),
    ],
    ids=["alike", "not alike"],
)  # fmt: skip
def test_a_sweep_without_a_result_fails_and_says_why(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, texts: list[str], message: str
) -> None:
    """Its MLflow run is FAILED; a report is not tried."""
    from mlflow import MlflowClient

    trials = trials_in(tmp_path, len(texts))
    labels = tmp_path / "labels.txt"
    labels.write_text("labels")

    def run(config: Config, trials: list[Trial], left: list[int], logbook: Logbook) -> None:
        stopper = GiveUp(logbook)
        with logbook.watching(len(left)):
            for index in left:
                if stopper.stop_all():
                    return
                logbook.on_trial_start(0, [], tune_trial(index, tmp_path))
                logbook.on_trial_error(0, [], tune_trial(index, tmp_path, texts[index].format(n=index)))

    monkeypatch.setattr(module, "_run", run)
    monkeypatch.setattr(module, "prepare", lambda config, wanted, say: Prepared(trials, labels))
    tree = {"run": {"output": tmp_path, "name": "s"}, "sweep": {"tasks": ("age",), "methods": ("fc",)}}
    with pytest.raises(TrialsFailed, match=message):
        module.sweep(Config.model_validate(tree))
    client = MlflowClient(tracking_uri=f"sqlite:///{tmp_path / 'mlflow.db'}")
    experiment = client.get_experiment_by_name("neurostorm")
    assert experiment.artifact_location == (tmp_path / "artifacts").as_uri()
    runs = client.search_runs([experiment.experiment_id])
    assert {run.info.status for run in runs} == {"FAILED"} and len(runs) == 1 + 3
    assert (tmp_path / "s" / "summary.json").is_file()
