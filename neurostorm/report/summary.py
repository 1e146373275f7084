"""The whole job: from a sweep's id to its report on disk and in MLflow.

    collect --> comparisons --> tables, figures, page --staging--> OUT/report.html, tables/, figures/, report.json
                                                                    `--> artifacts report/ of the parent run

OUT is the report's own folder. `report.json` says what belongs to it, so that a second report takes away what the first
one made and the second did not (a figure of a task that is gone), and nothing else.
"""

import json
import logging
from collections.abc import Collection
from dataclasses import dataclass
from datetime import UTC, datetime

from neurostorm.io.local_copies import local_copy, upload_folder
from neurostorm.io.paths import AnyPath
from neurostorm.report.collect import collect
from neurostorm.report.compare import DRAWS, comparisons
from neurostorm.report.figures import all_figures
from neurostorm.report.page import REPEAT, page
from neurostorm.report.results import ReportError, Results
from neurostorm.report.tables import all_tables
from neurostorm.runtime.progress import tracked
from neurostorm.tracking.mlflow_client import unhurried
from neurostorm.tracking.tracker import code_revision

logger = logging.getLogger(__name__)

PAGE, RECORD = "report.html", "report.json"
ARTIFACTS = "report"


@dataclass(frozen=True)
class ReportResult:
    """What was made.

    Attributes:
        html: the page.
        files: all files, relative to its folder.
        trials, tested: trials of the sweep, and those of them with test metrics.
        tables, figures: how many.
        single: tasks with one replicate.
    """

    html: AnyPath
    files: tuple[str, ...]
    trials: int
    tested: int
    tables: int
    figures: int
    single: tuple[str, ...] = ()

    def lines(self) -> list[str]:
        """The closing words."""
        return [
            f"{self.tested} of {self.trials} trials were tested; {self.tables} tables and {self.figures} figures",
            f"{self.html} is the report; CSV, Markdown, PNG and SVG lie beside it and in MLflow under {ARTIFACTS}/",
            *[f"one replicate of {', '.join(self.single)}: differences may be noise. {REPEAT}"] * bool(self.single),
        ]


def write_report(uri: str, parent_run_id: str, out: AnyPath, *, draws: int = DRAWS) -> ReportResult:
    """Report the sweep `parent_run_id` of the MLflow at `uri` into the folder `out`, and log it to that run.

    Args:
        uri: MLflow's tracking URI.
        parent_run_id: of the sweep.
        out: a folder for this report alone; files of an earlier one are replaced.
        draws: of each bootstrap over subjects.

    Raises:
        ReportError: MLflow holds no such sweep, nothing to report, or what contradicts itself; the folder has a
            `report.json` that is not ours.
        OSError: the folder cannot be written.
        MlflowException: the server does not answer or does not take the files.
    """
    with unhurried():
        return _write_report(uri, parent_run_id, out, draws)


def _write_report(uri: str, parent_run_id: str, out: AnyPath, draws: int) -> ReportResult:
    old = _files_of_the_last(out)
    logger.info("report: reading the sweep from MLflow")
    results = collect(uri, parent_run_id)
    logger.info("report: %d trials of %d tasks", len(results.trials), len(results.tasks))
    contents = _contents(results, draws)
    files = tuple(sorted([*contents, RECORD]))
    record = {"parent_run_id": parent_run_id, "uri": results.uri, "files": files}
    with upload_folder(out) as folder:
        for name, data in (contents | {RECORD: json.dumps(record, indent=1).encode()}).items():
            (folder / name).parent.mkdir(exist_ok=True)
            (folder / name).write_bytes(data)
    for name in old - set(files):
        (out / name).unlink(missing_ok=True)
    _log(uri, results.run_id, out, files)
    return ReportResult(
        html=out / PAGE,
        files=files,
        trials=len(results.trials),
        tested=sum(bool(one.test) for one in results.trials),
        tables=sum(name.endswith(".csv") for name in files),
        figures=sum(name.endswith(".svg") for name in files),
        single=results.single,
    )


def _contents(results: Results, draws: int) -> dict[str, bytes]:
    """Every file of the report but its record, by its name below the folder."""
    made = comparisons(results, draws=draws)
    logger.info("report: drawing figures and writing tables")
    built, drawn = all_tables(results, made), all_figures(results, made)
    now = datetime.now(UTC).isoformat(timespec="minutes")
    html = page(results, made, built, drawn, written=now, revision=code_revision(), draws=draws)
    contents = {PAGE: html.encode()}
    for table in built:
        contents[f"tables/{table.name}.csv"] = table.csv().encode()
        contents[f"tables/{table.name}.md"] = table.markdown().encode()
    for one in drawn:
        contents[f"figures/{one.name}.png"], contents[f"figures/{one.name}.svg"] = one.png, one.svg
    return contents


def _files_of_the_last(out: AnyPath) -> set[str]:
    """Names of the files that an earlier report put into `out`."""
    record = out / RECORD
    if not record.is_file():
        return set()
    try:
        files = json.loads(record.read_text())["files"]
        return {name for name in files if name.count("/") <= 1 and ".." not in name}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ReportError(f"{record} is not that of a report ({error!r}): give another folder, or delete it") from error


def _log(uri: str, run_id: str, out: AnyPath, files: Collection[str]) -> None:
    """Log the files to the run and take away what an earlier report logged and this one does not have."""
    from mlflow import MlflowClient
    from mlflow.store.artifact.artifact_repository_registry import get_artifact_repository

    client = MlflowClient(tracking_uri=uri)
    with local_copy(out, files) as folder:
        for name in tracked(files, len(files), "report: copy to MLflow", "file"):
            below = name.rpartition("/")[0]
            client.log_artifact(run_id, str(folder / name), f"{ARTIFACTS}/{below}".rstrip("/"))
    logged = [one for path in (ARTIFACTS, f"{ARTIFACTS}/tables", f"{ARTIFACTS}/figures")
              for one in client.list_artifacts(run_id, path) if not one.is_dir]  # fmt: skip
    stale = [one.path for one in logged if one.path.removeprefix(f"{ARTIFACTS}/") not in files]
    if stale:
        repository = get_artifact_repository(client.get_run(run_id).info.artifact_uri, tracking_uri=uri)
        for path in stale:
            repository.delete_artifacts(path)
