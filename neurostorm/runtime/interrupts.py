"""SIGTERM and Ctrl-C end a job with a sentence on how to resume it, and with the exit status that shells expect.

    with interruptible(resume): job()       # SIGTERM, SIGINT --> sentence at once --> Interrupted in the main thread
                                            #   --> the job unwinds --> Ray is shut down quietly --> exit 143 or 130

A second signal ends the process at once. Ray sets signal handlers of its own when it starts, so the code that starts
Ray calls `reinstall` afterwards.
"""

import logging
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import NoReturn

logger = logging.getLogger(__name__)
SIGNALS = (signal.SIGTERM, signal.SIGINT)
GRACE_S = 20.0  # the process ends at the latest after this time: what it waits for may never come


class Interrupted(KeyboardInterrupt):
    """Raised in the main thread by the first signal; what handles Ctrl-C handles it."""


class _Job:
    """The running `interruptible` block: what it says, and the signal that has come."""

    def __init__(self, resume: Callable[[], str]) -> None:
        self._resume = resume
        self.received: signal.Signals | None = None
        self.error: Exception | None = None  # to be raised in the main thread

    def install(self) -> None:
        for each in SIGNALS:
            signal.signal(each, self.handle)

    def handle(self, number: int, frame: FrameType | None) -> NoReturn:
        if self.error is not None:
            error, self.error = self.error, None
            raise error
        if self.received is not None:
            os._exit(128 + number)
        self.received = signal.Signals(number)
        ending = threading.Timer(GRACE_S, os._exit, (128 + number,))
        ending.daemon = True
        ending.start()
        try:
            advice = self._resume()
        except Exception:  # the sentence must not keep the job from ending
            advice = "start the same command again to resume"
        # Not print: the signal may have come while the main thread was inside a write of its own.
        with suppress(OSError, ValueError):
            os.write(sys.stderr.fileno(), f"\nstopped by {self.received.name}: {advice}\n".encode())
        raise Interrupted(self.received.name)


_current: _Job | None = None


@contextmanager
def interruptible(resume: str | Callable[[], str]) -> Iterator[None]:
    """Makes SIGTERM and Ctrl-C inside end the process with a sentence, without tracebacks or Ray's own output.

    Args:
        resume: what to do to resume, as the end of a sentence ("start the same command again to resume"), or a function
            that returns it. The function is called inside the signal handler, so it must be quick: `ray job stop` kills
            a job after 3 s.

    Raises:
        SystemExit: with 143 after SIGTERM and 130 after SIGINT, when the body has ended.
    """
    global _current
    if threading.current_thread() is not threading.main_thread():  # Python handles signals in the main thread alone
        yield
        return
    job = _Job((lambda: resume) if isinstance(resume, str) else resume)
    before, outer = {each: signal.getsignal(each) for each in SIGNALS}, _current
    _current = job
    job.install()
    try:
        try:
            yield
        except BaseException:
            if job.received is None:
                raise
        if job.received is not None:
            _shut_down_ray()
            raise SystemExit(128 + job.received)
    finally:
        _current = outer
        if job.received is None:  # else a further signal still ends the process at once
            for each, handler in before.items():
                signal.signal(each, handler)


def end_with(error: Exception) -> None:
    """Raises `error` in the main thread, from any other one; logged only when no `interruptible` block runs there."""
    if _current is None:
        logger.error("%s", error)
        return
    _current.error = error
    signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)


def reinstall() -> None:
    """Sets the handlers of the running `interruptible` block again, if there is one, after others were set."""
    if _current is not None and threading.current_thread() is threading.main_thread():
        _current.install()


def _shut_down_ray() -> None:
    """Ends this process's Ray, if it has one, without the stack traces that Ray writes when it is stopped at work."""
    if "ray" not in sys.modules:
        return
    sys.stdout.flush()
    sys.stderr.flush()
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for stream in (1, 2):
        os.dup2(nowhere, stream)  # to the end of the process: Ray's threads write until then
    sys.modules["ray"].shutdown()
