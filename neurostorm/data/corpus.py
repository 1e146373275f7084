"""A store as training sees it: which runs, how they are parted, the clip plan, the held-out clips.

    manifest + configuration -> open_corpus() -> Corpus: on the driver, on the trainer's controller, on every worker

Everybody rebuilds the same corpus from the same files; nothing of it is sent around.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from neurostorm.config import Config, ConfigError
from neurostorm.data.clips import ClipReader
from neurostorm.data.plan.clip_plan import ClipPlan, validation_rows
from neurostorm.data.plan.mixture import Origin, Sampling
from neurostorm.data.plan.split import split
from neurostorm.data.withdrawals import Withdrawals, subject_of
from neurostorm.store.files import StorePath
from neurostorm.store.manifest import LAYOUT_COLUMNS, read_manifest
from neurostorm.store.reader import FrameStore
from neurostorm.store.run_index import RunIndex

PLANNED_COLUMNS = ["run", "dataset", "subject", "frames", "source_sha256"]  # of the manifest; what a plan rests on
KEPT_COLUMNS = [*PLANNED_COLUMNS, *LAYOUT_COLUMNS, "global_mean", "global_std"]  # and what reading clips takes


@dataclass(frozen=True)
class Corpus:
    """The store's runs in manifest order, the training plan over them and the fixed held-out clips.

    Every worker holds one, so it keeps no table of the runs but the reader's `RunIndex`.

    Attributes:
        subjects, frames: how many there are.
        content_sha256: `FrameStore.content_hash` of the runs that were planned on.
        manifest: `KEPT_COLUMNS` of the runs, where they are still to be written to the run's folder.
    """

    store: FrameStore
    reader: ClipReader
    plan: ClipPlan
    validation: NDArray[np.void]
    subjects: int
    frames: int
    split: str
    content_sha256: str
    manifest: pa.Table | None = None

    @property
    def runs(self) -> Sequence[str]:
        """Run paths, indexed by the plan's `run` column."""
        return self.reader.runs

    @property
    def withdrawals(self) -> Withdrawals:
        """Who withdrew from the store since the plan was made."""
        assert self.reader.withdrawals is not None
        return self.reader.withdrawals

    @property
    def withdrawn(self) -> dict[str, str]:
        """Subjects of the plan, training and held-out, who are known to have withdrawn, and when; sorted."""
        when = self.withdrawals.when
        ours = {subject_of(run) for run in self.runs} if when else set()
        return {subject: when[subject] for subject in sorted(ours & when.keys())}

    @property
    def trained_subjects(self) -> list[str]:
        """`dataset/subject` of everyone of whom the plan has a training clip, sorted.

        Not of those held out, of datasets with weight 0, or of runs shorter than a clip.
        """
        segments = self.plan.segments
        used = np.unique(segments.run[segments.frames >= self.plan.clip_frames])
        return sorted({subject_of(self.runs[run]) for run in used})


def open_corpus(config: Config, manifest: pa.Table | None = None) -> Corpus:
    """The corpus of `config.data.store`: of its runs as they are now, or of those of a manifest that was kept.

    Raises StoreError for a missing or foreign store, ConfigError when its runs do not fit the configuration.
    """
    data = config.data
    store = FrameStore.open(data.store, data.verify)
    manifest = read_kept(store.path) if manifest is None else manifest
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
    runs = RunIndex(manifest, moments=data.normalize == "global")
    withdrawals = Withdrawals.read(store.path)
    reader = ClipReader(store, runs, data.clip_frames, data.normalize, data.unavailable_s, withdrawals)
    rows = validation_rows(parted.validation, clip_frames=data.clip_frames, count=data.val_clips)
    content = store.content_hash(manifest)
    return Corpus(store, reader, plan, rows, len(set(subjects)), int(frames.sum()), parted.description, content)


def read_kept(path: StorePath) -> pa.Table:
    """What a training run keeps of a store's manifest: `KEPT_COLUMNS`. StoreError as `read_manifest`."""
    return read_manifest(path, KEPT_COLUMNS)


def whose_runs(manifest: pa.Table) -> tuple[list[str], Origin]:
    """`dataset/subject` of every run, unique over datasets, and the same in numbers."""
    labels = pc.binary_join_element_wise(manifest["dataset"], manifest["subject"], "/")
    dataset, subject = (column.combine_chunks().dictionary_encode() for column in (manifest["dataset"], labels))
    names, number = tuple(dataset.dictionary.to_pylist()), dataset.indices.to_numpy().astype(np.int16)
    origin = Origin(names, number, subject.indices.to_numpy())
    return labels.to_pylist(), origin
