"""A task on a store, ready for any method: its runs, labels and clips, and who trains, validates and tests.

store + labels --find_task--> Evaluation (examples, report of what did not match)
                                   '--split_of(seed, fraction)--> Split, the same for every method
"""

import difflib
import functools
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from neurostorm.config import ConfigError, SplitConfig, TaskConfig
from neurostorm.downstream.cohort import Cohort, open_cohort
from neurostorm.downstream.labels import Labels, column_names, is_numeric, read_labels
from neurostorm.downstream.splits import (
    PARTS,
    Names,
    Split,
    combine_strata,
    holdout,
    kfold,
    leave_one_out,
    load_split,
    nested_fractions,
    strata_of,
)
from neurostorm.downstream.tasks.examples import Examples
from neurostorm.downstream.tasks.find import find_task
from neurostorm.downstream.tasks.task import REGISTRY, Task, UnknownTask
from neurostorm.io.errors import nearest_names
from neurostorm.io.paths import AnyPath, to_path

CLIP_FRAMES = 20  # without a model that says


@dataclass(frozen=True)
class Evaluation:
    """One task on one store.

    Attributes:
        task: what is predicted.
        cohort: its runs.
        examples: clips, units, targets.
        columns: further column -> subject -> value, of those that the split asked for.
        lines: what matched and what did not, for people.
    """

    task: Task
    cohort: Cohort
    examples: Examples
    columns: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    lines: tuple[str, ...] = ()

    @property
    def subjects(self) -> tuple[str, ...]:
        """Everybody with a unit, sorted."""
        return tuple(sorted(set(self.examples.subjects)))


def task_of(text: str, settings: TaskConfig, *, option: str = "--task") -> Task:
    """The task that `text` asks for, as `find_task`; a column of the labels is answered with how to predict it.

    Args:
        text: NAME, NAME:COLUMN or FILE.py[:COLUMN].
        settings: the section of the configuration, which says where the labels are.
        option: that took `text`, for the message.

    Raises:
        ConfigError: as `find_task`; for the name of a column, or nearly one, with the option to type.
    """
    try:
        return find_task(text, settings.target_column)
    except UnknownTask as error:
        columns = column_names(settings.store, settings.labels)
        name, table = text.partition(":")[0], settings.labels or "the participants table"
        near = nearest_names(name.lower(), [column.lower() for column in columns], cutoff=0.6)
        tasks = nearest_names(name, REGISTRY)
        if not near or (tasks and _likeness(name, tasks[0]) >= _likeness(name.lower(), near[0])):
            raise
        column = next(column for column in columns if column.lower() == near[0])
        base = "phenotype" if is_numeric(settings.store, settings.labels, column) else "diagnosis"
        what = "a column of that name" if column == name else f"a column {column!r}"
        raise ConfigError(f"no task {text!r}; {table} has {what}: use {option} {base}:{column}") from error


def _likeness(one: str, other: str) -> float:
    return difflib.SequenceMatcher(None, one, other).ratio()


def open_evaluation(task: Task, settings: TaskConfig, split: SplitConfig, clip_frames: int | None) -> Evaluation:
    """Read what a task needs.

    Args:
        task: from `find_task`.
        settings, split: the sections of the configuration.
        clip_frames: of the model; None without one.

    Raises:
        ConfigError, LabelError, StoreError: something is missing or does not fit; the message says what.
    """
    frames = settings.clip_frames or clip_frames or CLIP_FRAMES
    if clip_frames is not None and frames > clip_frames:
        raise ConfigError(f"task.clip_frames={frames}: the model takes clips of up to {clip_frames} frames")
    cohort = _cohort(str(settings.store), task.runs_for(settings.runs))
    wanted = [name for name in (split.group_column, *split.strata_columns) if name]
    wanted += [split.site_column] if split.scheme == "site" else []
    labels = _labels(task, settings, cohort, wanted)
    values = labels.values if labels and task.needs_labels else {}
    examples = task.examples(cohort, values, task.cut(settings, frames))
    columns = labels.columns if labels else {}
    return Evaluation(task, cohort, examples, columns, tuple(labels.report.lines()) if labels else ())


def split_of(evaluation: Evaluation, settings: SplitConfig, *, seed: int, fraction: float = 1.0) -> Split:
    """Who trains, validates and tests in the replicate with this seed; by the settings' file if they name one.

    Subjects are balanced over the parts by their label (where they have one) and by `strata_columns`, and those of one
    `group_column` value stay together. Errors as `splits.py`.
    """
    seed = seed if settings.seed is None else settings.seed
    strata = _strata(evaluation, settings)
    groups = evaluation.columns.get(settings.group_column) if settings.group_column else None
    if settings.file is not None:
        split = _kept(evaluation, settings.file)
    else:
        split = _made(evaluation, settings, seed, strata, groups)
    split.check(groups)
    if fraction < 1:
        split = nested_fractions(split, fraction, seed=seed, strata=strata, groups=groups)
    return split.with_facts(group_column=settings.group_column, fraction=fraction)


def _made(evaluation: Evaluation, settings: SplitConfig, seed: int, strata: Names, groups: Names) -> Split:
    subjects, share = evaluation.subjects, settings.validation
    if settings.scheme == "holdout":
        return holdout(subjects, test=settings.test, validation=share, seed=seed, strata=strata, groups=groups)
    if settings.scheme == "kfold":
        turn, fold = divmod(seed, settings.folds)
        return kfold(
            subjects, folds=settings.folds, fold=fold, validation=share, seed=turn, strata=strata, groups=groups
        )
    sites = evaluation.columns[settings.site_column]
    names = sorted({sites[subject] for subject in subjects if subject in sites})
    if not names:
        raise ConfigError(f"split.site_column={settings.site_column}: no subject of the task has a value in it")
    site = names[seed % len(names)]
    return leave_one_out(subjects, columns=sites, value=site, validation=share, seed=seed, strata=strata, groups=groups)


def _kept(evaluation: Evaluation, file: AnyPath) -> Split:
    """A split from its file, of it the subjects that the task has units of."""
    split, used = load_split(file, evaluation.cohort.subjects), set(evaluation.subjects)
    train, validation, test = (tuple(name for name in getattr(split, part) if name in used) for part in PARTS)
    return replace(split, train=train, validation=validation, test=test)


def _strata(evaluation: Evaluation, settings: SplitConfig) -> Names:
    """Subject -> what is balanced: its label where a subject is a unit, and the columns asked for."""
    mappings: list[Mapping[str, str]] = [evaluation.columns[name] for name in settings.strata_columns]
    examples = evaluation.examples
    if examples.units == examples.subjects:
        named = [examples.classes[int(t)] for t in examples.targets] if examples.classes else examples.targets.tolist()
        mappings.append(strata_of(dict(zip(examples.units, named, strict=True))))
    return combine_strata(*mappings) if mappings else None


def _labels(task: Task, settings: TaskConfig, cohort: Cohort, columns: list[str]) -> Labels | None:
    if not task.needs_labels and not columns:
        return None
    # A split by a column needs the table even where the task has no labels: then the column stands in for them.
    target = task.column if task.column is not None else columns[0]
    return read_labels(
        cohort.store.path,
        cohort.subjects,
        target,
        file=settings.labels,
        id_column=settings.id_column,
        columns=columns,
        numeric=task.numeric if task.needs_labels else None,
    )


@functools.lru_cache(maxsize=4)
def _cohort(store: str, runs: str) -> Cohort:
    """A process that runs many trials opens a store once."""
    return open_cohort(to_path(store)).of_task(runs)
