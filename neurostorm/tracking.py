"""MLflow for one run: parameters once, metrics and pictures by step, artifacts at the end. Rank 0 only.

    open_run()  ->  Tracker.metrics / image / artifact  ->  close()
                       ├─> observers, which see the metrics too
                       └─> in_background(): sent by a thread, which waits for a server that is away

Where to: an HTTP server by URI, or SQLite, by default in the output folder if that is a local one. A run that resumes
goes on in the MLflow run whose id it kept. Ranks other than 0 hold a `Tracker` without a run, which does nothing: the
loop needs no rank checks.
"""

import hashlib
import json
import os
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from neurostorm.config_base import SQLITE
from neurostorm.outbox import Outbox
from neurostorm.places import Place, no_secret, replace
from neurostorm.staging import fetched

RUN_FILE = "mlflow.json"  # in a run's folder: the id of its MLflow run, and the server
_PARAMETERS_PER_CALL = 100  # MLflow takes no more
_FAREWELL_S = 5.0  # that a run which failed waits for its server
os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
os.environ.setdefault("MLFLOW_LOGGING_LEVEL", "WARNING")  # not each table that it makes in a new database
os.environ.setdefault("GIT_PYTHON_REFRESH", "quiet")


def tracking_uri(uri: str | None, output: Place) -> str:
    """The MLflow URI to use: `uri`, or an SQLite file in the output folder.

    Raises ValueError for an output in an object store, where no database can lie, without a URI; and for a URI that
    holds credentials: it is kept with the run and printed.
    """
    if uri:
        try:
            return no_secret(uri)
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
    package = Path(__file__).resolve().parent
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
    """One MLflow run, or none at all (`Tracker()`), behind the few calls that training makes."""

    def __init__(self, client: Any = None, run_id: str = "") -> None:
        self._client, self.run_id = client, run_id
        self._observers: list[Callable[[dict[str, float], int], None]] = []
        self._outbox: Outbox | None = None

    def in_background(self) -> None:
        """From now on metrics and pictures are sent by a thread; artifacts, tags and the end wait until they are."""
        if self._client is not None and self._outbox is None:
            self._outbox = Outbox("the MLflow server", _is_away)

    def observe(self, observer: Callable[[dict[str, float], int], None]) -> None:
        """Calls `observer(values, step)` with all metrics from now on."""
        self._observers.append(observer)

    def metrics(self, values: dict[str, float], step: int) -> None:
        """Logs `values` at `step`; names carry their unit, as `speed/clips_per_s`."""
        for observer in self._observers:
            observer(values, step)
        if self._client is None or not values:
            return
        import time

        from mlflow.entities import Metric

        now_ms = int(time.time() * 1000)
        metrics = [Metric(name, float(value), now_ms, step) for name, value in values.items()]
        self._send(lambda: self._client.log_batch(self.run_id, metrics=metrics))

    def image(self, key: str, picture: NDArray[np.uint8], step: int) -> None:
        """Logs an RGB picture (H, W, 3) under `key`; the dashboard shows all steps of a key with a slider."""
        if self._client is not None:
            self._send(lambda: self._client.log_image(self.run_id, picture, key=key, step=step))

    def artifact(self, place: Place, folder: str | None = None) -> None:
        """Stores a file, or a folder with all it holds, with the run."""
        if self._client is None:
            return
        self._catch_up()
        with fetched(place) as path:
            if path.is_dir():
                self._client.log_artifacts(self.run_id, str(path), folder)
            else:
                self._client.log_artifact(self.run_id, str(path), folder)

    def tag(self, name: str, value: str) -> None:
        """Sets a tag of the run."""
        if self._client is not None:
            self._catch_up()
            self._client.set_tag(self.run_id, name, value)

    def close(self, status: str = "FINISHED") -> None:
        """Ends the run as FINISHED, FAILED or KILLED."""
        if self._client is None:
            return
        if status == "FINISHED":
            self._catch_up()
            self._client.set_terminated(self.run_id, status)
        else:  # a run that failed is to start again soon, whether or not the server hears of it
            self._send(lambda: self._client.set_terminated(self.run_id, status))
            if self._outbox is not None:
                self._outbox.flush(within_s=_FAREWELL_S)

    def _send(self, call: Callable[[], object]) -> None:
        if self._outbox is None:
            call()
        else:
            self._outbox.put(call)

    def _catch_up(self) -> None:
        if self._outbox is not None and (left := self._outbox.flush()):
            raise ConnectionError(
                f"the MLflow server is away, and {left} entries of run {self.run_id} are not sent: start it, and then "
                "the same command again"
            )


def _is_away(error: Exception) -> bool:
    """Whether a call failed because the server, or the way to it, is down; not because of what was asked."""
    from mlflow.exceptions import MlflowException

    if isinstance(error, MlflowException):
        return error.error_code in ("INTERNAL_ERROR", "TEMPORARILY_UNAVAILABLE", "REQUEST_LIMIT_EXCEEDED")
    return isinstance(error, OSError)  # as are the errors of requests


def open_run(
    folder: Place,
    *,
    uri: str,
    experiment: str,
    name: str,
    parameters: dict[str, Any],
    tags: dict[str, str],
    artifacts: Place,
) -> Tracker:
    """The MLflow run of the run folder `folder`: the one it began earlier, or a new one.

    The run's id and server are kept in `folder/mlflow.json`, so that a restarted run continues the same MLflow run
    even if it stopped before its first checkpoint. A file that names another server is ignored and a new run begins.

    Args:
        folder: of the run, which exists.
        uri: from `tracking_uri`.
        experiment: its name; made if it is missing.
        name: of the MLflow run.
        parameters, tags: of a new run.
        artifacts: where a new experiment keeps its artifacts unless an HTTP server decides: OUTPUT/artifacts, the same
            for every run of an output folder, however deep its own folder lies.
    """
    from mlflow import MlflowClient
    from mlflow.entities import Param
    from mlflow.exceptions import MlflowException

    root = _artifact_root(artifacts, uri)
    _make_database(uri, root)
    client = MlflowClient(tracking_uri=uri)
    kept = folder / RUN_FILE
    if kept.is_file():
        known = json.loads(kept.read_text())
        if known["uri"] == uri:
            try:
                client.update_run(known["run_id"], status="RUNNING")
                return Tracker(client, known["run_id"])
            except MlflowException as error:
                if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                    raise
    run = client.create_run(_experiment_id(client, experiment, root), run_name=name, tags=tags)
    tracker = Tracker(client, run.info.run_id)
    logged = [Param(key, str(value)) for key, value in parameters.items()]
    for first in range(0, len(logged), _PARAMETERS_PER_CALL):
        client.log_batch(run.info.run_id, params=logged[first : first + _PARAMETERS_PER_CALL])
    replace(kept, json.dumps({"uri": uri, "run_id": run.info.run_id}).encode())
    return tracker


def _experiment_id(client: Any, name: str, artifact_root: str | None) -> str:
    found = client.get_experiment_by_name(name)
    if found is not None:
        return str(found.experiment_id)
    # The kind opens MLflow's pages for training rather than those for language models.
    kind = {"mlflow.experimentKind": "custom_model_development"}
    return str(client.create_experiment(name, artifact_location=artifact_root, tags=kind))


def _make_database(uri: str, artifact_root: str | None) -> None:
    """Make a new SQLite database, whose experiment `Default` keeps its artifacts in `artifact_root`/0.

    MLflow's client makes that experiment with the first call, and puts its artifacts in the working directory, which
    on a Ray worker is a folder of the session.
    """
    if artifact_root is None or not uri.startswith(SQLITE):
        return
    file = Path(uri.removeprefix(SQLITE))
    if file.is_file() and file.stat().st_size:
        return
    from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore

    SqlAlchemyStore(uri, artifact_root)


def _artifact_root(artifacts: Place, uri: str) -> str | None:
    """The URI at which a new experiment keeps its artifacts; None where an HTTP server knows a place.

    `artifacts`, or beside an SQLite file whose run is in an object store.
    """
    if uri.startswith("http"):
        return None
    if isinstance(artifacts, Path):
        return artifacts.absolute().as_uri()
    if uri.startswith(SQLITE):
        return Path(uri.removeprefix(SQLITE)).with_name("artifacts").absolute().as_uri()
    return str(artifacts)
