"""The tasks: what is predicted, of which unit, and what counts. A task of your own is one class in one file.

    kind             unit      target                    metric that selects     bases and tasks
    regression       subject   a number                  r                       Regression: age, phenotype
    classification   subject   a class                   balanced accuracy       Classification: sex, diagnosis
    classification   event     what the person did       balanced accuracy       state
    identification   run       whose run it is           mAP across sessions     reid

    class ReactionTime(Regression):      # in reaction_time.py, started as --task reaction_time
        name, column, unit = "reaction_time", "rt_ms", "ms"

A class registers itself by its `name`. It inherits from its base which runs it is about (`runs`), how clips are cut
(`cut`) and what units and targets are (`examples`), and may override each:

    class Tapping(State):                # the events of one task label only
        name, runs = "tapping", "motor"
"""

import logging
import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from neurostorm.config import ConfigError, TaskConfig
from neurostorm.downstream.cohort import Cohort, CohortRun
from neurostorm.downstream.statistics.metrics import higher_is_better
from neurostorm.downstream.tasks.examples import Examples, build_examples, starts_of
from neurostorm.downstream.tasks.overlap import REFUSE, Settled, merged, overlaps, settle
from neurostorm.store.events import Event, run_events

logger = logging.getLogger(__name__)

REGISTRY: dict[str, type["Task"]] = {}
KINDS = ("regression", "classification", "identification")
AUTO = "auto"


class UnknownTask(ConfigError):
    """No task has the name that was asked for, and no file of that name is there."""


@dataclass(frozen=True)
class Cut:
    """How clips are cut: frames of a clip and between two starts.

    For events their delay, the types that count, and what to do when two types overlap (see `overlap`).
    """

    clip_frames: int
    stride_frames: int
    delay_s: float = 5.0
    states: tuple[str, ...] = ()
    overlap: str = REFUSE


class Task(ABC):
    """One thing to predict. Subclasses with a `name` can be asked for by it.

    Attributes:
        name: as `--task` takes it.
        kind: one of KINDS.
        metric: what selects and is shown first; a name of `metrics.py`, or "rank1", "map".
        unit: of a regression's target, for tables and axes.
        column: of the labels; None: the task needs no labels, or is asked for as NAME:COLUMN.
        runs: which runs it is about when `--task.runs` is left at auto, in the same words: "auto" (runs at rest if
            there are any, all if not), "all", or a BIDS task label.
        label: how the task is called in messages, and where several are compared.
    """

    name: ClassVar[str]
    kind: ClassVar[str]
    metric: ClassVar[str]
    unit: ClassVar[str] = ""
    runs: ClassVar[str] = AUTO
    column: str | None = None

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        if "name" not in cls.__dict__:
            return
        if getattr(cls, "kind", None) not in KINDS:
            raise TypeError(f"{cls.__qualname__}.kind is {getattr(cls, 'kind', None)!r}: one of {', '.join(KINDS)}")
        higher_is_better(getattr(cls, "metric", ""))  # refuses what is no metric
        REGISTRY[cls.name] = cls

    def __init__(self, column: str | None = None) -> None:
        self.column = column or type(self).column
        self.label = self.name if column is None else f"{self.name}:{column}"

    @property
    def needs_labels(self) -> bool:
        """Whether targets come from a table."""
        return self.column is not None

    @property
    def numeric(self) -> bool:
        """Whether labels are numbers."""
        return self.kind == "regression"

    def runs_for(self, asked: str) -> str:
        """The runs that are selected for `--task.runs asked`: what the user asked for, or else the task's own."""
        return self.runs if asked == AUTO else asked

    def cut(self, settings: TaskConfig, clip_frames: int) -> Cut:
        """How clips of `clip_frames` frames are cut, by the settings that matter to this task."""
        return Cut(clip_frames, settings.clip_stride_frames or clip_frames)

    @abstractmethod
    def examples(self, cohort: Cohort, labels: Mapping[str, float | str], cut: Cut) -> Examples:
        """Clips, units and targets.

        Args:
            cohort: the runs that the task is about.
            labels: subject -> value; {} for a task without labels.
            cut: how clips are cut.

        Raises:
            ConfigError: nothing can be made of these runs, with the reason.
        """


class SubjectTask(Task):
    """A unit is a subject with a label: clips of all of its runs."""

    def examples(self, cohort: Cohort, labels: Mapping[str, float | str], cut: Cut) -> Examples:
        if not labels:
            raise ConfigError(f"task.name={self.label}: it needs labels; give their column, --task {self.name}:COLUMN")
        clips = [
            (index, start, run.subject)
            for index, run in enumerate(cohort.runs)
            if run.subject in labels
            for start in starts_of(run.frames, cut.clip_frames, cut.stride_frames)
        ]
        if not clips:
            raise ConfigError(f"no run of a labelled subject in {cohort.store.path} has {cut.clip_frames} frames")
        subjects = {subject: subject for _, _, subject in clips}
        classes = self.classes({subject: labels[subject] for subject in subjects})
        targets = {subject: self.target(labels[subject], classes) for subject in subjects}
        return build_examples(cohort.runs, cut.clip_frames, clips, subjects, targets, classes)

    @abstractmethod
    def classes(self, labels: Mapping[str, float | str]) -> tuple[str, ...]:
        """The classes, in order; () for a regression."""

    @abstractmethod
    def target(self, label: float | str, classes: tuple[str, ...]) -> float:
        """What a label is as a number."""


class Regression(SubjectTask):
    """A number of each subject."""

    kind = "regression"
    metric = "r"

    def classes(self, labels: Mapping[str, float | str]) -> tuple[str, ...]:
        return ()

    def target(self, label: float | str, classes: tuple[str, ...]) -> float:
        return float(label)


class Classification(SubjectTask):
    """A class of each subject, weighted so that each class counts alike in training."""

    kind = "classification"
    metric = "balanced_accuracy"

    def classes(self, labels: Mapping[str, float | str]) -> tuple[str, ...]:
        found = tuple(sorted({str(label) for label in labels.values()}))
        if len(found) < 2:
            raise ConfigError(f"task.name={self.label}: the labels hold one class only, {found[0]!r}")
        return found

    def target(self, label: float | str, classes: tuple[str, ...]) -> float:
        return classes.index(str(label))


class Age(Regression):
    name, column, unit = "age", "age", "years"


class Sex(Classification):
    name, column = "sex", "sex"


class Phenotype(Regression):
    """Any score; asked for as phenotype:COLUMN."""

    name = "phenotype"


class Diagnosis(Classification):
    name, column = "diagnosis", "diagnosis"


class State(Task):
    """What the person did: a unit is an event, its clips begin when its blood response does."""

    name, kind, metric = "state", "classification", "balanced_accuracy"
    runs = "all"  # events are in runs of tasks, which "auto" leaves out

    def cut(self, settings: TaskConfig, clip_frames: int) -> Cut:
        stride = settings.clip_stride_frames or clip_frames
        return Cut(clip_frames, stride, settings.delay_s, settings.states, settings.overlap)

    def examples(self, cohort: Cohort, labels: Mapping[str, float | str], cut: Cut) -> Examples:
        clips, subject_of, state_of = [], {}, {}
        events = [merged(self._counting(cohort, run, cut)) for run in cohort.runs]
        self._say_overlaps(cohort, events, cut)
        kinds = {event.trial_type for those in events for event in those}
        for index, run in enumerate(cohort.runs):
            for each in settle(events[index], cut.overlap):
                unit = f"{run.path}#{each.event.onset_s}:{each.event.trial_type}"  # two kinds may begin at one time
                for start in settled_starts(each, run.frames, cohort.store.tr_s, cut):
                    clips.append((index, start, unit))
                    subject_of[unit], state_of[unit] = run.subject, each.event.trial_type
        classes = tuple(sorted(set(state_of.values())))
        if len(kinds) < 2:
            raise ConfigError(
                f"task.name={self.label}: the {len(cohort.runs)} selected runs of {cohort.store.path} have "
                f"{len(kinds)} kinds of event{f' of {list(cut.states)}' if cut.states else ''}, and two are needed. "
                "Select runs that have events (--task.runs all); ingest finds *_events.tsv beside the runs or above "
                "them, so a store that was made before these files were there has to be ingested again"
            )
        if len(classes) < 2:
            raise ConfigError(
                f"task.name={self.label}: of {len(kinds)} kinds of event in {cohort.store.path} {len(classes)} "
                f"leave(s) room for a clip of {cut.clip_frames} frames, and two are needed: take shorter clips "
                "(task.clip_frames)"
            )
        target_of = {unit: float(classes.index(state)) for unit, state in state_of.items()}
        return build_examples(cohort.runs, cut.clip_frames, clips, subject_of, target_of, classes)

    def _counting(self, cohort: Cohort, run: CohortRun, cut: Cut) -> list[Event]:
        """The events of a run whose type counts."""
        events = run_events(cohort.attributes(run))
        return [event for event in events if not cut.states or event.trial_type in cut.states]

    def _say_overlaps(self, cohort: Cohort, events: Sequence[Sequence[Event]], cut: Cut) -> None:
        """ConfigError or, by another rule, a warning for events of different types that overlap."""
        found = [(run.path, pair) for run, those in zip(cohort.runs, events, strict=True) for pair in overlaps(those)]
        if not found:
            return
        path, pair = found[0]
        what = (
            f"{len(found)} pair(s) of events overlap in {len({run for run, _ in found})} of {len(cohort.runs)} run(s) "
            f"of {cohort.store.path}, first in {path}: {pair}"
        )
        if cut.overlap == REFUSE:
            raise ConfigError(
                f"task.name={self.label}: {what}. Say what counts then: --task.overlap first (the earlier event, the "
                "later one is cut), --task.overlap drop (neither), or choose types that do not overlap (--task.states)"
            )
        logger.warning("task.overlap=%s: %s", cut.overlap, what)


def settled_starts(settled: Settled, frames: int, tr_s: float, cut: Cut) -> list[int]:
    """First frames of the clips of an event by `event_starts`, without those that meet a forbidden time."""
    starts = {
        start
        for begin_s, end_s in settled.spans
        for start in event_starts(begin_s, end_s - begin_s, frames, tr_s, cut)
    }  # fmt: skip
    taken = [
        (math.ceil((begin_s + cut.delay_s) / tr_s - 1e-6), math.ceil((end_s + cut.delay_s) / tr_s - 1e-6))
        for begin_s, end_s in settled.forbidden
    ]
    return sorted(
        start for start in starts if not any(start < end and start + cut.clip_frames > begin for begin, end in taken)
    )


def event_starts(onset_s: float, duration_s: float, frames: int, tr_s: float, cut: Cut) -> list[int]:
    """First frames of an event's clips: those that fit between onset + delay and end + delay, the first one always.

    An event that is shorter than a clip has one, which reaches beyond it. None if the run ends before, or if the event
    and its delay were over before the first frame.
    """
    begun = math.ceil((onset_s + cut.delay_s) / tr_s - 1e-6)
    first = max(0, begun)
    end = math.floor((onset_s + duration_s + cut.delay_s) / tr_s + 1e-6)
    if begun < 0 and end <= 0:
        return []
    starts = [first, *range(first + cut.stride_frames, end - cut.clip_frames + 1, cut.stride_frames)]
    return [start for start in starts if start + cut.clip_frames <= frames]


class ReId(Task):
    """Whose run it is, found among runs of other sessions; a unit is a run."""

    name, kind, metric = "reid", "identification", "map"

    def examples(self, cohort: Cohort, labels: Mapping[str, float | str], cut: Cut) -> Examples:
        sessions: dict[str, set[str]] = {}
        for run in cohort.runs:
            if run.frames >= cut.clip_frames:
                sessions.setdefault(run.subject, set()).add(run.session)
        several = tuple(sorted(subject for subject, found in sessions.items() if len(found) > 1))
        if len(several) < 2:
            raise ConfigError(
                f"task.name={self.label}: {len(several)} subject(s) of {cohort.store.path} have runs in two sessions, "
                "and two are needed at least: a person is searched for among runs of another session"
            )
        clips = [
            (index, start, run.path)
            for index, run in enumerate(cohort.runs)
            if run.subject in several
            for start in starts_of(run.frames, cut.clip_frames, cut.stride_frames)
        ]
        subject_of = {run.path: run.subject for run in cohort.runs}
        target_of = {run.path: float(several.index(run.subject)) for run in cohort.runs if run.subject in several}
        return build_examples(cohort.runs, cut.clip_frames, clips, subject_of, target_of, several)


def class_weights(targets: np.ndarray, classes: int) -> np.ndarray:
    """float32 (K): weights with which each class counts alike, N / (K n_k); 0 for a class without examples."""
    counts = np.bincount(targets, minlength=classes)
    return np.where(counts > 0, len(targets) / (np.maximum(counts, 1) * (counts > 0).sum()), 0).astype(np.float32)
