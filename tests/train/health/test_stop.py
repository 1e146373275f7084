"""Asking a run to stop: who asks, who looks, and that every rank hears it before the same step."""

import logging
import os
import signal
import threading
import time

import pytest
import torch.distributed as dist

from neurostorm.io.object_store import UnavailableError
from neurostorm.train.health.barrier import Barrier
from neurostorm.train.health.stop import STOP_FILE, StopWatch, stops_on_usr1
from neurostorm.train.health.timeouts import CollectiveTimeouts
from tests.train import stop_program
from tests.train.ranks import run_together


def wait_for(condition):
    for _ in range(2000):
        if condition():
            return
        time.sleep(0.01)
    pytest.fail("it did not come")


def test_usr1_asks_once_and_the_request_is_gone_afterwards(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    file = tmp_path / STOP_FILE
    file.write_text("")  # of a driver that was killed
    before = signal.getsignal(signal.SIGUSR1)
    with stops_on_usr1(tmp_path):
        assert not file.exists(), "an old request stops no new start"
        watch = StopWatch(tmp_path, every_s=0.01)
        assert not watch()
        os.kill(os.getpid(), signal.SIGUSR1)
        wait_for(file.exists)
        wait_for(watch)
        os.kill(os.getpid(), signal.SIGUSR1)
        wait_for(lambda: "asked to stop already" in caplog.text)
    assert not file.exists()
    assert signal.getsignal(signal.SIGUSR1) == before
    assert watch(), "who has heard it stays with it"


def test_a_request_that_cannot_be_written_is_said(tmp_path, caplog, monkeypatch):
    def away(*arguments):
        raise UnavailableError("s3://bucket: 503")

    monkeypatch.setattr("neurostorm.train.health.stop.atomic_write", away)
    with stops_on_usr1(tmp_path):
        os.kill(os.getpid(), signal.SIGUSR1)
        wait_for(lambda: "cannot be asked to stop (s3://bucket: 503)" in caplog.text)


def test_storage_that_is_away_asks_for_no_stop_and_is_looked_at_again(tmp_path):
    class File:
        looks = 0

        def __truediv__(self, name):
            return self

        def is_file(self):
            self.looks += 1
            if self.looks < 4:
                raise UnavailableError("503")
            return True

    folder = File()
    wait_for(StopWatch(folder, every_s=0.01))
    assert folder.looks == 4


def test_in_another_thread_no_signal_is_handled(tmp_path):
    before = signal.getsignal(signal.SIGUSR1)

    def inside():
        with stops_on_usr1(tmp_path):
            assert signal.getsignal(signal.SIGUSR1) == before

    thread = threading.Thread(target=inside)
    thread.start()
    thread.join()


def test_all_ranks_hear_it_before_the_same_step(tmp_path):
    run_together(stop_program.main, 2, tmp_path)
    assert {file.read_text() for file in tmp_path.glob("rank-*.txt")} == {"stopped after 3 steps"}


def test_without_a_request_no_step_is_the_last(tmp_path):
    dist.init_process_group("gloo", f"file://{tmp_path / 'meeting'}", rank=0, world_size=1)
    try:
        stream = stop_program.stream(3)
        barrier = Barrier(CollectiveTimeouts(1, 1, lambda timeout_s: None), 10)
        assert [barrier.next_batch(stream)[1].stop for _ in range(3)] == [False] * 3
    finally:
        dist.destroy_process_group()
