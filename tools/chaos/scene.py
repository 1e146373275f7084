"""What a fault finds: a run that has come to a certain step, the means to start it again, and a clock.

    Scene: start --> at(step) --> [fault: kill, damage ... struck] --> back: seconds --> ... --> finish
                                   '--start again, if it ended--'

`struck` notes when the fault struck and how far the run had come; `back` waits for the first step beyond that.
"""

import random
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

from chaos.job import Job, kill_all, last_words, make_config
from neurostorm.config import Config
from neurostorm.io.paths import AnyPath, list_files

FRAMES = 240  # of the store's runs: 60 clips each
STEPS_PER_EPOCH = 120  # of two clips, four training subjects
EVERY = 20  # steps between checkpoints
LOG_EVERY = 5
STILL_S = 0.6  # a ledger that did not grow for so long belongs to a run that stands


@dataclass(frozen=True)
class Setting:
    """What all runs of one start of the tool share.

    folder  holds them, their Ray's files and their tracking database; its path is short, as sockets lie below it
    """

    folder: Path
    store: Path
    steps: int

    def config(self, name: str, *overrides: Mapping[str, Mapping[str, Any]]) -> Config:
        """A run's configuration; the last word counts."""
        sections: dict[str, dict[str, Any]] = {
            "run": {"name": name, "output": self.folder / "runs"},
            "train": {
                "global_batch": 2, "epochs": self.steps / STEPS_PER_EPOCH, "log_every": LOG_EVERY,
                "validate_every": 10**6,
            },
            "checkpoint": {"every": EVERY, "preemption_check_every": 2},
            "scale": {"max_failures": 20, "collective_timeout_s": 120, "min_collective_timeout_s": 5},
            "tracking": {"pictures": False, "uri": f"sqlite:///{self.folder / 'mlflow.db'}"},
        }  # fmt: skip
        for section, fields in (change for changes in overrides for change in changes.items()):
            sections.setdefault(section, {}).update(fields)
        return make_config(sections.get("data", {}).get("store", self.store), self.folder / "runs", **sections)

    @property
    def environment(self) -> dict[str, str]:
        """What keeps a job's files in the folder."""
        (self.folder / "tmp").mkdir(exist_ok=True)
        return {
            "RAY_TMPDIR": str(self.folder), "TMPDIR": str(self.folder / "tmp"), "MLFLOW_DISABLE_TELEMETRY": "true",
            "OMP_WAIT_POLICY": "PASSIVE",
        }  # fmt: skip


@dataclass
class Scene:
    """One run and its starts.

    environment  of every start, beside the setting's
    random       for a fault that chooses
    """

    setting: Setting
    config: Config
    random: random.Random
    environment: dict[str, str] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)
    jobs: list[Job] = field(default_factory=list)
    struck_s: float = 0.0
    back_s: float | None = None
    reached: int = 0
    server: Any = None  # the tracking server, if the fault has one
    deleted_at: int = 0  # the step at which the fault deleted something there

    @property
    def job(self) -> Job:
        """The latest start."""
        return self.jobs[-1]

    @property
    def checkpoints(self) -> AnyPath:
        """Their folder."""
        return self.config.run.folder / "checkpoints"

    def command(self) -> Sequence[str]:
        """What starts a job."""
        return (sys.executable,)

    def start(self) -> Job:
        """Starts the run, or goes on with it by the same command."""
        environment = self.setting.environment | self.environment
        self.jobs.append(Job(self.config, self.command(), self.setting.folder / "notes", **environment))
        return self.job

    def at(self, step: int) -> None:
        """Waits until so many steps are done."""
        self.job.wait_for(lambda: self.job.reached() >= step, f"step {step}")

    def struck(self, goes_on: bool = False, at_s: float | None = None) -> None:
        """Notes that the fault struck, now or `at_s`; the run stands, unless it `goes_on`."""
        self.struck_s, self.back_s = time.monotonic() if at_s is None else at_s, None
        self.reached = self.job.reached()
        while not goes_on:
            time.sleep(STILL_S)
            before, self.reached = self.reached, self.job.reached()
            if before == self.reached:
                return

    def back(self) -> float:
        """Seconds from the fault to the first step beyond those that were done when it struck; waits for it once."""
        if self.back_s is None:
            self.job.wait_for(lambda: self.job.reached() > self.reached, f"step {self.reached + 1}", timeout_s=400)
            self.back_s = time.monotonic() - self.struck_s
        return self.back_s

    def note(self, holds: bool, problem: str) -> None:
        """Keeps `problem` unless what is expected holds."""
        if not holds:
            self.problems.append(problem)

    def words(self) -> dict[int, tuple[float, list[int]]]:
        """The ledger's last word on every step."""
        return last_words(self.config)

    def workers(self) -> list[psutil.Process]:
        """The run's training workers, in order of their start."""
        return self.job.workers()

    def committed(self) -> list[AnyPath]:
        """Folders of whole checkpoints, oldest first."""
        return self._saved()[0]

    def begun(self) -> list[AnyPath]:
        """Folders of checkpoints after the newest whole one, which have no marker."""
        whole, others = self._saved()
        return [folder for folder in others if not whole or folder.name > whole[-1].name]

    def _saved(self) -> tuple[list[AnyPath], list[AnyPath]]:
        """Folders of checkpoints with and without a marker."""
        files = [Path(name).parts for name, _ in list_files(self.checkpoints)]
        names = {parts[0] for parts in files if parts[0].startswith("step-")}
        whole = {parts[0] for parts in files if parts[1:] == ("COMMITTED",)} & names
        return (
            [self.checkpoints / name for name in sorted(whole)],
            [self.checkpoints / name for name in sorted(names - whole)],
        )

    def close(self) -> None:
        """Ends what still runs."""
        for job in self.jobs:
            if job.process.poll() is None:
                job.kill()


def end(processes: Sequence[Any]) -> None:
    """Kills what is left of `processes`."""
    kill_all([process for process in processes if process.is_running()])
