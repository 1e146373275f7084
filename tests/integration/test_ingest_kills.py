"""Ingests that are cut off in every way and started again end as the one that nothing happened to, byte by byte.

twin:     start ---------------------------------------------------------------> end
victims:  start --- SIGKILL of tasks ------------------------------------------> end
          start --- SIGKILL of the driver      start --------------------------> end, finished runs untouched
          start --- disk full, a clear error   room    start ------------------> end, likewise
          two drivers at once, one source -------------------------------------> end, both well
"""

import gzip
import hashlib
import importlib.util
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import nibabel
import numpy as np
import psutil
import pytest
import ray

from neurostorm.config import Config
from neurostorm.ingest.job import ingest
from neurostorm.store import FrameStore, StoreError, read_quarantine, run_bytes

pytestmark = [pytest.mark.integration, pytest.mark.usefixtures("local_ray")]
ROOT = Path(__file__).parents[2]
SHAPE, STEP_MM, FRAMES, RUNS = (26, 32, 26), 7.5, 150, 12
NAME = "sub-{0:02d}/func/sub-{0:02d}_task-rest_space-MNI152NLin6Asym_desc-preproc_bold.nii.gz"
Files = dict[str, tuple[str, int]]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs that take a task some tenths of a second each, one of them torn, and labels."""
    root = tmp_path_factory.mktemp("source") / "bids"
    affine = np.diag([STEP_MM, STEP_MM, STEP_MM, 1.0])
    affine[:3, 3] = np.array((0.0, -18.0, 8.0)) - STEP_MM * (np.array(SHAPE) - 1) / 2
    noise = (1000 + 50 * np.random.default_rng(0).standard_normal((*SHAPE, FRAMES))).astype(np.int16)
    for subject in range(RUNS):
        image = nibabel.Nifti1Image(np.roll(noise, subject, axis=3), affine)
        image.header.set_xyzt_units("mm", "sec")
        image.header["pixdim"][4] = 0.8
        path = root / NAME.format(subject)
        path.parent.mkdir(parents=True)
        path.write_bytes(gzip.compress(image.to_bytes(), 1))
    torn = root / NAME.format(5)
    torn.write_bytes(torn.read_bytes()[:-70_000])
    (root / "participants.tsv").write_text("participant_id\tage\nsub-00\t21\nsub-01\tn/a\n")
    return root


@pytest.fixture(scope="module")
def twin(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Files:
    """The files of a store that was filled in one go."""
    store = tmp_path_factory.mktemp("twin") / "store"
    report = ingest(config_of(source, store))
    assert len(report.having("ingested")) == RUNS - 1
    assert len(report.having("quarantined")) == 1
    return content(store)


@pytest.fixture
def start(source: Path) -> Iterator[Callable[[Path], subprocess.Popen[str]]]:
    """Starts jobs/ingest.py as a driver of its own on the test's Ray."""
    processes: list[subprocess.Popen[str]] = []
    address = ray.get_runtime_context().gcs_address

    def begin(store: Path) -> subprocess.Popen[str]:
        command = [sys.executable, str(ROOT / "jobs" / "ingest.py"), "--source", str(source), "--store", str(store)]
        processes.append(
            subprocess.Popen(
                [*command, "--grid", "4mm"],
                env=os.environ | {"RAY_ADDRESS": address},
                text=True,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
            )
        )
        return processes[-1]

    yield begin
    for process in processes:
        process.kill()
        process.wait()


def config_of(source: Path, store: Path) -> Config:
    return Config.model_validate({"ingest": {"source": source, "grid": "4mm"}, "data": {"store": store}})


def content(store: Path) -> Files:
    """sha256 and time of every file of a store; of the quarantine's rows all but the time."""
    found = {
        file.relative_to(store).as_posix(): (hashlib.sha256(file.read_bytes()).hexdigest(), file.stat().st_mtime_ns)
        for file in store.rglob("*")
        if file.is_file()
    }
    if "quarantine.parquet" in found:
        rows = read_quarantine(store).select(["source", "reason"]).to_pylist()
        found["quarantine.parquet"] = (repr(rows), 0)
    return found


def same(one: Files, other: Files) -> bool:
    """Whether two stores have the same files with the same bytes."""
    return {name: digest for name, (digest, _) in one.items()} == {name: digest for name, (digest, _) in other.items()}


def finished(store: Path) -> dict[str, int]:
    """Runs that are complete, with the time at which they became so."""
    return {
        file.parent.relative_to(store).as_posix(): file.stat().st_mtime_ns
        for file in store.glob("runs/*/*/*/zarr.json")
    }


def wait_for_runs(store: Path, count: int, process: subprocess.Popen[str] | None = None) -> None:
    end_s = time.monotonic() + 120
    while len(finished(store)) < count:
        assert time.monotonic() < end_s
        assert process is None or process.poll() is None, process.communicate()[0]
        time.sleep(0.01)


def writers() -> list[psutil.Process]:
    """Processes of this test's Ray that ingest a run just now."""
    family = psutil.Process().children(recursive=True)
    found = []
    for process in family:
        try:
            if "Map(_task)" in " ".join(process.cmdline()):
                found.append(process)
        except psutil.Error:
            pass
    return found


def wait_for_writers() -> None:
    end_s = time.monotonic() + 120
    while writers():
        assert time.monotonic() < end_s
        time.sleep(0.01)


def test_killed_tasks_are_done_again(source: Path, twin: Files, tmp_path: Path) -> None:
    """Processes die while they write into the store; the ingest ends as if nothing had happened."""
    store = tmp_path / "store"
    left: list[str] = []

    def kill() -> None:
        wait_for_runs(store, 2)
        while not left:  # they are halted first: only if a run is half written then do they die
            if any(store.glob(".partial/*/0.0")):
                victims = writers()
                for victim in victims:
                    victim.suspend()
                left.extend(folder.name for folder in store.glob(".partial/*") if (folder / "0.0").exists())
                for victim in victims:
                    victim.kill() if left else victim.resume()
            time.sleep(0.001)

    thread = threading.Thread(target=kill, daemon=True)
    thread.start()
    report = ingest(config_of(source, store))
    thread.join(1)
    assert left, "no process was caught in the middle of a write"
    assert len(report.having("quarantined")) == 1
    assert same(content(store), twin)


def test_a_killed_driver_is_taken_over(
    source: Path, twin: Files, tmp_path: Path, start: Callable[[Path], subprocess.Popen[str]]
) -> None:
    store = tmp_path / "store"
    driver = start(store)
    wait_for_runs(store, 3, driver)
    driver.send_signal(signal.SIGKILL)
    driver.wait()
    time.sleep(1)  # its tasks end with it; what they were writing is left half done
    before = finished(store)
    assert 3 <= len(before) < RUNS - 1, "the driver died too late to matter"
    report = ingest(config_of(source, store))
    assert len(report.having("complete")) >= len(before)
    assert len(report.having("ingested")) <= RUNS - 1 - len(before)
    assert same(content(store), twin)
    after = finished(store)
    assert {run: after[run] for run in before} == before, "a finished run was written again"
    calm = content(store)
    again = ingest(config_of(source, store))
    assert len(again.having("complete")) == RUNS - 1
    assert {name: when for name, (_, when) in content(store).items() if name.startswith("runs/")} == {
        name: when for name, (_, when) in calm.items() if name.startswith("runs/")
    }


def test_two_drivers_fill_one_store(
    source: Path, twin: Files, tmp_path: Path, start: Callable[[Path], subprocess.Popen[str]]
) -> None:
    """Both begin on an empty folder and want the same runs; none fails, and none spoils the other's."""
    store = tmp_path / "store"
    other = start(store)
    end_s = time.monotonic() + 60
    while not (store / "zarr.json").exists():
        assert other.poll() is None and time.monotonic() < end_s
        time.sleep(0.01)
    report = ingest(config_of(source, store))
    assert report.in_store == RUNS - 1
    printed = other.communicate(timeout=120)[0]
    assert other.returncode == 0, printed
    assert f"{store} now holds {RUNS - 1} run(s)" in printed
    assert same(content(store), twin)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system with room for about half of the runs."""
    if os.geteuid() != 0 or shutil.which("mount") is None:
        pytest.skip("only root can mount a small disk")
    disk = tmp_path / "disk"
    disk.mkdir()
    size = int(RUNS / 2 * run_bytes(FRAMES, 28210))
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(disk)], check=False)
    if mounted.returncode:
        pytest.skip("this machine does not let root mount a small disk")
    yield disk
    subprocess.run(["umount", "-l", str(disk)], check=True)


def test_a_full_disk_stops_the_job_and_blames_no_file(source: Path, twin: Files, small_disk: Path) -> None:
    store = small_disk / "store"
    with pytest.raises(StoreError, match=r"cannot be written: .*No space left on device.*GB are free there") as caught:
        ingest(config_of(source, store))
    assert str(store) in str(caught.value)
    wait_for_writers()  # tasks that were under way when the first one found no room may yet finish theirs
    before = finished(store)
    assert 0 < len(before) < RUNS - 1
    torn = {str(source / NAME.format(5))}
    assert set(read_quarantine(store)["source"].to_pylist()) <= torn
    subprocess.run(["mount", "-o", "remount,size=500m", str(small_disk)], check=True)
    report = ingest(config_of(source, store))
    assert len(report.having("complete")) == len(before)
    after = finished(store)
    assert {run: after[run] for run in before} == before
    assert same(content(store), twin)


def test_the_exit_status_of_a_store_that_cannot_be_written(
    source: Path, small_disk: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    spec = importlib.util.spec_from_file_location("ingest_job", ROOT / "jobs" / "ingest.py")
    assert spec is not None and spec.loader is not None
    job = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(job)
    assert job.main(["--source", str(source), "--store", str(small_disk / "store"), "--grid", "4mm"]) == 1
    error = capsys.readouterr().err
    assert "Read-only file system" in error and "start the same command again" in error


def test_a_broken_file_among_good_ones_does_not_stop_the_job(tmp_path: Path, source: Path) -> None:
    """A handful of the fuzz test's kinds through Ray: the good run beside them is ingested."""
    folder = tmp_path / "plain"
    folder.mkdir()
    good = (source / NAME.format(0)).read_bytes()
    raw = bytearray(gzip.decompress(good))
    raw[40:56] = np.array([4, 30000, 30000, 30000, 30000, 1, 1, 1], "<i2").tobytes()
    for name, data in {
        "good": good, "cut": good[: len(good) // 2], "flipped": good[:5000] + b"zzzz" + good[5004:],
        "garbage": os.urandom(3000), "huge": gzip.compress(bytes(raw), 1), "none": b"",
    }.items():  # fmt: skip
        (folder / f"{name}.nii.gz").write_bytes(data)
    report = ingest(config_of(folder, tmp_path / "store"))
    assert {outcome.run.split("/")[2]: outcome.status for outcome in report.outcomes} == {
        "sub-good": "ingested",
        **{f"sub-{name}": "quarantined" for name in ("cut", "flipped", "garbage", "huge", "none")},
    }
    assert all("unexpected" not in outcome.reason for outcome in report.outcomes)
    store = FrameStore.open(tmp_path / "store")
    assert store.runs() == ["runs/plain/sub-good/run"]
