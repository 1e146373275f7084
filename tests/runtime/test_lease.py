"""One driver at a time works in a run's folder; a lease whose owner has ended is taken over."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from neurostorm.config import ConfigError
from neurostorm.io.paths import to_path
from neurostorm.runtime import lease
from neurostorm.runtime.interrupts import interruptible
from neurostorm.runtime.lease import LEASE, LeaseLostError, hold_lease

HOLD = """
import sys, time
from pathlib import Path
from neurostorm.runtime.lease import hold_lease
with hold_lease(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(600)
"""


@pytest.fixture(params=["folder", "object store"])
def folder(request, tmp_path, make_bucket):
    return tmp_path / "outputs" / "run" if request.param == "folder" else to_path(make_bucket()) / "run"


@pytest.fixture
def other(tmp_path):
    """A process that holds the lease of `tmp_path / "run"`."""
    process = subprocess.Popen([sys.executable, "-c", HOLD, tmp_path / "run"], stdout=subprocess.PIPE)
    assert process.stdout.readline() == b"held\n"
    yield process
    process.kill()
    process.wait()


def foreign(folder, **changes):
    """Makes the lease in `folder` that of another host."""
    content = json.loads((folder / LEASE).read_text()) | {"host": "node-7", "pid": 12, "token": "other"} | changes
    (folder / LEASE).write_text(json.dumps(content))


def test_a_lease_is_there_inside_and_nothing_is_left_of_it(folder):
    with hold_lease(folder):
        owner = json.loads((folder / LEASE).read_text())
        assert owner["pid"] == os.getpid() and owner["user"] and owner["since"]
    assert not folder.exists()
    with hold_lease(folder):
        (folder / "config.yaml").write_text("x")
    assert [file.name for file in folder.iterdir()] == ["config.yaml"]


def test_the_same_process_cannot_hold_it_twice(folder):
    with hold_lease(folder), pytest.raises(ConfigError, match="is in use by process"), hold_lease(folder):
        pytest.fail("two drivers")


def test_a_living_process_of_this_host_is_named_at_once(other, tmp_path):
    words = rf"run is in use by process {other.pid} on .*choose another --name"
    with pytest.raises(ConfigError, match=words), hold_lease(tmp_path / "run"):
        pytest.fail("two drivers")


def test_a_killed_process_of_this_host_is_taken_over_at_once(other, tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(lease.time, "sleep", lambda seconds: pytest.fail("waited"))
    other.send_signal(signal.SIGKILL)
    other.wait()
    with hold_lease(tmp_path / "run"):
        assert json.loads((tmp_path / "run" / LEASE).read_text())["pid"] == os.getpid()
    assert f"taking over {tmp_path}/run from process {other.pid}" in caplog.text


def test_another_process_with_the_same_number_is_not_the_owner(tmp_path):
    with hold_lease(tmp_path / "run"):
        content = json.loads((tmp_path / "run" / LEASE).read_text())
    (tmp_path / "run").mkdir()
    machine, start = content["process"].rsplit(" ", 1)
    content |= {"process": f"{machine} {int(start) - 1}", "token": "earlier"}
    (tmp_path / "run" / LEASE).write_text(json.dumps(content))
    with hold_lease(tmp_path / "run"):
        pass


def test_a_driver_of_another_host_that_renews_is_refused(folder, caplog):
    with hold_lease(folder):
        stop = threading.Event()

        def renew():
            number = 0
            while not stop.wait(0.05):
                number += 1
                foreign(folder, renewed=number)

        foreign(folder)
        thread = threading.Thread(target=renew)
        thread.start()
        try:
            with pytest.raises(ConfigError, match="in use by process 12 on node-7"), hold_lease(folder, stale_s=20):
                pytest.fail("two drivers")
        finally:
            stop.set()
            thread.join()
    assert "is held by process 12 on node-7" in caplog.text and "waiting for up to 20 s" in caplog.text


def test_a_driver_of_another_host_that_does_not_renew_is_taken_over(folder):
    with hold_lease(folder):
        foreign(folder)
        with hold_lease(folder, stale_s=0.2):
            assert json.loads((folder / LEASE).read_text())["pid"] == os.getpid()


@pytest.mark.parametrize("content", ["", "{", "[]", "{}"])
def test_a_lease_that_cannot_be_read_is_one_that_does_not_renew(tmp_path, content):
    (tmp_path / LEASE).write_text(content)
    with hold_lease(tmp_path, stale_s=0.2):
        assert json.loads((tmp_path / LEASE).read_text())["pid"] == os.getpid()


def test_a_driver_that_lost_its_lease_ends_and_leaves_the_others(tmp_path):
    (tmp_path / "run").mkdir()
    lost = pytest.raises(LeaseLostError, match="taken over by process 12 on node-7")
    with interruptible("start it again"), lost, hold_lease(tmp_path / "run", renew_s=0.05):
        foreign(tmp_path / "run")
        end_s = time.monotonic() + 60
        while time.monotonic() < end_s:
            time.sleep(0.01)
    assert json.loads((tmp_path / "run" / LEASE).read_text())["host"] == "node-7"


def test_a_lease_is_renewed_and_storage_that_is_away_is_sat_out(tmp_path, monkeypatch, caplog):
    update, away = lease.atomic_update, [3]

    def busy(file, change):
        if away[0]:
            away[0] -= 1
            raise OSError(5, "Input/output error")
        update(file, change)

    monkeypatch.setattr(lease, "atomic_update", busy)
    with hold_lease(tmp_path / "run", renew_s=0.02):
        end_s = time.monotonic() + 60
        while json.loads((tmp_path / "run" / LEASE).read_text())["renewed"] < 2 and time.monotonic() < end_s:
            time.sleep(0.01)
        assert json.loads((tmp_path / "run" / LEASE).read_text())["renewed"] >= 2
    assert "cannot be renewed now" in caplog.text


def test_two_that_find_a_stale_lease_do_not_both_get_it(tmp_path):
    program = HOLD.replace("time.sleep(600)", "time.sleep(3)")
    with hold_lease(tmp_path / "run"):
        foreign(tmp_path / "run")
        program = program.replace("sys.argv[1])", "sys.argv[1]), stale_s=1")
        both = [
            subprocess.Popen([sys.executable, "-c", program, tmp_path / "run"], stdout=subprocess.PIPE, stderr=-1)
            for _ in range(2)
        ]
        told = [process.communicate(timeout=120) for process in both]
    assert sorted(out for out, _ in told) == [b"", b"held\n"]
    assert any(b"is in use by" in error for _, error in told)


def test_paths_above_that_had_to_be_made_go_too(tmp_path):
    with hold_lease(tmp_path / "a" / "b" / "c"):
        assert Path(tmp_path, "a", "b", "c", LEASE).exists()
    assert list(tmp_path.iterdir()) == []
