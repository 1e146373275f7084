"""A store as training sees it: which runs, how they are parted, the clip plan, the held-out clips.

    manifest + configuration -> open_corpus() -> Corpus: on the driver, on the trainer's controller, on every worker

Everybody rebuilds the same corpus from the same files; nothing of it is sent around.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from neurostorm.config import Config, ConfigError
from neurostorm.data.clips import ClipReader
from neurostorm.data.plan import ClipPlan, split, validation_rows
from neurostorm.store.manifest import read_manifest
from neurostorm.store.reader import FrameStore


@dataclass(frozen=True)
class Corpus:
    """The store's runs in manifest order, the training plan over them and the fixed held-out clips."""

    store: FrameStore
    reader: ClipReader
    plan: ClipPlan
    validation: NDArray[np.void]
    subjects: int
    frames: int
    split: str

    @property
    def runs(self) -> tuple[str, ...]:
        """Run paths, indexed by the plan's `run` column."""
        return self.reader.runs


def open_corpus(config: Config) -> Corpus:
    """The corpus of `config.data.store`.

    Raises StoreError for a missing or foreign store, ConfigError when its runs do not fit the configuration.
    """
    data = config.data
    store = FrameStore.open(data.store.absolute())
    manifest = read_manifest(store.path)
    runs, frames = manifest["run"].to_pylist(), manifest["frames"].to_pylist()
    names = zip(manifest["dataset"].to_pylist(), manifest["subject"].to_pylist(), strict=True)
    subjects = [f"{dataset}/{subject}" for dataset, subject in names]
    try:
        parted = split(subjects, frames, clip_frames=data.clip_frames, held_out=data.held_out, seed=config.run.seed)
    except ValueError as error:
        raise ConfigError(f"{store.path}: {error}") from error
    plan = ClipPlan(
        segments=parted.train,
        clip_frames=data.clip_frames,
        stride_frames=data.clip_stride_frames or data.clip_frames,
        seed=config.run.seed,
        global_batch=config.train.global_batch,
    )
    reader = ClipReader(store, tuple(runs), data.clip_frames, data.normalise)
    rows = validation_rows(parted.validation, clip_frames=data.clip_frames, count=data.val_clips)
    return Corpus(store, reader, plan, rows, len(set(subjects)), sum(frames), parted.description)
