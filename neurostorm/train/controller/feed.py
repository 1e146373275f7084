"""What Ray Data feeds to the training workers: the clips after the newest checkpoint, planned for as many as there are.

    a group of workers starts --> newest checkpoint, pinned manifest --> clip_dataset --> a share for each worker

Ray has a process for this in every group of workers; it needs no torch, so nothing here loads it.
"""

from typing import Any

import ray.train

from neurostorm.config import Config
from neurostorm.data.corpus import Corpus
from neurostorm.data.loader import clip_dataset, loader_options
from neurostorm.train.checkpoint import checkpoints
from neurostorm.train.records import pinned_manifest


class TrainData(ray.train.DataConfig):
    """The clips still to be trained on, planned whenever a group of workers starts, for as many as there are then."""

    def __init__(self, config: Config, corpus: Corpus) -> None:
        data = config.data
        options = loader_options(corpus.reader, corpus.plan, read_in=data.read_in, prefetch_steps=data.prefetch_steps)
        super().__init__(execution_options=options, enable_shard_locality=False)
        self._config = config

    def configure(self, datasets: dict[str, Any], world_size: int, *arguments: Any, **named: Any) -> Any:
        """Ray Train's hook: a share of the dataset for each worker. What it was given of `datasets` is a stand-in."""
        return super().configure(
            {"train": training_data(self._config.for_workers(world_size))}, world_size, *arguments, **named
        )


def training_data(config: Config) -> Any:
    """The clips from the newest checkpoint on."""
    corpus = pinned_manifest.planned(config)
    newest = checkpoints.newest(config.run.folder / "checkpoints")
    total = corpus.plan.total_steps(config.train.epochs, config.train.max_steps)
    first = min(newest.step if newest else 0, total - 1)
    return clip_dataset(
        corpus.reader, corpus.plan, first_step=first, last_step=total, workers=config.scale.workers,
        read_in=config.data.read_in,
    )  # fmt: skip
