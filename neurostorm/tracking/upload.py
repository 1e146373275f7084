"""Sends what a run could not log to MLflow: `python -m neurostorm upload RUN_FOLDER`.

    RUN/unsent/*  (and those of a sweep's trials below)  --> MLflow --> deleted; mlflow.json and summary.json updated

It can be interrupted and repeated: what is sent is deleted, and what was sent twice counts once. Run it when the job
has ended; a job that resumes sends these entries itself.
"""

import argparse
import json
import logging
import sys
from collections.abc import Sequence

from neurostorm.io.atomic import atomic_write
from neurostorm.io.paths import AnyPath, list_files, to_path
from neurostorm.tracking import unsent
from neurostorm.tracking.async_logger import AsyncLogger
from neurostorm.tracking.mlflow_run import MlflowRun
from neurostorm.tracking.unsent import ARTIFACT, Entry

SUMMARY = "summary.json"
_PATIENCE_S = 20.0  # for a server that does not answer


def main(argv: Sequence[str] | None = None, patience_s: float = _PATIENCE_S) -> int:
    """Returns 0 when nothing is left, 1 when something is, with the reason on stderr; 2 for a wrong folder."""
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    parser = argparse.ArgumentParser(prog="neurostorm upload", description=__doc__,
                                     allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    parser.add_argument("run_folder", help="the folder OUTPUT/NAME of the run, local or in an object store")
    parser.add_argument("--uri", help="MLflow's address, if it is another one now; default: that of the run")
    options = parser.parse_args(argv)
    folder = to_path(options.run_folder)
    try:
        folders = waiting(folder)
        if not folders and not folder.is_dir():
            raise FileNotFoundError(f"{folder} is not there: give the folder OUTPUT/NAME of a run")
        log = AsyncLogger("MLflow", patience_s=patience_s)
        left = sum(upload(each, log, options.uri) for each in folders)
    except (OSError, ValueError, KeyError) as error:
        print(f"neurostorm.tracking.upload: {error}", file=sys.stderr)
        return 2
    if left:
        print(f"{left} entries of {folder} are still not in MLflow: start the same command again", file=sys.stderr)
        return 1
    print(f"{folder}: all is in MLflow" if folders else f"{folder}: nothing waits to be sent to MLflow")
    return 0


def waiting(folder: AnyPath) -> list[AnyPath]:
    """The run folder and those below it that have unsent entries, a sweep before its trials."""
    found = {name.removesuffix(f"{unsent.FOLDER}/{unsent.RUN}").rstrip("/")
             for name, _ in list_files(folder) if f"/{name}".endswith(f"/{unsent.FOLDER}/{unsent.RUN}")}  # fmt: skip
    return [folder / name if name else folder for name in sorted(found, key=lambda name: (name.count("/"), name))]


def upload(folder: AnyPath, log: AsyncLogger, uri: str | None = None) -> int:
    """Sends the entries of one run folder.

    Args:
        folder: of the run.
        log: sends them; how patient it is with a server that does not answer is up to it.
        uri: of the server; default: the one in RUN/unsent/run.json.

    Returns:
        How many entries are left.

    Raises:
        OSError, ValueError, KeyError: RUN/unsent cannot be read.
    """
    run = MlflowRun.of_folder(folder, uri)
    log.open(run, run.backlog())
    log.flush()
    if run.run_id and _update_summary(folder, run):
        log.put(run, Entry(ARTIFACT, {"path": SUMMARY, "folder": None}))
        log.flush()
    log.release([run])
    left = sum(part.count for part in unsent.parts_in(folder))
    if run.run_id:
        print(f"{folder}: MLflow {run.uri}, run {run.run_id}" + (f"; {run.refused} refused" if run.refused else ""))
    return left


def _update_summary(folder: AnyPath, run: MlflowRun) -> bool:
    """Writes into the run's summary.json that its entries are sent; False without one, or with entries left."""
    if unsent.parts_in(folder) or not (folder / SUMMARY).is_file():
        return False
    summary = json.loads((folder / SUMMARY).read_text())
    if "mlflow_unsent" not in summary:
        return False
    summary |= {"mlflow_run_id": run.run_id, "mlflow_unsent": 0}
    summary.pop("mlflow_upload", None)
    atomic_write(folder / SUMMARY, json.dumps(summary, indent=1).encode())
    return True


if __name__ == "__main__":
    sys.exit(main())
