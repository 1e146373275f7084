"""What the dead left is told from what the living write: by locks, and by age where there are none."""

import errno
import fcntl
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from neurostorm import locks
from neurostorm.locks import open_locked, orphaned, remove_if_orphaned
from neurostorm.places import replace

HOLDS = """
import sys
from pathlib import Path
from neurostorm.locks import open_locked
with open_locked(Path(sys.argv[1])) as file:
    print("held", flush=True)
    sys.stdin.read()
"""


def test_what_the_dead_wrote_is_known_from_what_the_living_write(tmp_path: Path) -> None:
    file = tmp_path / "file"
    command = [sys.executable, "-c", HOLDS, os.fspath(file)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as writer:
        assert writer.stdout is not None and writer.stdout.readline() == b"held\n"
        assert not orphaned(file) and not remove_if_orphaned(file, file.unlink)
        writer.kill()
    assert orphaned(file) and file.exists()
    assert remove_if_orphaned(file, file.unlink) and not file.exists()
    assert not remove_if_orphaned(file, file.unlink) and not orphaned(file)


def test_a_writer_that_was_taken_for_dead_starts_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "file"
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
    replace(tmp_path / "table", b"1")
    assert not orphaned(tmp_path / "table")
    os.utime(tmp_path / "table", (time.time() - 2 * locks.STALE_S,) * 2)
    assert orphaned(tmp_path / "table")
