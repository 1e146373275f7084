"""What single predictions look like: confusion matrices and scatter plots, of the best method and of its reference.

    predictions of all replicates --pooled--> confusion: rows of truth, shares and counts
                                          --> scatter: prediction against truth, in the target's unit

A subject in the test data of several replicates is in the picture several times; the counts are of predictions.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from neurostorm.downstream.statistics.metrics import confusion
from neurostorm.downstream.statistics.uncertainty import summary
from neurostorm.report.figures.drawing import (
    INK,
    QUIET,
    TEXT_PT,
    WIDTH_INCHES,
    Drawn,
    file_names,
    heading,
    panels,
    plain,
    quiet,
    short,
)
from neurostorm.report.methods import look, ordered, references_of
from neurostorm.report.results import CLASSIFICATION, REGRESSION, Predictions, Results, TaskRow
from neurostorm.report.table import mean_sd, percent

_ROOMY = 8  # classes whose cells hold a share and a count, two matrices beside each other
_MANY_POINTS = 2000
_CELL_INCHES = 0.42


def confusions(results: Results) -> list[Drawn]:
    """A figure per classification task."""
    tasks = [task for task in results.tasks if task.kind == CLASSIFICATION and _shown(results, task)]
    names = file_names("confusion", [task.name for task in tasks])
    return [_confusion_figure(results, task, names[task.name]) for task in tasks]


def scatters(results: Results) -> list[Drawn]:
    """A figure per regression task."""
    tasks = [task for task in results.tasks if task.kind == REGRESSION and _shown(results, task)]
    names = file_names("scatter", [task.name for task in tasks])
    return [_scatter_figure(results, task, names[task.name]) for task in tasks]


def _shown(results: Results, task: TaskRow) -> list[str]:
    """The best method that has predictions, and the first of its references that has."""
    having = [one for one in results.methods(task.name) if _pooled(results, task, one)]
    best = results.best(task, tuple(having))
    if not best:
        return []
    others = [one for one in reversed(ordered(having)) if one != best]  # the plainest baseline comes last in the order
    reference = next((one for one in (*references_of(best, having), *others)), "")
    return [best, reference] if reference else [best]


def _pooled(results: Results, task: TaskRow, method: str) -> Predictions | None:
    """The predictions of all replicates, one after the other."""
    parts = [trial.predictions for trial in results.at(task.name, method) if trial.predictions]
    if not parts:
        return None
    return Predictions(
        tuple(name for part in parts for name in part.units),
        tuple(name for part in parts for name in part.subjects),
        np.concatenate([part.target for part in parts]),
        np.concatenate([part.output for part in parts]),
    )


def _confusion_figure(results: Results, task: TaskRow, name: str) -> Drawn:
    methods, classes = _shown(results, task), task.classes
    roomy = len(classes) <= _ROOMY
    side = min(4.6, 2.2 + 0.62 * len(classes)) if roomy else 2.2 + _CELL_INCHES * len(classes)
    beside = len(methods) if roomy else 1
    figure, axes = panels(len(methods), beside, side, min(WIDTH_INCHES, beside * (side + 0.9)))
    for axis, method in zip(axes, methods, strict=True):
        rows = _pooled(results, task, method)
        if rows is not None:
            _matrix(axis, confusion(rows.target, rows.output), classes, roomy)
        heading(axis, look(method).label)
    caption = (
        "Rows are the true classes and sum to 100 %; the numbers "
        + ("in brackets " if roomy else "")
        + f"are counts of predictions over all replicates. {_pair_words(results, task, methods)}"
    )
    return Drawn(name, f"Confusion: {task.name}", caption, figure, _ids(results, task, methods), task.name)


def _matrix(axis: Any, counts: np.ndarray[Any, Any], classes: Sequence[str], roomy: bool) -> None:
    totals = counts.sum(axis=1, keepdims=True)
    shares = counts / np.maximum(totals, 1)
    edges = np.arange(len(classes) + 1) - 0.5
    axis.pcolormesh(edges, edges, shares, cmap="Blues", vmin=0, vmax=1, edgecolors="white", linewidth=1.5)
    axis.set(aspect="equal", ylim=(edges[-1], edges[0]))
    for row, column in np.ndindex(counts.shape):
        share, count = shares[row, column], counts[row, column]
        text = f"{percent(round(share, 2))}\n({count})" if roomy else str(count)
        if roomy or count:
            axis.text(
                column, row, text, ha="center", va="center", fontsize=TEXT_PT, color="white" if share > 0.55 else INK
            )
    names = [plain(short(name, 18)) for name in classes]
    axis.set_xticks(range(len(classes)), names, fontsize=TEXT_PT)
    axis.set_yticks(range(len(classes)), names, fontsize=TEXT_PT)
    if max(map(len, names)) * len(names) > 28:
        for label in axis.get_xticklabels():
            label.set(rotation=40, ha="right", rotation_mode="anchor")
    axis.set_xlabel("predicted", fontsize=TEXT_PT, color=QUIET)
    axis.set_ylabel("true", fontsize=TEXT_PT, color=QUIET)
    axis.tick_params(length=0, colors=INK)
    for spine in axis.spines.values():
        spine.set_visible(False)


def _scatter_figure(results: Results, task: TaskRow, name: str) -> Drawn:
    methods = _shown(results, task)
    figure, axes = panels(len(methods), 2, 4.6, 4.9 * len(methods))
    found = {method: _pooled(results, task, method) for method in methods}
    truth = np.concatenate([rows.target for rows in found.values() if rows])
    guesses = np.concatenate([rows.output for rows in found.values() if rows])
    margin = 0.05 * (np.ptp(truth) or 1.0)
    # A wild prediction must not squeeze all others: the frame is the truth's, and half as much to either side.
    low = max(min(truth.min(), guesses.min()), truth.min() - np.ptp(truth) / 2) - margin
    high = min(max(truth.max(), guesses.max()), truth.max() + np.ptp(truth) / 2) + margin
    for axis, (method, rows) in zip(axes, found.items(), strict=True):
        if rows is not None:
            _points(axis, rows, method, (low, high))
        _frame(axis, task, (low, high))
        heading(axis, look(method).label)
        axis.text(
            0.03, 0.97, _agreement(results, task, method), transform=axis.transAxes, va="top", fontsize=TEXT_PT,
            color=INK, linespacing=1.5, bbox={"facecolor": "white", "edgecolor": "none", "alpha": 0.85, "pad": 3},
        )  # fmt: skip
    caption = (
        "A point is a test unit of one replicate; the dashed line is where prediction and truth are equal. r and MAE "
        f"are means and standard deviations over replicates. {_pair_words(results, task, methods)}"
    )
    return Drawn(name, f"Prediction and truth: {task.name}", caption, figure, _ids(results, task, methods), task.name)


def _points(axis: Any, rows: Predictions, method: str, limits: tuple[float, float]) -> None:
    count = len(rows.target)
    axis.scatter(
        rows.target, np.clip(rows.output, *limits), s=16 if count < _MANY_POINTS else 7, color=look(method).colour,
        alpha=float(np.clip(40 / np.sqrt(count + 1), 0.15, 0.75)), linewidth=0, rasterized=count > _MANY_POINTS,
        zorder=3,
    )  # fmt: skip


def _frame(axis: Any, task: TaskRow, limits: tuple[float, float]) -> None:
    quiet(axis, "")
    axis.grid(axis="x", color="#e4e7eb", linewidth=0.8)
    axis.plot(limits, limits, color=QUIET, linewidth=1.1, linestyle=(0, (4, 3)), zorder=2)
    axis.set(xlim=limits, ylim=limits, aspect="equal")
    unit = f" ({task.unit})" if task.unit else ""
    axis.set_xlabel(plain(short(f"true {task.name}{unit}", 48)), fontsize=TEXT_PT, color=QUIET)
    axis.set_ylabel(plain(short(f"predicted {task.name}{unit}", 48)), fontsize=TEXT_PT, color=QUIET)


def _agreement(results: Results, task: TaskRow, method: str) -> str:
    lines = []
    for label, metric, unit in (("r", "r", ""), ("MAE", "mae", f" {task.unit}" if task.unit else "")):
        values = list(results.values(task.name, method, metric).values())
        if values:
            lines.append(plain(f"{label} = {mean_sd(summary(values))}{unit}"))
    return "\n".join(lines)


def _pair_words(results: Results, task: TaskRow, methods: Sequence[str]) -> str:
    what = "value, of one replicate" if task.name in results.single else "mean"
    best = f"{look(methods[0]).label} has the best {what}"
    return f"{best}; {look(methods[1]).label} is its reference." if len(methods) > 1 else f"{best}."


def _ids(results: Results, task: TaskRow, methods: Sequence[str]) -> tuple[str, ...]:
    return tuple(trial.run_id for method in methods for trial in results.at(task.name, method))
