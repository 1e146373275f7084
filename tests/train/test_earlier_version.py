"""What commit 9132ecd wrote still opens: a store, a run that was stopped half-way, its model and its MLflow run.

`tests/data/written_by_9132ecd.tar.xz` holds five runs of 16 frames on a grid of 12^3 voxels, and a run of 8 steps with
two workers as it was after step 4, beside its ledger and the model that it ended with.
"""

import json
import shutil
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from neurostorm.config import Config
from neurostorm.model.hub.pretrained import load_pretrained
from neurostorm.store import FrameStore, read_manifest
from neurostorm.store.maintenance.verify import verify
from neurostorm.tracking.tracker import open_run
from neurostorm.train.checkpoint import checkpoints
from tests.train.rank_program import main
from tests.train.ranks import run_together

ARCHIVE = Path(__file__).resolve().parents[1] / "data" / "written_by_9132ecd.tar.xz"
DATABASE = "sqlite:////scratch/lab/runs/mlflow.db"  # where the run was written


@pytest.fixture
def written(tmp_path: Path) -> Path:
    with tarfile.open(ARCHIVE) as archive:
        archive.extractall(tmp_path, filter="data")
    return tmp_path


@pytest.fixture
def config(written: Path) -> Config:
    """The settings of the run, at its new place."""
    tree = yaml.safe_load((written / "runs" / "begun" / "config.yaml").read_text())
    tree["run"]["output"], tree["data"]["store"] = str(written / "runs"), str(written / "store")
    return Config.model_validate(tree)


def test_its_store_is_read_and_found_to_be_whole(written: Path) -> None:
    store = FrameStore.open(written / "store")
    assert len(store.runs()) == 5 and read_manifest(written / "store").num_rows == 5
    for run in store.runs():
        z = store.codec.decode(store.frames(run))
        assert z.shape == (16, store.voxel_count)
        assert np.abs(z.mean(0)).max() < 0.05 and np.abs(z.std(0) - 1).max() < 0.05
    wrong = verify(written / "store").problems  # its runs were made up, and their tsnr_median with them
    assert len(wrong) == 5 and all(problem.what.startswith("tsnr_median is") for problem in wrong)


def test_its_run_is_resumed_with_the_losses_that_it_had(written: Path, config: Config, read_ledger) -> None:
    folder = config.run.folder
    expected, ended_with = read_ledger(config), load_pretrained(folder / "model").state_dict()
    shutil.rmtree(folder / "ledger")
    assert sorted(expected) == list(range(8))
    newest = checkpoints.newest(folder / "checkpoints")
    assert newest is not None and (newest.step, newest.workers) == (4, 2)
    run_together(main, 2, [config], [-1])
    found = read_ledger(config)
    assert found == {step: entry for step, entry in expected.items() if step >= 4}
    for name, value in load_pretrained(folder / "model").state_dict().items():
        assert torch.equal(value, ended_with[name]), name


def test_its_mlflow_run_goes_on(written: Path, config: Config) -> None:
    from mlflow import MlflowClient

    uri = f"sqlite:///{written / 'runs' / 'mlflow.db'}"
    file = config.run.folder / "mlflow.json"
    assert json.loads(file.read_text())["uri"] == DATABASE
    file.write_text(file.read_text().replace(DATABASE, uri))
    run_id = json.loads(file.read_text())["run_id"]
    tracker = open_run(
        config.run.folder, uri=uri, experiment="neurostorm", name="begun", parameters={}, tags={},
        artifacts=written / "runs" / "artifacts",
    )  # fmt: skip
    tracker.metrics({"loss/train": 0.5}, 10)
    tracker.close()
    client = MlflowClient(tracking_uri=uri)
    assert client.get_run(run_id).data.params["train.max_steps"] == "8"
    assert [point.step for point in client.get_metric_history(run_id, "loss/train")][-1] == 10
