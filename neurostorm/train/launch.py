"""The driver of a pretraining run: check everything that can be checked now, then hand over to Ray Train.

    config -> corpus and model fit? folder free or resumable? -> TorchTrainer -> summary

A run is its folder OUTPUT/NAME, local or in an object store. Started again, it goes on from the newest committed
checkpoint there, with as many workers as are asked for; a different configuration is refused with what differs.
"""

import json
import logging
import math
import os
import tempfile
from dataclasses import dataclass
from typing import Any

import torch
from pydantic import ValidationError

from neurostorm.config import Config, ConfigError
from neurostorm.config.presets import PRESETS
from neurostorm.data.corpus import Corpus
from neurostorm.io.paths import remove_tree
from neurostorm.model.cost import clip_cost, measured_peak
from neurostorm.runtime.capacity import training_demand
from neurostorm.runtime.lease import hold_lease
from neurostorm.runtime.resources import require
from neurostorm.runtime.run_folder import (
    changed_settings,
    differing_keys,
    keep_config,
    refuse_other,
    require_writable,
    saved_store,
)
from neurostorm.store import GRIDS, Grid
from neurostorm.tracking import unsent
from neurostorm.tracking.tracker import RUN_FILE, tracking_uri
from neurostorm.train.build import atlas_of, build_model, swin_config
from neurostorm.train.checkpoint import checkpoints
from neurostorm.train.controller.trainer import trainer_of
from neurostorm.train.health.stop import RunStopped, stops_on_usr1
from neurostorm.train.records import pinned_manifest
from neurostorm.train.records.time_account import ACCOUNT, now_ns
from neurostorm.train.worker import SUMMARY

SLOW_STEP_S, LOOK_STEPS = 3.0, 5
CPU_SHARE = 0.06  # of a matrix product's rate, in steps of `tiny`: .10 to .12 of one worker alone, .05 of two

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Plan:
    """What a start of the run will do."""

    first_step: int
    total_steps: int
    finished: bool


def check_folder(config: Config) -> None:
    """ConfigError unless the run's folder is new or holds a pretraining run, can be written, and MLflow has a place."""
    refuse_other(config, "pretrain", ())
    require_writable(config.run.folder, f"run.output={config.run.output}")
    try:
        tracking_uri(config.tracking.uri, config.run.output)
    except ValueError as error:
        raise ConfigError(str(error)) from error


def check(config: Config, corpus: Corpus) -> Plan:
    """Whether this configuration can run in its folder now. Raises ConfigError naming the field and the fix."""
    swin_config(config, corpus.store)
    atlas_of(config, corpus.store)
    folder, resume = config.run.folder, config.checkpoint.resume
    newest = checkpoints.newest(folder / "checkpoints")
    total = corpus.plan.total_steps(config.train.epochs, config.train.max_steps)
    if newest is None:
        if resume == "must":
            raise ConfigError(
                f"checkpoint.resume=must: {folder}/checkpoints has no committed checkpoint to resume from"
            )
        return Plan(0, total, False)
    if resume == "never":
        raise ConfigError(f"checkpoint.resume=never: {folder} already holds a run; choose another --name")
    try:
        different = differing_keys(newest.trainer["config"], config)
    except ValidationError as error:
        raise ConfigError(
            f"{newest.path} was saved by another version of neurostorm ({newest.trainer.get('code_revision')}) with "
            f"settings that this one does not know: {error}; resume with that version or take another run.name"
        ) from error
    if different and (folder / SUMMARY).exists():
        raise ConfigError(
            f"{folder} is complete ({newest.step} steps), with other settings: {'; '.join(different)}; choose another "
            "--name, also to train longer"
        )
    if different:
        raise ConfigError(
            f"{newest.path} was trained with other settings: {'; '.join(different)}; "
            "use those settings to resume it, or another --name"
        )
    if newest.trainer["store_sha256"] != corpus.content_sha256:
        raise ConfigError(
            f"{newest.path} was trained on another content of {corpus.store.path}: runs were added or removed since, "
            "so the clip order differs; take another run.name"
        )
    return Plan(newest.step, total, newest.step >= total and (folder / SUMMARY).exists())


def pretrain(config: Config) -> dict[str, Any]:
    """Runs pretraining to its end on the Ray cluster and returns the summary.

    The summary also holds `mlflow_uri`, and `trained_steps`, which is 0 if the run was complete already; then a line
    says so and nothing starts.

    Raises RunStopped when it was asked to stop and has saved; ConfigError (also when the cluster is too small, or
    another driver is at work on the run), StoreError or ObjectStoreError before anything starts; and Ray Train's
    error when the run fails for good.
    """
    started_ns = now_ns()
    check_folder(config)
    with hold_lease(config.run.folder):
        return _pretrain(config, started_ns)


def _pretrain(config: Config, started_ns: int) -> dict[str, Any]:
    corpus = pinned_manifest.choose(config)
    plan = check(config, corpus)
    folder = config.run.folder
    if not plan.finished:
        # The controller polls its workers at this interval; at its default of 2 s a failure is noticed late.
        os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.2")
        require(training_demand(config), config.scale.wait_for_nodes_s)
        slow = slow_words(config, corpus.store.grid, plan.total_steps - plan.first_step, step_s(config, corpus))
        if slow:
            logger.warning("%s", slow)
        if not checkpoints.is_begun(folder / "checkpoints"):
            forget_other_start(config, corpus)
        keep_config(config, "pretrain")
        pinned_manifest.keep(config, corpus)
        logger.info(
            "%d subjects, %d runs, %d frames; %s; %d clips per epoch; steps %d to %d",
            corpus.subjects, len(corpus.runs), corpus.frames, corpus.split, corpus.plan.clips_per_epoch,
            plan.first_step, plan.total_steps,
        )  # fmt: skip
        logger.info("starting %s", training_demand(config))
        with tempfile.TemporaryDirectory(prefix="neurostorm-ray-") as storage, stops_on_usr1(folder):
            trainer_of(config, corpus, storage, started_ns).fit()
        require_finished(config, plan)
    summary: dict[str, Any] = json.loads((folder / SUMMARY).read_text())
    if plan.finished:
        logger.info("%s", already_complete(config, plan, summary))
    return {
        **summary,
        "mlflow_uri": tracking_uri(config.tracking.uri, config.run.output),
        "trained_steps": plan.total_steps - plan.first_step,
    }


def require_finished(config: Config, plan: Plan) -> None:
    """Raises RunStopped, with what to type, when the workers have ended before the last step."""
    newest = checkpoints.newest_committed(config.run.folder / "checkpoints")
    if newest is None or checkpoints.step_of(newest) < plan.total_steps:
        raise RunStopped(f"stopped as asked, of {plan.total_steps} steps; {how_to_resume(config)}")


def forget_other_start(config: Config, corpus: Corpus) -> None:
    """Lets go of a start that ended before its first checkpoint, if it was of other settings or another store.

    Its MLflow run and its account of time would mix with those of this one.
    """
    folder = config.run.folder
    changed = changed_settings(config)
    if pinned_manifest.is_other(folder, corpus):
        before, now = saved_store(folder), str(config.data.store)
        changed.append(f"data.store: {before} -> {now}" if before != now else f"other runs in {now}")
    if changed:
        for name in (RUN_FILE, ACCOUNT):
            (folder / name).unlink(missing_ok=True)
        remove_tree(folder / unsent.FOLDER)
        logger.warning(
            "%s had no checkpoint yet and starts from step 0 with other settings (%s) and an MLflow run of its own",
            folder, "; ".join(changed),
        )  # fmt: skip


def already_complete(config: Config, plan: Plan, summary: dict[str, Any]) -> str:
    """What a start of a finished run says: that there is nothing to do, and what to type for another run."""
    finished = f", finished {summary['finished']}" if "finished" in summary else ""  # not in older summaries
    return (
        f"{config.run.folder} is complete: {plan.first_step} of {plan.total_steps} steps{finished}; nothing to do. "
        "A complete run cannot be made longer, as its learning rate has come to its end: for a longer or another run "
        "choose another --name (longer: with a larger --train.epochs or --train.max_steps)"
    )


def how_to_resume(config: Config) -> str:
    """What a run that is stopped says: its newest checkpoint, and that the same command resumes from it."""
    path = checkpoints.newest_committed(config.run.folder / "checkpoints")
    if path is None:
        return f"{config.run.folder} has no checkpoint yet: the same command starts it again from step 0"
    done = checkpoints.step_of(path)
    return f"the newest checkpoint is {path} ({done} steps done): start the same command again to resume from it"


def step_s(config: Config, corpus: Corpus) -> float:
    """Seconds that a step will about take on CPUs like this machine's; 0 on GPUs, of which nothing is estimated.

    The model's operations (on no device, so nothing is allocated) at the share of this processor's matrix product that
    steps of `tiny` reach; takes about a second.
    """
    scale = config.scale
    if scale.gpus_per_worker or config.mask.kind == "atlas":  # an atlas is not read twice for an estimate
        return 0.0
    with torch.device("meta"):
        model = build_model(config, corpus.store)
    before = torch.get_num_threads()
    torch.set_num_threads(scale.threads_per_worker)
    try:
        peak = measured_peak("cpu", torch.bfloat16 if config.train.dtype == "bf16" else torch.float32)
    finally:
        torch.set_num_threads(before)
    return config.clips_per_worker * clip_cost(model, config.data.clip_frames).train_flops / (CPU_SHARE * peak)


def slow_words(config: Config, grid: Grid, steps: int, seconds: float) -> str:
    """The warning for `steps` steps of so many seconds each, with what is faster; empty when they are not slow."""
    if seconds < SLOW_STEP_S:
        return ""
    times = math.prod(grid.shape) / math.prod(GRIDS["4mm"].shape)
    faster = ["use a GPU"]
    if times > 1:
        shape = "x".join(map(str, grid.shape))
        faster.append(f"ingest with --grid 4mm, as {shape} voxels are {times:.0f} times the work of its 48x48x48")
    if config.model.embed_dim > PRESETS["tiny"]["model"]["embed_dim"]:
        faster.append("use --preset tiny")
    look = f"for a first look use --train.max_steps {LOOK_STEPS}; to train, " if steps > LOOK_STEPS else "to train, "
    return (
        f"about {seconds:.0f} s a step on this machine's CPU, {_duration(steps * seconds)} for {steps} steps: "
        f"{look}{', or '.join(faster)}"
    )


def _duration(seconds: float) -> str:
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:,.1f} h"
