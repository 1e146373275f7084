"""Storage that is away is waited for, up to a limit; what is damaged is an error at once."""

import threading

import pytest

from neurostorm.data import storage_wait
from neurostorm.data.storage_wait import StorageAwayError, wait_for_storage
from neurostorm.store.layout import StoreError, StoreUnavailableError


class Time:
    """A clock that only pauses move, as the event that pauses."""

    def __init__(self):
        self.now_s, self.pauses, self.stopped = 0.0, [], False

    def __call__(self):
        return self.now_s

    def wait(self, pause_s):
        self.pauses.append(pause_s)
        self.now_s += pause_s

    def is_set(self):
        return self.stopped


def failing(times, error=StoreUnavailableError):
    left = [times]

    def work():
        if left[0] > 0:
            left[0] -= 1
            raise error("s3://b/run: 503")
        return "frames"

    return work


def wait(work, limit_s=600.0):
    time = Time()
    return wait_for_storage(work, limit_s, stop=time, clock_s=time), time


def test_what_answers_at_once_waits_for_nothing():
    assert wait(failing(0))[0] == ("frames", 0.0)


def test_pauses_grow_to_their_bound_and_the_wait_is_measured():
    (found, waited_s), time = wait(failing(8))
    assert found == "frames"
    assert time.pauses == [0.5, 1, 2, 4, 8, 10, 10, 10]
    assert waited_s == sum(time.pauses)


def test_after_the_limit_it_is_an_error_that_names_the_setting_and_ends_the_run():
    with pytest.raises(StorageAwayError, match=r"503.*away for 600 s \(data\.unavailable_s=600\).*resumes") as away:
        wait(failing(10**6))
    assert not away.value.retry


def test_damage_is_not_waited_for():
    with pytest.raises(StoreError) as damaged:
        wait(failing(1, StoreError))
    assert not isinstance(damaged.value, StoreUnavailableError)


def test_a_reader_that_ends_does_not_wait_on():
    stop = threading.Event()
    stop.set()
    with pytest.raises(StorageAwayError):
        wait_for_storage(failing(10**6), 1e9, stop=stop)


def test_many_threads_say_it_once(caplog, monkeypatch):
    monkeypatch.setattr(storage_wait, "_SAID", storage_wait._Said(threading.Lock()))
    for _ in range(20):
        wait(failing(3))
    assert len(caplog.records) == 1 and "s3://b/run: 503; waiting for it" in caplog.text


def test_a_second_outage_soon_after_the_first_is_said_too(caplog, monkeypatch):
    said = storage_wait._Said(threading.Lock())
    monkeypatch.setattr(storage_wait, "_SAID", said)
    for _ in range(2):
        wait(failing(3))
        said.at_s -= storage_wait.SAY_CHANGES_EVERY_S
    assert [record.getMessage().split(",")[0] for record in caplog.records] == [
        "s3://b/run: 503; waiting for it", "s3://b/run: 503; waiting for it",
    ]  # fmt: skip
