"""What the driver decides before anything starts: fresh, resumed, refused or finished; which clips still come."""

import json
import logging
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from neurostorm.config import Config, ConfigError
from neurostorm.data.corpus import Corpus, open_corpus
from neurostorm.io.atomic import atomic_write
from neurostorm.runtime import resources
from neurostorm.runtime.run_folder import keep_config
from neurostorm.store import GRIDS, StoreError, write_manifest
from neurostorm.train import launch
from neurostorm.train.checkpoint import checkpoints
from neurostorm.train.controller import feed
from neurostorm.train.controller.feed import training_data
from neurostorm.train.controller.trainer import trainer_of, worker_environment
from neurostorm.train.launch import Plan, check
from neurostorm.train.records import pinned_manifest

STEPS = 12  # of one epoch of the ball store: 48 clips, four at a time


@pytest.fixture
def stop_at() -> Callable[..., None]:
    """Leaves a committed checkpoint of a configuration, as a run that stopped after `step` steps does."""

    def stop(config: Config, step: int, corpus: Corpus | None = None) -> None:
        checkpoints.save(
            config.run.folder / "checkpoints", step, rank=0, gather=lambda value: [value], keep=9,
            write_shards=lambda path: (path / "shard").write_text("weights"),
            trainer={
                "config": config.model_dump(mode="json"), "workers": config.scale.workers,
                "store_sha256": (corpus or open_corpus(config)).store.content_hash(),
            },
        )  # fmt: skip

    return stop


def outcome(config):
    launch.check_folder(config)
    return check(config, open_corpus(config))


@pytest.mark.parametrize("resume", ["auto", "never"])
def test_a_fresh_run_starts_at_step_0(resume, ball_config):
    assert outcome(ball_config(checkpoint={"resume": resume})) == Plan(0, STEPS, False)
    assert outcome(ball_config(checkpoint={"resume": resume}, train={"max_steps": 5})).total_steps == 5


@pytest.mark.parametrize("resume", ["auto", "must"])
def test_a_run_that_stopped_goes_on_after_its_newest_checkpoint(resume, ball_config, stop_at):
    stop_at(ball_config(), 3)
    stop_at(ball_config(), 7)
    assert outcome(ball_config(checkpoint={"resume": resume})) == Plan(7, STEPS, False)


def test_a_broken_newest_checkpoint_means_going_on_after_its_copy_or_the_one_before(ball_config, stop_at, caplog):
    config = ball_config()
    stop_at(config, 3)
    stop_at(config, 7)
    for name, first_step in (("step-00000007", 7), ("copy-00000007", 3)):
        (config.run.folder / "checkpoints" / name / "shard").write_text("wei")
        assert outcome(config).first_step == first_step
        assert name in caplog.text


def test_resume_must_needs_a_committed_checkpoint(ball_config):
    config = ball_config(checkpoint={"resume": "must"})
    (config.run.folder / "checkpoints" / "step-00000004").mkdir(parents=True)
    with pytest.raises(ConfigError, match=r"checkpoint\.resume=must: .*test/checkpoints has no committed"):
        outcome(config)


def test_resume_never_refuses_a_used_folder(ball_config, stop_at):
    stop_at(ball_config(), 3)
    with pytest.raises(ConfigError, match=r"checkpoint\.resume=never: .*test already holds a run.*--name"):
        outcome(ball_config(checkpoint={"resume": "never"}))


def test_settings_that_change_the_result_are_refused_with_both_values(ball_config, stop_at):
    stop_at(ball_config(), 3)
    with pytest.raises(ConfigError) as refused:
        outcome(ball_config(train={"lr": 1e-4}, mask={"ratio": 0.75}, data={"val_clips": 5}))
    for words in ("step-00000003", "train.lr: 0.003 -> 0.0001", "mask.ratio: 0.5 -> 0.75", "--name"):
        assert words in str(refused.value)
    assert "train.epochs" not in str(refused.value), "only what differs"


def test_a_setting_that_the_saving_version_did_not_have_is_refused_by_name(ball_config, stop_at):
    config = ball_config()
    stop_at(config, 3)
    file = config.run.folder / "checkpoints" / "step-00000003" / checkpoints.TRAINER
    trainer = json.loads(file.read_text())
    del trainer["config"]["model"]["layout"]
    (marker := file.with_name(checkpoints.MARKER)).unlink()
    file.write_text(json.dumps(trainer))
    names = ("shard", checkpoints.TRAINER)
    files = {name: checkpoints._fingerprint(file.with_name(name)) for name in names}
    marker.write_text(json.dumps({"files": files, "ranks": [["shard"]]}))
    with pytest.raises(ConfigError, match=r"model\.layout: not known to the version that saved it -> clean"):
        outcome(config)


def test_settings_that_do_not_change_the_result_may_differ(ball_config, stop_at):
    stop_at(ball_config(), 3)
    other = ball_config(
        train={"micro_batch": 2, "log_every": 7, "validate_every": 9}, checkpoint={"every": 3, "keep": 1},
        scale={"max_failures": 0}, tracking={"pictures": False},
    )  # fmt: skip
    assert outcome(other).first_step == 3


def test_another_number_of_workers_may_go_on(ball_config, stop_at):
    stop_at(ball_config(), 3)
    assert outcome(ball_config(scale={"workers": 4}, train={"micro_batch": 1, "zero_stage": 3})).first_step == 3


def test_another_content_of_the_store_is_refused(ball_config, ball_store, stop_at, tmp_path):
    store = tmp_path / "copy.zarr"
    shutil.copytree(ball_store, store)
    config = ball_config(data={"store": store})
    stop_at(config, 3)
    assert outcome(config).first_step == 3
    assert outcome(ball_config()).first_step == 3, "the same content elsewhere is the same corpus"
    shutil.rmtree(store / "runs" / "balls" / "sub-5")
    write_manifest(store)
    with pytest.raises(ConfigError, match=r"another content of .*copy\.zarr: runs were added or removed"):
        outcome(config)


def test_a_model_that_does_not_fit_the_grid_is_refused_before_anything_starts(ball_config):
    with pytest.raises(ConfigError, match=r"does not fit the store's \(24, 24, 24\) grid"):
        outcome(ball_config(model={"patch": (5, 5, 5, 1)}))


def test_a_run_is_finished_when_its_last_checkpoint_and_its_summary_are_there(ball_config, stop_at):
    config = ball_config()
    stop_at(config, STEPS)
    assert outcome(config) == Plan(STEPS, STEPS, False), "it still has to export"
    (config.run.folder / "summary.json").write_text("{}")
    assert outcome(config) == Plan(STEPS, STEPS, True)


def test_a_finished_run_says_that_it_is_complete_and_starts_nothing(ball_config, stop_at, monkeypatch, caplog):
    config = ball_config()
    stop_at(config, STEPS)
    kept = {"steps": STEPS, "loss/validation": 0.5, "finished": "2026-01-02 03:04:05+00:00"}
    (config.run.folder / "summary.json").write_text(json.dumps(kept))
    monkeypatch.setattr(launch, "require", lambda *_: pytest.fail("Ray was started"))
    caplog.set_level(logging.INFO)
    summary = launch.pretrain(config)
    assert summary["loss/validation"] == 0.5 and summary["trained_steps"] == 0
    said = f"{config.run.folder} is complete: 12 of 12 steps, finished 2026-01-02 03:04:05+00:00; nothing to do. "
    assert caplog.messages[-1].startswith(said) and "another --name" in caplog.messages[-1]
    assert summary["mlflow_uri"] == f"sqlite:///{config.run.output / 'mlflow.db'}"


def test_a_finished_run_cannot_be_made_longer_as_its_line_says(ball_config, stop_at):
    stop_at(ball_config(train={"max_steps": 5}), 5)
    with pytest.raises(ConfigError, match=r"train\.max_steps: 5 -> 9; .*another --name"):
        outcome(ball_config(train={"max_steps": 9}))


def test_an_output_in_an_object_store_needs_a_place_for_mlflow(ball_config, make_bucket):
    config = ball_config(run={"output": make_bucket()})
    with pytest.raises(
        ConfigError, match=r"tracking\.uri is not set, .*run\.output=s3://bucket-\d+: .*--tracking\.uri http"
    ):
        outcome(config)
    assert outcome(ball_config(run={"output": config.run.output}, tracking={"uri": "http://mlflow:5000"})).total_steps


def test_a_checkpoint_in_an_object_store_is_gone_on_from(ball_config, make_bucket, stop_at):
    config = ball_config(run={"output": make_bucket()}, tracking={"uri": "http://mlflow:5000"})
    stop_at(config, 3)
    assert outcome(config) == Plan(3, STEPS, False)
    for name, first_step in (("step-00000003", 3), ("copy-00000003", 0)):
        atomic_write(config.run.folder / "checkpoints" / name / "shard", b"wei")
        assert outcome(config) == Plan(first_step, STEPS, False)


def test_what_is_refused_leaves_no_folder_behind(ball_config, monkeypatch, tmp_path):
    monkeypatch.setattr(launch, "require", lambda *_: pytest.fail("Ray was started"))
    with pytest.raises(StoreError):
        launch.pretrain(ball_config(data={"store": tmp_path / "nowhere"}))
    with pytest.raises(ConfigError):
        launch.pretrain(ball_config(checkpoint={"resume": "must"}))
    assert not (tmp_path / "outputs").exists()


def test_a_machine_that_is_too_small_is_refused_before_ray_starts(ball_config, monkeypatch, tmp_path):
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr(resources.ray, "is_initialized", lambda: False)
    monkeypatch.setattr(resources, "ensure_ray", lambda: pytest.fail("Ray was started"))
    with pytest.raises(ConfigError, match=r"asked for 2 workers x \(0 GPU, 10000 CPU\); this cluster has .*: use --"):
        launch.pretrain(ball_config(scale={"cpus_per_worker": 10_000}))
    assert not (tmp_path / "outputs").exists()


@pytest.fixture
def asked(monkeypatch) -> list[tuple]:
    """The arguments of each call of `clip_dataset`, which makes no dataset here."""
    calls: list[tuple] = []

    def record(reader, plan, *, first_step, last_step, workers, **how):
        steps = {"first_step": first_step, "last_step": last_step, "workers": workers}
        calls.append((reader, plan, steps))

    monkeypatch.setattr(feed, "clip_dataset", record)
    return calls


def test_the_feed_begins_after_the_steps_that_are_done(asked, ball_config, stop_at):
    config = ball_config()
    training_data(config)
    stop_at(config, 7)
    training_data(config)
    assert [steps for _, _, steps in asked] == [
        {"first_step": 0, "last_step": STEPS, "workers": 2},
        {"first_step": 7, "last_step": STEPS, "workers": 2},
    ]
    corpus = open_corpus(config)
    for reader, plan, _ in asked:
        assert (tuple(reader.runs), reader.clip_frames, reader.normalise) == (tuple(corpus.runs), 4, "voxel")
        assert (plan.step_rows(7, 1, 2) == corpus.plan.step_rows(7, 1, 2)).all()


def test_the_feed_of_a_run_whose_steps_are_all_done_is_not_empty(asked, ball_config, stop_at):
    stop_at(ball_config(), STEPS)
    training_data(ball_config())
    assert asked[0][2]["first_step"] == STEPS - 1, "Ray Data cannot make a dataset without blocks"


def test_the_trainer_asks_for_the_plans_order_and_for_what_the_configuration_says(ball_config):
    config = ball_config(scale={"cpus_per_worker": 0.5, "max_failures": 5})
    trainer = trainer_of(config, open_corpus(config), "/scratch/of-ray", started_ns=12)
    assert trainer.data_config._resolve_execution_options("train").preserve_order
    assert trainer.scaling_config.num_workers == 2
    assert trainer.scaling_config.resources_per_worker == {"CPU": 0.5}
    assert trainer.run_config.failure_config.max_failures == 5
    assert trainer.run_config.storage_path == "/scratch/of-ray"
    assert trainer.train_loop_config["started_ns"] == 12


def test_the_trainer_may_shrink_to_the_fewest_workers_and_the_feed_follows(asked, ball_config, monkeypatch):
    config = ball_config(scale={"workers": 2, "min_workers": 1})
    trainer = trainer_of(config, open_corpus(config), "/scratch/of-ray", started_ns=12)
    assert trainer.scaling_config.num_workers == (1, 2)
    given = []
    monkeypatch.setattr(
        feed.ray.train.DataConfig,
        "configure",
        lambda self, datasets, workers, *rest, **named: given.append(workers),
    )
    for workers in (2, 1):
        trainer.data_config.configure({"train": None}, workers, None, None)
    assert given == [2, 1] and [steps["workers"] for _, _, steps in asked] == [2, 1]


def test_workers_wait_without_spinning_and_keep_builds_per_user(ball_config, monkeypatch, tmp_path):
    monkeypatch.delenv("TORCH_EXTENSIONS_DIR", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    variables = worker_environment(ball_config(scale={"threads_per_worker": 3}))
    assert variables == {
        "OMP_WAIT_POLICY": "PASSIVE", "OMP_NUM_THREADS": "3", "DS_ACCELERATOR": "cpu",
        "TORCH_EXTENSIONS_DIR": str(tmp_path / "neurostorm" / "torch_extensions"),
    }  # fmt: skip
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert worker_environment(ball_config())["TORCH_EXTENSIONS_DIR"].startswith(str(tmp_path / "home" / ".cache"))


def test_a_given_build_folder_is_kept_and_gpu_workers_use_the_gpu(ball_config, monkeypatch):
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", "/scratch/builds")
    variables = worker_environment(ball_config(scale={"gpus_per_worker": 1}))
    assert variables["TORCH_EXTENSIONS_DIR"] == "/scratch/builds"
    assert "DS_ACCELERATOR" not in variables
    assert Path(variables["TORCH_EXTENSIONS_DIR"]).is_absolute()


def test_a_stopped_run_says_its_newest_checkpoint_and_that_the_same_command_resumes(ball_config, stop_at):
    config = ball_config()
    folder = config.run.folder
    assert launch.how_to_resume(config) == (
        f"{folder} has no checkpoint yet: the same command starts it again from step 0"
    )
    stop_at(config, 3)
    (folder / "checkpoints" / "step-00000004").mkdir()
    assert launch.how_to_resume(config) == (
        f"the newest checkpoint is {folder}/checkpoints/step-00000003 (3 steps done): "
        "start the same command again to resume from it"
    )


def test_the_trainer_leaves_ctrl_c_and_other_rays_of_this_machine_alone(ball_config, monkeypatch):
    config = ball_config()
    trainer = trainer_of(config, open_corpus(config), "/scratch/of-ray", started_ns=12)
    monkeypatch.setattr("signal.signal", lambda *handler: pytest.fail("a signal handler was set"))
    trainer._register_sigint_handler(None)
    monkeypatch.setattr(type(trainer), "train_run_context", None, raising=False)
    callbacks = trainer._create_default_callbacks()
    names = {type(each).__name__ for each in callbacks}
    assert "BackendSetupCallback" in names and "PlacementGroupCleanerCallback" not in names
    logger = logging.getLogger("ray.train.v2._internal.execution.scaling_policy.autoscaling_coordinator_client")
    monkeypatch.setattr(logger, "level", logging.NOTSET)
    assert isinstance(pickle.loads(pickle.dumps(callbacks[-1])), type(callbacks[-1]))  # as in the controller
    assert logger.level == logging.ERROR


def test_the_folder_of_another_job_is_refused(ball_config):
    config = ball_config()
    keep_config(config, "finetune")
    with pytest.raises(ConfigError, match=r"run\.name=test: .* of jobs/finetune\.py; choose another --name"):
        outcome(config)


def test_an_atlas_that_cannot_be_used_is_refused_before_anything_starts(ball_config, tmp_path):
    (tmp_path / "notes.txt").write_text("not an image")
    config = ball_config(mask={"kind": "atlas", "atlas": tmp_path / "notes.txt"})
    with pytest.raises(ConfigError, match=r"mask\.atlas: atlas .*notes\.txt: cannot be read"):
        outcome(config)


def test_a_step_that_is_slow_on_the_cpu_says_what_is_faster(ball_config, ball_store, monkeypatch):
    monkeypatch.setattr(launch, "measured_peak", lambda *_: 1e9)
    config = ball_config()
    corpus = open_corpus(config)
    seconds = launch.step_s(config, corpus)
    assert seconds > 0 and launch.step_s(ball_config(scale={"workers": 1}), corpus) == pytest.approx(2 * seconds)
    assert launch.step_s(ball_config(scale={"gpus_per_worker": 1}), corpus) == 0
    assert launch.slow_words(config, corpus.store.grid, 120, 1.0) == ""
    assert launch.slow_words(config, GRIDS["4mm"], 120, 15.6) == (
        "about 16 s a step on this machine's CPU, 31 min for 120 steps: for a first look use --train.max_steps 5; to "
        "train, use a GPU"
    )
    wide = ball_config(model={"embed_dim": 48, "heads": (3, 6)})
    assert launch.slow_words(wide, GRIDS["2mm"], 120, 16.0).endswith(
        "to train, use a GPU, or ingest with --grid 4mm, as 96x96x96 voxels are 8 times the work of its 48x48x48, or "
        "use --preset tiny"
    )


def test_other_settings_in_the_folder_are_left_to_what_the_checkpoints_say(ball_config):
    keep_config(ball_config(train={"lr": 1e-4}, scale={"workers": 1}), "pretrain")
    assert outcome(ball_config()) == Plan(0, STEPS, False)


def test_other_settings_before_the_first_checkpoint_begin_a_new_mlflow_run_and_account(
    ball_config, ball_store, tmp_path, caplog
):
    config = ball_config()
    corpus = pinned_manifest.choose(config)
    keep_config(config, "pretrain")
    pinned_manifest.keep(config, corpus)
    notes = [config.run.folder / name for name in ("mlflow.json", "goodput.json")]
    for note in notes:
        note.write_text("{}")
    launch.forget_other_start(config, corpus)
    assert all(note.exists() for note in notes) and not caplog.messages, "the same start again"
    other = ball_config(train={"lr": 1e-4})
    launch.forget_other_start(other, open_corpus(other))
    assert not any(note.exists() for note in notes)
    assert "train.lr: 0.003 -> 0.0001" in caplog.text and "an MLflow run of its own" in caplog.text
    store = tmp_path / "copy.zarr"
    shutil.copytree(ball_store, store)
    shutil.rmtree(store / "runs" / "balls" / "sub-5")
    write_manifest(store)
    smaller = ball_config(data={"store": store})
    launch.forget_other_start(smaller, open_corpus(smaller))
    assert f"data.store: {ball_store} -> {store}" in caplog.text


def test_an_output_that_cannot_hold_a_folder_is_refused_by_its_setting(ball_config, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"run\.output=.*file: cannot be written"):
        launch.pretrain(ball_config(run={"output": tmp_path / "file"}))
