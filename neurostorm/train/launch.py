"""The driver of a pretraining run: check everything that can be checked now, then hand over to Ray Train.

    config -> corpus and model fit? folder free or resumable? -> TorchTrainer -> summary

A run is its folder OUTPUT/NAME, local or in an object store. Started again, it goes on from the newest committed
checkpoint there, with as many workers as are asked for; a different configuration is refused with what differs.
"""

import json
import logging
import os
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray.data
import ray.train
from pydantic import ValidationError
from ray.train.torch import TorchConfig, TorchTrainer

from neurostorm.config import Config, ConfigError, differing_keys, refuse_unwritable
from neurostorm.data.corpus import Corpus
from neurostorm.places import replace
from neurostorm.resources import Demand, require
from neurostorm.tracking import tracking_uri
from neurostorm.train import checkpoint, planned
from neurostorm.train.build import atlas_of, swin_config
from neurostorm.train.feed import Feed
from neurostorm.train.goodput import now_ns
from neurostorm.train.worker import SUMMARY, train_worker

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Plan:
    """What a start of the run will do."""

    first_step: int
    total_steps: int
    finished: bool


def check(config: Config, corpus: Corpus) -> Plan:
    """Whether this configuration can run in its folder now. Raises ConfigError naming the field and the fix."""
    swin_config(config, corpus.store)
    atlas_of(config, corpus.store)
    refuse_unwritable("run.output", config.run.folder)
    try:
        tracking_uri(config.tracking.uri, config.run.output)
    except ValueError as error:
        raise ConfigError(str(error)) from error
    folder, resume = config.run.folder, config.checkpoint.resume
    newest = checkpoint.newest(folder / "checkpoints")
    total = corpus.plan.total_steps(config.train.epochs, config.train.max_steps)
    if newest is None:
        if resume == "must":
            raise ConfigError(
                f"checkpoint.resume=must: {folder}/checkpoints has no committed checkpoint to resume from"
            )
        return Plan(0, total, False)
    if resume == "never":
        raise ConfigError(f"checkpoint.resume=never: {folder} already holds a run; choose another run.name")
    try:
        different = differing_keys(newest.trainer["config"], config)
    except ValidationError as error:
        raise ConfigError(
            f"{newest.path} was saved by another version of neurostorm ({newest.trainer.get('code_revision')}) with "
            f"settings that this one does not know: {error}; resume with that version or take another run.name"
        ) from error
    if different:
        raise ConfigError(
            f"{newest.path} was trained with other settings: {'; '.join(different)}; "
            "take those settings again, or another run.name"
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

    Raises ConfigError (also when the cluster is too small), StoreError or PlaceError before anything starts, and Ray
    Train's error when the run fails for good.
    """
    started_ns = now_ns()
    corpus = planned.choose(config)
    plan = check(config, corpus)
    folder = config.run.folder
    if not plan.finished:
        # The controller polls its workers at this interval; at its default of 2 s a failure is noticed late.
        os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.2")
        require(demand(config), config.scale.wait_for_nodes_s)
        folder.mkdir(parents=True, exist_ok=True)
        replace(folder / "config.yaml", config.to_yaml().encode())
        planned.keep(config, corpus)
        logger.info(
            "%d subjects, %d runs, %d frames; %s; %d clips per epoch; steps %d to %d",
            corpus.subjects, len(corpus.runs), corpus.frames, corpus.split, corpus.plan.clips_per_epoch,
            plan.first_step, plan.total_steps,
        )  # fmt: skip
        with tempfile.TemporaryDirectory(prefix="neurostorm-ray-") as storage:
            trainer(config, corpus, storage, started_ns).fit()
    summary: dict[str, Any] = json.loads((folder / SUMMARY).read_text())
    if plan.finished:
        logger.info("%s", already_complete(config, plan, summary))
    return {
        **summary,
        "mlflow_uri": tracking_uri(config.tracking.uri, config.run.output),
        "trained_steps": plan.total_steps - plan.first_step,
    }


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
    path = checkpoint.newest_committed(config.run.folder / "checkpoints")
    if path is None:
        return f"{config.run.folder} has no checkpoint yet: the same command starts it again from step 0"
    step = int(path.name.rpartition("-")[2])
    return f"the newest checkpoint is {path} ({step} steps done): start the same command again to resume from it"


class Trainer(TorchTrainer):
    """Ray Train's trainer, without its handler of Ctrl-C and its placement group cleaner."""

    def _create_default_callbacks(self) -> list[Any]:
        """Leaves the cleaner out: it looks for the run's controller in whichever Ray of this machine it finds.

        With two of them it ends with a traceback, or takes the controller for dead and the workers' resources away.
        When the controller dies this driver ends, too, and Ray frees what the job had.
        """
        callbacks: list[Any] = super()._create_default_callbacks()
        return [each for each in callbacks if type(each).__name__ != "PlacementGroupCleanerCallback"]

    def _register_sigint_handler(self, controller: Any) -> None:
        """Leaves Ctrl-C to `interrupts.interruptible`, which says how to resume."""


def demand(config: Config) -> Demand:
    """What the run asks of the cluster; with scale.min_workers it starts with as few as these."""
    scale, batch, micro = config.scale, config.train.global_batch, config.train.micro_batch
    per_worker = {name: f"--scale.{name}_per_worker" for name in ("cpus", "gpus")}
    return Demand(
        scale.workers, scale.cpus_per_worker, scale.gpus_per_worker, least=scale.min_workers,
        counts=tuple(count for count in range(1, scale.workers + 1) if batch % (count * micro) == 0),
        task_cpus=1.0 if config.data.read_in == "tasks" else 0.0,
        options=per_worker | {"workers": "--workers", "least": "--scale.min_workers"}, small_preset=True,
    )  # fmt: skip


def trainer(config: Config, corpus: Corpus, storage: str, started_ns: int) -> Any:
    """The Ray Train V2 trainer of a run.

    storage     a local folder for Ray Train's own notes. Workers report no checkpoints through Ray, so its controller,
                which runs on the driver's machine, is the only one to use it.
    started_ns  when this driver began, in Unix time
    """
    scale = config.scale
    resources = {"CPU": scale.cpus_per_worker} | ({"GPU": scale.gpus_per_worker} if scale.gpus_per_worker else {})
    return Trainer(
        train_worker,
        train_loop_config={"config": config.model_dump(mode="json"), "started_ns": started_ns},
        torch_config=TorchConfig(
            backend="nccl" if scale.gpus_per_worker else "gloo", timeout_s=scale.collective_timeout_s
        ),
        scaling_config=ray.train.ScalingConfig(
            num_workers=(scale.min_workers, scale.workers) if scale.min_workers else scale.workers,
            use_gpu=bool(scale.gpus_per_worker),
            resources_per_worker=resources,
            elastic_resize_monitor_interval_s=scale.resize_every_s,
        ),
        run_config=ray.train.RunConfig(
            name=config.run.name,
            storage_path=storage,
            failure_config=ray.train.FailureConfig(max_failures=scale.max_failures),
            worker_runtime_env={"env_vars": worker_environment(config)},
        ),
        datasets={"train": lambda: ray.data.range(0)},
        dataset_config=Feed(config, corpus),
    )


def worker_environment(config: Config) -> dict[str, str]:
    """Environment of the training workers: few threads that sleep while they wait, DeepSpeed's builds kept per user."""
    variables = {"OMP_WAIT_POLICY": "PASSIVE", "OMP_NUM_THREADS": str(config.scale.threads_per_worker)}
    if not config.scale.gpus_per_worker:
        variables["DS_ACCELERATOR"] = "cpu"
    cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "neurostorm" / "torch_extensions"
    return variables | {"TORCH_EXTENSIONS_DIR": os.environ.get("TORCH_EXTENSIONS_DIR", str(cache))}
