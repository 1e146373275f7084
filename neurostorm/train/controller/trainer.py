"""A pretraining run as Ray Train's trainer: how many workers with which resources, their environment, their data."""

import os
from pathlib import Path
from typing import Any

import ray.data
import ray.train
from ray.train.torch import TorchConfig, TorchTrainer

from neurostorm.config import Config
from neurostorm.data.corpus import Corpus
from neurostorm.io.paths import AnyPath
from neurostorm.train.controller.failure_policy import FailuresSinceCheckpoint, FewerWarnings
from neurostorm.train.controller.feed import TrainData
from neurostorm.train.worker import train_worker


class Trainer(TorchTrainer):
    """Ray Train's trainer with a failure policy of ours, without its handler of Ctrl-C and placement group cleaner.

    Args:
        checkpoints: the run's folder of checkpoints.
        arguments: of TorchTrainer.
    """

    def __init__(self, *arguments: Any, checkpoints: AnyPath, **named: Any) -> None:
        super().__init__(*arguments, **named)
        self._checkpoints = checkpoints

    def _initialize_and_run_controller(self, **given: Any) -> Any:
        """Has failures judged by `FailuresSinceCheckpoint`: Ray Train offers no option for it."""
        policy = FailuresSinceCheckpoint(self.run_config.failure_config, self._checkpoints)
        return super()._initialize_and_run_controller(**{**given, "failure_policy": policy})

    def _create_default_callbacks(self) -> list[Any]:
        """Leaves the cleaner out: it looks for the run's controller in whichever Ray of this machine it finds.

        With two of them it ends with a traceback, or takes the controller for dead and the workers' resources away.
        When the controller dies this driver ends, too, and Ray frees what the job had.
        """
        callbacks: list[Any] = super()._create_default_callbacks()
        kept = [each for each in callbacks if type(each).__name__ != "PlacementGroupCleanerCallback"]
        return [*kept, FewerWarnings()]

    def _register_sigint_handler(self, controller: Any) -> None:
        """Leaves Ctrl-C to `interrupts.interruptible`, which says how to resume."""


def trainer_of(config: Config, corpus: Corpus, storage: str, started_ns: int) -> Any:
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
        dataset_config=TrainData(config, corpus),
        checkpoints=config.run.folder / "checkpoints",
    )


def worker_environment(config: Config) -> dict[str, str]:
    """Environment of the training workers: few threads that sleep while they wait, DeepSpeed's builds kept per user."""
    variables = {"OMP_WAIT_POLICY": "PASSIVE", "OMP_NUM_THREADS": str(config.scale.threads_per_worker)}
    if not config.scale.gpus_per_worker:
        variables["DS_ACCELERATOR"] = "cpu"
    cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "neurostorm" / "torch_extensions"
    return variables | {"TORCH_EXTENSIONS_DIR": os.environ.get("TORCH_EXTENSIONS_DIR", str(cache))}
