"""One run on an MLflow server: opened when it is first needed, continued by a resume, replaced when it was deleted.

    RUN/mlflow.json --id--> the run is there: goes on in it
                       |--> deleted, or its experiment is: a new run with the same parameters and tags, and the old id
                       '--> no file: a new run                                               --id--> RUN/mlflow.json

Everything here talks to the server, so the thread of `AsyncLogger` calls it and nothing waits for it.
"""

import contextlib
import json
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from neurostorm.io.atomic import atomic_write
from neurostorm.io.local_copies import local_copy
from neurostorm.io.paths import AnyPath, to_path
from neurostorm.tracking import unsent
from neurostorm.tracking.mlflow_client import NotOpen, experiment_id, make_database, unhurried
from neurostorm.tracking.sink import Verdict
from neurostorm.tracking.unsent import ARTIFACT, END, IMAGE, METRICS, TAG, Entry, Part

logger = logging.getLogger(__name__)

RUN_FILE = "mlflow.json"  # in a run's folder: the id of its MLflow run, and the server
REPLACES = "neurostorm.replaces"  # tag of a run that took the place of a deleted one: the id of that
PARENT = "mlflow.parentRunId"
_PARAMETERS_PER_CALL = 100  # MLflow takes no more
_TRIES = 5  # of an entry that fails while the server answers
# What the server would refuse again. All else (no answer, 5xx, 401 and 403 of a login that ended) may pass.
_REFUSED = {
    "INVALID_PARAMETER_VALUE", "BAD_REQUEST", "RESOURCE_DOES_NOT_EXIST", "RESOURCE_ALREADY_EXISTS", "ALREADY_EXISTS",
    "INVALID_STATE", "MALFORMED_REQUEST", "RESOURCE_CONFLICT", "NOT_IMPLEMENTED",
}  # fmt: skip


class _Missing(Exception):
    """A file that is to be stored is not there."""


@dataclass(eq=False)
class MlflowRun:
    """An MLflow run of a run folder: a sink of `AsyncLogger`.

    Attributes:
        folder: of the run, which exists.
        uri: of the server.
        experiment: its name; made if it is missing.
        name, parameters, tags: of a new run.
        artifact_root: URI below which a new experiment keeps its artifacts; None: the server decides.
        parent: the run that it is a child of.
        run_id: "" until it is open.
        refused, lost: entries that the server refused, and that were dropped for want of memory.
        resumed: whether a job goes on with the run, so that it is running and an earlier process did not end it.
    """

    folder: AnyPath
    uri: str
    experiment: str
    name: str
    parameters: dict[str, str]
    tags: dict[str, str]
    artifact_root: str | None
    parent: "MlflowRun | None" = None
    run_id: str = ""
    refused: int = 0
    lost: int = 0
    resumed: bool = True
    _client: Any = None
    _noted: str = ""  # the id that RUN_FILE has
    _parts: int = 0  # the highest number
    _earlier: int = 0  # the highest number that an earlier process wrote
    _open: bool = False
    _new: bool = False  # whether parameters have yet to be logged
    _replaced: str = ""  # the id of a deleted run whose children have yet to be taken over

    @classmethod
    def of_folder(cls, folder: AnyPath, uri: str | None = None) -> "MlflowRun":
        """The run that the entries in `folder`/unsent belong to, as its run.json says.

        Args:
            folder: of the run.
            uri: another address of the server.

        Raises:
            OSError, ValueError, KeyError: run.json cannot be read.
        """
        facts = unsent.read_run(folder)
        known = ("experiment", "name", "parameters", "tags", "artifact_root")
        parent = None
        if facts["parent"] is not None:
            above = to_path(facts["parent"])
            kept = json.loads((above / RUN_FILE).read_text()) if (above / RUN_FILE).is_file() else {"run_id": ""}
            parent = cls(above, uri or facts["uri"], "", "", {}, {}, None, run_id=kept["run_id"])
            parent._open = bool(parent.run_id)
        run = cls(folder, uri or facts["uri"], **{key: facts[key] for key in known}, parent=parent, resumed=False)
        if uri not in (None, facts["uri"]):
            run._continue_at(uri)
        return run

    @property
    def title(self) -> str:
        """For messages."""
        return f"MLflow run of {self.folder}"

    def backlog(self) -> list[Part]:
        """What an earlier process kept and did not send."""
        try:
            found = unsent.parts_in(self.folder)
        except OSError as error:
            logger.warning("%s/%s cannot be listed: %s", self.folder, unsent.FOLDER, error)
            return []
        self._parts = max((part.number for part in found), default=0)
        self._earlier = self._parts
        return found

    def open(self) -> None:
        """Opens the run unless it is open. NotOpen with the reason when that fails."""
        try:
            if not self._open:
                self._connect()
            self._complete()
        except NotOpen:
            raise
        except Exception as error:
            raise NotOpen(f"{type(error).__name__}: {error}") from error
        self._open = True

    def send(self, entry: Entry | None) -> None:
        """Logs one entry, in a new run if this one was deleted."""
        from mlflow.exceptions import MlflowException

        self.open()
        if entry is None:
            return
        if entry.kind == ARTIFACT and self._is_gone():  # MLflow would still take it
            self._replace()
        try:
            self._log(entry)
        except MlflowException as error:
            if error.error_code not in _REFUSED or not self._is_gone():
                raise
            self._replace()
            self._log(entry)
        unsent.remove_picture(self.folder, entry)

    def judge(self, error: Exception, entry: Entry | None, tries: int) -> Verdict:
        """See `async_logger.Sink`."""
        from mlflow.exceptions import MlflowException

        if entry is None or isinstance(error, NotOpen):
            return Verdict.AWAY
        is_file = entry.kind == ARTIFACT
        if isinstance(error, _Missing):
            return Verdict.REFUSED
        code = error.error_code if isinstance(error, MlflowException) else None
        not_json = isinstance(error, json.JSONDecodeError)  # the page of a gateway before the server
        if code in _REFUSED or (isinstance(error, TypeError | ValueError) and not not_json):
            return Verdict.LATER if is_file else Verdict.REFUSED
        if tries < _TRIES or not self._answers():
            return Verdict.AWAY
        if is_file or entry.kind == IMAGE:
            return Verdict.LATER
        return Verdict.REFUSED if code in ("INTERNAL_ERROR", None) else Verdict.AWAY

    def keep(self, entries: list[Entry]) -> Part:
        """Writes entries to RUN/unsent. OSError when that fails."""
        facts = {
            "uri": self.uri, "experiment": self.experiment, "name": self.name, "parameters": self.parameters,
            "tags": self.tags, "artifact_root": self.artifact_root,
            "parent": None if self.parent is None else str(self.parent.folder),
        }  # fmt: skip
        self._parts += 1
        return unsent.write_part(self.folder, self._parts, entries, facts)

    def read(self, part: Part) -> list[Entry]:
        """The entries of a part; a resumed run is not ended by its predecessor's end."""
        entries = unsent.read_part(self.folder, part)
        if self.resumed and part.number <= self._earlier:
            return [entry for entry in entries if entry.kind != END]
        return entries

    def remove(self, part: Part) -> None:
        """Deletes a part that is sent."""
        unsent.remove_part(self.folder, part)

    def count(self, *, refused: int = 0, lost: int = 0) -> None:
        """Takes note of entries that were refused or lost."""
        self.refused += refused
        self.lost += lost

    def _log(self, entry: Entry) -> None:
        from mlflow.entities import Metric

        facts, run_id = entry.facts, self.run_id
        if entry.kind == METRICS:
            values = [Metric(name, value, facts["time_ms"], facts["step"]) for name, value in facts["values"].items()]
            self._client.log_batch(run_id, metrics=values)
        elif entry.kind == IMAGE:
            picture = {"key": facts["key"], "step": facts["step"], "timestamp": facts["time_ms"]}
            self._client.log_image(run_id, entry.picture, **picture)
        elif entry.kind == TAG:
            self._client.set_tag(run_id, facts["name"], facts["value"])
        elif entry.kind == ARTIFACT:
            self._store(facts["path"], facts["folder"])
        elif entry.kind == END:
            self._client.set_terminated(run_id, facts["status"], facts["time_ms"])

    def _store(self, path: str, folder: str | None) -> None:
        """Stores a file or folder, whose path is absolute or relative to the run's folder."""
        relative = not ("://" in path or path.startswith("/"))
        source = self.folder / path if relative else to_path(path)
        if isinstance(source, Path) and not source.exists():
            raise _Missing(f"{source} is not there")
        with local_copy(source) as local, unhurried(retries=False):
            if local.is_dir():
                self._client.log_artifacts(self.run_id, str(local), folder)
            else:
                self._client.log_artifact(self.run_id, str(local), folder)

    def _connect(self) -> None:
        from mlflow import MlflowClient

        # What these say at every try is said once by the logger that calls.
        logging.getLogger("mlflow.store.db.utils").setLevel(logging.CRITICAL)
        logging.getLogger("urllib3.connectionpool").setLevel(logging.ERROR)
        if not self.experiment:
            raise NotOpen(f"{self.folder} has no MLflow run yet: python -m neurostorm upload {self.folder}")
        if self.parent is not None:
            self.parent.open()
        make_database(self.uri, self.artifact_root)
        self._client = MlflowClient(tracking_uri=self.uri)
        if not self.run_id and (self.folder / RUN_FILE).is_file():
            known = json.loads((self.folder / RUN_FILE).read_text())
            self.run_id = self._noted = known["run_id"] if known["uri"] == self.uri else ""
        if not self.run_id:
            self._create({})
        elif self._is_gone():
            self._replace()
        elif self.resumed:
            self._client.update_run(self.run_id, status="RUNNING")
            self._new = not self._client.get_run(self.run_id).data.params  # killed before they were logged

    def _continue_at(self, uri: str | None) -> None:
        """Takes the id of RUN_FILE although it names another address of the server."""
        with contextlib.suppress(OSError, ValueError, KeyError):
            self.run_id = json.loads((self.folder / RUN_FILE).read_text())["run_id"]

    def _create(self, more: dict[str, str]) -> None:
        parent = {} if self.parent is None else {PARENT: self.parent.run_id}
        tags = {**self.tags, **parent, **more}
        self.run_id = self._client.create_run(
            experiment_id(self._client, self.experiment, self.artifact_root), run_name=self.name, tags=tags
        ).info.run_id
        self._new = True
        self._note()  # at once: a process that is killed now would begin a second run when it starts again

    def _replace(self) -> None:
        """Begins a new run in place of one that was deleted. NotOpen when that fails."""
        old = self.run_id
        try:
            self._create({REPLACES: old})
        except Exception as error:
            raise NotOpen(f"{type(error).__name__}: {error}") from error
        self._replaced = old
        logger.warning(
            "MLflow run %s of %s was deleted; run %s takes its place and has what is logged from now on",
            old, self.folder, self.run_id,
        )  # fmt: skip
        if self._open:
            self.open()

    def _complete(self) -> None:
        """What belongs to a new run beside its tags: parameters, the children of the one that it replaces, a note."""
        if self._new:
            self._log_parameters()
            self._new = False
        if self._replaced:
            self._adopt(self._replaced)
            self._replaced = ""
        self._note()

    def _log_parameters(self) -> None:
        from mlflow.entities import Param
        from mlflow.exceptions import MlflowException

        logged = [Param(key, value) for key, value in self.parameters.items()]
        for first in range(0, len(logged), _PARAMETERS_PER_CALL):
            try:
                self._client.log_batch(self.run_id, params=logged[first : first + _PARAMETERS_PER_CALL])
            except MlflowException as error:
                if error.error_code not in _REFUSED or self._is_gone():
                    raise
                self.count(refused=1)
                logger.warning("%s: the server refuses parameters: %s", self.title, error)

    def _adopt(self, old: str) -> None:
        """Makes the children of the run `old` those of this one."""
        experiment = self._client.get_run(self.run_id).info.experiment_id
        wanted, token = f"tags.`{PARENT}` = '{old}'", None
        while True:
            page = self._client.search_runs([experiment], filter_string=wanted, page_token=token)
            for child in page:
                self._client.set_tag(child.info.run_id, PARENT, self.run_id)
            token = page.token
            if not token:
                return

    def _note(self) -> None:
        """Keeps the id in the run's folder; an error is told and tried again with the next run."""
        if self._noted == self.run_id:
            return
        try:
            atomic_write(self.folder / RUN_FILE, json.dumps({"uri": self.uri, "run_id": self.run_id}).encode())
            self._noted = self.run_id
        except OSError as error:
            logger.warning("%s cannot be written: %s", self.folder / RUN_FILE, error)

    def _is_gone(self) -> bool:
        """Whether the server says that the run, or its experiment, was deleted."""
        from mlflow.exceptions import MlflowException, RestException

        try:
            return str(self._client.get_run(self.run_id).info.lifecycle_stage) != "active"
        except MlflowException as error:
            # A gateway before the server answers 404 as well, but not in MLflow's own words.
            its_own = isinstance(error, RestException) or not self.uri.startswith("http")
            if its_own and error.error_code == "RESOURCE_DOES_NOT_EXIST":
                return True
            raise

    def _answers(self) -> bool:
        """Whether the server answers at all."""
        try:
            self._client.get_run(self.run_id)
        except Exception:
            return False
        return True
