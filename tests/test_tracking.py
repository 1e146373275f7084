"""MLflow behind the tracker: what is logged can be read back, and a restarted run goes on where it was."""

import json
import pickle
import shutil
import sqlite3
import subprocess
import urllib.parse
from contextlib import closing
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from mlflow import MlflowClient
from PIL import Image

from neurostorm import places, tracking
from neurostorm.config import Config
from neurostorm.mlflow_run import RUN_FILE, MlflowRun, NotOpen
from neurostorm.tracking import Tracker, code_revision, open_run, tracking_uri
from neurostorm.train import worker

pytestmark = pytest.mark.filterwarnings("ignore:.*noload:DeprecationWarning")  # MLflow's use of its database library


@pytest.fixture(scope="module")
def empty_database(tmp_path_factory):
    """An MLflow database without runs: making one takes seconds, copying it none."""
    path = tmp_path_factory.mktemp("mlflow") / "empty.db"
    MlflowClient(tracking_uri=f"sqlite:///{path}").get_experiment_by_name("none")
    return path


@pytest.fixture
def place(tmp_path, empty_database, monkeypatch):
    """An output folder with a database and one run's folder; the working directory is another, empty one."""
    (tmp_path / "outputs" / "mine").mkdir(parents=True)
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    shutil.copy(empty_database, tmp_path / "outputs" / "mlflow.db")
    return tmp_path / "outputs"


def begin(place, run="mine", database="mlflow.db", experiment="study", **parameters):
    tracker = open_run(
        place / run, uri=f"sqlite:///{place / database}", experiment=experiment, name=run,
        parameters=parameters, tags={"code_revision": "abc"}, artifacts=place / "artifacts",
    )  # fmt: skip
    assert tracker.flush() == 0
    return tracker


def client_of(place, database="mlflow.db"):
    return MlflowClient(tracking_uri=f"sqlite:///{place / database}")


def test_parameters_tags_and_metrics_by_step_are_in_the_run(place):
    tracker = begin(place, **{"train.lr": 0.001, "model.depths": [2, 2]})
    tracker.metrics({"loss/train": 2.0, "speed/clips_per_s": 5}, 10)
    tracker.metrics({"loss/train": 1.5}, 20)
    tracker.metrics({}, 30)
    tracker.flush()
    run = client_of(place).get_run(tracker.run_id)
    assert run.info.run_name == "mine"
    assert run.data.params == {"train.lr": "0.001", "model.depths": "[2, 2]"}
    assert run.data.tags["code_revision"] == "abc"
    assert run.data.metrics == {"loss/train": 1.5, "speed/clips_per_s": 5.0}
    history = client_of(place).get_metric_history(tracker.run_id, "loss/train")
    assert [(point.step, point.value) for point in history] == [(10, 2.0), (20, 1.5)]


def test_the_run_ends_as_it_is_closed(place):
    tracker = begin(place)
    assert client_of(place).get_run(tracker.run_id).info.status == "RUNNING"
    tracker.close("FAILED")
    assert client_of(place).get_run(tracker.run_id).info.status == "FAILED"
    begin(place).close()
    assert client_of(place).get_run(tracker.run_id).info.status == "FINISHED"


def test_artifacts_lie_in_the_output_folder_and_not_where_the_job_was_started(place):
    tracker = begin(place)
    (place / "mine" / "config.yaml").write_text("a: 1")
    (place / "mine" / "model" / "deep").mkdir(parents=True)
    (place / "mine" / "model" / "deep" / "weights").write_text("w")
    tracker.artifact(place / "mine" / "config.yaml")
    tracker.artifact(place / "mine" / "model", "model")
    tracker.flush()
    root = Path(urllib.parse.urlparse(client_of(place).get_run(tracker.run_id).info.artifact_uri).path)
    assert place in root.parents
    assert (root / "config.yaml").read_text() == "a: 1"
    assert (root / "model" / "deep" / "weights").read_text() == "w"
    assert not list(Path.cwd().iterdir())


def test_a_run_deep_in_an_output_keeps_its_artifacts_where_the_others_do(place):
    deep = "mine/trials/sex_linear"
    (place / deep).mkdir(parents=True)
    (place / "second").mkdir()
    for tracker in (begin(place, deep), begin(place, "second")):
        location = client_of(place).get_run(tracker.run_id).info.artifact_uri
        assert location == f"{(place / 'artifacts').as_uri()}/{tracker.run_id}/artifacts"


def test_a_new_database_keeps_nothing_in_the_working_directory(place):
    begin(place, database="fresh.db").close()
    with closing(sqlite3.connect(place / "fresh.db")) as database:
        found = dict(database.execute("SELECT name, artifact_location FROM experiments"))
    assert found == {
        "Default": (place / "artifacts" / "0").as_uri(),
        "study": (place / "artifacts").as_uri(),
    }
    assert not list(Path.cwd().iterdir())


def test_pretraining_names_its_mlflow_run_after_the_run_and_gives_the_outputs_artifacts(place, monkeypatch):
    asked = {}
    monkeypatch.setattr(worker, "open_run", lambda folder, **given: asked.update(given, folder=folder) or Tracker())
    config = Config(run={"output": str(place), "name": "mine"})
    (place / "mine" / "config.yaml").write_text("a: 1")
    worker.open_tracker(config, SimpleNamespace(content_sha256="c", split="s", withdrawn={}))
    assert (asked["name"], asked["folder"], asked["artifacts"]) == ("mine", place / "mine", place / "artifacts")


def test_pictures_carry_their_key_and_step(place):
    tracker = begin(place)
    pictures = {step: np.full((4, 6, 3), step, np.uint8) for step in (40, 80)}
    for step, picture in pictures.items():
        tracker.image("reconstruction", picture, step)
    tracker.flush()
    root = Path(urllib.parse.urlparse(client_of(place).get_run(tracker.run_id).info.artifact_uri).path)
    for step, picture in pictures.items():
        (file,) = (root / "images").glob(f"reconstruction?step?{step}?*.png")
        assert np.array_equal(np.asarray(Image.open(file)), picture)
    assert not list(Path.cwd().iterdir())


def test_opening_a_run_again_goes_on_in_it(place):
    first = begin(place, lr=1)
    first.metrics({"loss/train": 2.0}, 1)
    first.close("FAILED")
    again = begin(place, lr=1)
    assert again.run_id == first.run_id
    again.metrics({"loss/train": 1.0}, 2)
    again.flush()
    run = client_of(place).get_run(first.run_id)
    assert run.info.status == "RUNNING"
    assert run.data.params == {"lr": "1"}
    assert len(client_of(place).get_metric_history(first.run_id, "loss/train")) == 2
    assert begin(place, "mine", experiment="study").run_id == first.run_id


def test_runs_of_other_folders_are_other_runs_of_the_same_experiment(place):
    (place / "second").mkdir()
    one, two = begin(place), begin(place, "second")
    assert one.run_id != two.run_id
    found = client_of(place).search_runs([client_of(place).get_experiment_by_name("study").experiment_id])
    assert {run.info.run_id for run in found} == {one.run_id, two.run_id}


def test_another_server_starts_a_new_run_and_is_then_kept(place):
    first = begin(place)
    shutil.copy(place / "mlflow.db", place / "other.db")  # one that even knows a run of this id
    other = begin(place, database="other.db")
    assert other.run_id != first.run_id
    assert client_of(place, "other.db").get_run(other.run_id).info.run_name == "mine"
    assert begin(place, database="other.db").run_id == other.run_id


def test_a_run_that_the_server_does_not_know_any_more_starts_anew(place, empty_database):
    first = begin(place)
    shutil.copy(empty_database, place / "fresh.db")
    kept = place / "mine" / "mlflow.json"
    kept.write_text(json.dumps({"uri": f"sqlite:///{place / 'fresh.db'}", "run_id": first.run_id}))
    again = begin(place, database="fresh.db")
    assert again.run_id != first.run_id
    assert json.loads(kept.read_text())["run_id"] == again.run_id


def test_a_tracker_without_a_run_does_nothing(place):
    tracker = Tracker()
    before = sorted(place.rglob("*"))
    tracker.metrics({"loss/train": 1.0}, 0)
    tracker.image("reconstruction", np.zeros((2, 2, 3), np.uint8), 0)
    tracker.artifact(place)
    tracker.close()
    assert tracker.run_id == ""
    assert sorted(place.rglob("*")) == before
    assert not list(Path.cwd().iterdir())


def test_a_pickled_tracker_logs_nothing(place):
    tracker = begin(place)
    copy = pickle.loads(pickle.dumps(tracker))
    copy.metrics({"loss/train": 1.0}, 0)
    assert copy.run_id == "" and copy.flush() == 0
    tracker.flush()
    assert client_of(place).get_run(tracker.run_id).data.metrics == {}


def test_the_server_is_the_one_given_or_a_file_in_the_output_folder(place):
    assert tracking_uri("http://tracking:5000", place) == "http://tracking:5000"
    assert tracking_uri(None, place) == f"sqlite:///{place}/mlflow.db"
    assert tracking_uri(None, Path("runs")) == f"sqlite:///{Path.cwd()}/runs/mlflow.db"


def test_an_output_in_an_object_store_has_no_database_of_its_own(place):
    output = places.place("s3://bucket/runs")
    assert tracking_uri("http://tracking:5000", output) == "http://tracking:5000"
    with pytest.raises(ValueError, match=r"tracking\.uri is not set.*run\.output=s3://bucket/runs.*sqlite:////"):
        tracking_uri(None, output)


def test_a_run_in_an_object_store_keeps_its_artifacts_beside_the_database(place, make_bucket):
    folder = places.place(make_bucket()) / "runs" / "mine"
    for name in ("config.yaml", "model/deep/weights"):
        places.replace(folder / name, name.encode())

    def opened():
        uri = f"sqlite:///{place / 'mlflow.db'}"
        artifacts = folder.parent / "artifacts"
        tracker = open_run(
            folder, uri=uri, experiment="study", name="mine", parameters={}, tags={}, artifacts=artifacts
        )
        tracker.flush()
        return tracker

    tracker = opened()
    tracker.artifact(folder / "config.yaml")
    tracker.artifact(folder / "model", "model")
    tracker.flush()
    root = Path(urllib.parse.urlparse(client_of(place).get_run(tracker.run_id).info.artifact_uri).path)
    assert place / "artifacts" in root.parents
    assert (root / "config.yaml").read_text() == "config.yaml"
    assert (root / "model" / "deep" / "weights").read_text() == "model/deep/weights"
    assert opened().run_id == tracker.run_id, "its id is kept in the object store"


@pytest.fixture
def package(tmp_path, monkeypatch):
    """A package of two files that `code_revision` takes for its own."""
    folder = tmp_path / "code" / "package"
    folder.mkdir(parents=True)
    (folder / "tracking.py").write_text("one = 1\n")
    (folder / "loop.py").write_text("two = 2\n")
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path))
    monkeypatch.setattr(tracking, "__file__", str(folder / "tracking.py"))
    return folder


def test_outside_a_repository_the_revision_is_a_hash_of_names_and_sources(package):
    first = code_revision()
    assert first.startswith("source-") and len(first) == len("source-") + 12
    (package / "notes.txt").write_text("not code")
    assert code_revision() == first
    (package / "loop.py").write_text("two = 3\n")
    changed = code_revision()
    (package / "loop.py").rename(package / "pool.py")
    assert len({first, changed, code_revision()}) == 3


def test_without_git_the_revision_is_the_hash_too(package, monkeypatch):
    expected = code_revision()
    monkeypatch.setenv("PATH", str(package))
    assert code_revision() == expected


def test_in_a_repository_the_revision_is_the_commit_and_says_when_it_was_changed(package):
    def git(*arguments):
        command = ["git", "-C", str(package), "-c", "user.name=A", "-c", "user.email=a@b", *arguments]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()

    git("init", "--quiet")
    git("add", ".")
    git("commit", "--quiet", "--no-gpg-sign", "-m", "first")
    commit = git("rev-parse", "HEAD")[:12]
    assert code_revision() == commit
    (package / "loop.py").write_text("two = 3\n")
    assert code_revision() == f"{commit}-dirty"


def test_observers_see_all_metrics_with_an_mlflow_run_or_without(place):
    for tracker in (Tracker(), begin(place)):
        seen = []
        tracker.observe(lambda values, step, seen=seen: seen.append((values, step)))
        tracker.metrics({"loss/train": 1.0}, 3)
        tracker.metrics({"loss/train": 0.5}, 4)
        assert seen == [({"loss/train": 1.0}, 3), ({"loss/train": 0.5}, 4)]


def test_a_start_that_died_before_its_parameters_were_logged_begins_no_second_run(place, monkeypatch):
    def killed(run):
        raise OSError("killed")

    def run():
        uri = f"sqlite:///{place / 'mlflow.db'}"
        return MlflowRun(place / "mine", uri, "study", "mine", {"train.lr": "1"}, {}, str(place / "artifacts"))

    with monkeypatch.context() as during, pytest.raises(NotOpen, match="killed"):
        during.setattr(MlflowRun, "_log_parameters", killed)
        run().open()
    kept = json.loads((place / "mine" / RUN_FILE).read_text())["run_id"]
    run().open()
    client = client_of(place)
    (only,) = client.search_runs([client.get_experiment_by_name("study").experiment_id])
    assert only.info.run_id == kept and only.data.params == {"train.lr": "1"}
