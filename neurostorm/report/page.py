"""The page: what was asked, the answer first, then the evidence, then how it was tested and what is missing.

    Results, Comparisons, Tables, Drawn --what to say--> templates/report.html (parts.html, style.css) --> one file

The file needs no other: no script, no font, no address outside but MLflow's own.
"""

from base64 import b64encode
from collections.abc import Mapping, Sequence
from functools import cache, partial
from typing import Any
from urllib.parse import quote

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from neurostorm.downstream.statistics.metrics import chance_text, higher_is_better
from neurostorm.downstream.statistics.uncertainty import Comparison, stars
from neurostorm.report.collect import without_credentials
from neurostorm.report.compare import find, unpaired
from neurostorm.report.figures.drawing import Drawn
from neurostorm.report.methods import CONNECTIVITY, look, references_of
from neurostorm.report.results import CLASSIFICATION, REGRESSION, Results, TaskRow
from neurostorm.report.table import Table, decimals, minus, p_text, percent
from neurostorm.report.tables import NO_CORRELATION, metric_label, results_table, summary_text

_SAID_ABOVE = ("Task", "Chance")  # of a table that is about one task
REPEAT = "Start the sweep again with --replicates 5; what is done is kept"
_TABLE_COLUMNS = 8  # of a table of means, beside its first: more are shown as several tables
_GALLERY = ("tasks", "phenotypes", "identification", "label_efficiency", "radar")


def page(
    results: Results,
    made: Sequence[Comparison],
    built: Sequence[Table],
    drawn: Sequence[Drawn],
    *,
    written: str,
    revision: str,
    draws: int,
) -> str:
    """The report as one file of HTML.

    Args:
        results: the sweep.
        made: its comparisons.
        built: its tables, as `tables.all_tables` orders them.
        drawn: its figures.
        written: when the report was made.
        revision: of the code that made the report.
        draws: of the bootstrap.
    """
    experiment_of = {one.run_id: one.experiment_id for one in results.trials}
    return (
        _environment()
        .get_template("report.html")
        .render(
            address_of=partial(_address, results.uri, experiment_of),
            parts_of=_parts,
            name=results.name,
            facts=_facts(results, written=written, revision=revision),
            warnings=warnings(results, made),
            glance=glance(results, made),
            notes=notes(results, made, draws),
            tables={one.name: one for one in built},
            gallery=[one for one in drawn if one.name in _GALLERY and not one.task],
            tasks=[_task(results, made, task, drawn) for task in results.tasks],
            settings=[(name, without_credentials(value)) for name, value in results.parameters.items()],
        )
    )


def glance(results: Results, made: Sequence[Comparison]) -> list[str]:
    """One sentence per task: the best method, chance, and the best method that has references against these."""
    lines = []
    for task in results.tasks:
        best = results.best(task)
        if not best:
            lines.append(f"{task.name}: no method was tested with {percent(results.fraction)} of the labels.")
            continue
        chance = results.chance(task.name)
        known = f" (chance {chance_text(task.metric, chance)})" if chance == chance else ""
        single = task.name in results.single
        order = "best" if not single else "highest" if higher_is_better(task.metric) else "lowest"
        doubt = ", in one replicate, so that differences may be noise" if single else ""
        lines.append(f"{task.name}: {order} is {look(best).label}, {summary_text(results, task, best)}{known}{doubt}."
                     + _against(results, made, task))  # fmt: skip
    return lines


def warnings(results: Results, made: Sequence[Comparison]) -> list[str]:
    """What a reader must know before the first number."""
    told = []
    if results.status != "FINISHED":
        told.append(f"The sweep's run is {results.status}, not FINISHED: numbers may be missing or change.")
    few = min(one.pairs for one in made) if made else 0
    if made and few < 2:
        told.append("Some comparisons have fewer than two pairs, so no test over replicates can be made.")
    if results.single:
        names = ", ".join(results.single)
        told.append(f"One replicate of {names}: differences between methods may be noise. {REPEAT}.")
    tested = [one for one in results.trials if one.test]
    if any(one.overlap is None for one in tested):
        told.append(
            "It is not known how many of the test subjects of some trials pretraining saw, because the model's files "
            "do not name its subjects (see the task tables)."
        )
    seen = [one for one in tested if one.overlap]
    if seen:
        most = max(one.overlap or 0.0 for one in seen)
        told.append(
            f"Pretraining saw up to {percent(most)} of the test subjects of some trials (see the task tables), so "
            "their scores may be too high. To avoid it, keep the people to be tested out of pretraining: leave their "
            "dataset out with --data.weights '{DATASET: 0}', and evaluate on that dataset alone (a store of its own, "
            "or a table of its subjects as --labels)."
        )
    apart = sorted({one.task for one in made if unpaired(results, one.task, one.a, one.b)})
    if apart:
        told.append(f"In {', '.join(apart)} some methods had different splits under the same seed; these make no pair.")
    return told


def notes(results: Results, made: Sequence[Comparison], draws: int) -> list[str]:
    """How the numbers came about: protocol, tests, families, bootstrap."""
    pairs = sorted({one.pairs for one in made})
    told = [
        "A replicate is one seed: its split of the subjects, its initial weights and its order of training. Numbers "
        "are means ± standard deviations (divisor n minus 1) over replicates.",
        "For every task, method, share of labels and seed, the trial with the best validation metric was selected. "
        "Test data were read once, by the selected trial, after the selection.",
    ]
    if made:
        span = f"{pairs[0]}" if len(pairs) == 1 else f"{pairs[0]} to {pairs[-1]}"
        told += [
            f"p: paired two-sided t-test over replicates of the same seed and split, {span} pairs. It asks whether "
            "other seeds would say the same; replicates that share test subjects are not independent of one another.",
            f"p Holm: Holm's step-down correction; the family is all {len(made)} comparisons of this report, over all "
            "tasks. What is compared was fixed before: each method against the same network without pretraining, and "
            "against functional connectivity.",
            f"Subject bootstrap: predictions for the same test units are pooled over the paired replicates, subjects "
            f"are drawn with all their rows, {draws} times; the interval is the middle 95 % of the differences. It "
            "asks whether other people would say the same. It is not corrected by Holm.",
        ]
    told.append(
        "Chance: what guessing reaches on average; for mean absolute error and the like it depends on the target, and "
        "the method “Mean or majority” stands for it. "
        f"{NO_CORRELATION}"
    )
    if results.fraction != 1:
        told.append(f"No trial had all training labels; the main tables are of {percent(results.fraction)} of them.")
    return told


def _facts(results: Results, *, written: str, revision: str) -> list[tuple[str, str]]:
    """What was run and reported, by name."""
    return [
        ("Tasks", ", ".join(f"{task.name} ({task.kind})" for task in results.tasks)),
        ("Methods", ", ".join(look(one).label for one in results.methods())),
        ("Seeds", ", ".join(map(str, sorted({one.seed for one in results.trials if one.test})))),
        ("Training labels", ", ".join(map(percent, results.fractions))),
        ("Trials", _counts(results)),
        ("Sweep", f"begun {moment(results.date)}, run {results.run_id} in {results.uri}"),
        ("Report", f"written {moment(written)}"),
        ("Code", _code(results.revision, revision)),
    ]


def moment(iso: str) -> str:
    """`2026-11-25 16:30 UTC` of an ISO 8601 time in UTC."""
    return iso.replace("T", " ").replace("+00:00", " UTC")


def _code(sweep: str, report: str) -> str:
    if not sweep or sweep == report:
        return report if sweep else f"report {report}; the sweep did not say"
    return f"sweep {sweep}, report {report}"


def _counts(results: Results) -> str:
    count = len(results.trials)
    tested = sum(bool(one.test) for one in results.trials)
    failed = sum(one.status in ("FAILED", "KILLED") for one in results.trials)
    return f"{count}, of which {tested} were selected and tested and {failed} failed"


def _against(results: Results, made: Sequence[Comparison], task: TaskRow) -> str:
    """How the best method that has references does against these, in a sentence; "" if there is none."""
    present = [one for one in results.methods(task.name) if results.at(task.name, one)]
    asking = tuple(one for one in present if references_of(one, present))
    best = results.best(task, asking)
    parts = []
    for reference in references_of(best, present):
        one = find(made, task.name, best, reference)
        if one is not None and one.pairs:
            name = "functional connectivity" if reference == CONNECTIVITY else look(reference).label.lower()
            test = f"p {p_text(one.p_holm)} by Holm" if stars(one.p_holm) else "no p"
            change = minus(f"{one.difference:+.{decimals(one.difference)}f}")
            parts.append(f"{change} against {name} ({test})")
    if not parts:
        return ""
    subject = "It is" if best == results.best(task) else f"{look(best).label} is"
    return f" {subject} {'; '.join(parts)}."


def _task(results: Results, made: Sequence[Comparison], task: TaskRow, drawn: Sequence[Drawn]) -> dict[str, Any]:
    """One task: what it is, its table without the columns that say so, its figures."""
    table, chance = results_table(results, made, [task]), results.chance(task.name)
    units = sorted({len(one.predictions.units) for one in results.trials if one.task == task.name and one.predictions})
    facts = [
        ("Question", f"{task.kind}, primary metric {metric_label(task)}"),
        ("Target", f"in {task.unit}" if task.kind == REGRESSION and task.unit else ""),
        ("Classes", ", ".join(task.classes) if task.kind == CLASSIFICATION else ""),
        ("Chance", chance_text(task.metric, chance, 3) if chance == chance else "depends on the target"),
        ("Test units per replicate", " to ".join(dict.fromkeys(map(str, units[:1] + units[-1:])))),
    ]
    return {
        "name": task.name,
        "facts": facts,
        "table": table.only(at for at, column in enumerate(table.columns) if column.name not in _SAID_ABOVE),
        "figures": [one for one in drawn if one.task == task.name],
    }


@cache
def _environment() -> Environment:
    """The templates; every value that they print is escaped, and a name that they lack is an error."""
    environment = Environment(
        loader=PackageLoader("neurostorm.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["base64"] = lambda data: b64encode(data).decode()
    environment.globals["classes"] = _classes
    return environment


def _classes(**kinds: bool) -> Markup:
    """The names of those `kinds` that hold, as an attribute. A macro would take most of the time of a long table."""
    held = " ".join(name for name, holds in kinds.items() if holds)
    return Markup(f' class="{held}"') if held else Markup("")


def _address(uri: str, experiment_of: Mapping[str, str], run_id: str) -> str:
    """MLflow's page of a run; "" unless MLflow (`uri`, without credentials) is an HTTP server and so has pages."""
    if not uri.startswith(("http://", "https://")):
        return ""
    experiment = quote(experiment_of.get(run_id, ""), safe="")
    return f"{uri.rstrip('/')}/#/experiments/{experiment}/runs/{quote(run_id, safe='')}"


def _parts(table: Table) -> list[Table]:
    """The table; if it has more columns of means than the page is wide, several with the first column in each."""
    width = len(table.columns)
    if width <= _TABLE_COLUMNS + 1 or not all(column.spread for column in table.columns[1:]):
        return [table]
    starts = range(1, width, _TABLE_COLUMNS)
    return [table.only([0, *range(at, min(width, at + _TABLE_COLUMNS))]) for at in starts]
