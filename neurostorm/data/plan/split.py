"""Which stretches of which runs are trained on and which are held out: pure functions of (manifest, seed).

    subjects and lengths of the runs -> split() -> training segments | validation segments

Subjects are parted, never a subject's runs; a store of one subject is parted in time.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class Segments:
    """Stretches of runs to cut clips from: `run` indexes the manifest, `first` and `frames` are in stored frames."""

    run: NDArray[np.int32]
    first: NDArray[np.int32]
    frames: NDArray[np.int32]

    def __len__(self) -> int:
        return len(self.run)

    def where(self, chosen: NDArray[np.bool_]) -> "Segments":
        """The segments that `chosen` (bool, one per segment) is true for."""
        return Segments(self.run[chosen], self.first[chosen], self.frames[chosen])


@dataclass(frozen=True)
class HoldOut:
    """Training and validation segments, and in words how they were parted (`12 of 60 subjects held out`)."""

    train: Segments
    validation: Segments
    description: str

    def of_runs(self, used: NDArray[np.bool_]) -> "HoldOut":
        """The same parting without the runs that `used` (bool, one per run of the manifest) is false for."""
        parts = {side: getattr(self, side).where(used[getattr(self, side).run]) for side in ("train", "validation")}
        return replace(self, **parts)

    def check(self, clip_frames: int) -> None:
        """Raises ValueError when one side has no run as long as a clip."""
        for side, segments in (("training", self.train), ("validation", self.validation)):
            if not (segments.frames >= clip_frames).any():
                raise ValueError(
                    f"no {side} run has data.clip_frames={clip_frames} frames ({self.description}; the longest has "
                    f"{segments.frames.max(initial=0)}): shorten the clips or add longer runs"
                )


def split(subjects: Sequence[str], frames: Sequence[int], *, clip_frames: int, held_out: float, seed: int) -> HoldOut:
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
        chosen = set(names[:count])
        held = np.fromiter((subject in chosen for subject in subjects), bool, len(lengths))
        whole = Segments(np.arange(len(lengths), dtype=np.int32), np.zeros_like(lengths), lengths)
        parted = HoldOut(whole.where(~held), whole.where(held), f"{count} of {len(names)} subjects held out")
    parted.check(clip_frames)
    return parted


def _split_in_time(lengths: NDArray[np.int32], clip_frames: int, held_out: float) -> HoldOut:
    held = np.maximum(np.ceil(held_out * lengths).astype(np.int32), clip_frames)
    index = np.arange(len(lengths), dtype=np.int32)
    train = Segments(index, np.zeros_like(lengths), np.maximum(lengths - held - clip_frames, 0))
    validation = Segments(index, np.maximum(lengths - held, 0), np.minimum(held, lengths))
    return HoldOut(train, validation, f"one subject: the last {held_out:.0%} of each run held out")


def subject_hash(subject: str) -> str:
    """The first 12 hex digits of a subject's sha256, `subject` as "dataset/sub-001".

    By it a model tells whom it was trained on. It hides no identity: whoever has the labels can compute it.
    """
    return hashlib.sha256(subject.encode()).hexdigest()[:12]


def clip_counts(frames: NDArray[np.int32], clip_frames: int, stride_frames: int) -> NDArray[np.int64]:
    """How many clips fit into segments of `frames` frames, `stride_frames` apart."""
    return np.maximum((frames.astype(np.int64) - clip_frames) // stride_frames + 1, 0)
