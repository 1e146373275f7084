"""The report as a whole: files, the page, what is in MLflow afterwards, and that it can be made again."""

import csv
import io
import re
import xml.etree.ElementTree as ET
from collections.abc import Callable
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from neurostorm.report import page as pages
from neurostorm.report.compare import comparisons
from neurostorm.report.figures.curves import normalised
from neurostorm.report.figures.scores import identification_bars, phenotype_bars, task_bars
from neurostorm.report.results import ReportError, Results
from neurostorm.report.summary import ReportResult, write_report
from neurostorm.report.tables import all_tables

pytestmark = pytest.mark.filterwarnings("ignore:.*noload:DeprecationWarning")  # MLflow's use of its database library
FIGURES = {
    "tasks", "phenotypes", "identification", "label_efficiency", "radar",
    "confusion_b-sex-co-b", "confusion_state", "scatter_age", "scatter_fluid",
}  # fmt: skip
TABLES = {"headline", "results", "comparisons", "label_efficiency", "failed", "runs"}


class Page(HTMLParser):
    """What a browser would see: visible text, tags, addresses."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.words, self.tags, self.addresses = "", [], []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.tags.append(tag)
        self.addresses += [value for name, value in attrs if name in ("src", "href")]

    def handle_data(self, data: str) -> None:
        self.words += data


@pytest.fixture(scope="module")
def report(sweep: Any, tmp_path_factory: pytest.TempPathFactory) -> ReportResult:
    return write_report(sweep.uri, sweep.parent, tmp_path_factory.mktemp("out") / "report", draws=10)


@pytest.fixture(scope="module")
def html(report: ReportResult) -> str:
    assert isinstance(report.html, Path)
    return report.html.read_text()


def page_of(results: Results, **changes: Any) -> str:
    """The page without figures, which is quick."""
    results = replace(results, **changes)
    made = comparisons(results, draws=2)
    return pages.page(results, made, all_tables(results, made), (), written="now", revision="def", draws=2)


def test_every_file_is_there_and_counted(report: ReportResult) -> None:
    folder = report.html.parent
    assert isinstance(folder, Path)
    there = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    assert there == set(report.files)
    assert {Path(name).stem for name in there if name.startswith("tables/")} == TABLES
    assert {Path(name).stem for name in there if name.startswith("figures/")} == FIGURES
    assert (report.trials, report.tested, report.tables, report.figures) == (169, 168, 6, 9)
    assert "168 of 169" in report.lines()[0] and str(report.html) in report.lines()[1]


@pytest.mark.parametrize("name", sorted(FIGURES))
def test_figures_are_pictures_in_both_forms(report: ReportResult, name: str) -> None:
    folder = report.html.parent / "figures"
    assert ET.parse(folder / f"{name}.svg").getroot().tag.endswith("svg")
    pixels = np.asarray(Image.open(folder / f"{name}.png").convert("L"))
    assert pixels.shape[1] > 700 and 0.01 < (pixels < 250).mean() < 0.7
    border = np.concatenate([pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]])
    assert (border == 255).all()  # nothing is cut off


def test_the_page_has_every_run_of_a_reported_number(html: str, sweep: Any) -> None:
    for run_id in (*sweep.run_of.values(), sweep.failed, sweep.parent):
        assert run_id in html


def test_the_page_needs_nothing_from_outside(html: str) -> None:
    assert "http://" not in html and "https://" not in html
    seen = Page(html)
    assert not {"script", "link", "iframe"} & set(seen.tags)
    assert all(address.startswith(("#", "data:image/svg+xml;base64,")) for address in seen.addresses)
    assert seen.tags.count("img") == len(FIGURES)


def test_all_text_is_escaped(html: str) -> None:
    assert "<b>" not in html and "<script" not in html and "<at step 3>" not in html
    words = Page(html).words
    assert "<b>sex & co</b>" in words and "<script>alert(1)</script>" in words and "<at step 3>" in words


def test_tags_close_in_the_order_they_open(html: str) -> None:
    """Also what `<div>` in a cell or a heading would break: the page is well-formed XML but for void elements."""
    text = re.sub(r"<(meta|img)([^>]*)>", r"<\1\2/>", html.removeprefix("<!DOCTYPE html>\n"))
    assert ET.fromstring(text).tag == "html"


def test_the_page_says_how_it_was_tested(html: str, report: ReportResult) -> None:
    words = Page(html).words
    rows = list(csv.reader(io.StringIO((report.html.parent / "tables" / "comparisons.csv").read_text())))
    assert f"the family is all {len(rows) - 1} comparisons" in words
    assert "3 pairs" in words and "Test data were read once" in words
    assert "Pretraining saw up to 25" in words and "abc123" in words


def test_the_warning_of_overlap_says_how_to_avoid_it(html: str) -> None:
    words = Page(html).words
    assert "leave their dataset out with --data.weights '{DATASET: 0}', and evaluate on that dataset alone" in words


def test_chance_of_a_correlation_explains_itself(results: Results, report: ReportResult) -> None:
    said = "\n".join(pages.glance(results, comparisons(results, draws=2)))
    assert "age: best is Full fine-tuning, r " in said and "(chance 0: no correlation)." in said
    assert "(chance 0.33)" in said
    assert "Chance of a correlation r is 0: no correlation." in (report.html.parent / "tables/headline.md").read_text()


def test_nothing_of_one_replicate_is_called_best_without_a_caution(results: Results) -> None:
    one = replace(results, trials=tuple(trial for trial in results.trials if trial.seed == 0))
    made = comparisons(one, draws=2)
    said = pages.glance(one, made)
    assert all("best is" not in line and "in one replicate, so that differences may be noise" in line for line in said)
    assert any("One replicate of <b>sex & co</b>, age" in line and "--replicates 5" in line
               for line in pages.warnings(one, made))  # fmt: skip
    assert not [cell for table in all_tables(one, made) for row in table.rows for cell in row if cell.strong]
    assert not [line for line in pages.warnings(results, comparisons(results, draws=2)) if "One replicate" in line]
    lines = ReportResult(Path("report.html"), (), 1, 1, 1, 1, single=one.single).lines()
    assert "differences may be noise. Start the sweep again with --replicates 5" in lines[-1]


def test_links_lead_to_a_server_and_carry_no_password(results: Results) -> None:
    trial = results.at("age", "full")[0]
    html = page_of(results, uri="http://mlflow.lab:5000/", status="RUNNING")
    address = f"http://mlflow.lab:5000/#/experiments/{trial.experiment_id}/runs/{trial.run_id}"
    assert address in Page(html).addresses
    others = [one for one in Page(html).addresses if one.startswith("http")]
    assert all(one.startswith("http://mlflow.lab:5000/#/experiments/") for one in others)
    assert "run is RUNNING, not FINISHED" in html
    hidden = page_of(results, parameters={"tracking.uri": "https://me:secret@host"})
    assert "secret" not in hidden


def test_a_table_of_many_tasks_is_several_tables_with_the_methods_in_each(results: Results) -> None:
    (age,) = (task for task in results.tasks if task.name == "age")
    tasks = tuple(replace(age, name=f"age{number:02d}") for number in range(10))
    trials = tuple(replace(one, task=task.name) for task in tasks for one in results.trials if one.task == "age")
    html = page_of(results, tasks=tasks, trials=trials)
    section = re.sub(r"<(meta|img)([^>]*)>", r"<\1\2/>", html[html.index("<main>") : html.index("</section>")])
    found = ET.fromstring(section.removeprefix("<main>") + "</section>").findall("table")
    names = [[head.text for head in table.iter("th")] for table in found]
    assert names == [["Method", *(f"{one.name}, r" for one in tasks[:8])], ["Method", "age08, r", "age09, r"]]
    cells = [[cell.get("class") for cell in table.findall("tbody/tr")[1]] for table in found]
    assert cells[0] == ["words", *["n left"] * 4, *["n"] * 4] and cells[1] == ["words", "n left", "n"]


def test_the_report_is_an_artifact_of_the_sweep(report: ReportResult, sweep: Any) -> None:
    logged = {
        one.path
        for folder in ("report", "report/tables", "report/figures")
        for one in sweep.client.list_artifacts(sweep.parent, folder)
        if not one.is_dir
    }
    assert logged == {f"report/{name}" for name in report.files}


def test_a_second_report_replaces_the_first_and_nothing_else(new_sweep: Callable[..., Any], tmp_path: Path) -> None:
    sweep = new_sweep(name="small")
    chosen = {"neurostorm.selected": "true"}
    sweep.trial(("age", "full", 1.0, 0), metrics={"test/r": 0.5}, tags=chosen)
    gone = sweep.trial(("age", "full", 0.25, 0), metrics={"test/r": 0.4}, tags=chosen)
    first = write_report(sweep.uri, sweep.parent, tmp_path, draws=5)
    (tmp_path / "figures" / "mine.png").write_bytes(b"mine")
    assert "tables/label_efficiency.csv" in first.files
    sweep.client.delete_run(gone)
    second = write_report(sweep.uri, sweep.parent, tmp_path, draws=5)
    lost = set(first.files) - set(second.files)
    ends = ("tables", "csv"), ("tables", "md"), ("figures", "png"), ("figures", "svg")
    assert lost == {f"{folder}/label_efficiency.{end}" for folder, end in ends}
    assert not any((tmp_path / name).exists() for name in lost)
    assert (tmp_path / "figures" / "mine.png").read_bytes() == b"mine"
    assert gone not in (tmp_path / "report.html").read_text()
    logged = [one.path for one in sweep.client.list_artifacts(sweep.parent, "report/figures")]
    assert logged == ["report/figures/tasks.png", "report/figures/tasks.svg"]


def test_a_record_that_is_not_ours_is_refused(sweep: Any, tmp_path: Path) -> None:
    (tmp_path / "report.json").write_text('{"files": 3}')
    with pytest.raises(ReportError, match=r"report\.json is not that of a report"):
        write_report(sweep.uri, sweep.parent, tmp_path, draws=5)


def test_bars_stand_at_the_means_with_a_dot_for_each_replicate(results: Results) -> None:
    (drawn,) = task_bars(results, ())
    axis = next(one for one in drawn.figure.axes if one.get_title(loc="left") == "age")
    heights = [bar.get_height() for bar in axis.patches]
    methods = results.methods("age")
    assert heights == pytest.approx([results.mean("age", method, "r") for method in methods])
    assert [len(dots.get_offsets()) for dots in axis.collections if len(dots.get_offsets()) > 1] == [3] * len(methods)
    assert axis.get_ylim()[0] == 0


def test_chance_of_map_follows_from_the_gallery(results: Results) -> None:
    (drawn,) = identification_bars(results)
    lines = [axis.lines[-1].get_ydata()[0] for axis in drawn.figure.axes]
    assert lines[0] == pytest.approx(1 / 20)
    assert lines[1] == pytest.approx(sum(1 / rank for rank in range(1, 21)) / 20)


def test_the_radar_has_chance_at_nought_and_the_best_at_one(results: Results) -> None:
    for task in results.tasks:
        assert normalised(results, task, "full") == pytest.approx(1)
        middle = (results.mean(task.name, "linear", task.metric) - results.chance(task.name)) / (
            results.mean(task.name, "full", task.metric) - results.chance(task.name)
        )
        assert normalised(results, task, "linear") == pytest.approx(middle)


def test_a_figure_without_data_is_not_made(results: Results) -> None:
    one = replace(results, tasks=tuple(task for task in results.tasks if task.name == "age"))
    assert phenotype_bars(one) == [] and identification_bars(one) == []
