"""A write that fails costs its own run a second try at the end; a store that cannot be written ends the ingest."""

import errno
import os
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest

from neurostorm.config import Config
from neurostorm.ingest import job
from neurostorm.ingest.job import ingest
from neurostorm.store import StoreError, read_manifest, read_quarantine

SHAPE = (26, 32, 26)
NAME = "sub-{0}/func/sub-{0}_task-rest_space-MNI152NLin6Asym_desc-preproc_bold.nii.gz"


@pytest.fixture
def dataset(tmp_path: Path, kit: Any) -> Path:
    root = tmp_path / "bids"
    affine = kit.affine_of("LAS", 7.5, SHAPE, (0.0, -18.0, 8.0))
    for subject in range(1, 5):
        kit.save(root / NAME.format(subject), kit.phantom(SHAPE, affine, 8, 0.8) + subject, affine)
    return root


@pytest.fixture
def pauses(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Runs one after another in this process; the pauses that are made."""
    made: list[float] = []

    def here(sources: Any, work: Any, cpus: float) -> Any:
        for source in sources:
            yield work(source)

    monkeypatch.setattr(job, "map_runs", here)
    monkeypatch.setattr(job, "require", lambda *demand: None)
    monkeypatch.setattr(job, "time", SimpleNamespace(sleep=made.append, monotonic=time.monotonic))
    return made


@pytest.fixture
def write(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Makes writes of some subjects fail: `write.failing[subject] = (times, errno)`."""
    from neurostorm.ingest import convert

    class Writes:
        failing: ClassVar[dict[str, tuple[int, int]]] = {}

    plain = convert.write_run

    def faulty(store: Any, run: str, **arrays: Any) -> bool:
        left, number = Writes.failing.get(run.split("/")[2], (0, 0))
        if left:
            Writes.failing[run.split("/")[2]] = left - 1, number
            raise OSError(number, os.strerror(number))
        return plain(store, run, **arrays)

    Writes.failing = {}
    monkeypatch.setattr(convert, "write_run", faulty)
    return Writes


def settings(source: Path, tmp_path: Path) -> Config:
    return Config.model_validate({"ingest": {"source": source, "grid": "4mm"}, "data": {"store": tmp_path / "store"}})


def subjects(tmp_path: Path) -> list[str]:
    return read_manifest(tmp_path / "store").column("subject").to_pylist()


def test_a_write_that_fails_once_is_made_at_the_end(
    dataset: Path, tmp_path: Path, pauses: list[float], write: Any
) -> None:
    write.failing["sub-2"] = (1, errno.EIO)
    report = ingest(settings(dataset, tmp_path))
    assert [outcome.status for outcome in report.outcomes] == ["ingested"] * 4
    assert pauses == [job.PAUSE_S] and subjects(tmp_path) == ["sub-1", "sub-2", "sub-3", "sub-4"]


def test_a_write_that_keeps_failing_is_listed_and_the_others_go_on(
    dataset: Path, tmp_path: Path, pauses: list[float], write: Any
) -> None:
    write.failing["sub-2"] = (2, errno.EIO)
    report = ingest(settings(dataset, tmp_path))
    assert [outcome.status for outcome in report.outcomes] == ["ingested", "unwritten", "ingested", "ingested"]
    told = "\n".join(report.lines())
    assert "1 could not be written" in told and "start the same command again" in told and "sub-2_task" in told
    assert subjects(tmp_path) == ["sub-1", "sub-3", "sub-4"]
    assert not read_quarantine(tmp_path / "store").num_rows, "it is not the file's fault"
    again = ingest(settings(dataset, tmp_path))
    assert [outcome.status for outcome in again.outcomes] == ["complete", "ingested", "complete", "complete"]


def test_a_full_disk_ends_the_ingest_at_once(dataset: Path, tmp_path: Path, pauses: list[float], write: Any) -> None:
    write.failing["sub-2"] = (1, errno.ENOSPC)
    with pytest.raises(StoreError, match="No space left"):
        ingest(settings(dataset, tmp_path))
    assert pauses == [] and subjects(tmp_path) == ["sub-1"]


def test_writes_that_fail_one_after_another_end_the_ingest(
    dataset: Path, tmp_path: Path, pauses: list[float], write: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(job, "FAILED_WRITES", 3)
    write.failing |= {f"sub-{number}": (9, errno.EIO) for number in (2, 3, 4)}
    with pytest.raises(StoreError, match=os.strerror(errno.EIO)):
        ingest(settings(dataset, tmp_path))
    assert pauses == [] and subjects(tmp_path) == ["sub-1"]
