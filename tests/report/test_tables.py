"""Tables against the planted numbers, and comparisons against the statistics they are said to be."""

import csv
import io
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from scipy.stats import ttest_rel

from neurostorm.downstream.statistics.metrics import metric_of
from neurostorm.downstream.statistics.uncertainty import Comparison, holm, paired_bootstrap
from neurostorm.report import tables
from neurostorm.report.collect import collect
from neurostorm.report.compare import comparisons, find, unpaired
from neurostorm.report.methods import look, ordered, references_of
from neurostorm.report.results import Results
from neurostorm.report.table import Cell, Column, Table, decimals, mean_sd, p_text, replicated

pytestmark = pytest.mark.filterwarnings("ignore:.*noload:DeprecationWarning")  # MLflow's use of its database library
DRAWS = 20
SEEDS = range(3)


@pytest.fixture(scope="module")
def made(results: Results) -> tuple[Comparison, ...]:
    return comparisons(results, draws=DRAWS)


def read(table: Table) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO(table.csv())))


def logged(sweep: Any, task: str, method: str, fraction: float = 1.0, metric: str = "r") -> list[float]:
    """The numbers as MLflow has them, without the code under test."""
    ids = [sweep.run_of[task, method, fraction, seed] for seed in SEEDS]
    return [sweep.client.get_run(one).data.metrics[f"test/{metric}"] for one in ids]


def test_headline_holds_the_planted_means_and_spreads(results: Results, sweep: Any) -> None:
    rows = {row["Method"]: row for row in read(tables.headline(results))}
    assert list(rows) == ["full", "linear", "random_full", "random_linear", "fc", "constant", "Chance"]
    for method in ("full", "fc"):
        values = logged(sweep, "age", method)
        assert float(rows[method]["age, r"]) == pytest.approx(np.mean(values), abs=1e-12)
        assert float(rows[method]["age, r sd"]) == pytest.approx(np.std(values, ddof=1), abs=1e-12)
        assert rows[method]["age, r n"] == "3"
        assert set(sweep.run_of[task, method, 1.0, seed] for task in ("age", "state") for seed in SEEDS) <= set(
            rows[method]["runs"].split()
        )
    assert rows["fc"]["reid, Rank-1"] == "" and rows["fc"]["reid, Rank-1 n"] == "0"
    assert float(rows["Chance"]["state, balanced accuracy"]) == pytest.approx(1 / 3)


def test_the_best_of_each_task_stands_out(results: Results) -> None:
    table = tables.headline(results)
    strong = [(row[0].value, at) for row in table.rows for at, cell in enumerate(row) if cell.strong]
    assert strong == [("full", at) for at in range(1, 6)]


def test_results_have_every_metric_with_chance_overlap_size_and_cost(
    results: Results, made: tuple[Comparison, ...], sweep: Any
) -> None:
    rows = {(row["Task"], row["Method"]): row for row in read(tables.results_table(results, made))}
    assert len(rows) == 5 * 6 - 2
    row = rows["age", "linear"]
    assert float(row["MAE"]) == pytest.approx(np.mean(logged(sweep, "age", "linear", metric="mae")))
    assert row["Test subjects seen in pretraining"] == "0.25"
    assert float(row["Trainable parameters"]) == 1234567 and float(row["Seconds"]) == 61
    assert row["Pairs"] == "3" and row["Rank-1"] == ""
    twin, fc = (find(made, "age", "linear", reference) for reference in ("random_linear", "fc"))
    assert twin is not None and fc is not None
    assert float(row["p against random weights"]) == twin.p
    assert float(row["p Holm against FC"]) == fc.p_holm
    assert rows["age", "constant"]["p against FC"] == ""
    assert rows["age", "constant"]["Pairs"] == ""


def test_one_tasks_table_leaves_out_what_it_lacks(results: Results, made: tuple[Comparison, ...]) -> None:
    task = next(task for task in results.tasks if task.name == "reid")
    names = [column.name for column in tables.results_table(results, made, [task]).columns]
    assert names[2:4] == ["Rank-1", "mAP"]
    assert not any("FC" in name or name == "MAE" for name in names)


def test_comparisons_are_the_tests_they_are_said_to_be(
    results: Results, made: tuple[Comparison, ...], sweep: Any
) -> None:
    # 2 pretrained methods with a twin in each of 5 tasks, and with connectivity in the 4 tasks that have it.
    assert len(made) == 2 * 5 + 2 * 4
    one = find(made, "fluid", "full", "random_full")
    assert one is not None
    test = ttest_rel(logged(sweep, "fluid", "full"), logged(sweep, "fluid", "random_full"))
    assert (one.p, one.pairs) == (pytest.approx(test.pvalue), 3)
    assert [other.p_holm for other in made] == pytest.approx(holm([other.p for other in made]))


def test_the_bootstrap_pools_subjects_over_the_paired_replicates(
    results: Results, made: tuple[Comparison, ...]
) -> None:
    mine, theirs = (results.at("state", method) for method in ("full", "fc"))
    rows = [trial.predictions for trial in mine]
    others = [trial.predictions for trial in theirs]
    assert all(rows) and all(others)
    boot = paired_bootstrap(
        [subject for part in rows if part for subject in part.subjects],
        np.concatenate([part.target for part in rows if part]),
        np.concatenate([part.output for part in rows if part]),
        np.concatenate([part.output for part in others if part]),
        metric_of("balanced_accuracy", ("rest", "motor", "language")),
        draws=DRAWS,
        seed=0,
    )
    one = find(made, "state", "full", "fc")
    assert one is not None and (one.boot_low, one.boot_high, one.boot_p) == (boot.low, boot.high, boot.p)
    reid = find(made, "reid", "full", "random_full")
    assert reid is not None and np.isnan(reid.boot_p)  # it keeps embeddings, no predictions


def test_every_number_of_a_table_can_be_read_as_one(results: Results, made: tuple[Comparison, ...]) -> None:
    for table in tables.all_tables(results, made):
        numbers = {column.name for column in table.columns if column.number} - {"Pairs"}
        for row in read(table):
            [float(row[name]) for name in numbers if row[name] not in ("", "unknown")]


def test_label_efficiency_is_by_share(results: Results, sweep: Any) -> None:
    rows = {(row["Task"], row["Method"]): row for row in read(tables.label_efficiency(results))}
    values = logged(sweep, "age", "full", 0.25)
    assert float(rows["age", "full"]["25 %"]) == pytest.approx(np.mean(values))
    assert float(rows["age", "full"]["100 %"]) == pytest.approx(np.mean(logged(sweep, "age", "full")))
    assert len(rows) == 28


def test_failed_trials_are_listed_with_what_they_cost(results: Results, sweep: Any) -> None:
    (row,) = read(tables.failures(results))
    assert (row["Task"], row["Method"], row["Seed"], row["What happened"]) == ("age", "full", "0", "failed")
    assert row["Error"] == "CUDA out of memory <at step 3>" and row["Run"] == sweep.failed
    assert row["Effect"] == "none, another trial was selected"


def test_missing_replicates_are_listed(new_sweep: Callable[..., Any]) -> None:
    sweep = new_sweep(status="RUNNING")
    chosen = {"neurostorm.selected": "true"}
    for seed in SEEDS:
        sweep.trial(("age", "full", 1.0, seed), metrics={"test/r": 0.5}, tags=chosen)
    sweep.trial(("age", "fc", 1.0, 0), metrics={"test/r": 0.4}, tags=chosen)
    killed = sweep.trial(("age", "fc", 1.0, 1), metrics={}, status="KILLED")
    rows = read(tables.failures(collect(sweep.uri, sweep.parent)))
    found = {(row["Method"], row["Seed"], row["What happened"], row["Effect"], row["Run"]) for row in rows}
    assert found == {
        ("fc", "1", "killed", "a replicate is missing", killed),
        ("fc", "2", "no trial was tested", "a replicate is missing", ""),
    }


def test_replicates_on_other_splits_make_no_pair(new_sweep: Callable[..., Any]) -> None:
    sweep = new_sweep()
    for method, seed, split, value in (
        ("full", 0, "a", 0.5), ("full", 1, "b", 0.6), ("full", 2, "c", 0.9),
        ("fc", 0, "a", 0.4), ("fc", 1, "b", 0.55), ("fc", 2, "other", 0.1),
    ):  # fmt: skip
        sweep.trial(
            ("age", method, 1.0, seed),
            metrics={"test/r": value},
            tags={"neurostorm.selected": "true"},
            params={"split_sha256": split, "pretraining_overlap": "unknown"},
        )
    results = collect(sweep.uri, sweep.parent)
    (one,) = comparisons(results, draws=5)
    assert one.pairs == 2 and one.difference == pytest.approx(0.075)
    assert {(pair.seed, pair.split_sha256) for pair in unpaired(results, "age", "full", "fc")} == {
        (2, "c"), (2, "other"),
    }  # fmt: skip
    (row, _) = read(tables.results_table(results, [one]))
    assert row["Test subjects seen in pretraining"] == "unknown"


def test_every_run_is_listed(results: Results, sweep: Any) -> None:
    rows = read(tables.runs(results))
    assert {row["Run"] for row in rows} == {*sweep.run_of.values(), sweep.failed}


def test_references_are_the_twin_without_pretraining_and_connectivity() -> None:
    present = ("full", "linear", "random_linear", "fc", "motion", "new")
    assert references_of("linear", present) == ("random_linear", "fc")
    assert references_of("full", present) == ("random_linear", "fc")  # its own twin was not run
    assert references_of("new", present) == ("fc",)
    assert references_of("fc", present) == references_of("motion", present) == ()
    assert ordered(present) == ("new", "full", "linear", "random_linear", "fc", "motion")
    assert look("new").label == "new" and look("new") == look("new")


def test_markdown_and_csv_cannot_be_broken_by_a_name() -> None:
    cells = (Cell("a|b <i>*x*</i>\nc"), Cell("1", value=1.5))
    table = Table("t", "T", (Column("N", number=False), Column("V")), (cells,))
    line = table.markdown().splitlines()[4]
    assert line == "| a\\|b &lt;i&gt;\\*x\\*&lt;/i&gt; c | 1 |"
    assert next(csv.reader(io.StringIO(table.csv().split("\n", 1)[1]))) == ["a|b <i>*x*</i>\nc", "1.5", ""]
    with pytest.raises(ValueError, match="1 cells, there are 2 columns"):
        Table("t", "T", table.columns, ((cells[0],),))


@pytest.mark.parametrize(
    ("values", "text"),
    [
        ([0.5, 0.7], "0.600 ± 0.141"),
        ([0.5], "0.500"),
        ([12.34, 12.36], "12.3 ± 0.0"),
        ([-0.25, -0.25], "\u22120.250 ± 0.000"),
    ],
)
def test_means_are_written_with_their_spread(values: list[float], text: str) -> None:
    cell = replicated({str(at): value for at, value in enumerate(values)})
    assert cell.text == text and cell.spread is not None and cell.text == mean_sd(cell.spread)


def test_numbers_have_about_three_digits() -> None:
    assert [decimals(value) for value in (0.01, 1.0, 1.7, 12, 345, 6789)] == [3, 3, 2, 1, 0, 0]
    assert [p_text(p) for p in (0.0004, 0.0126, 1.0, float("nan"))] == ["<0.001", "0.013", "1.000", "\u2013"]
