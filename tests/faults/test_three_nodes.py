"""Three nodes and an object store, as a cluster has them: a run struck by several faults ends like its untouched twin.

twin:    two ranks without Ray, on a disk ------------------------------------------------------------------> end
victim:  two ranks without Ray, on S3 -- SIGKILL    a job on three nodes -- NaN -- S3 refuses -- SIGKILL of its --> end
                          after a checkpoint                               everything    workers while
                                                                                         they save; by itself

The nodes are three `ray start` on 127.0.0.1, .2 and .3, behind a token; on the last two there is room for one training
worker each, and both read one store. tools/chaos.py strikes with all faults one by one. Both runs train the mamba mixer
on visible brain tokens, with the light decoder and on augmented clips: what they end with is also what that
configuration has to end with.
"""

import json
import os
import random
import re
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import chaos.faults as faults
import pytest
import torch
from chaos.check import clip_problems, loss_problems
from chaos.job import last_words
from chaos.nodes import WORKER_CPUS, NodesScene, with_nodes
from chaos.scene import Setting

from neurostorm.config import Config
from neurostorm.data.corpus import open_corpus
from neurostorm.io.local_copies import local_copy
from neurostorm.io.paths import AnyPath, copy_files, list_files, to_path
from neurostorm.model.hub.pretrained import load_pretrained
from neurostorm.train.records.time_account import ACCOUNT
from tests.faulty_s3 import Network
from tests.train.rank_program import main
from tests.train.ranks import Ranks, run_together

pytestmark = pytest.mark.integration

CLIPS = 48  # of one epoch of the ball store: four training subjects, twelve clips each
EPOCHS = 2
STEPS = EPOCHS * CLIPS // 2
EVERY = 6
AWAY_S = float(os.environ.get("NEUROSTORM_TEST_AWAY_S", "3"))  # for which the object store refuses everything
SETTINGS = {
    "model": {
        "embed_dim": 8, "depths": (2, 1), "heads": (1, 2), "mixer": "mamba", "tokens": "brain", "decoder": "light",
    },
    "mask": {"kind": "window-tube", "window": (2, 2, 2, 2)},
    "strd": {"enabled": True, "rate": 0.1},
    "train": {"global_batch": 2, "epochs": EPOCHS, "validate_every": 100, "lr": 3e-3},
    "checkpoint": {"every": EVERY, "keep": 2}, "augment": {"enabled": True},
    "scale": {"cpus_per_worker": WORKER_CPUS, "collective_timeout_s": 120, "min_collective_timeout_s": 20},
}  # fmt: skip


@pytest.fixture
def network(s3_server: str) -> Iterator[Network]:
    """What lies between the nodes and the object store."""
    made = Network(s3_server)
    yield made
    made.close()


@pytest.fixture
def scene(
    ball_config, make_bucket: Callable[[], str], network: Network, ball_store: Path, tmp_path: Path
) -> Iterator[NodesScene]:
    """The victim, not started, and three nodes; all that it reads and writes is in a bucket."""
    folder = Path(tempfile.mkdtemp(prefix="rn-"))  # for Ray's files: short, as sockets lie below it
    bucket = to_path(make_bucket())
    copy_files(ball_store, bucket / "store", [name for name, _ in list_files(ball_store)])
    tracking = {"clip_ledger": True, "pictures": False, "uri": f"sqlite:///{tmp_path / 'mlflow.db'}"}
    config = ball_config(
        run={"name": "victim", "output": bucket / "runs"}, data={"store": bucket / "store"}, tracking=tracking,
        **SETTINGS,
    )  # fmt: skip
    made = NodesScene(Setting(folder, ball_store, STEPS), config, random.Random(0))
    faults.may_be_poisoned(made)
    made.environment["AWS_ENDPOINT_URL"] = network.address
    try:
        with_nodes(made)
        yield made
    finally:
        made.close()
        if made.nodes is not None:
            made.cluster.__exit__()
        shutil.rmtree(folder, ignore_errors=True)


def start_and_kill(config: Config) -> None:
    """Trains a run on two ranks without Ray, which are killed after the first checkpoint."""
    marker, end_s = config.run.folder / "checkpoints" / f"step-{EVERY:08d}" / "COMMITTED", time.monotonic() + 200
    with Ranks(main, 2, [config], [-1]) as ranks:
        while not marker.is_file():
            assert not ranks.ended() and time.monotonic() < end_s, f"no {marker}: {ranks.output()[-4000:]}"
            time.sleep(0.02)


def weights(folder: AnyPath) -> dict[str, torch.Tensor]:
    with local_copy(folder) as local:
        return load_pretrained(local).state_dict()


def test_struck_by_many_faults_it_ends_like_its_untouched_twin(
    ball_config, scene: NodesScene, network: Network
) -> None:
    twin, victim = ball_config(run={"name": "twin"}, tracking={"pictures": False}, **SETTINGS), scene.config
    run_together(main, 2, [twin], [-1])
    start_and_kill(victim)
    other = scene.cluster.submit("echo", "let in", RAY_AUTH_TOKEN="0" * 64, RAY_AUTH_TOKEN_PATH="")
    assert other.returncode and "let in" not in other.stdout, other.stdout
    job = scene.start()
    poison = Path(scene.environment["CHAOS_POISON"])
    poison.touch()
    job.wait_for(lambda: not poison.exists(), "a poisoned step")
    refused = {words.split()[0] for words in network.be_away(AWAY_S)}
    workers = faults.hold_in_checkpoint(scene)
    whole, unfinished = scene.committed()[-1], scene.begun()[-1]
    for worker in workers:  # one that is left could yet commit what all had written
        worker.kill()
    shown = job.finish()

    assert "GET" in refused, f"the run did not meet the outage: {refused}"
    assert faults.REPEATED in shown
    places = re.findall(r"ip=([\d.]+), pid=\d+\) world_rank", shown)
    assert sorted(places) == 2 * ["127.0.0.2"] + 2 * ["127.0.0.3"], shown[-4000:]
    resumed = [int(step) for step in re.findall(r"resume step=(\d+) ", shown)]
    assert resumed == [resumed[0], int(whole.name.removeprefix("step-"))] and EVERY <= resumed[0] < STEPS, resumed
    assert f"passing over checkpoint {unfinished}" in shown

    expected, found = last_words(twin), last_words(victim)
    assert sorted(found) == list(range(STEPS))
    assert open_corpus(twin).plan.clips_per_epoch == CLIPS
    rows = [row for step in range(STEPS) for row in found[step][1]]
    assert sorted(rows) == list(range(EPOCHS * CLIPS)), "not every clip exactly once in each epoch"
    assert clip_problems(expected, found) == loss_problems(expected, found) == []
    final = json.loads((twin.run.folder / "final.json").read_text())
    summary = json.loads((victim.run.folder / "summary.json").read_text())
    assert summary["loss/validation"] == pytest.approx(final["loss/validation"], rel=1e-6)
    mine, other = weights(victim.run.folder / "model"), weights(twin.run.folder / "model")
    assert all(value.allclose(other[name], rtol=1e-5, atol=1e-7) for name, value in mine.items())
    check_folder(victim)
    check_learning(victim, [found[step][0] for step in range(STEPS)])
    check_mlflow(victim)
    check_account(twin, victim, shown)


def check_folder(config: Config) -> None:
    """All that a run leaves lies in the object store, and the last two checkpoints, the newest twice."""
    folder = config.run.folder
    assert {path.name for path in folder.iterdir()} == {
        "checkpoints", "config.yaml", "goodput.json", "ledger", "manifest.parquet", "mlflow.json", "model",
        "summary.json",
    }  # fmt: skip
    kept = {f"step-{STEPS - EVERY:08d}", f"step-{STEPS:08d}", f"copy-{STEPS:08d}"}
    assert {path.name for path in (folder / "checkpoints").iterdir()} == kept
    assert json.loads((folder / "summary.json").read_text())["steps"] == STEPS


def check_learning(config: Config, losses: list[float]) -> None:
    """It learned, on the same clips in the first epoch and the last; what it saved is what was asked for."""
    epoch = CLIPS // 2
    assert sum(losses[-epoch:]) < 0.95 * sum(losses[:epoch]), losses
    with local_copy(config.run.folder / "model") as folder:
        saved = load_pretrained(folder)
    assert (saved.config.mixer, saved.config.tokens, saved.decoder) == ("mamba", "brain", "light")
    assert saved.strd_config.rate == 0.1 and saved.mask_config.kind == "window-tube"
    client, run = mlflow_run(config)
    rates = [metric.value for metric in client.get_metric_history(run.info.run_id, "strd/drop_rate")]
    assert sum(rates) / len(rates) == pytest.approx(0.1, abs=0.02), rates
    metrics = run.data.metrics
    assert metrics["mask/fraction"] == 0.5
    assert metrics["speed/mfu"] > 0


def check_account(twin: Config, victim: Config, shown: str) -> None:
    """The victim's time adds up over all its groups of workers, its twin lost none; the victim says so."""
    metrics = mlflow_run(victim)[1].data.metrics
    parts_s = {name: value for name, value in metrics.items() if name.startswith("time/") and name.endswith("_s")}
    wall_s = parts_s.pop("time/wall_s")
    # Steps of the last seconds before a kill may count as new again: in an object store the account lags by up to 10 s.
    zero = {name for name, value in parts_s.items() if value <= 0}
    assert len(parts_s) == 8 and zero <= {"time/repeated_s"}, parts_s
    assert sum(parts_s.values()) == pytest.approx(wall_s)
    assert metrics["time/goodput"] == pytest.approx(parts_s["time/step_s"] / wall_s)
    step = rf"step \d+/{STEPS} loss=\d\S* predicting_mean=\S+ clips_per_s=\S+ wait=\S+% .*left_s=\d+\n"
    lines = (
        step,
        rf"validation step={STEPS} loss=\d",
        r"checkpoint step=\d+\n",
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

    client = MlflowClient(tracking_uri=config.tracking.uri)
    experiment = client.get_experiment_by_name("neurostorm")
    (run,) = [r for r in client.search_runs([experiment.experiment_id]) if r.info.run_name == config.run.name]
    return client, run
