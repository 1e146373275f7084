"""`jobs/pretrain.py` on a local Ray, struck by several faults at once, ends as if nothing had happened.

twin:    two ranks without Ray -----------------------------------------------> end
victim:  start -- NaN -- SIGKILL of a worker, while it saves -- by itself ----> end
                         and the newest checkpoint damaged

A run whose driver dies too is tests/integration/test_three_nodes.py; tools/chaos.py strikes with all faults one by one.
Both train the mamba mixer on visible brain tokens, with the light decoder and on augmented clips: what they end with is
also what that configuration has to end with.
"""

import json
import random
import re
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import chaos_faults as faults
import pytest
from chaos_check import clip_problems, loss_problems, replays
from chaos_job import last_words
from chaos_scene import Scene, Setting

from neurostorm.config import Config
from neurostorm.data.corpus import open_corpus
from neurostorm.model.hub import load_pretrained
from neurostorm.train.goodput import ACCOUNT
from tests.train.conftest import PROGRAM, run_together

pytestmark = pytest.mark.integration

CLIPS = 48  # of one epoch of the ball store: four training subjects, twelve clips each
EPOCHS = 3
STEPS = EPOCHS * CLIPS // 2
EVERY = 6
SETTINGS = {
    "model": {
        "embed_dim": 8, "depths": (2, 1), "heads": (1, 2), "mixer": "mamba", "tokens": "brain", "decoder": "light",
    },
    "mask": {"kind": "window-tube", "window": (2, 2, 2, 2)},
    "strd": {"enabled": True, "rate": 0.1},
    "train": {"global_batch": 2, "epochs": EPOCHS, "validate_every": 100, "lr": 3e-3},
    "checkpoint": {"every": EVERY}, "augment": {"enabled": True},
    "scale": {"collective_timeout_s": 120, "min_collective_timeout_s": 20},
    "tracking": {"clip_ledger": True, "pictures": False},
}  # fmt: skip


@pytest.fixture
def folder() -> Iterator[Path]:
    """For Ray's files: short, as sockets lie below it."""
    path = Path(tempfile.mkdtemp(prefix="faults-"))
    yield path
    shutil.rmtree(path, ignore_errors=True)


@pytest.fixture
def scene(ball_store: Path, ball_config, folder: Path) -> Iterator[Scene]:
    """The victim, not started."""
    made = Scene(Setting(folder, ball_store, STEPS), ball_config(run={"name": "victim"}, **SETTINGS), random.Random(0))
    yield made
    made.close()


def test_struck_by_many_faults_it_ends_like_its_untouched_twin(ball_config, scene: Scene, tmp_path: Path) -> None:
    twin, victim = ball_config(run={"name": "twin"}, **SETTINGS), scene.config
    file = tmp_path / "twin.yaml"
    file.write_text(twin.to_yaml())
    ended = run_together(PROGRAM, [[file, rank, 2, None, -1] for rank in range(2)])
    assert [status for status, _ in ended] == [0, 0], ended[0][1][-4000:]

    faults.may_be_poisoned(scene)
    job = scene.start()
    scene.at(EVERY + 2)
    assert "resume step=" not in job.output()
    faults.poison(scene)
    scene.back()
    scene.at(4 * EVERY + 1)
    workers = faults.hold_in_checkpoint(scene)
    unfinished, damaged = faults.begun(scene)[-1], scene.committed()[-1]
    before = job.reached()
    assert before < STEPS, "the worker died too late to matter"
    faults.damage(damaged)
    workers[1].kill()
    workers[0].resume()
    shown = job.finish()

    assert faults.REPEATED in shown
    for lost in (unfinished, damaged):
        assert f"passing over checkpoint {lost}" in shown
    newest = int(damaged.name.removeprefix("step-"))
    assert f"resume step={newest} " in shown, "not resumed from the copy of the damaged checkpoint"
    assert replays(job.steps()) == [before - newest] and before - newest <= EVERY

    expected, found = last_words(twin), last_words(victim)
    assert sorted(found) == list(range(STEPS))
    assert open_corpus(twin).plan.clips_per_epoch == CLIPS
    rows = [row for step in range(STEPS) for row in found[step][1]]
    assert sorted(rows) == list(range(EPOCHS * CLIPS)), "not every clip exactly once in each epoch"
    assert clip_problems(expected, found) == loss_problems(expected, found) == []
    final = json.loads((twin.run.folder / "final.json").read_text())
    summary = json.loads((victim.run.folder / "summary.json").read_text())
    assert summary["loss/validation"] == pytest.approx(final["loss/validation"], rel=1e-6)
    weights = [load_pretrained(config.run.folder / "model").state_dict() for config in (twin, victim)]
    assert all(value.allclose(weights[1][name], rtol=1e-5, atol=1e-7) for name, value in weights[0].items())
    check_learning(victim, [found[step][0] for step in range(STEPS)])
    check_mlflow(victim)
    check_account(twin, victim, shown)


def check_learning(config: Config, losses: list[float]) -> None:
    """It learned, on the same clips in the first epoch and the last; what it saved is what was asked for."""
    epoch = CLIPS // 2
    assert sum(losses[-epoch:]) < 0.95 * sum(losses[:epoch]), losses
    saved = load_pretrained(config.run.folder / "model")
    assert (saved.config.mixer, saved.config.tokens, saved.decoder) == ("mamba", "brain", "light")
    assert saved.strd_config.rate == 0.1 and saved.mask_config.kind == "window-tube"
    metrics = mlflow_run(config)[1].data.metrics
    assert metrics["strd/drop_rate"] == pytest.approx(0.1, abs=0.03) and metrics["mask/fraction"] == 0.5
    assert metrics["speed/mfu"] > 0


def check_account(twin: Config, victim: Config, shown: str) -> None:
    """The victim's time adds up over both its groups of workers, its twin lost none; the victim says so."""
    metrics = mlflow_run(victim)[1].data.metrics
    parts_s = {name: value for name, value in metrics.items() if name.startswith("time/") and name.endswith("_s")}
    wall_s = parts_s.pop("time/wall_s")
    assert len(parts_s) == 8 and all(value > 0 for value in parts_s.values()), parts_s
    assert sum(parts_s.values()) == pytest.approx(wall_s)
    assert metrics["time/goodput"] == pytest.approx(parts_s["time/step_s"] / wall_s)
    step = rf"step \d+/{STEPS} loss=\d\S* predicting_mean=\S+ clips_per_s=\S+ wait=\S+% .*left_s=\d+\n"
    lines = (
        step,
        rf"validation step={STEPS} loss=\d",
        rf"checkpoint step={EVERY}\n",
        r"  time    \d+ s, goodput \d+%: ",
    )
    for line in (*lines, "predicting each voxel's mean"):
        assert re.search(line, shown), line
    assert re.search(r"  time .* repeated [1-9]", shown) or re.search(r"  time .* down [1-9]", shown)
    spent_ns = json.loads((twin.run.folder / ACCOUNT).read_text())["spent_ns"]
    assert spent_ns["repeated"] == spent_ns["down"] == 0


def check_mlflow(config: Config) -> None:
    """The victim has one MLflow run, finished, with metrics to the last step, its configuration and its model."""
    client, run = mlflow_run(config)
    assert run.info.status == "FINISHED"
    history = client.get_metric_history(run.info.run_id, "loss/train")
    assert max(point.step for point in history) == STEPS
    assert {"data/wait_fraction", "strd/drop_rate", "speed/clips_per_s", "loss/validation"} <= set(run.data.metrics)
    assert run.data.params["train.global_batch"] == "2"
    assert {"code_revision", "store_sha256", "split"} <= set(run.data.tags)
    names = {artifact.path for artifact in client.list_artifacts(run.info.run_id)}
    assert {"config.yaml", "model", "checkpoints", "summary.json"} <= names


def mlflow_run(config: Config):
    """A client, and the one MLflow run with the configuration's name."""
    from mlflow import MlflowClient

    client = MlflowClient(tracking_uri=f"sqlite:///{config.run.output / 'mlflow.db'}")
    experiment = client.get_experiment_by_name("neurostorm")
    (run,) = [r for r in client.search_runs([experiment.experiment_id]) if r.info.run_name == config.run.name]
    return client, run
