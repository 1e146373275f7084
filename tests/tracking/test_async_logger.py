"""What is logged waits for a server that is away, in order, in memory and then in files; nothing raises or waits."""

import logging
import threading
import time

import numpy as np
import pytest

from neurostorm.tracking.async_logger import AsyncLogger
from neurostorm.tracking.sink import Verdict
from neurostorm.tracking.unsent import IMAGE, METRICS, Entry, Part


class Server:
    """A sink that notes what it is told; away while told so. Its files are lists."""

    title = "the run"

    def __init__(self):
        self.heard, self.up = [], threading.Event()
        self.up.set()
        self.files, self.refused, self.lost, self.opened, self.disk_full = {}, 0, 0, 0, False
        self.tries = threading.Semaphore(0)

    def send(self, entry):
        self.tries.release()
        if not self.up.is_set():
            raise ConnectionError("refused")
        if entry is None:
            self.opened += 1
            return
        value = entry.facts["value"]
        if value == "bad":
            raise ValueError("a bad name")
        if value == "broken":
            raise PermissionError("no access")
        self.heard.append(value)

    def judge(self, error, entry, tries):
        if isinstance(error, ConnectionError):
            return Verdict.AWAY
        return Verdict.REFUSED if isinstance(error, ValueError) else Verdict.LATER

    def keep(self, entries):
        if self.disk_full:
            raise OSError(28, "No space left on device")
        part = Part(len(self.files) + 1, len(entries))
        self.files[part] = list(entries)
        return part

    def read(self, part):
        return self.files[part]

    def remove(self, part):
        del self.files[part]

    def count(self, *, refused=0, lost=0):
        self.refused += refused
        self.lost += lost

    def kept(self):
        return [
            entry.facts["value"] for part in sorted(self.files, key=lambda p: p.number) for entry in self.files[part]
        ]

    def wait_for_try(self, count=1):
        for _ in range(count):
            assert self.tries.acquire(timeout=30)


def entry(value, kind=METRICS, picture=None):
    return Entry(kind, {"value": value}, picture)


def logger_for(server, values=(), **keywords):
    log = AsyncLogger("the server", **{"pause_s": 0.01, "longest_pause_s": 0.01, **keywords})
    for value in values:
        log.put(server, entry(value))
    return log


def test_entries_are_sent_in_order_and_flush_waits_for_them():
    server = Server()
    assert logger_for(server, range(200)).flush() == 0
    assert server.heard == list(range(200))


def test_a_server_that_is_away_delays_nothing_and_misses_nothing(caplog):
    server = Server()
    log = logger_for(server, ["before"])
    assert log.flush() == 0
    server.up.clear()
    with caplog.at_level(logging.WARNING):
        for value in range(5):
            log.put(server, entry(value))
        server.wait_for_try(4)
        assert server.heard == ["before"]
        server.up.set()
        assert log.flush() == 0
    assert server.heard == ["before", *range(5)] and not server.files
    assert caplog.records[0].getMessage().startswith("the server does not answer (refused)")
    assert len(caplog.records) == 2 and "answers again" in caplog.text


def test_what_waits_for_long_is_kept_in_files_and_sent_from_them_in_order(caplog):
    server = Server()
    server.up.clear()
    log = logger_for(server, range(3), keep_after_s=0.0)
    server.wait_for_try(3)
    for value in range(3, 6):
        log.put(server, entry(value))
    server.wait_for_try(3)
    assert server.kept() == list(range(6)), "a process that is killed now leaves all of them"
    server.up.set()
    assert log.flush() == 0
    assert server.heard == list(range(6)) and not server.files


def test_what_a_killed_process_kept_is_sent_first():
    server = Server()
    parts = [server.keep([entry("old 1"), entry("old 2")]), server.keep([entry("old 3")])]
    log = logger_for(server)
    log.open(server, parts)
    log.put(server, entry("new"))
    assert log.flush() == 0
    assert server.opened == 1 and server.heard == ["old 1", "old 2", "old 3", "new"] and not server.files


def test_flush_gives_up_on_a_server_that_stays_away_and_release_keeps_the_rest():
    server = Server()
    server.up.clear()
    log = logger_for(server, range(3), patience_s=0.05)
    assert log.flush() == 3
    log.release([server])
    assert server.kept() == [0, 1, 2]
    server.up.set()
    log.put(server, entry("after"))
    assert log.flush() == 0
    assert server.heard == ["after"] and server.kept() == [0, 1, 2], "the rest is for the upload"


def test_releasing_one_run_leaves_the_others_waiting():
    one, other = Server(), Server()
    one.up.clear()
    other.up.clear()
    log = logger_for(one, ["a"], patience_s=0.05)
    log.put(other, entry("b"))
    log.flush()
    log.release([one])
    other.up.set()
    log.flush()
    assert one.kept() == ["a"] and other.heard == ["b"]


def test_what_the_server_refuses_is_dropped_with_one_warning_and_counted(caplog):
    server = Server()
    with caplog.at_level(logging.WARNING):
        assert logger_for(server, ["bad", "good", "bad", "better"]).flush() == 0
    assert server.heard == ["good", "better"] and server.refused == 2
    assert len(caplog.records) == 1 and "a bad name" in caplog.text


def test_what_fails_although_the_server_answers_is_kept_and_holds_up_nothing(caplog):
    server = Server()
    with caplog.at_level(logging.WARNING):
        assert logger_for(server, ["broken", "good"]).flush() == 0
    assert server.heard == ["good"] and server.kept() == ["broken"]
    assert "no access" in caplog.text


def test_memory_is_bounded_and_pictures_go_first(caplog):
    server = Server()
    server.up.clear()
    server.disk_full = True
    log = logger_for(server, ["first"], memory_bytes=100_000)
    server.wait_for_try()
    with caplog.at_level(logging.WARNING):
        for value in range(4):
            log.put(server, entry(f"picture {value}", IMAGE, np.zeros((100, 100, 3), np.uint8)))
        for value in range(2000):
            log.put(server, entry(value))
        assert log._bytes <= 100_000
        server.up.set()
        assert log.flush() == 0
    numbers = [value for value in server.heard if isinstance(value, int)]
    assert server.heard[0] == "first" and numbers == list(range(2000 - len(numbers), 2000)), "the newest are left"
    assert not [value for value in server.heard if str(value).startswith("picture")]
    assert server.lost == 4 + 2000 - len(numbers)
    assert caplog.text.count("pictures are dropped first") == 1


def test_much_in_memory_goes_to_files_before_anything_is_dropped():
    server = Server()
    server.up.clear()
    log = logger_for(server, memory_bytes=100_000)
    for value in range(40):
        log.put(server, entry(value, IMAGE, np.zeros((50, 50, 3), np.uint8)))
        server.wait_for_try(2)
    assert server.lost == 0 and len(server.files) >= 2
    server.up.set()
    assert log.flush() == 0
    assert server.heard == list(range(40))


def test_a_full_disk_at_the_end_counts_what_is_lost(caplog):
    server = Server()
    server.up.clear()
    server.disk_full = True
    log = logger_for(server, range(3), patience_s=0.01)
    log.flush()
    log.release([server])
    assert server.lost == 3 and "No space left" in caplog.text


def test_flush_within_a_time_does_not_wait_for_a_call_that_tries_for_minutes():
    server, answer = Server(), threading.Event()
    server.send = lambda entry, send=server.send: (answer.wait(60), send(entry))  # neither done nor failed
    log = logger_for(server, ["slow", "after"])
    assert log.flush(within_s=0.05) == 2
    log.release([server])
    assert server.kept() == ["slow", "after"], "whether the first one arrives is not known: it may arrive twice"
    answer.set()
    log.put(server, entry("last"))
    assert log.flush() == 0
    assert server.heard == ["slow", "last"]


def test_flush_ends_a_long_pause_between_two_tries():
    server = Server()
    server.up.clear()
    log = logger_for(server, ["a"], pause_s=10.0, longest_pause_s=10.0)
    server.wait_for_try()
    time.sleep(0.05)  # the pause has begun
    server.up.set()
    assert log.flush(within_s=9.0) == 0


@pytest.mark.parametrize("step", ["read", "remove"])
def test_a_file_that_cannot_be_used_stops_nothing(step, caplog):
    server = Server()
    part = server.keep([entry("kept")])

    def fail(part):
        raise OSError(5, "Input/output error")

    setattr(server, step, fail)
    log = logger_for(server)
    log.open(server, [part])
    log.put(server, entry("new"))
    assert log.flush() == 0
    assert server.heard[-1] == "new" and "Input/output error" in caplog.text
