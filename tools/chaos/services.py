"""Faults of what a run leans on: the tracking server goes away for a while, the disk under its output fills up.

mlflow                the server, on loopback, is stopped for 30 s      the run goes on; no metric is missing afterwards
mlflow-away-at-start  the server starts 20 s after step 45              the run does not wait; no metric is missing
mlflow-run-deleted    the run is deleted in MLflow, then the driver     a new MLflow run has what is logged afterwards,
                      is killed                                         and the resumed run goes on in it
disk                  the output's file system, a small tmpfs, is full  an error that names it; room is made, the same
                                                                        command
"""

import errno
import json
import os
import re
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

from chaos.faults import CannotTry, Fault
from chaos.job import JobError
from chaos.ray_nodes import free_port
from chaos.scene import EVERY, LOG_EVERY, Scene

AWAY_S = 30.0
LATE_S = 20.0
OPEN_S = 60.0  # the longest until a run that was deleted is replaced
TMPFS_MIB = 64


class TrackingServer:
    """`mlflow server` with SQLite on loopback, in a process group of its own."""

    def __init__(self, folder: Path) -> None:
        self._folder, self._port = folder, free_port()
        self.uri = f"http://127.0.0.1:{self._port}"
        folder.mkdir()
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Starts it and waits until it answers."""
        with (self._folder / "server.log").open("ab") as log:
            self._process = subprocess.Popen(
                [
                    Path(sys.executable).with_name("mlflow"), "server", "--host", "127.0.0.1", "--port",
                    str(self._port), "--workers", "1", "--backend-store-uri", f"sqlite:///{self._folder / 'server.db'}",
                    "--artifacts-destination", str(self._folder / "artifacts"),
                ],
                env={**os.environ, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false", "MLFLOW_DISABLE_TELEMETRY": "true"},
                stdout=log, stderr=log, start_new_session=True, cwd=self._folder,
            )  # fmt: skip
        end_s = time.monotonic() + 120
        while time.monotonic() < end_s and self._process.poll() is None:
            try:
                urllib.request.urlopen(f"{self.uri}/health", timeout=5)
                return
            except (urllib.error.URLError, OSError):
                time.sleep(0.2)
        raise JobError(f"the MLflow server did not start:\n{(self._folder / 'server.log').read_text()[-3000:]}")

    def stop(self) -> None:
        """Kills it."""
        if self._process is not None and self._process.poll() is None:
            os.killpg(self._process.pid, 9)
            self._process.wait(30)


def with_server(scene: Scene) -> Callable[[], None]:
    """A run that logs to a server of its own."""
    server = TrackingServer(scene.setting.folder / f"{scene.config.run.name}-server")
    server.start()
    scene.server = server
    scene.config = scene.config.model_copy(
        update={"tracking": scene.config.tracking.model_copy(update={"uri": server.uri})}
    )
    return server.stop


def stop_server(scene: Scene) -> None:
    scene.server.stop()
    scene.struck(goes_on=True)
    gone_s = time.monotonic()
    scene.back()
    scene.job.wait_for(lambda: scene.job.reached() > scene.reached + 2 * LOG_EVERY, "steps without the server")
    took_s = time.monotonic() - gone_s
    scene.note(took_s < AWAY_S, f"the run waited for the server: {took_s:.0f} s for {2 * LOG_EVERY} steps")
    time.sleep(max(0.0, gone_s + AWAY_S - time.monotonic()))
    scene.server.start()


def without_server(scene: Scene) -> Callable[[], None]:
    """A run that logs to a server which is not there yet; its database is, so that it starts sooner."""
    stop = with_server(scene)
    scene.server.stop()
    return stop


def start_late(scene: Scene) -> None:
    """The run has come so far without a server, and has said so; it starts 20 s later."""
    scene.struck(goes_on=True)
    said = scene.job.output()
    scene.note(said.count("does not answer") == 1, "the job did not say once that no server answers")
    scene.back()
    time.sleep(LATE_S)
    scene.server.start()


def delete_run(scene: Scene) -> None:
    """Deletes the MLflow run; the next run in its place is there before the driver is killed and started again."""
    client, (run,) = tracked_runs(scene)
    scene.deleted_at = scene.job.reached()
    client.delete_run(run.info.run_id)
    scene.struck(goes_on=True)
    scene.job.wait_for(lambda: bool(tracked_runs(scene)[1]), "an MLflow run in place of the deleted one", OPEN_S, 1.0)
    scene.back()
    scene.job.wait_for(lambda: scene.job.reached() > scene.reached + EVERY, "steps after the deletion")
    scene.job.kill()
    scene.start()


def tracked_runs(scene: Scene) -> tuple[Any, list[Any]]:
    """A client, and the runs of the server that are not deleted."""
    from mlflow import MlflowClient

    client = MlflowClient(tracking_uri=scene.server.uri)
    experiment = client.get_experiment_by_name(scene.config.tracking.experiment)
    return client, list(client.search_runs([experiment.experiment_id]))


def all_is_logged(scene: Scene, after: int = 0) -> None:
    """Metrics of every log line from step `after` on, in one run that is finished, with its parameters."""
    client, runs = tracked_runs(scene)
    scene.note([run.info.status for run in runs] == ["FINISHED"], f"runs: {[run.info.status for run in runs]}")
    scene.note("train.lr" in runs[0].data.params, "the MLflow run has no parameters")
    for metric in ("loss/train", "time/goodput"):
        logged = [point.step for point in client.get_metric_history(runs[0].info.run_id, metric)]
        wanted = [step for step in range(LOG_EVERY, scene.setting.steps + 1, LOG_EVERY) if step > after]
        missing = sorted(set(wanted) - set(logged))
        scene.note(not missing, f"MLflow has no {metric} of steps {missing}")
    summary = json.loads((scene.job.folder / "summary.json").read_text())
    scene.note(summary["mlflow_run_id"] == runs[0].info.run_id, "the summary names another MLflow run")
    waiting = {name: summary[name] for name in ("mlflow_unsent", "mlflow_refused", "mlflow_lost") if summary[name]}
    scene.note(not waiting, f"the summary says {waiting}")


def the_rest_is_logged(scene: Scene) -> None:
    """Likewise, of all that was logged after the run had been deleted."""
    all_is_logged(scene, after=scene.deleted_at + LOG_EVERY)
    said = scene.jobs[0].output()
    scene.note(said.count("was deleted; run") == 1, "the job did not say that its MLflow run was deleted")


def on_small_disk(scene: Scene) -> Callable[[], None]:
    """The run's output on a file system of its own."""
    if os.geteuid():
        raise CannotTry("a file system of its own takes root")
    disk = scene.setting.folder / f"{scene.config.run.name}-disk"
    disk.mkdir()
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={TMPFS_MIB}m", "tmpfs", str(disk)], capture_output=True, text=True
    )
    if done.returncode:
        raise CannotTry(done.stderr.strip())
    scene.config = scene.config.model_copy(update={"run": scene.config.run.model_copy(update={"output": disk})})
    return lambda: unmount(disk)


def unmount(disk: Path) -> None:
    subprocess.run(["umount", "--lazy", str(disk)], check=True)


def fill_disk(scene: Scene) -> None:
    disk = Path(str(scene.config.run.output))
    filler = disk / "filler"
    with filler.open("wb", buffering=0) as file:
        try:
            while True:
                file.write(bytes(1 << 12))
        except OSError as error:
            if error.errno != errno.ENOSPC:
                raise
        at_s = time.monotonic()
        scene.job.wait_for_end()
    scene.struck(at_s=at_s)
    filler.unlink()
    said = scene.job.output()
    scene.note(scene.job.process.returncode != 0, "the job ended well on a full disk")
    last = said[-6000:]
    named = re.search(
        rf"No space left on device[^\n]*{re.escape(str(disk))}|{re.escape(str(disk))}[^\n]*No space left", last
    )
    scene.note(named is not None, f"the job's end does not say that there is no space left in {disk}")
    scene.job.kill()
    scene.start()


OF_SERVICES: dict[str, Fault] = {
    "mlflow": Fault(stop_server, allowed=0, fresh=True, prepare=with_server, check=all_is_logged),
    "mlflow-away-at-start": Fault(start_late, allowed=0, fresh=True, prepare=without_server, check=all_is_logged),
    "mlflow-run-deleted": Fault(delete_run, fresh=True, prepare=with_server, check=the_rest_is_logged),
    "disk": Fault(fill_disk, {"scale": {"max_failures": 0}}, prepare=on_small_disk),
}
