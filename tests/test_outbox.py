"""Calls wait for a server that is away, and for nothing else."""

import logging
import threading
import time

import pytest

from neurostorm.outbox import Outbox


class Server:
    """Notes what it is told; away while told so."""

    def __init__(self):
        self.heard, self.up = [], threading.Event()
        self.up.set()

    def call(self, value):
        def send():
            if not self.up.is_set():
                raise ConnectionError("refused")
            if value == "bad":
                raise ValueError("a bad name")
            self.heard.append(value)

        return send


def box(**keywords):
    return Outbox("the server", lambda error: isinstance(error, OSError), **{"pause_s": 0.01, **keywords})


def test_calls_are_made_in_order_and_flush_waits_for_them():
    server, outbox = Server(), box()
    for value in range(200):
        outbox.put(server.call(value))
    assert outbox.flush() == 0
    assert server.heard == list(range(200))


def test_a_server_that_is_away_holds_up_nothing_and_misses_nothing(caplog):
    server, outbox = Server(), box()
    outbox.put(server.call("before"))
    assert outbox.flush() == 0
    server.up.clear()
    with caplog.at_level(logging.WARNING):
        for value in range(5):
            outbox.put(server.call(value))  # does not wait
        time.sleep(0.1)
        assert server.heard == ["before"]
        server.up.set()
        assert outbox.flush() == 0
    assert server.heard == ["before", *range(5)]
    assert [record.getMessage().split(" (")[0] for record in caplog.records[:1]] == ["the server does not answer"]
    assert len(caplog.records) == 2 and "answers again" in caplog.text


def test_flush_gives_up_on_a_server_that_stays_away_and_says_how_much_is_left():
    server, outbox = Server(), box(patience_s=0.05)
    server.up.clear()
    for value in range(3):
        outbox.put(server.call(value))
    assert outbox.flush() == 3
    server.up.set()
    deadline_s = time.monotonic() + 30
    while len(server.heard) < 3 and time.monotonic() < deadline_s:
        time.sleep(0.01)
    assert server.heard == [0, 1, 2], "it went on trying"


def test_what_the_server_refuses_is_raised_and_not_sent_again():
    server, outbox = Server(), box()
    outbox.put(server.call("bad"))
    with pytest.raises(ValueError, match="a bad name"):
        outbox.flush()
    outbox.put(server.call("good"))
    assert outbox.flush() == 0
    assert server.heard == ["good"]


def test_flush_within_a_time_does_not_wait_for_a_call_that_tries_for_minutes():
    server, outbox, answer = Server(), box(), threading.Event()
    outbox.put(answer.wait)  # neither done nor failed
    outbox.put(server.call("after"))
    assert outbox.flush(within_s=0.05) == 2
    answer.set()
    assert outbox.flush() == 0
    assert server.heard == ["after"]
