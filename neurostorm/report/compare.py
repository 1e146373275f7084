"""Which methods are compared with which, on what pairs, and how many of the tests count as one family.

    trials of two methods, same seed and split --paired_t--------------------+
    their predictions for the same test units  --pooled, paired_bootstrap----+--with_holm over all--> Comparison

Both references are named before a number is seen: a method's own network without pretraining, and functional
connectivity. All tests of a report, over all tasks, are one family for Holm's correction.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from neurostorm.downstream.statistics.metrics import metric_of
from neurostorm.downstream.statistics.uncertainty import (
    Comparison,
    PairedInterval,
    compare,
    paired_bootstrap,
    with_holm,
)
from neurostorm.report.methods import references_of
from neurostorm.report.results import Pair, ReportError, Results, TaskRow, TrialRow
from neurostorm.runtime.progress import tracked

DRAWS = 1000  # of the bootstrap: its p is then known to about 0.007 at 0.05
_SAME = 1e-6  # of two targets, relative: what single precision leaves


@dataclass(frozen=True)
class Pooled:
    """Predictions of two methods for the same test units of all their common replicates, N rows."""

    subjects: tuple[str, ...]
    target: NDArray[Any]
    a: NDArray[np.float64]
    b: NDArray[np.float64]


def comparisons(results: Results, *, draws: int = DRAWS, seed: int = 0) -> tuple[Comparison, ...]:
    """Every method against its references, in every task, with all labels.

    Replicates make a pair when seed and split are the same. `p_holm` corrects for all of the comparisons together;
    `boot_*` are nan where a task keeps no predictions (identification).

    Args:
        results: the sweep.
        draws: of each bootstrap over subjects.
        seed: of these draws.

    Raises:
        ReportError: two methods' predictions name different targets for one test unit.
    """
    made: list[Comparison] = []
    for task in tracked(results.tasks, len(results.tasks), "report: compare", "task"):
        methods = [one for one in results.methods(task.name) if results.at(task.name, one)]
        asked = {one: references_of(one, methods) for one in methods}
        for reference in methods:
            against = [one for one in methods if reference in asked[one]]
            if not against:
                continue
            replicates = {one: results.values(task.name, one, task.metric) for one in (*against, reference)}
            boots = {one: _boot(results, task, one, reference, draws, seed) for one in against}
            made += compare(
                replicates,
                reference,
                task=task.name,
                metric=task.metric,
                boots={one: boot for one, boot in boots.items() if boot},
            )
    return tuple(with_holm(made))


def find(made: Sequence[Comparison], task: str, a: str, b: str) -> Comparison | None:
    """The comparison of `a` with `b` in a task, None if it was not made."""
    return next((one for one in made if (one.task, one.a, one.b) == (task, a, b)), None)


def pooled(first: Sequence[TrialRow], second: Sequence[TrialRow]) -> Pooled | None:
    """Predictions of the trials of two methods, paired by seed, split and test unit; None if they share none.

    Raises ReportError when they disagree about a unit's target.
    """
    others = {trial.pair: trial for trial in second if trial.predictions}
    rows = [_common(one, others[one.pair]) for one in first if one.predictions and one.pair in others]
    rows = [part for part in rows if part.subjects]
    if not rows:
        return None
    subjects = tuple(subject for part in rows for subject in part.subjects)
    return Pooled(subjects, *(np.concatenate([getattr(part, name) for part in rows]) for name in ("target", "a", "b")))


def unpaired(results: Results, task: str, a: str, b: str) -> tuple[Pair, ...]:
    """Replicates of `a` or `b` whose seed the other has too, but on another split: they are compared with nothing."""
    first, second = ({trial.pair for trial in results.at(task, one)} for one in (a, b))
    seeds = {pair.seed for pair in first} & {pair.seed for pair in second}
    return tuple(sorted(pair for pair in first ^ second if pair.seed in seeds))


def _boot(results: Results, task: TaskRow, a: str, b: str, draws: int, seed: int) -> PairedInterval | None:
    rows = pooled(results.at(task.name, a), results.at(task.name, b))
    if rows is None:
        return None
    metric = metric_of(task.metric, task.classes)
    return paired_bootstrap(rows.subjects, rows.target, rows.a, rows.b, metric, draws=draws, seed=seed)


def _common(one: TrialRow, other: TrialRow) -> Pooled:
    first, second = one.predictions, other.predictions
    assert first is not None and second is not None
    place = {unit: row for row, unit in enumerate(second.units)}
    mine = [row for row, unit in enumerate(first.units) if unit in place]
    theirs = [place[first.units[row]] for row in mine]
    target = first.target[mine]
    differ = np.flatnonzero(~np.isclose(target, second.target[theirs], rtol=_SAME, atol=0))
    if len(differ):
        unit = first.units[mine[differ[0]]]
        raise ReportError(
            f"runs {one.run_id} and {other.run_id} name different targets for {unit} in the task {one.task}: they were "
            "made with different tables of labels; train one of them anew"
        )
    return Pooled(tuple(first.subjects[row] for row in mine), target, first.output[mine], second.output[theirs])
