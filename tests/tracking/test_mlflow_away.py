"""A real MLflow server that is away, refuses, or has deleted the run: nothing raises, nothing is lost unnoticed."""

import json
import logging
from types import SimpleNamespace

import numpy as np
import pytest
from chaos.services import TrackingServer
from mlflow import MlflowClient

from neurostorm.config import Config
from neurostorm.tracking import mlflow_client, mlflow_run, tracker, unsent, upload
from neurostorm.tracking.async_logger import AsyncLogger
from neurostorm.tracking.mlflow_run import REPLACES, RUN_FILE
from neurostorm.tracking.tracker import closing_words, open_run
from neurostorm.train import launch, worker
from neurostorm.train.validation import CLIPS

PICTURE = np.full((4, 6, 3), 7, np.uint8)


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    server = TrackingServer(tmp_path_factory.mktemp("mlflow") / "server")
    server.start()
    yield server
    server.stop()


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "mine").mkdir()
    return tmp_path / "mine"


@pytest.fixture
def uri(request, server, tmp_path):
    """The server's, or that of a database."""
    return server.uri if request.param == "http" else f"sqlite:///{tmp_path / 'mlflow.db'}"


both = pytest.mark.parametrize("uri", ["http", "sqlite"], indirect=True)
pytestmark = pytest.mark.filterwarnings("ignore:.*noload:DeprecationWarning")  # MLflow's use of its database library


def begin(folder, uri, experiment=None, parent=None):
    return open_run(
        folder, uri=uri, experiment=experiment or folder.parent.name, name="mine", parent=parent,
        parameters={"lr": 1}, tags={"code_revision": "abc"}, artifacts=folder.parent / "artifacts",
    )  # fmt: skip


def impatient(monkeypatch, uri, patience_s=0.1):
    """A logger for `uri` that gives up soon."""
    log = AsyncLogger("MLflow", patience_s=patience_s, pause_s=0.05, longest_pause_s=0.05, keep_after_s=0.0)
    monkeypatch.setitem(tracker._loggers, uri, log)


def steps(client, run_id):
    return [point.step for point in client.get_metric_history(run_id, "loss/train")]


@both
@pytest.mark.parametrize("what", ["run", "experiment", "unknown"])
def test_a_deleted_run_is_replaced_by_a_new_one_and_resumes(uri, what, folder, caplog):
    client = MlflowClient(tracking_uri=uri)
    tracker = begin(folder, uri)
    tracker.metrics({"loss/train": 1.0}, 1)
    assert tracker.flush() == 0
    first, experiment = tracker.run_id, client.get_run(tracker.run_id).info.experiment_id
    if what == "run":
        client.delete_run(first)
    elif what == "experiment":
        client.delete_experiment(experiment)
    else:
        first = tracker.run.run_id = "0" * 32  # of a database that was made anew
    with caplog.at_level(logging.WARNING):
        tracker.metrics({"loss/train": 0.5}, 2)
        tracker.metrics({"loss/train": 0.4}, 3)
        tracker.image("reconstruction", PICTURE, 3)
        assert tracker.flush() == 0
    run = client.get_run(tracker.run_id)
    assert tracker.run_id != first and run.info.status == "RUNNING"
    assert run.data.params == {"lr": "1"}
    assert run.data.tags["code_revision"] == "abc" and run.data.tags[REPLACES] == first
    assert steps(client, tracker.run_id) == [2, 3]
    assert json.loads((folder / RUN_FILE).read_text()) == {"uri": uri, "run_id": tracker.run_id}
    assert caplog.text.count("was deleted; run") == 1 and first in caplog.text
    if what == "experiment":
        assert client.get_experiment(run.info.experiment_id).name == f"{folder.parent.name}-2"
    assert tracker.facts()["mlflow_refused"] == 0
    tracker.close("FAILED")
    again = begin(folder, uri)
    assert again.flush() == 0 and again.run_id == tracker.run_id


@both
def test_a_run_that_was_deleted_between_two_starts_is_replaced(uri, folder):
    client = MlflowClient(tracking_uri=uri)
    first = begin(folder, uri)
    first.close("FAILED")
    client.delete_run(first.run_id)
    again = begin(folder, uri)
    again.metrics({"loss/train": 0.5}, 2)
    again.close()
    run = client.get_run(again.run_id)
    assert again.run_id != first.run_id and run.data.tags[REPLACES] == first.run_id
    assert run.info.status == "FINISHED" and run.data.params == {"lr": "1"} and steps(client, again.run_id) == [2]


def test_an_artifact_does_not_go_to_a_deleted_run(server, folder):
    client = MlflowClient(tracking_uri=server.uri)
    tracker = begin(folder, server.uri)
    tracker.flush()
    client.delete_run(tracker.run_id)
    (folder / "config.yaml").write_text("a: 1")
    tracker.artifact(folder / "config.yaml")
    assert tracker.flush() == 0
    assert [file.path for file in client.list_artifacts(tracker.run_id)] == ["config.yaml"]
    assert client.get_run(tracker.run_id).info.lifecycle_stage == "active"


def test_the_children_of_a_deleted_run_become_those_of_the_new_one(server, folder):
    client = MlflowClient(tracking_uri=server.uri)
    parent = begin(folder, server.uri)
    children = []
    for name in ("one", "two"):
        (folder / name).mkdir()
        children.append(begin(folder / name, server.uri, experiment=folder.parent.name, parent=parent))
        if name == "one":
            children[0].close()
            parent.flush()
            client.delete_run(parent.run_id)
            parent.tag("a", "b")
    parent.close()
    for child in children:
        assert client.get_run(child.run_id).data.tags["mlflow.parentRunId"] == parent.run_id


@both
def test_what_the_server_refuses_is_dropped_and_counted(uri, folder, caplog):
    tracker = begin(folder, uri)
    with caplog.at_level(logging.WARNING, logger="neurostorm"):
        tracker.metrics({"bad\x00name": 1.0}, 1)
        tracker.metrics({"loss/train": 1.0}, 2)
        tracker.metrics({"bad\x00name": 1.0}, 3)
        tracker.image("bad\x00key", PICTURE, 3)
        tracker.close()
    client = MlflowClient(tracking_uri=uri)
    assert steps(client, tracker.run_id) == [2] and client.get_run(tracker.run_id).info.status == "FINISHED"
    facts = tracker.facts()
    assert facts["mlflow_refused"] == 3 and facts["mlflow_unsent"] == 0
    assert caplog.text.count("refuses an entry") == 1
    assert closing_words(facts) == ["  MLflow refused 3 entries; the log says why for the first"]


def test_without_a_server_all_is_kept_and_the_upload_sends_it_once(server, folder, monkeypatch, capsys):
    impatient(monkeypatch, "http://127.0.0.1:1")
    tracker = begin(folder, "http://127.0.0.1:1")
    (folder / "model").mkdir()
    (folder / "model" / "weights").write_text("w")
    tracker.metrics({"loss/train": 1.0, "speed/clips_per_s": float("nan")}, 1)
    tracker.image("reconstruction", PICTURE, 1)
    tracker.artifact(folder / "model", "model")
    tracker.tag("a", "b")
    tracker.close()
    facts = tracker.facts()
    assert facts["mlflow_run_id"] == "" and facts["mlflow_unsent"] == 5 and not (folder / RUN_FILE).exists()
    assert facts["mlflow_upload"] == f"python -m neurostorm upload {folder}"
    assert facts["mlflow_upload"] in closing_words(facts)[0]
    (folder / "summary.json").write_text(json.dumps({"steps": 1, **facts}))

    assert upload.main([str(folder)], patience_s=0.1) == 1, "nothing answers there"
    assert "start the same command again" in capsys.readouterr().err
    assert tracker.facts()["mlflow_unsent"] == 5
    arguments = [str(folder), "--uri", server.uri]
    monkeypatch.setattr(unsent, "remove_part", lambda *given: None)  # as if it were killed after sending
    upload.main(arguments)
    monkeypatch.undo()
    assert upload.main(arguments) == 0
    assert upload.main(arguments) == 0 and "nothing waits" in capsys.readouterr().out
    assert not (folder / unsent.FOLDER).exists()

    client = MlflowClient(tracking_uri=server.uri)
    summary = json.loads((folder / "summary.json").read_text())
    run = client.get_run(summary["mlflow_run_id"])
    assert (summary["mlflow_unsent"], summary["steps"]) == (0, 1) and "mlflow_upload" not in summary
    assert len(client.search_runs([run.info.experiment_id])) == 1
    assert run.info.status == "FINISHED" and run.data.params == {"lr": "1"} and run.data.tags["a"] == "b"
    assert steps(client, run.info.run_id) == [1], "sent twice, it counts once"
    found = {file.path for file in client.list_artifacts(run.info.run_id)}
    assert {"model", "summary.json", "images"} == found
    assert len([f for f in client.list_artifacts(run.info.run_id, "images") if f.path.endswith(".png")]) == 1


def test_a_resumed_run_sends_what_its_killed_predecessor_kept_and_stays_open(server, folder, monkeypatch):
    impatient(monkeypatch, "http://127.0.0.1:1")
    killed = begin(folder, "http://127.0.0.1:1")
    killed.metrics({"loss/train": 1.0}, 1)
    killed.close("FAILED")
    resumed = begin(folder, server.uri)
    resumed.metrics({"loss/train": 0.5}, 2)
    assert resumed.flush() == 0
    client = MlflowClient(tracking_uri=server.uri)
    run = client.get_run(resumed.run_id)
    assert run.info.status == "RUNNING" and steps(client, resumed.run_id) == [1, 2]
    assert not (folder / unsent.FOLDER).exists()
    resumed.close()


def test_a_sweep_and_its_trials_are_uploaded_by_one_command(server, folder, monkeypatch, capsys):
    nowhere = "http://127.0.0.1:1"
    impatient(monkeypatch, nowhere)
    parent = begin(folder, nowhere)
    for name in ("one", "two"):
        (folder / "trials" / name).mkdir(parents=True)
        child = begin(folder / "trials" / name, nowhere, experiment=folder.parent.name, parent=parent)
        child.metrics({"loss/train": 1.0}, 1)
        child.close()
    parent.close()
    assert parent.facts()["mlflow_unsent"] == 5
    assert upload.main([str(folder / "trials" / "one"), "--uri", server.uri], patience_s=0.1) == 1
    assert upload.main([str(folder), "--uri", server.uri]) == 0
    client = MlflowClient(tracking_uri=server.uri)
    ids = [json.loads(path.read_text())["run_id"] for path in sorted(folder.rglob(RUN_FILE))]
    runs = client.search_runs([client.get_run(ids[0]).info.experiment_id])
    assert len(runs) == 3 and {run.info.status for run in runs} == {"FINISHED"}
    parents = {run.data.tags.get("mlflow.parentRunId") for run in runs}
    assert parents == {None, json.loads((folder / RUN_FILE).read_text())["run_id"]}


def test_an_artifact_that_cannot_be_stored_is_kept_for_the_upload(tmp_path, folder, monkeypatch, caplog):
    uri = f"sqlite:///{tmp_path / 'mlflow.db'}"
    impatient(monkeypatch, uri, patience_s=60.0)  # the server answers: this is not waited for
    (folder / "config.yaml").write_text("a: 1")
    tracker = begin(folder, uri)
    tracker.flush()
    (tmp_path / "artifacts").write_text("a file where the folder should be")
    tracker.artifact(folder / "config.yaml")
    tracker.artifact(folder / "not there")
    tracker.metrics({"loss/train": 1.0}, 1)
    tracker.close()
    facts = tracker.facts()
    assert (facts["mlflow_unsent"], facts["mlflow_refused"]) == (1, 1)
    client = MlflowClient(tracking_uri=uri)
    assert client.get_run(tracker.run_id).info.status == "FINISHED" and steps(client, tracker.run_id) == [1]
    (tmp_path / "artifacts").unlink()
    assert upload.main([str(folder)]) == 0
    assert [file.path for file in client.list_artifacts(tracker.run_id)] == ["config.yaml"]
    assert client.get_run(tracker.run_id).info.status == "FINISHED"


def test_a_wrong_folder_is_named(tmp_path, capsys):
    assert upload.main([str(tmp_path / "none")]) == 2
    assert f"{tmp_path}/none is not there" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("code", "json_answer", "gone"),
    [("RESOURCE_DOES_NOT_EXIST", True, True), ("ENDPOINT_NOT_FOUND", False, None), ("INTERNAL_ERROR", True, None)],
)
def test_a_gateways_404_does_not_count_as_a_deleted_run(folder, code, json_answer, gone):
    from mlflow.exceptions import MlflowException, RestException

    class Client:
        def get_run(self, run_id):
            if json_answer:
                raise RestException({"error_code": code, "message": ""})
            raise MlflowException("404 <html>", error_code=5)

    run = mlflow_run.MlflowRun(folder, "http://x", "e", "n", {}, {}, None, run_id="1", _client=Client())
    if gone is None:
        with pytest.raises(MlflowException):
            run._is_gone()
    else:
        assert run._is_gone()


def test_transfers_wait_longer_than_metrics_unless_the_user_says_otherwise(monkeypatch):
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "10")
    with mlflow_client.unhurried():
        from mlflow.environment_variables import MLFLOW_HTTP_REQUEST_TIMEOUT

        assert MLFLOW_HTTP_REQUEST_TIMEOUT.get() == 300
    assert MLFLOW_HTTP_REQUEST_TIMEOUT.get() == 10
    monkeypatch.setattr(mlflow_client, "_OURS", set())
    with mlflow_client.unhurried():
        assert MLFLOW_HTTP_REQUEST_TIMEOUT.get() == 10


def test_pretraining_ends_well_without_a_server(folder, monkeypatch, capsys):
    nowhere = "http://127.0.0.1:1"
    impatient(monkeypatch, nowhere)
    (folder / "config.yaml").write_text("a: 1")
    (folder / "model").mkdir()
    (folder / "model" / "weights").write_text("w")
    config = Config(run={"output": str(folder.parent), "name": "mine"}, tracking={"uri": nowhere})
    account = SimpleNamespace(keep=lambda phase: None, metrics=lambda: {"time/goodput": 1.0}, flush=lambda: None)
    corpus = SimpleNamespace(content_sha256="c", split="s", withdrawn=())
    tracker = worker.open_tracker(config, corpus)
    tracker.metrics({"loss/train": 1.0}, 5)
    worker.finish(config, corpus, tracker, account, {"loss/validation": 0.5, CLIPS: 4}, 5)
    summary = json.loads((folder / "summary.json").read_text())
    assert (summary["steps"], summary["mlflow_run_id"], summary["mlflow_unsent"]) == (5, "", 7)
    kept = [json.loads(line) for path in sorted((folder / "unsent").glob("*.jsonl")) for line in path.open()]
    assert [entry["kind"] for entry in kept] == ["artifact", "metrics", "artifact", "metrics", "tag", "artifact", "end"]
    assert [entry["path"] for entry in kept if entry["kind"] == "artifact"] == ["config.yaml", "model", "summary.json"]


def test_a_start_with_other_settings_forgets_what_the_other_one_did_not_send(folder, monkeypatch):
    (folder / "config.yaml").write_text("a: 1")
    nowhere = "http://127.0.0.1:1"
    impatient(monkeypatch, nowhere)
    tracker = begin(folder, nowhere)
    tracker.metrics({"loss/train": 1.0}, 1)
    tracker.close("FAILED")
    monkeypatch.setattr(launch, "changed_settings", lambda config: ["train.lr: 1 -> 2"])
    monkeypatch.setattr(launch.pinned_manifest, "is_other", lambda folder, corpus: False)
    config = Config(run={"output": str(folder.parent), "name": "mine"})
    launch.forget_other_start(config, None)
    assert not (folder / unsent.FOLDER).exists()
