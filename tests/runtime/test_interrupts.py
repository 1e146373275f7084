"""SIGTERM and Ctrl-C on programs of their own: the sentence, the exit status, no stack trace of Python or Ray."""

import signal
import subprocess
import sys
from collections.abc import Callable

import pytest

from neurostorm.runtime.interrupts import interruptible

HEAD = """
import signal, sys, time
from neurostorm.runtime.interrupts import interruptible

def wait():
    print("ready", flush=True)
    time.sleep(60)

"""
WITH_RAY = """
import functools, ray
from neurostorm.runtime import session

session.start_local = functools.partial(session.start_local, include_dashboard=False, num_cpus=1)  # sooner there

class Slow:
    def go(self):
        time.sleep(60)

with interruptible("start it again"):
    session.ensure_ray()
    waited = ray.remote(num_cpus=0)(Slow).remote().go.remote()
    print("ready", flush=True)
    ray.get(waited)
"""


def run(body: str, *signals: signal.Signals) -> tuple[int, str]:
    """Runs a program, sends the first signal when it is ready and each further one after its sentence."""
    command = [sys.executable, "-c", HEAD + body]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as program:
        assert program.stdout is not None
        shown = ""
        for number, each in enumerate(signals):
            awaited = "stopped by" if number else "ready"
            while awaited not in shown:
                line = program.stdout.readline()
                assert line, shown
                shown += line
            program.send_signal(each)
        shown += program.communicate(timeout=60)[0]
    return program.returncode, shown.removeprefix("ready\n")


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_ends_the_job_with_a_sentence_and_the_status_of_the_signal(number, status) -> None:
    body = """
with interruptible(lambda: "the newest checkpoint is step-7: start the same command again"):
    try:
        wait()
    finally:
        print("the job cleans up", flush=True)
"""
    ended, shown = run(body, number)
    assert ended == status
    sentence = f"stopped by {number.name}: the newest checkpoint is step-7: start the same command again"
    assert shown.split("\n") == ["", sentence, "the job cleans up", ""]


@pytest.mark.parametrize(
    "job",
    [
        "try:\n        wait()\n    except BaseException:\n        pass",
        "try:\n        wait()\n    except BaseException as error:\n        raise ValueError from error",
    ],
)
def test_a_job_that_swallows_or_replaces_the_interruption_ends_all_the_same(job) -> None:
    ended, shown = run(f"with interruptible('again'):\n    {job}\nprint('went on')", signal.SIGTERM)
    assert (ended, shown) == (143, "\nstopped by SIGTERM: again\n")


def test_a_second_signal_ends_a_job_that_cannot_end() -> None:
    body = "with interruptible('again'):\n    try:\n        wait()\n    finally:\n        time.sleep(60)"
    assert run(body, signal.SIGTERM, signal.SIGINT) == (130, "\nstopped by SIGTERM: again\n")


def test_advice_that_cannot_be_had_does_not_keep_the_job_from_ending() -> None:
    ended, shown = run("with interruptible(lambda: 1 / 0):\n    wait()", signal.SIGTERM)
    assert ended == 143
    assert shown == "\nstopped by SIGTERM: start the same command again to resume\n"


def test_without_a_signal_results_errors_and_handlers_stay_as_they_were() -> None:
    before: list[Callable | int | None] = [signal.getsignal(each) for each in (signal.SIGTERM, signal.SIGINT)]
    with interruptible("again"):
        assert signal.getsignal(signal.SIGTERM) != before[0]
    with pytest.raises(ValueError, match="of the job"), interruptible("again"):
        raise ValueError("of the job")
    assert [signal.getsignal(each) for each in (signal.SIGTERM, signal.SIGINT)] == before


def test_a_job_on_ray_is_stopped_without_rays_stack_trace() -> None:
    """Ray's own handler for SIGTERM writes a C++ stack and aborts with status 134."""
    ended, shown = run(WITH_RAY, signal.SIGTERM)
    assert (ended, shown) == (143, "\nstopped by SIGTERM: start it again\n")
