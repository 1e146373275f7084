"""Lines: how many labels a method needs, and all tasks at one look.

Results --share of labels--> curve and band per method
        --tasks, chance = 0, best = 1--> radar chart
"""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.ticker import FixedFormatter, FixedLocator, NullLocator

from neurostorm.downstream.statistics.metrics import higher_is_better
from neurostorm.downstream.statistics.uncertainty import summary
from neurostorm.report.figures.drawing import (
    GRID,
    QUIET,
    TEXT_PT,
    Drawn,
    chance_line,
    legend,
    line_style,
    panels,
    plain,
    quiet,
    short,
)
from neurostorm.report.methods import look
from neurostorm.report.results import Results, TaskRow
from neurostorm.report.table import percent
from neurostorm.report.tables import metric_label

_FEW = 7  # lines of one radar
_NAN = float("nan")


def label_efficiency(results: Results) -> list[Drawn]:
    """A panel per task: the primary metric against the share of training labels, where a method has two or more."""
    shown = {task: methods for task in results.tasks if (methods := _curves(results, task))}
    if not shown:
        return []
    figure, axes = panels(len(shown), 3, 3.1)
    runs: list[str] = []
    for axis, (task, methods) in zip(axes, shown.items(), strict=True):
        for method in methods:
            runs += _curve(axis, results, task, method)
        shares = results.fractions
        axis.set_xscale("log")
        axis.xaxis.set_major_locator(FixedLocator(shares))
        axis.xaxis.set_major_formatter(FixedFormatter([percent(share) for share in shares]))
        axis.xaxis.set_minor_locator(NullLocator())
        axis.set_xlabel("training labels", fontsize=TEXT_PT, color=QUIET)
        quiet(axis, short(task.name, 44), metric_label(task))
        chance_line(axis, results.chance(task.name))
    drawn = {method for methods in shown.values() for method in methods}
    legend(figure, [one for one in results.methods() if one in drawn])
    caption = (
        "Lines are means over seeds, bands one standard deviation to either side; the horizontal scale is logarithmic."
    )
    return [Drawn("label_efficiency", "Label efficiency", caption, figure, tuple(dict.fromkeys(runs)))]


def radar(results: Results) -> list[Drawn]:
    """All tasks with a chance level as the axes of a radar, at least three; from chance (0) to the best method (1)."""
    tasks = [task for task in results.tasks if _span(results, task) > 0]
    if len(tasks) < 3:
        return []
    scores = {method: [normalised(results, task, method) for task in tasks] for method in results.methods()}
    methods = [one for one, found in scores.items() if np.isfinite(found).any()]
    halves = 1 if len(methods) <= _FEW else 2
    groups = [list(part) for part in np.array_split(np.array(methods, dtype=object), halves)]
    figure, axes = _polar(len(groups))
    for axis, group in zip(axes, groups, strict=True):
        _axes_of_tasks(axis, [task.name for task in tasks])
        for method in group:
            _ring(axis, scores[method], method)
    legend(figure, methods)
    runs = [t.run_id for task in tasks for method in methods for t in results.at(task.name, method)]
    caption = (
        "Each axis is one task, scaled so that chance is 0 (the inner ring) and the best method's mean is 1 (the outer "
        "ring); means below chance are drawn at 0. A gap is a task that the method was not run on."
    )
    return [Drawn("radar", "All tasks at one look", caption, figure, tuple(dict.fromkeys(runs)))]


def normalised(results: Results, task: TaskRow, method: str) -> float:
    """(mean - chance) / (best mean - chance), at least 0; nan without a value."""
    mean = results.mean(task.name, method, task.metric)
    if math.isnan(mean):
        return _NAN
    sign = 1 if higher_is_better(task.metric) else -1
    return max(0.0, sign * (mean - results.chance(task.name)) / _span(results, task))


def _span(results: Results, task: TaskRow) -> float:
    """How far the best method is from chance; nan without either."""
    best = results.mean(task.name, results.best(task), task.metric)
    return (1 if higher_is_better(task.metric) else -1) * (best - results.chance(task.name))


def _curves(results: Results, task: TaskRow) -> list[str]:
    return [one for one in results.methods(task.name) if len(_points(results, task, one)) > 1]


def _points(results: Results, task: TaskRow, method: str) -> dict[float, list[float]]:
    found = {share: results.values(task.name, method, task.metric, share) for share in results.fractions}
    return {share: list(values.values()) for share, values in found.items() if values}


def _curve(axis: Any, results: Results, task: TaskRow, method: str) -> list[str]:
    """One line with its band; the ids of its runs."""
    points = _points(results, task, method)
    shares, found = list(points), [summary(values) for values in points.values()]
    means, sds = np.array([one.mean for one in found]), np.nan_to_num([one.sd for one in found])
    axis.plot(shares, means, zorder=3, **line_style(method))
    axis.fill_between(shares, means - sds, means + sds, color=look(method).colour, alpha=0.13, linewidth=0, zorder=2)
    return [trial.run_id for share in shares for trial in results.at(task.name, method, share)]


def _polar(count: int) -> tuple[Any, list[Any]]:
    figure, axes = panels(count, 2, 5.2)
    made = []
    for axis in axes:
        place = axis.get_subplotspec()
        axis.remove()
        made.append(figure.add_subplot(place, projection="polar"))
    return figure, made


def _axes_of_tasks(axis: Any, names: Sequence[str]) -> None:
    """Rings at 0, 0.5 and 1, the ring of chance a little off the centre so that its points stay apart."""
    angles = np.linspace(0, 2 * np.pi, len(names), endpoint=False)
    axis.set_theta_offset(np.pi / 2)
    axis.set_theta_direction(-1)
    axis.set_xticks(angles, [plain(short(name)) for name in names], fontsize=TEXT_PT)
    for label, angle in zip(axis.get_xticklabels(), angles, strict=True):
        side = math.sin(angle)
        label.set_ha("center" if abs(side) < 0.1 else "left" if side > 0 else "right")
    axis.set_ylim(-0.15, 1.08)
    axis.set_yticks([0, 0.5, 1], [])
    for level, text in ((0, "0 = chance"), (0.5, "0.5"), (1, "1 = best")):
        axis.text(
            np.pi / len(names), level, text, fontsize=TEXT_PT, color=QUIET, zorder=6, ha="center", va="center",
            bbox={"facecolor": "white", "edgecolor": "none", "alpha": 0.8, "pad": 1},
        )  # fmt: skip
    axis.grid(color=GRID, linewidth=0.9)
    axis.spines["polar"].set_visible(False)
    axis.tick_params(axis="x", pad=6)


def _ring(axis: Any, values: Sequence[float], method: str) -> None:
    angles = np.linspace(0, 2 * np.pi, len(values) + 1)
    axis.plot(angles, [*values, values[0]], zorder=3, clip_on=False, **line_style(method))
