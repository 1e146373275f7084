"""`jobs/pretrain.py` on a local Ray: killed twice and started again, it ends as if nothing had happened.

twin:    start ---------------------------------------------------------> end
victim:  start --- SIGKILL of a worker --- SIGKILL of the driver   start --> end
"""

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from neurostorm.config import Config
from neurostorm.data.corpus import open_corpus
from neurostorm.model.hub import load_pretrained

pytestmark = pytest.mark.integration

ROOT = Path(__file__).parents[2]
CLIPS = 48  # of one epoch of the ball store: four training subjects, twelve clips each


class Job:
    """One start of jobs/pretrain.py in a process group of its own, with its output in a file."""

    def __init__(self, config: Config) -> None:
        config.run.output.mkdir(parents=True, exist_ok=True)
        file = config.run.output / f"{config.run.name}.yaml"
        file.write_text(config.to_yaml())
        self.folder, self.log = config.run.folder, file.with_suffix(".log")
        environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
        self.process = subprocess.Popen(
            [sys.executable, str(ROOT / "jobs" / "pretrain.py"), "--config", str(file)],
            stdout=self.log.open("a"),
            stderr=subprocess.STDOUT,
            env={**environment, "PYTHONUNBUFFERED": "1"},
        )

    def steps_done(self) -> int:
        """Steps that rank 0 has written to the ledger; repeated ones count again."""
        ledger = self.folder / "ledger" / "rank-0.jsonl"
        return len(ledger.read_text().splitlines()) if ledger.exists() else 0

    def wait_for(self, condition: Callable[[], bool], what: str, timeout_s: float = 240) -> None:
        """Waits until `condition` holds while the job runs; its log is the message if that fails."""
        end_s = time.monotonic() + timeout_s
        while not condition():
            assert self.process.poll() is None, f"the job ended before {what}:\n{self.log.read_text()[-4000:]}"
            assert time.monotonic() < end_s, f"no {what} after {timeout_s} s:\n{self.log.read_text()[-4000:]}"
            time.sleep(0.02)

    def workers(self) -> list[psutil.Process]:
        """The training workers of this job."""
        family = psutil.Process(self.process.pid).children(recursive=True)
        return [process for process in family if "RayTrainWorker" in (process.name() + " ".join(process.cmdline()))]

    def finish(self) -> str:
        """Waits for a good end; returns the output."""
        status = self.process.wait(timeout=300)
        assert status == 0, self.log.read_text()[-4000:]
        return self.log.read_text()


@pytest.fixture
def start() -> Iterator[Callable[[Config], Job]]:
    jobs: list[Job] = []

    def begin(config: Config) -> Job:
        jobs.append(Job(config))
        return jobs[-1]

    yield begin
    for job in jobs:
        if job.process.poll() is None:
            for process in [*psutil.Process(job.process.pid).children(recursive=True), job.process]:
                process.kill()


def ledger(config: Config) -> dict[int, tuple[float, list[int]]]:
    """step -> (mean loss, rows of all ranks), as they were last."""
    ranks = []
    for rank in range(config.scale.workers):
        lines = (config.run.folder / "ledger" / f"rank-{rank}.jsonl").read_text().splitlines()
        ranks.append({entry["step"]: entry for entry in map(json.loads, lines)})
    return {step: (ranks[0][step]["loss"], [row for rank in ranks for row in rank[step]["rows"]]) for step in ranks[0]}


def test_killed_and_started_again_it_ends_like_its_uninterrupted_twin(ball_config, start):
    settings = {
        "train": {"global_batch": 2, "epochs": 2, "validate_every": 100}, "checkpoint": {"every": 6},
        "tracking": {"clip_ledger": True, "pictures": False}, "augment": {"enabled": True},
    }  # fmt: skip
    twin, victim = (ball_config(run={"name": name}, **settings) for name in ("twin", "victim"))
    steps = 2 * CLIPS // 2
    shown = start(twin).finish()

    job = start(victim)
    job.wait_for(lambda: job.steps_done() >= 8, "step 8")
    victims = job.workers()
    assert len(victims) == 2, "training workers not found"
    victims[-1].kill()
    job.wait_for(lambda: job.steps_done() >= 8 + 10, "ten steps after the worker's death")
    family = psutil.Process(job.process.pid).children(recursive=True)
    job.process.send_signal(signal.SIGKILL)
    for process in psutil.wait_procs(family, timeout=15)[1]:  # Ray's agents may outlive their node by a minute
        process.kill()
    before = job.steps_done()
    assert before < steps + 12, "the driver died too late to matter"
    again = start(victim)
    resumed = again.finish()
    assert "resume step=" in resumed

    expected, found = ledger(twin), ledger(victim)
    assert sorted(found) == sorted(expected) == list(range(steps))
    assert open_corpus(twin).plan.clips_per_epoch == CLIPS
    rows = [row for step in range(steps) for row in found[step][1]]
    assert sorted(rows) == list(range(2 * CLIPS)), "not every clip exactly once in each epoch"
    for step in range(steps):
        assert found[step][1] == expected[step][1]
        assert found[step][0] == pytest.approx(expected[step][0], rel=1e-6), f"step {step}"
    one, two = (json.loads((config.run.folder / "summary.json").read_text()) for config in (twin, victim))
    assert two["loss/validation"] == pytest.approx(one["loss/validation"], rel=1e-6)
    weights = [load_pretrained(config.run.folder / "model").state_dict() for config in (twin, victim)]
    assert all(value.allclose(weights[1][name], rtol=1e-5, atol=1e-7) for name, value in weights[0].items())
    assert "predicting each voxel's mean" in shown
    check_mlflow(victim, steps)
    check_account(victim, shown, resumed)


def test_the_scan_pretrains_on_visible_brain_tokens_from_store_to_saved_model(ball_config, start):
    config = ball_config(
        run={"name": "scan"},
        model={
            "embed_dim": 8,
            "depths": (2, 1),
            "heads": (1, 2),
            "mixer": "mamba",
            "tokens": "brain",
            "decoder": "light",
        },
        mask={"kind": "window-tube", "window": (2, 2, 2, 2)},
        strd={"enabled": True, "rate": 0.1},
        train={"global_batch": 4, "epochs": 2, "log_every": 4, "lr": 1e-2},
    )
    start(config).finish()
    losses = [loss for _, (loss, _) in sorted(ledger(config).items())]
    assert len(losses) == 24 and sum(losses[-6:]) < 0.9 * sum(losses[:6]), losses
    saved = load_pretrained(config.run.folder / "model")
    assert (saved.config.mixer, saved.config.tokens, saved.decoder) == ("mamba", "brain", "light")
    assert saved.strd_config.rate == 0.1 and saved.mask_config.kind == "window-tube"
    metrics = last_metrics(config)
    assert metrics["strd/drop_rate"] == pytest.approx(0.1, abs=0.03) and metrics["mask/fraction"] == 0.5
    assert metrics["speed/mfu"] > 0


def last_metrics(config: Config) -> dict[str, float]:
    """The latest metrics of the one MLflow run with the configuration's name."""
    from mlflow import MlflowClient

    client = MlflowClient(tracking_uri=f"sqlite:///{config.run.output / 'mlflow.db'}")
    experiment = client.get_experiment_by_name("neurostorm")
    (run,) = [r for r in client.search_runs([experiment.experiment_id]) if r.info.run_name == config.run.name]
    return run.data.metrics


def check_account(config: Config, shown: str, resumed: str) -> None:
    """The victim's time adds up over its three starts, its twin lost none; both say so, line by line."""
    metrics = last_metrics(config)
    parts_s = {name: value for name, value in metrics.items() if name.startswith("time/") and name.endswith("_s")}
    wall_s = parts_s.pop("time/wall_s")
    assert len(parts_s) == 8 and all(value > 0 for value in parts_s.values()), parts_s
    assert sum(parts_s.values()) == pytest.approx(wall_s)
    assert metrics["time/goodput"] == pytest.approx(parts_s["time/step_s"] / wall_s)
    step = r"step \d+/48 loss=\d\S* predicting_mean=\S+ clips_per_s=\S+ wait=\S+% .*left_s=\d+\n"
    for line in (step, r"validation step=48 loss=\d", r"checkpoint step=6\n", r"  time    \d+ s, goodput \d+%: "):
        assert re.search(line, shown), line
    assert re.search(r"  time .* repeated [1-9]", resumed) or re.search(r"  time .* down [1-9]", resumed)
    assert "resume step=" not in shown and "repeated 0 s" in shown and "down 0 s" in shown


def check_mlflow(config: Config, steps: int) -> None:
    """The victim has one MLflow run, finished, with metrics to the last step, its configuration and its model."""
    from mlflow import MlflowClient

    client = MlflowClient(tracking_uri=f"sqlite:///{config.run.output / 'mlflow.db'}")
    experiment = client.get_experiment_by_name("neurostorm")
    runs = [run for run in client.search_runs([experiment.experiment_id]) if run.info.run_name == "victim"]
    assert len(runs) == 1
    run = runs[0]
    assert run.info.status == "FINISHED"
    history = client.get_metric_history(run.info.run_id, "loss/train")
    assert max(point.step for point in history) == steps
    assert {"data/wait_fraction", "strd/drop_rate", "speed/clips_per_s", "loss/validation"} <= set(run.data.metrics)
    assert run.data.params["train.global_batch"] == "2"
    assert {"code_revision", "store_sha256", "split"} <= set(run.data.tags)
    names = {artifact.path for artifact in client.list_artifacts(run.info.run_id)}
    assert {"config.yaml", "model", "checkpoints", "summary.json"} <= names
