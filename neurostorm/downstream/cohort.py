"""The runs that an evaluation works on: what the manifest says of each, and the labels of their subjects.

manifest --> Cohort of runs --by task label--> the runs that a task is about
"""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from neurostorm.config import ConfigError
from neurostorm.io.paths import AnyPath
from neurostorm.store import FrameStore, read_manifest

REST = "rest"


@dataclass(frozen=True)
class CohortRun:
    """One run: its path in the store, "dataset/subject", BIDS session and task label, frames, the source's sha256."""

    path: str
    subject: str
    session: str
    task: str
    frames: int
    source_sha256: str

    @property
    def content(self) -> str:
        """What its stored bytes follow from, given the store."""
        return f"{self.source_sha256} {self.frames}"


@dataclass(frozen=True)
class Cohort:
    """Runs of one store, in the manifest's order."""

    store: FrameStore
    runs: tuple[CohortRun, ...]

    @property
    def subjects(self) -> tuple[str, ...]:
        """Everybody with a run, sorted."""
        return tuple(sorted({run.subject for run in self.runs}))

    def attributes(self, run: CohortRun) -> dict[str, Any]:
        """What the store keeps beside the frames of a run. StoreError if there is no such run."""
        return self.store.run_attributes(run.path)

    def where(self, wanted: Callable[[CohortRun], bool], what: str) -> "Cohort":
        """The runs that `wanted` is true for. ConfigError, which says `what` was looked for, if there are none."""
        chosen = tuple(run for run in self.runs if wanted(run))
        if not chosen:
            labels = ", ".join(f"{task or '(none)'} {count}" for task, count in self.labelled().items())
            raise ConfigError(f"{self.store.path} has no run {what}; its runs by task label: {labels}")
        return replace(self, runs=chosen)

    def of_task(self, name: str) -> "Cohort":
        """The runs with a BIDS task label; "all" of them; or "auto": those at rest, all if none is."""
        if name == "all" or (name == "auto" and REST not in self.labelled()):
            return self
        label = REST if name == "auto" else name
        return self.where(lambda run: run.task == label, f"with the task label {label!r} (task.runs)")

    def labelled(self) -> Counter[str]:
        """Runs by their task label."""
        return Counter(run.task for run in self.runs)


def open_cohort(store: AnyPath) -> Cohort:
    """All runs of a store. StoreError: no store, no manifest; ConfigError: it holds no run."""
    opened = FrameStore.open(store)
    rows = read_manifest(opened.path).to_pylist()
    if not rows:
        raise ConfigError(f"{opened.path} holds no run: ingest some first (jobs/ingest.py)")
    return Cohort(
        opened,
        tuple(
            CohortRun(
                path=row["run"],
                subject=f"{row['dataset']}/{row['subject']}",
                session=row["session"] or "",
                task=row["task"] or "",
                frames=row["frames"],
                source_sha256=row["source_sha256"] or "",
            )
            for row in rows
        ),
    )
