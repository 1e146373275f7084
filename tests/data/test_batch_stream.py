"""Batches come when they are polled for, and a wait ends with what it was for."""

import gc
import threading
import time
from weakref import ref

import pytest

from neurostorm.data import batch_stream
from neurostorm.data.batch_stream import BatchStream, BatchTimeout


def test_batches_come_in_order_each_made_when_it_is_asked_for():
    made = []

    def make():
        for number in range(3):
            made.append(number)
            yield number

    stream = BatchStream(make())
    assert made == []
    assert stream.poll(10) == 0 and made == [0]
    assert list(stream) == [1, 2]
    with pytest.raises(StopIteration):
        stream.poll(10)


def test_a_poll_that_is_too_short_gives_nothing_and_the_next_one_the_same_batch():
    free = threading.Event()

    def make():
        free.wait(60)
        yield "batch"

    stream = BatchStream(make())
    assert stream.poll(0.01) is None and stream.poll(0.0) is None
    free.set()
    assert stream.poll(60) == "batch"


def test_an_error_reaches_the_caller():
    def make():
        yield 1
        raise KeyError("lost")

    stream = BatchStream(make())
    assert next(stream) == 1
    with pytest.raises(KeyError, match="lost"):
        next(stream)


def test_a_batch_that_does_not_come_is_said_and_then_an_error(monkeypatch, caplog):
    monkeypatch.setattr(batch_stream, "SAY_EVERY_S", 0.02)
    end = threading.Event()

    def make():
        end.wait(60)
        yield 1

    words = ("reads from the moon", "it is full")
    stream = BatchStream(make(), rank=3, first_step=7, timeout_s=0.2, words=lambda: words)
    with pytest.raises(BatchTimeout, match=r"step 7 .*worker 3.*reads from the moon\. Check that it is full.*raise"):
        while stream.poll(0.01) is None:
            pass
    end.set()
    assert "worker 3 waits for the clips of step 7" in caplog.text


def test_a_stream_that_nobody_holds_ends_its_thread():
    before = set(threading.enumerate())
    stream = BatchStream(iter([1, 2]))
    next(stream)
    gone = ref(stream)
    del stream
    gc.collect()
    assert gone() is None
    end_s = time.monotonic() + 30
    while set(threading.enumerate()) - before and time.monotonic() < end_s:
        time.sleep(0.01)
    assert not set(threading.enumerate()) - before
