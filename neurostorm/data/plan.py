"""Which clips a training run sees and in which order: pure functions of (manifest, seed), no I/O.

    manifest -> split() -> segments (run, first frame, frames) for training and for validation
    segments -> ClipPlan -> an endless stream of clip rows: epoch 0's clips in random order, epoch 1's, ...
                            optimiser step s of any number of workers takes rows [s * B, (s + 1) * B)

The stream is rebuilt from the seed at any time, so a checkpoint's only data state is its step number. Each epoch holds
each clip of each segment exactly once; where a segment is longer than its clips, the clips move within the slack from
epoch to epoch, so that every frame is used. A batch may span two epochs; no clip is dropped or repeated for that.
"""

import hashlib
import math
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

ROW = np.dtype([("row", np.int64), ("run", np.int32), ("start", np.int32)])


@dataclass(frozen=True)
class Segments:
    """Stretches of runs to cut clips from: `run` indexes the manifest, `first` and `frames` are in stored frames."""

    run: NDArray[np.int32]
    first: NDArray[np.int32]
    frames: NDArray[np.int32]

    def __len__(self) -> int:
        return len(self.run)


@dataclass(frozen=True)
class Split:
    """Training and validation segments, and in words how they were parted (`12 of 60 subjects held out`)."""

    train: Segments
    validation: Segments
    description: str


def split(subjects: Sequence[str], frames: Sequence[int], *, clip_frames: int, held_out: float, seed: int) -> Split:
    """Parts runs into training and validation, by subject; a store of one subject is parted in time.

    `subjects` names each run's subject uniquely over datasets, `frames` its length. Subjects are ordered by a hash of
    (seed, name), so the choice depends neither on the order of the manifest nor on what else is in it. In time, the
    end of each run is held out, a clip's length away from the training frames.
    Raises ValueError when a side would be empty.
    """
    lengths = np.asarray(frames, np.int32)
    names = sorted(set(subjects), key=lambda name: hashlib.sha256(f"{seed}/{name}".encode()).digest())
    if not names:
        raise ValueError("the store has no runs: ingest some first (jobs/ingest.py)")
    if len(names) == 1:
        parted = _split_in_time(lengths, clip_frames, held_out)
    else:
        count = min(max(1, round(held_out * len(names))), len(names) - 1)
        held = np.isin(np.asarray(subjects), names[:count])
        index = np.arange(len(lengths), dtype=np.int32)
        train, validation = (
            Segments(index[side], np.zeros(side.sum(), np.int32), lengths[side]) for side in (~held, held)
        )
        parted = Split(train, validation, f"{count} of {len(names)} subjects held out")
    for side, segments in (("training", parted.train), ("validation", parted.validation)):
        if not (segments.frames >= clip_frames).any():
            raise ValueError(
                f"no {side} run has data.clip_frames={clip_frames} frames ({parted.description}; the longest has "
                f"{segments.frames.max(initial=0)}): shorten the clips or add longer runs"
            )
    return parted


def _split_in_time(lengths: NDArray[np.int32], clip_frames: int, held_out: float) -> Split:
    held = np.maximum(np.ceil(held_out * lengths).astype(np.int32), clip_frames)
    index = np.arange(len(lengths), dtype=np.int32)
    train = Segments(index, np.zeros_like(lengths), np.maximum(lengths - held - clip_frames, 0))
    validation = Segments(index, np.maximum(lengths - held, 0), np.minimum(held, lengths))
    return Split(train, validation, f"one subject: the last {held_out:.0%} of each run held out")


@dataclass(frozen=True)
class ClipPlan:
    """The endless clip stream of a training run.

    segments      what clips are cut from
    clip_frames   frames of a clip; stride_frames between clip starts within an epoch
    seed          of order and of the clips' shift within their segment's slack
    global_batch  clips of one optimiser step, over all workers
    """

    segments: Segments
    clip_frames: int
    stride_frames: int
    seed: int
    global_batch: int
    _epochs: "OrderedDict[int, NDArray[np.void]]" = field(default_factory=OrderedDict, repr=False, compare=False)

    @property
    def clips_per_segment(self) -> NDArray[np.int64]:
        """Clips of each segment in each epoch, the same in all epochs."""
        return clip_counts(self.segments.frames, self.clip_frames, self.stride_frames)

    @property
    def clips_per_epoch(self) -> int:
        """Clips of one epoch."""
        return int(self.clips_per_segment.sum())

    def total_steps(self, epochs: float, max_steps: int | None) -> int:
        """Optimiser steps that use every clip of `epochs` epochs (the last step is filled up from the next epoch)."""
        steps = math.ceil(epochs * self.clips_per_epoch / self.global_batch)
        return steps if max_steps is None else min(steps, max_steps)

    def epoch(self, number: int) -> NDArray[np.void]:
        """All rows of one epoch in order, as ROW records; `row` counts from the start of the stream."""
        if number not in self._epochs:
            self._epochs[number] = self._draw_epoch(number)
            while len(self._epochs) > 2:
                self._epochs.popitem(last=False)
        return self._epochs[number]

    def _draw_epoch(self, number: int) -> NDArray[np.void]:
        generator = np.random.Generator(np.random.Philox(np.random.SeedSequence((self.seed, number))))
        counts = self.clips_per_segment
        slack = np.maximum(self.segments.frames - (self.clip_frames + (counts - 1) * self.stride_frames), 0)
        shift = generator.integers(0, np.where(counts > 0, slack, 0) + 1)
        segment = np.repeat(np.arange(len(self.segments)), counts)
        nth = np.arange(len(segment)) - np.repeat(np.cumsum(counts) - counts, counts)
        rows = np.empty(len(segment), ROW)
        order = generator.permutation(len(segment))
        segment, nth = segment[order], nth[order]
        rows["row"] = number * len(rows) + np.arange(len(rows))
        rows["run"] = self.segments.run[segment]
        rows["start"] = self.segments.first[segment] + shift[segment] + nth * self.stride_frames
        return rows

    def rows(self, first: int, count: int) -> NDArray[np.void]:
        """Rows [first, first + count) of the stream, over as many epochs as that takes."""
        if self.clips_per_epoch == 0:
            raise ValueError("no segment is as long as one clip: shorten data.clip_frames")
        parts = []
        while count > 0:
            number, offset = divmod(first, self.clips_per_epoch)
            parts.append(self.epoch(number)[offset : offset + count])
            first, count = first + len(parts[-1]), count - len(parts[-1])
        return np.concatenate(parts) if parts else np.empty(0, ROW)

    def step_rows(self, step: int, rank: int, workers: int) -> NDArray[np.void]:
        """The rows of one worker in one optimiser step: its contiguous share of the global batch."""
        share = self.global_batch // workers
        return self.rows(step * self.global_batch + rank * share, share)


def clip_counts(frames: NDArray[np.int32], clip_frames: int, stride_frames: int) -> NDArray[np.int64]:
    """How many clips fit into segments of `frames` frames, `stride_frames` apart."""
    return np.maximum((frames.astype(np.int64) - clip_frames) // stride_frames + 1, 0)


def validation_rows(segments: Segments, *, clip_frames: int, count: int) -> NDArray[np.void]:
    """At most `count` fixed clips, spread evenly over all clips of the held-out segments; the same at every step."""
    counts = clip_counts(segments.frames, clip_frames, clip_frames)
    segment = np.repeat(np.arange(len(segments)), counts)
    nth = np.arange(len(segment)) - np.repeat(np.cumsum(counts) - counts, counts)
    chosen = np.unique(np.linspace(0, len(segment) - 1, min(count, len(segment))).round().astype(int))
    rows = np.empty(len(chosen), ROW)
    rows["row"] = np.arange(len(chosen))
    rows["run"] = segments.run[segment[chosen]]
    rows["start"] = segments.first[segment[chosen]] + nth[chosen] * clip_frames
    return rows
