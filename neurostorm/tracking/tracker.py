"""MLflow for one run: parameters once, metrics and pictures by step, artifacts at the end. Rank 0 only.

    open_run()  ->  Tracker.metrics / image / artifact / tag  ->  close()
                       |-> observers, which see the metrics too
                       '-> AsyncLogger, a thread -> MlflowRun, on the server
                                                 '-> RUN/unsent, what the server did not take by the end

No call waits for the server except `flush` and `close`, and none fails because of it. Where to: an HTTP server by URI,
or SQLite, by default in the output folder if that is a local one. A run that resumes goes on in the MLflow run whose id
it kept. Ranks other than 0 hold a `Tracker` without a run, which does nothing: the loop needs no rank checks.
"""

import hashlib
import math
import os
import shlex
import subprocess
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from neurostorm.config.base import SQLITE
from neurostorm.io.paths import AnyPath, without_credentials
from neurostorm.tracking import unsent
from neurostorm.tracking.async_logger import AsyncLogger
from neurostorm.tracking.mlflow_client import artifact_root
from neurostorm.tracking.mlflow_run import RUN_FILE, MlflowRun
from neurostorm.tracking.unsent import ARTIFACT, END, IMAGE, METRICS, TAG, Entry

__all__ = ["RUN_FILE", "Tracker", "closing_words", "code_revision", "open_run", "tracking_uri"]

_FAILED_WAIT_S = 5.0  # for the server, of a run that failed and is to start again soon
_loggers: dict[str, AsyncLogger] = {}  # by server: the runs of a sweep share one, and its view of a server that is away
os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
os.environ.setdefault("MLFLOW_LOGGING_LEVEL", "WARNING")  # not each table that it makes in a new database
os.environ.setdefault("GIT_PYTHON_REFRESH", "quiet")


def tracking_uri(uri: str | None, output: AnyPath) -> str:
    """The MLflow URI to use: `uri`, or an SQLite file in the output folder.

    Raises ValueError for an output in an object store, where no database can lie, without a URI; and for a URI that
    holds credentials: it is kept with the run and printed.
    """
    if uri:
        try:
            return without_credentials(uri)
        except ValueError as error:
            raise ValueError(f"tracking.uri: {error}") from None
    if not isinstance(output, Path):
        raise ValueError(
            f"tracking.uri is not set, and MLflow's database cannot lie in run.output={output}: name a server, "
            "--tracking.uri http://HOST:5000, or a file that worker 0 reaches, --tracking.uri sqlite:////FOLDER/mlflow.db"
        )
    return f"{SQLITE}{output.absolute() / 'mlflow.db'}"


def code_revision() -> str:
    """The commit that runs (with `-dirty` when changed), or a hash of the package's sources outside a repository.

    Ray uploads a job's working directory without `.git`; whoever submits may say the commit in NEUROSTORM_REVISION.
    """
    if named := os.environ.get("NEUROSTORM_REVISION"):
        return named
    package = Path(__file__).resolve().parents[1]
    command = ["git", "-C", str(package), "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired):
        answer = None
    if answer is not None and answer.returncode == 0 and answer.stdout.strip():
        return answer.stdout.strip()
    digest = hashlib.sha256()
    for path in sorted(package.rglob("*.py")):
        digest.update(path.relative_to(package).as_posix().encode() + b"\0" + path.read_bytes())
    return f"source-{digest.hexdigest()[:12]}"


class Tracker:
    """One MLflow run, or none at all (`Tracker()`), behind the few calls that a job makes.

    Args:
        run: where to log; None does nothing.
        log: its thread.
        parent: of a trial, the sweep's tracker, whose `close` waits for this run as well.
    """

    def __init__(
        self, run: MlflowRun | None = None, log: AsyncLogger | None = None, parent: "Tracker | None" = None
    ) -> None:
        self._run, self._log, self._parent = run, log, parent
        self._runs = [run] if run is not None else []  # this one and its children
        self._observers: list[Callable[[dict[str, float], int], None]] = []
        if parent is not None:
            parent._runs += self._runs

    def __reduce__(self) -> tuple[type["Tracker"], tuple[()]]:
        """A copy in another process logs nothing, as one process writes; Ray Tune pickles what it calls back."""
        return Tracker, ()

    @property
    def run_id(self) -> str:
        """The id of the MLflow run; "" until the server has made it."""
        return "" if self._run is None else self._run.run_id

    @property
    def run(self) -> MlflowRun | None:
        """The MLflow run; None for a tracker that does nothing."""
        return self._run

    def observe(self, observer: Callable[[dict[str, float], int], None]) -> None:
        """Calls `observer(values, step)` with all metrics from now on."""
        self._observers.append(observer)

    def metrics(self, values: dict[str, float], step: int) -> None:
        """Logs `values` at `step`; names carry their unit, as `speed/clips_per_s`."""
        for observer in self._observers:
            observer(values, step)
        if values:
            numbers = {name: float(value) for name, value in values.items()}
            self._put(METRICS, {"values": numbers, "step": step, "time_ms": _now_ms()})

    def image(self, key: str, picture: NDArray[np.uint8], step: int) -> None:
        """Logs an RGB picture (H, W, 3) under `key`; the dashboard shows all steps of a key with a slider."""
        self._put(IMAGE, {"key": key, "step": step, "time_ms": _now_ms()}, picture)

    def artifact(self, place: AnyPath, folder: str | None = None) -> None:
        """Stores a file, or a folder with all it holds, with the run. It must stay as it is until it is sent."""
        if self._run is not None:
            home: Any = self._run.folder
            inside = home in place.parents
            path = place.relative_to(home).as_posix() if inside else str(place.absolute())
            self._put(ARTIFACT, {"path": path, "folder": folder})

    def tag(self, name: str, value: str) -> None:
        """Sets a tag of the run."""
        self._put(TAG, {"name": name, "value": value})

    def flush(self) -> int:
        """Waits until all is sent, or the server has been away for a minute; returns how many entries are not.

        These are then in RUN/unsent, and this process tries no more to send them.
        """
        return self._flush()

    def close(self, status: str = "FINISHED") -> None:
        """Ends the run as FINISHED, FAILED or KILLED; waits as `flush` (briefly if it failed), unless a parent does."""
        self._put(END, {"status": status, "time_ms": _now_ms()})
        if self._parent is None:
            self._flush(math.inf if status == "FINISHED" else _FAILED_WAIT_S)

    def facts(self) -> dict[str, Any]:
        """What a summary says of the MLflow run, and of its children.

        Returns:
            mlflow_run_id: "" if it could not be opened.
            mlflow_unsent: entries in RUN/unsent; mlflow_upload: the command that sends them, if there are any.
            mlflow_refused: entries that the server did not take.
            mlflow_lost: entries that were dropped for want of memory or disk.
        """
        waiting = sum(_unsent(run) for run in self._runs)
        command = f"python -m neurostorm upload {shlex.quote(str(self._run.folder))}" if self._run else ""
        return {
            "mlflow_run_id": self.run_id,
            "mlflow_unsent": waiting,
            "mlflow_refused": sum(run.refused for run in self._runs),
            "mlflow_lost": sum(run.lost for run in self._runs),
        } | ({"mlflow_upload": command} if waiting else {})

    def _put(self, kind: str, facts: dict[str, Any], picture: NDArray[np.uint8] | None = None) -> None:
        if self._run is not None and self._log is not None:
            self._log.put(self._run, Entry(kind, facts, picture))

    def _flush(self, within_s: float = math.inf) -> int:
        if self._log is None:
            return 0
        self._log.flush(within_s)
        self._log.release(self._runs)
        return sum(_unsent(run) for run in self._runs)


def closing_words(facts: Mapping[str, Any]) -> list[str]:
    """What a job says at its end of what is not in MLflow, from `Tracker.facts`; nothing if all is."""
    lines = []
    if waiting := facts.get("mlflow_unsent"):
        lines.append(
            f"  {waiting} entries are not in MLflow, which did not take them. Send them: {facts['mlflow_upload']}"
        )
    if refused := facts.get("mlflow_refused"):
        lines.append(f"  MLflow refused {refused} entries; the log says why for the first")
    if lost := facts.get("mlflow_lost"):
        lines.append(f"  {lost} entries for MLflow were dropped: memory or disk was full while it did not answer")
    return lines


def open_run(
    folder: AnyPath,
    *,
    uri: str,
    experiment: str,
    name: str,
    parameters: dict[str, Any],
    tags: dict[str, str],
    artifacts: AnyPath,
    parent: Tracker | None = None,
) -> Tracker:
    """The MLflow run of the run folder `folder`: the one it began earlier, or a new one. Does not wait for the server.

    The run's id and server are kept in `folder/mlflow.json`, so that a restarted run continues the same MLflow run
    even if it stopped before its first checkpoint. A file that names another server is ignored and a new run begins.
    A run that was deleted in MLflow is replaced by a new one.

    Args:
        folder: of the run, which exists.
        uri: from `tracking_uri`.
        experiment: its name; made if it is missing.
        name: of the MLflow run.
        parameters, tags: of a new run.
        artifacts: where a new experiment keeps its artifacts unless an HTTP server decides: OUTPUT/artifacts, the same
            for every run of an output folder, however deep its own folder lies.
        parent: of a trial, the sweep's tracker.
    """
    import mlflow.tracking  # noqa: F401  here and not in the thread, while DeepSpeed is imported (`engine`)

    run = MlflowRun(
        folder, uri, experiment, name, {key: str(value) for key, value in parameters.items()}, tags,
        artifact_root(artifacts, uri), None if parent is None else parent.run,
    )  # fmt: skip
    log = _loggers[uri] = _loggers.get(uri) or AsyncLogger(f"MLflow at {uri}")
    log.open(run, run.backlog())
    return Tracker(run, log, parent)


def _unsent(run: MlflowRun) -> int:
    """Entries in the run's folder."""
    try:
        return sum(part.count for part in unsent.parts_in(run.folder))
    except OSError:
        return 0


def _now_ms() -> int:
    return int(time.time() * 1000)
