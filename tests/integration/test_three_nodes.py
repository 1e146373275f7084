"""Three nodes and an object store, as a cluster has them: a killed run, submitted there, ends like its twin on a disk.

twin:    two ranks without Ray on the disk ----------------------------------------------------> end
victim:  two ranks without Ray on S3 --- SIGKILL after a checkpoint     a job on three nodes --> end

The nodes are three `ray start` on 127.0.0.1, .2 and .3, behind a token; on the last two there is room for one training
worker each, and both read one store.
"""

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from ray_nodes import ROOT, RayNodes

from neurostorm.config import Config
from neurostorm.data.corpus import open_corpus
from neurostorm.model.hub import load_pretrained
from neurostorm.places import Place, copy_files, files_below, place
from neurostorm.staging import fetched
from tests.train.conftest import run_together

pytestmark = pytest.mark.integration

PRETRAIN, RANK = ROOT / "jobs" / "pretrain.py", ROOT / "tests" / "train" / "rank_program.py"
STEPS, KILLED = 10, 4


@pytest.fixture
def nodes(s3_server: str) -> Iterator[RayNodes]:
    """One node, which knows of the object store; others are added."""
    folder = Path(tempfile.mkdtemp(prefix="rn-"))  # short: sockets lie below it
    try:
        with RayNodes(folder) as cluster:
            yield cluster
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture
def killed(tmp_path: Path) -> Iterator[Callable[[Config], None]]:
    """Trains a run on two ranks without Ray and kills them after the checkpoint of step KILLED."""
    started: list[subprocess.Popen[str]] = []

    def strike(config: Config) -> None:
        file = tmp_path / "killed.yaml"
        file.write_text(config.to_yaml())
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "PYTHONPATH": str(ROOT)}
        for rank in range(2):
            command = [sys.executable, RANK, file, str(rank), "2", tmp_path / "meeting", "-1"]
            started.append(
                subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment)
            )
        marker, end_s = config.run.folder / "checkpoints" / f"step-{KILLED:08d}" / "COMMITTED", time.monotonic() + 200
        while not marker.is_file():
            ended = [process for process in started if process.poll() is not None]
            assert not ended, ended[0].communicate()[0][-4000:]
            assert time.monotonic() < end_s, f"{marker} did not come"
            time.sleep(0.02)
        for process in started:
            process.kill()
            process.wait()

    yield strike
    for process in started:
        process.kill()


def losses(folder: Place) -> dict[int, tuple[float, list[list[int]]]]:
    """step -> (mean loss, rows of each rank), from all files of the ledger; each step stands in one line of a rank."""
    steps: dict[int, tuple[float, list[list[int]]]] = {}
    for name, _ in sorted(files_below(folder / "ledger")):
        for entry in map(json.loads, (folder / "ledger" / name).read_text().splitlines()):
            steps.setdefault(entry["step"], (entry["loss"], []))[1].append(entry["rows"])
    return steps


def weights(folder: Place) -> dict[str, torch.Tensor]:
    with fetched(folder) as local:
        return load_pretrained(local).state_dict()


def test_a_killed_run_is_submitted_to_three_nodes_and_ends_as_on_one(
    ball_config, ball_store: Path, make_bucket: Callable[[], str], nodes: RayNodes, killed, tmp_path: Path
) -> None:
    bucket = place(make_bucket())
    copy_files(ball_store, bucket / "store", [name for name, _ in files_below(ball_store)])
    settings = {
        "train": {"global_batch": 4, "micro_batch": 2, "max_steps": STEPS, "validate_every": 100},
        "scale": {"workers": 2, "cpus_per_worker": 1.5}, "checkpoint": {"every": 4, "keep": 2},
        "tracking": {"clip_ledger": True, "pictures": False, "uri": f"sqlite:///{tmp_path / 'mlflow.db'}"},
    }  # fmt: skip
    twin = ball_config(run={"name": "twin"}, **settings)
    victim = ball_config(
        run={"name": "victim", "output": bucket / "runs"}, data={"store": bucket / "store"}, **settings
    )
    assert open_corpus(victim).content_sha256 == open_corpus(twin).content_sha256
    killed(victim)
    assert not (victim.run.folder / "model").exists(), "it was killed too late to matter"

    for _ in range(2):
        nodes.add(cpus=2)
    refused = nodes.submit("echo", "let in", RAY_AUTH_TOKEN="0" * 64, RAY_AUTH_TOKEN_PATH="")
    assert refused.returncode and "let in" not in refused.stdout, refused.stdout
    done = nodes.submit(sys.executable, PRETRAIN, "--config", tmp_path / "killed.yaml")
    assert done.returncode == 0, done.stdout[-4000:]
    places = re.findall(r"ip=([\d.]+), pid=\d+\) world_rank", done.stdout)
    assert sorted(places) == ["127.0.0.2", "127.0.0.3"], done.stdout[-4000:]
    assert f"resume step={KILLED} " in done.stdout or "resume step=8 " in done.stdout
    assert f"model   {victim.run.folder}/model" in done.stdout

    file = tmp_path / "twin.yaml"
    file.write_text(twin.to_yaml())
    single = run_together(RANK, [[file, rank, 2, None, -1] for rank in range(2)])
    assert [status for status, _ in single] == [0, 0], single[0][1][-3000:]
    expected, found = losses(twin.run.folder), losses(victim.run.folder)
    assert sorted(found) == sorted(expected) == list(range(STEPS))
    for step in range(STEPS):
        assert found[step][1] == expected[step][1]
        assert found[step][0] == pytest.approx(expected[step][0], rel=1e-6), f"step {step}"
    mine, other = weights(victim.run.folder / "model"), weights(twin.run.folder / "model")
    assert all(value.allclose(other[name], rtol=1e-5, atol=1e-7) for name, value in mine.items())
    check_folder(victim)


def check_folder(config: Config) -> None:
    """All that a run leaves lies in the object store, and the last two checkpoints."""
    folder = config.run.folder
    assert {path.name for path in folder.iterdir()} == {
        "checkpoints", "config.yaml", "goodput.json", "ledger", "manifest.parquet", "mlflow.json", "model",
        "summary.json",
    }  # fmt: skip
    assert {path.name for path in (folder / "checkpoints").iterdir()} == {"step-00000008", f"step-{STEPS:08d}"}
    assert json.loads((folder / "summary.json").read_text())["steps"] == STEPS
