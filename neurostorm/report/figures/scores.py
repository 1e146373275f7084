"""Bars: every method in every task, the phenotypes side by side, and re-identification.

    replicates --mean, sd, dots--> bar | chance --> dashed line | comparisons of the best method --> brackets

Bars begin at zero, so that their lengths may be compared.
"""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from neurostorm.downstream.statistics.metrics import chance_of
from neurostorm.downstream.statistics.uncertainty import Comparison, stars
from neurostorm.report.compare import find
from neurostorm.report.figures.drawing import (
    TEXT_PT,
    Bracket,
    Drawn,
    bar,
    brackets,
    chance_line,
    legend,
    method_ticks,
    panels,
    plain,
    quiet,
    short,
)
from neurostorm.report.methods import references_of
from neurostorm.report.results import IDENTIFICATION, REGRESSION, Results, TaskRow
from neurostorm.report.table import p_text
from neurostorm.report.tables import METRICS, NO_CORRELATION, metric_label

_FEW = 7  # methods in a panel of a third of the page
_BARS_PER_ROW = 48


def task_bars(results: Results, made: Sequence[Comparison]) -> list[Drawn]:
    """One panel per task with the primary metric of every method."""
    tasks = [task for task in results.tasks if results.best(task)]
    widest = max(len(_with_values(results, task, task.metric)) for task in tasks) if tasks else 0
    if not tasks:
        return []
    figure, axes = panels(len(tasks), 3 if widest <= _FEW else 2, 3.3)
    runs: list[str] = []
    for axis, task in zip(axes, tasks, strict=True):
        runs += _panel(axis, results, task, task.metric, results.chance(task.name), made)
        quiet(axis, short(task.name, 60), metric_label(task))
    caption = (
        "Bars are means over replicates, whiskers one standard deviation, dots the replicates. Hatched: a network "
        "without pretraining. Brackets compare the best method with its references (paired t-test over replicates, "
        "p corrected by Holm over all comparisons of this report)."
    )
    caption += f" {NO_CORRELATION}" if any(task.metric == "r" for task in tasks) else ""
    return [Drawn("tasks", "All tasks and methods", caption, figure, tuple(dict.fromkeys(runs)))]


def identification_bars(results: Results) -> list[Drawn]:
    """Rank-1 and mAP of re-identification, each with its chance."""
    shown = [
        (task, metric)
        for task in results.tasks
        if task.kind == IDENTIFICATION
        for metric in ("rank1", "map")
        if _with_values(results, task, metric)
    ]
    if not shown:
        return []
    figure, axes = panels(len(shown), 2, 3.3)
    runs: list[str] = []
    for axis, (task, metric) in zip(axes, shown, strict=True):
        runs += _panel(axis, results, task, metric, _chance(results, task, metric), ())
        quiet(axis, f"{short(task.name, 40)}: {METRICS[metric]}", METRICS[metric])
        axis.set_ylim(0, max(1.0, axis.get_ylim()[1]))
    caption = (
        "Rank-1: how often the nearest run of another session is the same person's. mAP: mean average precision of the "
        "ranked gallery. Bars, whiskers and dots as above."
    )
    return [Drawn("identification", "Re-identification", caption, figure, tuple(dict.fromkeys(runs)))]


def phenotype_bars(results: Results) -> list[Drawn]:
    """Pearson's r of all regression tasks side by side, if there are two or more."""
    tasks = [task for task in results.tasks if task.kind == REGRESSION and _with_values(results, task, "r")]
    if len(tasks) < 2:
        return []
    methods = [one for one in results.methods() if any(results.values(task.name, one, "r") for task in tasks)]
    per_row = max(1, min(len(tasks), _BARS_PER_ROW // len(methods)))
    rows = [tasks[first : first + per_row] for first in range(0, len(tasks), per_row)]
    figure, axes = panels(len(rows), 1, 3.3)
    runs: list[str] = []
    width = 0.84 / len(methods)
    for axis, row in zip(axes, rows, strict=True):
        for at, task in enumerate(row):
            for number, method in enumerate(methods):
                values = results.values(task.name, method, "r")
                if values:
                    bar(axis, at + (number - (len(methods) - 1) / 2) * width, 0.88 * width, [*values.values()], method)
                    runs += [trial.run_id for trial in results.at(task.name, method)]
        axis.set_xticks(range(len(row)), [plain(short(task.name, 120 // per_row)) for task in row], fontsize=TEXT_PT)
        axis.set_xlim(-0.55, per_row - 0.45)
        quiet(axis, "Pearson's r of prediction and truth", "r")
        chance_line(axis, 0.0)
    legend(figure, methods)
    caption = "Correlation of predicted and true values on the test subjects, mean, standard deviation and replicates."
    caption += f" {NO_CORRELATION}"
    return [Drawn("phenotypes", "Phenotypes side by side", caption, figure, tuple(dict.fromkeys(runs)))]


def _panel(
    axis: Any, results: Results, task: TaskRow, metric: str, chance: float, made: Sequence[Comparison]
) -> list[str]:
    """Draw the bars of one metric with chance and brackets; the ids of the runs in it."""
    methods = _with_values(results, task, metric)
    top = max(
        bar(axis, at, 0.72, list(results.values(task.name, method, metric).values()), method)
        for at, method in enumerate(methods)
    )
    method_ticks(axis, methods)
    chance_line(axis, chance)
    brackets(axis, np.nanmax([top, chance]), _brackets(results, task, methods, made))
    return [trial.run_id for method in methods for trial in results.at(task.name, method)]


def _brackets(results: Results, task: TaskRow, methods: Sequence[str], made: Sequence[Comparison]) -> list[Bracket]:
    """The best of the methods that have references, against each of these."""
    best = results.best(task, tuple(one for one in methods if references_of(one, methods)))
    marks = []
    for reference in references_of(best, methods):
        one = find(made, task.name, best, reference)
        if one is not None and not math.isnan(one.p_holm):
            left, right = sorted((methods.index(best), methods.index(reference)))
            text = "n.s." if stars(one.p_holm) == "n.s." else f"p {_equals(one.p_holm)} {stars(one.p_holm)}"
            marks.append(Bracket(left, right, text))
    return marks


def _equals(p: float) -> str:
    return p_text(p).replace("<", "< ") if p < 0.001 else f"= {p_text(p)}"


def _with_values(results: Results, task: TaskRow, metric: str) -> list[str]:
    return [one for one in results.methods(task.name) if results.values(task.name, one, metric)]


def _chance(results: Results, task: TaskRow, metric: str) -> float:
    """Of the primary metric what the trials say; of the other one what follows from the gallery's size."""
    level = results.chance(task.name)
    if metric == task.metric:
        return level
    sizes = [results.mean(task.name, one, "gallery") for one in results.methods(task.name)]
    known = [size for size in sizes if math.isfinite(size)]
    if not known and task.metric == "rank1" and 0 < level <= 1:
        known = [1 / level]
    return chance_of(metric, gallery=round(sum(known) / len(known))) if known else math.nan
