"""Pretraining with store and output in an object store, killed and resumed, ends like its twin on the disk.

twin:    two ranks without Ray on the disk ------------------------------> end
victim:  two ranks on S3 --- SIGKILL after a checkpoint   jobs/pretrain.py --> end
"""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
import torch

from neurostorm.config import Config
from neurostorm.data.corpus import open_corpus
from neurostorm.model.hub import load_pretrained
from neurostorm.places import Place, copy_files, files_below, place
from neurostorm.staging import fetched

pytestmark = pytest.mark.integration

ROOT = Path(__file__).parents[2]
STEPS = 18
Start = Callable[..., "subprocess.Popen[str]"]


@pytest.fixture
def start() -> Iterator[Start]:
    """Starts a program with the environment of a training worker."""
    started: list[subprocess.Popen[str]] = []

    def begin(*command: object) -> subprocess.Popen[str]:
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE", "PYTHONPATH": str(ROOT)}
        process = subprocess.Popen(
            [sys.executable, *map(str, command)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
            env=environment | {"DS_ACCELERATOR": "cpu"},
        )  # fmt: skip
        started.append(process)
        return process

    yield begin
    for process in started:
        if process.poll() is None:
            for child in [*psutil.Process(process.pid).children(recursive=True), process]:
                child.kill()


def ranks(start: Start, config: Config, folder: Path) -> list[subprocess.Popen[str]]:
    """Both ranks of a run, without Ray."""
    file = folder / f"{config.run.name}.yaml"
    file.write_text(config.to_yaml())
    program = ROOT / "tests" / "train" / "rank_program.py"
    return [start(program, file, rank, 2, file.with_suffix(".meeting"), -1) for rank in range(2)]


def finish(process: subprocess.Popen[str]) -> str:
    """Waits for a good end; returns the output."""
    output = process.communicate(timeout=240)[0]
    assert process.returncode == 0, output[-4000:]
    return output


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


def test_a_run_in_an_object_store_is_killed_and_resumed(
    ball_config: Callable[..., Config], ball_store: Path, tmp_path: Path, make_bucket: Callable[[], str], start: Start
) -> None:
    bucket = place(make_bucket())
    copy_files(ball_store, bucket / "store", [name for name, _ in files_below(ball_store)])
    settings = {
        "train": {"global_batch": 2, "max_steps": STEPS, "validate_every": 100}, "checkpoint": {"every": 4, "keep": 2},
        "tracking": {"clip_ledger": True, "pictures": False, "uri": f"sqlite:///{tmp_path / 'mlflow.db'}"},
    }  # fmt: skip
    tmp_path.joinpath("outputs").mkdir()
    twin = ball_config(run={"name": "twin"}, **settings)
    victim = ball_config(
        run={"name": "victim", "output": bucket / "runs"}, data={"store": bucket / "store"}, **settings
    )
    assert open_corpus(victim).content_sha256 == open_corpus(twin).content_sha256

    killed = ranks(start, victim, tmp_path)
    wait_for(victim.run.folder / "checkpoints" / "step-00000008" / "COMMITTED", killed)
    for process in killed:
        process.kill()
    for process in ranks(start, twin, tmp_path):
        finish(process)
    assert not (victim.run.folder / "model").exists(), "it was killed too late to matter"

    output = finish(start(ROOT / "jobs" / "pretrain.py", "--config", tmp_path / "victim.yaml"))
    assert "resume step=" in output and f"model   {victim.run.folder}/model" in output
    expected, found = losses(twin.run.folder), losses(victim.run.folder)
    assert sorted(found) == sorted(expected) == list(range(STEPS))
    for step in range(STEPS):
        assert found[step][1] == expected[step][1]
        assert found[step][0] == pytest.approx(expected[step][0], rel=1e-6), f"step {step}"
    mine, other = weights(victim.run.folder / "model"), weights(twin.run.folder / "model")
    assert all(value.allclose(other[name], rtol=1e-5, atol=1e-7) for name, value in mine.items())
    check_folder(victim)


def wait_for(file: Place, processes: list[subprocess.Popen[str]], timeout_s: float = 120) -> None:
    end_s = time.monotonic() + timeout_s
    while not file.is_file():
        ended = [process for process in processes if process.poll() is not None]
        assert not ended, ended[0].communicate()[0][-4000:]
        assert time.monotonic() < end_s, f"{file} did not come"
        time.sleep(0.02)


def check_folder(config: Config) -> None:
    """All that a run leaves lies in the object store, and the last two checkpoints."""
    folder = config.run.folder
    assert {path.name for path in folder.iterdir()} == {
        "checkpoints", "config.yaml", "goodput.json", "ledger", "manifest.parquet", "mlflow.json", "model",
        "summary.json",
    }  # fmt: skip
    assert {path.name for path in (folder / "checkpoints").iterdir()} == {"step-00000016", f"step-{STEPS:08d}"}
    assert json.loads((folder / "summary.json").read_text())["steps"] == STEPS
