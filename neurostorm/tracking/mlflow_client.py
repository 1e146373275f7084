"""How MLflow's client is set up: how long it waits for a server, and where a new database and its artifacts lie."""

import contextlib
import logging
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from neurostorm.config.base import SQLITE
from neurostorm.io.paths import AnyPath

# A call to a server that is away fails within seconds; MLflow's own settings retry for four minutes.
_HTTP = {
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1", "MLFLOW_HTTP_REQUEST_BACKOFF_FACTOR": "1",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",
}  # fmt: skip
# For transfers of files, and for a report, which has nothing else to do than wait.
_UNHURRIED = {"MLFLOW_HTTP_REQUEST_MAX_RETRIES": "5", "MLFLOW_HTTP_REQUEST_TIMEOUT": "300"}
# What the user has not set; the environment of a Ray worker has these values from its driver.
_OURS = {name for name, value in _HTTP.items() if os.environ.get(name, value) == value}
for _name, _value in _HTTP.items():
    os.environ.setdefault(_name, _value)


@contextlib.contextmanager
def unhurried(retries: bool = True) -> Iterator[None]:
    """Lets MLflow wait longer for an answer, and retry more often, unless the environment says otherwise."""
    names = [name for name in _UNHURRIED if name in _OURS and (retries or not name.endswith("RETRIES"))]
    before = {name: os.environ.get(name, _HTTP[name]) for name in names}
    os.environ.update({name: _UNHURRIED[name] for name in names})
    try:
        yield
    finally:
        os.environ.update(before)


def artifact_root(artifacts: AnyPath, uri: str) -> str | None:
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


def make_database(uri: str, root: str | None) -> None:
    """Make a new SQLite database, whose experiment `Default` keeps its artifacts in `root`/0.

    MLflow's client makes that experiment with the first call, and puts its artifacts in the working directory, which
    on a Ray worker is a folder of the session.
    """
    if root is None or not uri.startswith(SQLITE):
        return
    file = Path(uri.removeprefix(SQLITE))
    if file.is_file() and file.stat().st_size:
        return
    from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore

    SqlAlchemyStore(uri, root)


_EXPERIMENTS = 100
logger = logging.getLogger(__name__)


class NotOpen(Exception):
    """The MLflow run cannot be opened now; the message says why."""


def experiment_id(client: Any, wanted: str, artifact_root: str | None) -> str:
    """The experiment of that name; `NAME-2` and so on if it was deleted, because MLflow keeps its name."""
    for number in range(1, _EXPERIMENTS):
        name = wanted if number == 1 else f"{wanted}-{number}"
        found = client.get_experiment_by_name(name)
        if found is None:
            # The kind opens MLflow's pages for training rather than those for language models.
            kind = {"mlflow.experimentKind": "custom_model_development"}
            return str(client.create_experiment(name, artifact_location=artifact_root, tags=kind))
        if found.lifecycle_stage == "active":
            return str(found.experiment_id)
        logger.warning("the MLflow experiment %s was deleted: runs go to %s-%d", name, wanted, number + 1)
    raise NotOpen(f"the experiments {wanted} to {name} are all deleted: choose another --tracking.experiment")
