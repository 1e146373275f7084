"""What the dead left is told from what the living write: by locks, and by age where there are none."""

import errno
import fcntl
import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from neurostorm.io import locks
from neurostorm.io.atomic import atomic_update, atomic_write
from neurostorm.io.locks import locked, open_locked, orphaned, remove_if_orphaned, temporary_name

HOLDS = """
import sys
from pathlib import Path
from neurostorm.io.locks import open_locked
with open_locked(Path(sys.argv[1])) as file:
    print("held", flush=True)
    sys.stdin.read()
"""


def test_what_the_dead_wrote_is_known_from_what_the_living_write(tmp_path: Path) -> None:
    file = tmp_path / temporary_name()
    command = [sys.executable, "-c", HOLDS, os.fspath(file)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as writer:
        assert writer.stdout is not None and writer.stdout.readline() == b"held\n"
        assert not orphaned(file) and not remove_if_orphaned(file, file.unlink)
        writer.kill()
    assert orphaned(file) and file.exists()
    assert remove_if_orphaned(file, file.unlink) and not file.exists()
    assert not remove_if_orphaned(file, file.unlink) and not orphaned(file)


def test_a_writer_that_was_taken_for_dead_starts_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / temporary_name()
    flock, sweeps = fcntl.flock, [1]

    def swept_before_the_lock(handle: Any, kind: int) -> None:
        if sweeps and not kind & fcntl.LOCK_NB:
            sweeps.pop()
            assert remove_if_orphaned(file, file.unlink)
        flock(handle, kind)

    monkeypatch.setattr(fcntl, "flock", swept_before_the_lock)
    with open_locked(file) as handle:
        handle.write(b"data")
    assert not sweeps and file.read_bytes() == b"data"


def test_without_locks_age_decides(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_locks(*_: Any) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", no_locks)
    atomic_write(tmp_path / "table", b"1")
    assert not orphaned(tmp_path / "table")
    os.utime(tmp_path / "table", (time.time() - 2 * locks.STALE_S,) * 2)
    assert orphaned(tmp_path / "table")


def test_what_another_machine_wrote_has_to_be_old_as_its_lock_may_not_be_seen_here(tmp_path: Path) -> None:
    file = tmp_path / ".table.0123456789abcdef.partial"  # on a file system whose locks end at the machine
    file.write_bytes(b"half")
    assert not orphaned(file) and not remove_if_orphaned(file, file.unlink)
    os.utime(file, (time.time() - 2 * locks.QUIET_S,) * 2)
    assert remove_if_orphaned(file, file.unlink) and not file.exists()


COUNTS = """
import sys
from pathlib import Path
from neurostorm.io.atomic import atomic_update
for _ in range(int(sys.argv[2])):
    atomic_update(Path(sys.argv[1]), lambda old: str(int(old or b"0") + 1).encode())
"""
NO_FLOCK = """
import errno, fcntl
def none(*_):
    raise OSError(errno.ENOLCK, "No locks available")
fcntl.flock = none
"""


@pytest.mark.parametrize("flock", ["", NO_FLOCK], ids=["flock", "no flock"])
def test_tables_are_changed_by_several_processes_with_and_without_flock(flock: str, tmp_path: Path) -> None:
    table = tmp_path / "table"
    command = [sys.executable, "-c", flock + COUNTS, os.fspath(table), "20"]
    for process in [subprocess.Popen(command) for _ in range(3)]:
        assert process.wait(120) == 0
    assert table.read_bytes() == b"60" and [file.name for file in tmp_path.iterdir()] == ["table"]


TAKES = """
import sys
from pathlib import Path
from neurostorm.io.locks import locked
with locked(Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()
"""


def test_a_lock_whose_process_was_killed_is_taken_over_at_once(tmp_path: Path, caplog: Any) -> None:
    path = tmp_path / "lock"
    command = [sys.executable, "-c", TAKES, os.fspath(path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as holder:
        assert holder.stdout is not None and holder.stdout.readline() == b"held\n"
        holder.kill()
    with locked(path):
        assert json.loads(path.read_bytes())["pid"] == os.getpid()
    assert f"left by process {holder.pid}" in caplog.text and list(tmp_path.iterdir()) == []


def test_a_lock_of_another_machine_is_waited_for_while_it_shows_life(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: Any
) -> None:
    monkeypatch.setattr(locks, "SILENT_S", 0.4)
    monkeypatch.setattr(locks, "_SAY_S", 0.1)
    path = tmp_path / "lock"
    path.write_text(json.dumps({"host": "node-7", "pid": 12, "process": "there"}))
    alive = threading.Event()

    def beat() -> None:
        for number in range(20):
            os.utime(path, ns=(number, number))
            time.sleep(0.05)
        alive.set()

    beating = threading.Thread(target=beat)
    beating.start()
    with locked(path):
        assert alive.is_set(), "it was taken while it showed signs of life"
    beating.join()
    assert "held by process 12 on node-7" in caplog.text and "removed" in caplog.text


def test_a_lock_that_was_taken_away_is_not_removed_by_its_first_owner(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    with locked(path):
        path.write_text("another's")
    assert path.read_text() == "another's"


def test_a_lock_that_is_held_is_touched_again_and_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(locks, "_BEAT_S", 0.02)
    monkeypatch.setattr(locks, "_of_processes", {})
    path = tmp_path / "lock"
    with locked(path):
        os.utime(path, ns=(1, 1))
        end_s = time.monotonic() + 30
        while path.stat().st_mtime_ns == 1 and time.monotonic() < end_s:
            time.sleep(0.01)
        assert path.stat().st_mtime_ns > 1


def test_a_full_disk_leaves_no_lock_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "write", full)
    with pytest.raises(OSError, match="No space left"):
        atomic_update(tmp_path / "table", lambda old: b"1")
    assert list(tmp_path.iterdir()) == []
