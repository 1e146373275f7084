"""What a task is made of: clips, the unit that each belongs to, and what is to be predicted of the unit.

    runs --cut--> clips (run, first frame) --belong to--> units (a subject, an event, a run) --have--> target, subject

A prediction is made of every clip and pooled over its unit. Splits choose subjects; `of` keeps their units.
"""

import hashlib
import json
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from neurostorm.downstream.cohort import CohortRun

Whole = NDArray[np.int64]


@dataclass(frozen=True)
class Examples:
    """N clips of M units; clips are ordered by unit.

    Attributes:
        runs: the runs that clips are cut from.
        clip_frames: frames of every clip, L.
        run, start, unit: int64 (N): index into `runs`, first frame, index into `units`.
        units: name of each unit, unique.
        subjects: "dataset/subject" of each unit.
        targets: (M), float64 in the target's own unit, or int64: index into `classes`.
        classes: names of the classes; () for a regression. Of identification: the subjects.
    """

    runs: tuple[CohortRun, ...]
    clip_frames: int
    run: Whole
    start: Whole
    unit: Whole
    units: tuple[str, ...]
    subjects: tuple[str, ...]
    targets: NDArray[np.float64] | Whole
    classes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not len(self.units) == len(self.subjects) == len(self.targets):
            raise ValueError(f"{len(self.units)} units, {len(self.subjects)} subjects, {len(self.targets)} targets")
        if not len(self.run) == len(self.start) == len(self.unit):
            raise ValueError(f"clips with {len(self.run)} runs, {len(self.start)} starts, {len(self.unit)} units")
        if len(set(self.units)) < len(self.units):
            raise ValueError("two units have one name")
        if not np.array_equal(np.unique(self.unit), np.arange(len(self.units))):
            raise ValueError("every unit needs a clip")

    def __len__(self) -> int:
        return len(self.run)

    @property
    def sha256(self) -> str:
        """Hash, in hex, of all that a result can follow from: clips and the runs' content, units, targets."""
        runs = [(run.path, run.content) for run in self.runs]
        digest = hashlib.sha256(json.dumps([runs, self.units, self.subjects, self.classes, self.clip_frames]).encode())
        for values in (self.run, self.start, self.unit, self.targets):
            digest.update(values.tobytes())
        return digest.hexdigest()

    def of(self, subjects: Collection[str]) -> "Examples":
        """The units of `subjects`, with their clips."""
        wanted = set(subjects)
        return self.take(np.flatnonzero([subject in wanted for subject in self.subjects]))

    def take(self, units: Whole) -> "Examples":
        """The units with these indices, in this order, with their clips."""
        clips = self.clips_of(units)
        renumbered = np.full(len(self.units), -1)
        renumbered[units] = np.arange(len(units))
        return Examples(
            runs=self.runs,
            clip_frames=self.clip_frames,
            run=self.run[clips],
            start=self.start[clips],
            unit=renumbered[self.unit[clips]],
            units=tuple(self.units[unit] for unit in units),
            subjects=tuple(self.subjects[unit] for unit in units),
            targets=self.targets[units],
            classes=self.classes,
        )

    def clips_of(self, units: Iterable[int]) -> Whole:
        """Indices of the clips of the units with these indices: of `take(units)`'s clips, in its order."""
        parts = self.clips_by_unit()
        return np.concatenate([parts[unit] for unit in units] or [np.empty(0, np.int64)])

    def clips_by_unit(self) -> list[Whole]:
        """Of each unit the indices of its clips."""
        order = np.argsort(self.unit, kind="stable")
        return np.split(order, np.searchsorted(self.unit[order], np.arange(1, len(self.units))))

    def one_clip_each(self) -> "Examples":
        """The same units with their first clip alone, for what is given unit by unit."""
        _, first = np.unique(self.unit, return_index=True)
        return replace(self, run=self.run[first], start=self.start[first], unit=self.unit[first])

    def clips_of_run(self) -> dict[int, Whole]:
        """Index of a run -> its distinct first frames, sorted."""
        return {int(run): np.unique(self.start[self.run == run]) for run in np.unique(self.run)}


def starts_of(frames: int, clip_frames: int, stride_frames: int) -> range:
    """First frames of the clips that fit into a run; empty for a run that is shorter than a clip."""
    return range(0, frames - clip_frames + 1, stride_frames)


def build_examples(
    runs: Sequence[CohortRun],
    clip_frames: int,
    clips: Sequence[tuple[int, int, str]],
    subject_of: dict[str, str],
    target_of: dict[str, float],
    classes: tuple[str, ...] = (),
) -> Examples:
    """Examples of `clips` (run, first frame, unit), each once, with subject and target by unit."""
    units = tuple(dict.fromkeys(unit for _, _, unit in sorted(clips, key=lambda clip: clip[2])))
    number = {unit: index for index, unit in enumerate(units)}
    rows = sorted({(number[unit], run, start) for run, start, unit in clips})
    unit, run, start = (np.array([row[column] for row in rows], np.int64) for column in range(3))
    found = [target_of[name] for name in units]
    targets = np.array(found, np.int64) if classes else np.array(found, np.float64)
    return Examples(
        tuple(runs), clip_frames, run, start, unit, units, tuple(subject_of[name] for name in units), targets, classes
    )
