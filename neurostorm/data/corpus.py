"""A store as training sees it: which runs, how they are parted, the clip plan, the held-out clips.

    manifest + configuration -> open_corpus() -> Corpus: on the driver, on the trainer's controller, on every worker

Everybody rebuilds the same corpus from the same files; nothing of it is sent around.
"""

from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from neurostorm.config import Config, ConfigError
from neurostorm.data.clips import ClipReader
from neurostorm.data.mixture import Origin, Sampling
from neurostorm.data.plan import ClipPlan, validation_rows
from neurostorm.data.split import split
from neurostorm.store.manifest import read_manifest
from neurostorm.store.reader import FrameStore

PLANNED_COLUMNS = ["run", "dataset", "subject", "frames", "source_sha256"]  # of the manifest; what a plan rests on


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
    manifest: pa.Table

    @property
    def content_sha256(self) -> str:
        """`FrameStore.content_hash` of the runs that were planned on."""
        return self.store.content_hash(self.manifest)

    @property
    def runs(self) -> tuple[str, ...]:
        """Run paths, indexed by the plan's `run` column."""
        return self.reader.runs


def open_corpus(config: Config, manifest: pa.Table | None = None) -> Corpus:
    """The corpus of `config.data.store`: of its runs as they are now, or of those of a manifest that was kept.

    Raises StoreError for a missing or foreign store, ConfigError when its runs do not fit the configuration.
    """
    data = config.data
    store = FrameStore.open(data.store, data.verify)
    manifest = (read_manifest(store.path) if manifest is None else manifest).select(PLANNED_COLUMNS)
    frames = manifest["frames"].to_numpy()
    subjects, origin = whose_runs(manifest)
    sampling = Sampling(
        data.weights, data.temperature, data.max_clips_per_subject, data.clips_per_read, data.masks_per_clip
    )
    try:
        parted = split(subjects, frames, clip_frames=data.clip_frames, held_out=data.held_out, seed=config.run.seed)
        # Only now, so that the same subjects are held out whatever the mixture.
        parted = parted.of_runs((sampling.weight_of(origin.datasets) > 0)[origin.dataset])
        parted.check(data.clip_frames)
    except ValueError as error:
        raise ConfigError(f"{store.path}: {error}") from error
    plan = ClipPlan(
        segments=parted.train,
        clip_frames=data.clip_frames,
        stride_frames=data.clip_stride_frames or data.clip_frames,
        seed=config.run.seed,
        global_batch=config.train.global_batch,
        origin=origin,
        sampling=sampling,
    )
    runs = tuple(manifest["run"].to_pylist())
    reader = ClipReader(store, runs, data.clip_frames, data.normalise, data.unavailable_s)
    rows = validation_rows(parted.validation, clip_frames=data.clip_frames, count=data.val_clips)
    return Corpus(store, reader, plan, rows, len(set(subjects)), int(frames.sum()), parted.description, manifest)


def whose_runs(manifest: pa.Table) -> tuple[list[str], Origin]:
    """`dataset/subject` of every run, unique over datasets, and the same in numbers."""
    labels = pc.binary_join_element_wise(manifest["dataset"], manifest["subject"], "/")
    dataset, subject = (column.combine_chunks().dictionary_encode() for column in (manifest["dataset"], labels))
    origin = Origin(tuple(dataset.dictionary.to_pylist()), dataset.indices.to_numpy(), subject.indices.to_numpy())
    return labels.to_pylist(), origin
