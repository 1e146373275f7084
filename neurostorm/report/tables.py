"""The tables of a report: what each has as rows and columns, and which runs stand behind every number.

Results + Comparisons --> headline            methods x tasks, the primary metric
                      --> results             task x method: all metrics, chance, p, overlap, size, cost
                      --> compared            every test that was made
                      --> label_efficiency    task x method x share of labels
                      --> failures, runs      what is missing, and everything that ran
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from functools import partial

from neurostorm.downstream.statistics.uncertainty import Comparison, stars, summary
from neurostorm.report.compare import find
from neurostorm.report.methods import CONNECTIVITY, look, references_of
from neurostorm.report.results import REGRESSION, Results, TaskRow, TrialRow
from neurostorm.report.table import (
    NONE,
    Cell,
    Column,
    Table,
    decimals,
    grouped,
    mean_sd,
    minus,
    number,
    p_text,
    percent,
    replicated,
    words,
)

METRICS = {
    "r": "r",
    "r2": "R²",
    "mae": "MAE",
    "rmse": "RMSE",
    "balanced_accuracy": "balanced accuracy",
    "accuracy": "accuracy",
    "macro_f1": "macro F1",
    "auroc": "AUROC",
    "rank1": "Rank-1",
    "map": "mAP",
    "gallery": "gallery size",
    "same_scan_released_rank1": "Rank-1, same scan (as released)",
    "same_scan_released_map": "mAP, same scan (as released)",
}
NO_CORRELATION = "Chance of a correlation r is 0: no correlation."
TWIN_LABEL, CONNECTIVITY_LABEL = "random weights", "FC"
_TEXT = partial(Column, number=False)
_ENDED = {"FAILED": "failed", "KILLED": "killed", "RUNNING": "has not ended", "SCHEDULED": "has not begun"}
_NO_TEST = "selected, but has no test metrics"
_LOST, _COVERED = "a replicate is missing", "none, another trial was selected"


def all_tables(results: Results, made: Sequence[Comparison]) -> tuple[Table, ...]:
    """Every table that has rows, in the order of the page."""
    tables = (
        headline(results),
        results_table(results, made),
        compared(results, made),
        label_efficiency(results),
        failures(results),
        runs(results),
    )
    return tuple(table for table in tables if table.rows)


def headline(results: Results) -> Table:
    """Methods x tasks: mean ± sd of each task's primary metric with all labels; the last row is chance."""
    strong = {task.name: _outstanding(results, task) for task in results.tasks}
    columns = [_TEXT("Method"), *(Column(f"{task.name}, {metric_label(task)}", spread=True) for task in results.tasks)]
    rows = []
    for method in _main_methods(results):
        cells = (_replicated(results, task, method, strong=strong[task.name] == method) for task in results.tasks)
        rows.append((_method(method), *cells))
    chance = {task.name: results.chance(task.name) for task in results.tasks}
    rows.append((words("Chance"), *(number(level, minus(f"{level:.3f}")) for level in chance.values())))
    note = "Mean ± standard deviation over replicates (seeds). The best mean of each task is in bold"
    note += ", unless it is of one replicate." if results.single else "."
    if any(task.metric == "r" for task in results.tasks):
        note += f" {NO_CORRELATION}"
    return Table("headline", f"Primary metric, {_labels(results)}", tuple(columns), tuple(rows), note)


def results_table(results: Results, made: Sequence[Comparison], tasks: Sequence[TaskRow] | None = None) -> Table:
    """Task x method with all labels; columns that no row fills are left out. `tasks`: of these only."""
    chosen = results.tasks if tasks is None else tasks
    metrics = _metrics(results, chosen)
    columns = [_TEXT("Task"), _TEXT("Method"), *(Column(METRICS.get(one, one), spread=True) for one in metrics)]
    columns += [Column("Chance"), Column("Pairs")]
    for label in (TWIN_LABEL, CONNECTIVITY_LABEL):
        columns += [Column(f"p against {label}"), Column(f"p Holm against {label}")]
    columns += [Column("Test subjects seen in pretraining"), Column("Trainable parameters"), Column("Seconds")]
    rows = [
        _result_row(results, made, task, method, metrics)
        for task in chosen
        for method in _main_methods(results)
        if results.at(task.name, method)
    ]
    note = (
        "Mean ± standard deviation over replicates. Chance and p are of the primary metric: "
        + ", ".join(f"{task.name}: {metric_label(task)}" for task in chosen)
        + ". MAE and RMSE are in the target's unit. FC: functional connectivity. Seconds are of one training."
    )
    names = ", ".join(task.name for task in chosen) if tasks else "all tasks"
    return _without_empty(Table("results", f"Results, {names}, {_labels(results)}", tuple(columns), tuple(rows), note))


def compared(results: Results, made: Sequence[Comparison]) -> Table:
    """Every comparison: difference, t-test over replicates raw and by Holm, bootstrap over test subjects."""
    names = ("Pairs", "Difference", "p", "p Holm", "Bootstrap low", "Bootstrap high", "p bootstrap")
    columns = (*map(_TEXT, ("Task", "Metric", "Method", "Against")), *map(Column, names), _TEXT("Better"))
    rows = []
    for one in made:
        ids = [trial.run_id for name in (one.a, one.b) for trial in results.at(one.task, name)]
        cell = partial(number, runs=ids)
        values = (
            cell(one.pairs, str(one.pairs)),
            cell(one.difference, minus(f"{one.difference:+.{decimals(one.difference)}f}")),
            cell(one.p, p_text(one.p)),
            cell(one.p_holm, f"{p_text(one.p_holm)} {stars(one.p_holm)}"),
            *(cell(bound, minus(f"{bound:+.3f}")) for bound in (one.boot_low, one.boot_high)),
            cell(one.boot_p, p_text(one.boot_p)),
        )
        task, metric = words(one.task), words(METRICS.get(one.metric, one.metric))
        better = words(look(one.better).label if one.better else "")
        rows.append((task, metric, _method(one.a), _method(one.b), *values, better))
    note = (
        "Difference: method minus the other, mean over pairs. p: paired two-sided t-test over replicates. p Holm: "
        f"corrected for all {len(rows)} comparisons of this table. Stars: * below 0.05, ** below 0.01, *** below "
        "0.001. Bootstrap: the 95 % interval of the difference over test subjects."
    )
    return Table("comparisons", f"Comparisons, {_labels(results)}", columns, tuple(rows), note)


def label_efficiency(results: Results) -> Table:
    """Task x method x share of the training labels; no rows when only one share was tested."""
    shares = results.fractions
    columns = (
        *map(_TEXT, ("Task", "Metric", "Method")),
        *(Column(f"{100 * share:g} %", spread=True) for share in shares),
    )
    rows = tuple(
        (
            *(words(task.name), words(metric_label(task)), _method(method)),
            *(_replicated(results, task, method, fraction=share) for share in shares),
        )
        for task in results.tasks
        for method in results.methods(task.name)
    )
    note = "Smaller shares are nested in larger ones; the test subjects of a seed are the same for all shares."
    title = "Label efficiency: primary metric by share of the training labels"
    return Table("label_efficiency", title, columns, rows if len(shares) > 1 else (), note)


def failures(results: Results) -> Table:
    """Trials that failed, were killed or have not ended, and replicates of which no trial was tested."""
    tested = {_cell(trial) for trial in results.trials if trial.test}
    columns = (*map(_TEXT, ("Task", "Method")), Column("Labels"), Column("Seed"))
    columns += tuple(map(_TEXT, ("What happened", "Effect", "Error", "Run")))
    rows, listed = [], set()
    for trial in results.trials:
        what = _ENDED.get(trial.status) or (_NO_TEST if trial.selected and not trial.test else "")
        if what:
            listed.add(_cell(trial))
            effect = _COVERED if _cell(trial) in tested else _LOST
            rows.append((*_cells(trial), words(what), words(effect), words(trial.error), _run(trial.run_id)))
    seeds = {task.name: {trial.seed for trial in results.trials if trial.task == task.name} for task in results.tasks}
    begun = {(trial.task, trial.method, trial.fraction) for trial in results.trials}
    wanted = {(*cell, seed) for cell in begun for seed in seeds[cell[0]]}
    for task, method, fraction, seed in sorted(wanted - tested - listed):
        place = (words(task), _method(method), number(fraction, percent(fraction)), number(seed, str(seed)))
        rows.append((*place, words("no trial was tested"), words(_LOST), words(""), words("")))
    return Table("failed", "Failed and missing trials", columns, tuple(rows))


def runs(results: Results) -> Table:
    """Every trial with its id, and the primary metric on validation and test data."""
    tasks = {task.name: task for task in results.tasks}
    columns = (*map(_TEXT, ("Task", "Method")), Column("Labels"), Column("Seed"), _TEXT("Status"), _TEXT("Selected"))
    columns += (_TEXT("Metric"), Column("Validation"), Column("Test"), _TEXT("Run"))
    rows = []
    for trial in results.trials:
        task = tasks[trial.task]
        measured = [values.get(task.metric, math.nan) for values in (trial.validation, trial.test)]
        scores = (number(value, minus(f"{value:.{_digits(value)}f}"), [trial.run_id]) for value in measured)
        state = (words(trial.status.lower()), words("yes" if trial.selected else ""), words(metric_label(task)))
        rows.append((*_cells(trial), *state, *scores, _run(trial.run_id)))
    return Table("runs", "Every run", columns, tuple(rows))


def metric_label(task: TaskRow) -> str:
    """The primary metric's name as it is read; errors with the target's unit."""
    label = METRICS.get(task.metric, task.metric)
    return f"{label} ({task.unit})" if task.metric in ("mae", "rmse") and task.unit else label


def _result_row(
    results: Results, made: Sequence[Comparison], task: TaskRow, method: str, metrics: Sequence[str]
) -> tuple[Cell, ...]:
    trials, best = results.at(task.name, method), _outstanding(results, task)
    ids = [trial.run_id for trial in trials]
    cells = [words(task.name), _method(method)]
    for metric in metrics:
        cells.append(_replicated(results, task, method, metric, strong=(method, metric) == (best, task.metric)))
    chance = results.chance(task.name)
    cells.append(number(chance, minus(f"{chance:.3f}")))
    against = _by_reference(results, made, task, method)
    pairs = ", ".join(dict.fromkeys(str(one.pairs) for one in against.values() if one))
    cells.append(words(pairs))
    for one in against.values():
        both = [] if one is None else [*ids, *(trial.run_id for trial in results.at(task.name, one.b))]
        raw, holm = (math.nan, math.nan) if one is None else (one.p, one.p_holm)
        cells += [number(raw, p_text(raw), both), number(holm, f"{p_text(holm)} {stars(holm)}".strip(), both)]
    return (*cells, _overlap(trials), _mean({one.run_id: one.parameters for one in trials}, whole=True),
            _mean({one.run_id: one.seconds for one in trials}))  # fmt: skip


def _outstanding(results: Results, task: TaskRow) -> str:
    """The method that is set in bold: the best of several replicates; "" if there is one only."""
    return "" if task.name in results.single else results.best(task)


def _by_reference(
    results: Results, made: Sequence[Comparison], task: TaskRow, method: str
) -> Mapping[str, Comparison | None]:
    """The method's comparisons with its network without pretraining, and with connectivity."""
    asked = references_of(method, [one for one in results.methods(task.name) if results.at(task.name, one)])
    twin = next((one for one in asked if one != CONNECTIVITY), "")
    return {
        TWIN_LABEL: find(made, task.name, method, twin),
        CONNECTIVITY_LABEL: find(made, task.name, method, CONNECTIVITY),
    }


def _overlap(trials: Sequence[TrialRow]) -> Cell:
    """The mean share over the trials; unknown if it is for one of them."""
    ids, shares = [trial.run_id for trial in trials], [trial.overlap for trial in trials]
    known = [share for share in shares if share is not None]
    if len(known) < len(shares):
        return words("unknown", ids)
    mean = summary(known).mean
    return number(mean, percent(mean), ids)


def _mean(values: Mapping[str, float], *, whole: bool = False) -> Cell:
    logged = {run: value for run, value in values.items() if math.isfinite(value)}
    if not logged:
        return number(math.nan, NONE)
    mean = summary(list(logged.values())).mean
    return number(mean, grouped(mean) if whole or mean >= 10 else f"{mean:.2g}", list(logged))


def _replicated(
    results: Results,
    task: TaskRow,
    method: str,
    metric: str = "",
    *,
    fraction: float | None = None,
    strong: bool = False,
) -> Cell:
    metric = metric or task.metric
    finite = results.values(task.name, method, metric, fraction)
    trials = results.at(task.name, method, fraction)
    return replicated({one.run_id: finite[one.pair] for one in trials if one.pair in finite}, strong)


def _metrics(results: Results, tasks: Iterable[TaskRow]) -> list[str]:
    """Metrics of these tasks, the primary ones first, then those that this module names, then others."""
    names = {task.name for task in tasks}
    found = {metric for one in results.trials if one.task in names for metric in one.test}
    first = [task.metric for task in tasks]
    return list(dict.fromkeys([*(one for one in (*first, *METRICS) if one in found), *sorted(found)]))


def _main_methods(results: Results) -> tuple[str, ...]:
    return tuple(
        one for one in results.methods() if any(results.at(task.name, one) for task in results.tasks)
    )  # those that have all labels in some task


def _labels(results: Results) -> str:
    return "all training labels" if results.fraction == 1 else f"{percent(results.fraction)} of the training labels"


def _without_empty(table: Table) -> Table:
    return table.only(at for at in range(len(table.columns)) if any(row[at].text != NONE for row in table.rows))


def _method(method: str) -> Cell:
    return Cell(look(method).label, value=method)


def _cell(trial: TrialRow) -> tuple[str, str, float, int]:
    return trial.task, trial.method, trial.fraction, trial.seed


def _cells(trial: TrialRow) -> tuple[Cell, ...]:
    labels, seed = number(trial.fraction, percent(trial.fraction)), number(trial.seed, str(trial.seed))
    return words(trial.task), _method(trial.method), labels, seed


def _run(run_id: str) -> Cell:
    return Cell(run_id, value=run_id, runs=(run_id,))


def _digits(value: float) -> int:
    return 3 if math.isnan(value) else decimals(value)


def summary_text(results: Results, task: TaskRow, method: str) -> str:
    """The primary metric of a method in words, as `r 0.61 ± 0.02`, with its unit; "" if it has none."""
    values = results.values(task.name, method, task.metric)
    if not values:
        return ""
    unit = f" {task.unit}" if task.kind == REGRESSION and task.metric in ("mae", "rmse") and task.unit else ""
    return f"{METRICS.get(task.metric, task.metric)} {mean_sd(summary(list(values.values())))}{unit}"
