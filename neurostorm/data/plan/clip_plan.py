"""Which clips a training run sees and in which order: pure functions of (manifest, seed), no I/O.

    training segments (split.py) -> each dataset's stream of passes (passes.py)
                                 -> epoch e: c_d clips of each dataset d (mixture.py), their units in random order
    ClipPlan -> an endless stream of rows: epoch 0's clips, epoch 1's, ...  each `masks_per_clip` times in a row
                optimiser step s of any number of workers takes rows [s * B, (s + 1) * B)

The stream is rebuilt from the seed at any time, so a checkpoint's only data state is its step number. Within a dataset
each clip is used once per pass, whatever its share of an epoch: epoch e takes clips [e * c_d, (e + 1) * c_d) of its
stream. With equal weights an epoch is one pass over every dataset. A batch may span two epochs; no clip is dropped or
repeated for that.
"""

import math
from collections import OrderedDict
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from neurostorm.data.plan.epochs import Ints, Passes, Units, shuffled
from neurostorm.data.plan.mixture import Origin, Sampling, epoch_counts
from neurostorm.data.plan.split import Segments, clip_counts

ROW = np.dtype([("row", np.int64), ("run", np.int32), ("start", np.int32)])
_KEPT_EPOCHS = 2  # a batch may span two; 12 MB each for 1.4 million clips


@dataclass(frozen=True)
class ClipPlan:
    """The endless clip stream of a training run.

    segments      what clips are cut from
    clip_frames   frames of a clip; stride_frames between clip starts within a pass
    seed          of order and of the clips' shift within their segment's slack
    global_batch  clips of one optimiser step, over all workers
    origin        dataset and subject of the manifest's runs; None: one dataset, each run a subject of its own
    sampling      mixture of the datasets, cap per subject, what is kept together and repeated

    Raises ValueError for a weight that names no dataset.
    """

    segments: Segments
    clip_frames: int
    stride_frames: int
    seed: int
    global_batch: int
    origin: Origin | None = None
    sampling: Sampling = field(default_factory=Sampling)
    _epochs: "OrderedDict[int, tuple[Ints, Ints]]" = field(default_factory=OrderedDict, repr=False, compare=False)

    def __post_init__(self) -> None:
        if self.origin is not None:
            self.sampling.weight_of(self.origin.datasets)

    def __reduce__(self) -> tuple[type["ClipPlan"], tuple[object, ...]]:
        """Travels to other processes without what it has drawn."""
        return ClipPlan, (
            self.segments, self.clip_frames, self.stride_frames, self.seed, self.global_batch, self.origin,
            self.sampling,
        )  # fmt: skip

    @cached_property
    def _streams(self) -> tuple[tuple[Passes, int], ...]:
        """Each dataset's stream, in the order of their names, and the clips that an epoch takes of it."""
        origin = self.origin or Origin.one_dataset(int(self.segments.run.max(initial=-1)) + 1)
        dataset, subject = origin.dataset[self.segments.run], origin.subject[self.segments.run]
        streams = []
        for name in sorted(origin.datasets):
            mine = dataset == origin.datasets.index(name)
            streams.append(
                Passes(
                    name, self.seed, self.segments.where(mine), subject[mine], self.clip_frames, self.stride_frames,
                    self.sampling.clips_per_read, self.sampling.max_clips_per_subject,
                )
            )  # fmt: skip
        clips = np.array([stream.size for stream in streams], np.int64)
        weights = self.sampling.weight_of([stream.name for stream in streams])
        counts = epoch_counts(clips, weights, self.sampling.temperature)
        return tuple((stream, int(count)) for stream, count in zip(streams, counts, strict=True))

    @cached_property
    def clips_by_dataset(self) -> dict[str, int]:
        """Clips that one epoch takes of each dataset."""
        return {stream.name: count for stream, count in self._streams}

    @property
    def clips_per_epoch(self) -> int:
        """Rows of one epoch: its clips, each counted as often as it stands in the stream (`masks_per_clip`)."""
        return sum(self.clips_by_dataset.values()) * self.sampling.masks_per_clip

    def total_steps(self, epochs: float, max_steps: int | None) -> int:
        """Optimiser steps that use every row of `epochs` epochs (the last step is filled up from the next epoch)."""
        steps = math.ceil(epochs * self.clips_per_epoch / self.global_batch)
        return steps if max_steps is None else min(steps, max_steps)

    def epoch(self, number: int) -> NDArray[np.void]:
        """All rows of one epoch in order."""
        return self.rows(number * self.clips_per_epoch, self.clips_per_epoch)

    def rows(self, first: int, count: int) -> NDArray[np.void]:
        """Rows [first, first + count) of the stream as ROW records, over as many epochs as that takes.

        `row` counts from the start of the stream, `run` indexes the manifest, `start` is the clip's first stored frame.
        Raises ValueError when there is no clip.
        """
        length = self.clips_per_epoch
        if length == 0:
            raise ValueError("no segment is as long as one clip: shorten data.clip_frames")
        rows = np.empty(count, ROW)
        rows["row"] = np.arange(first, first + count)
        for number in range(first // length, -(-(first + count) // length)):
            run, start = self._clips(number)
            part = slice(max(number * length - first, 0), (number + 1) * length - first)
            clip = (rows["row"][part] - number * length) // self.sampling.masks_per_clip
            rows["run"][part], rows["start"][part] = run[clip], start[clip]
        return rows

    def step_rows(self, step: int, rank: int, workers: int) -> NDArray[np.void]:
        """The rows of one worker in one optimiser step: its contiguous share of the global batch."""
        share = self.global_batch // workers
        return self.rows(step * self.global_batch + rank * share, share)

    def _clips(self, number: int) -> tuple[Ints, Ints]:
        """`run` and `start` of the clips of one epoch in order; the epochs drawn last are kept."""
        clips = self._epochs.get(number)
        if clips is None:
            parts = [stream.take(number * count, count) for stream, count in self._streams if count]
            units = Units.join(parts)
            clips = units.take(shuffled(len(units), self.seed, "epoch", number)).rows(self.stride_frames)
            self._epochs[number] = clips
            while len(self._epochs) > _KEPT_EPOCHS:
                self._epochs.popitem(last=False)
        return clips


def validation_rows(segments: Segments, *, clip_frames: int, count: int) -> NDArray[np.void]:
    """At most `count` fixed clips, spread evenly over all clips of the held-out segments; the same at every step."""
    last = np.cumsum(clip_counts(segments.frames, clip_frames, clip_frames))  # clips up to and with each segment
    total = int(last[-1]) if len(last) else 0
    chosen = np.unique(np.linspace(0, total - 1, min(count, total)).round().astype(np.int64))
    segment = np.searchsorted(last, chosen, side="right")
    nth = chosen - np.concatenate([[0], last])[segment]
    rows = np.empty(len(chosen), ROW)
    rows["row"] = np.arange(len(chosen))
    rows["run"] = segments.run[segment]
    rows["start"] = segments.first[segment] + nth * clip_frames
    return rows
