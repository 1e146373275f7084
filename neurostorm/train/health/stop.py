"""A run that is asked to stop saves a checkpoint after the step under way, and ends.

    kill -USR1 DRIVER -> driver: RUN/stop-requested --looked for by rank 0, in a thread--> all ranks, before a step
    touch RUN/stop-requested (a launch script)      -> that step -> checkpoint -> workers end -> driver ends: status 75

A file, because whoever asks knows the run's folder, and neither Ray nor on which node the workers are. The driver
removes it when it starts and when it ends: it stops no later start. A checkpoint that cannot be saved is a failure like
others: the workers start again, find the file, and save after their next step.
"""

import logging
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType

from neurostorm.io.atomic import atomic_write
from neurostorm.io.errors import UserError
from neurostorm.io.paths import AnyPath

logger = logging.getLogger(__name__)

STOP_FILE = "stop-requested"
STOPPED_STATUS = 75  # EX_TEMPFAIL of sysexits.h: start the same command again
LOOK_EVERY_S, LOOK_AWAY_EVERY_S = 1.0, 10.0  # at a local folder; at an object store, where a look is a request


class RunStopped(UserError):
    """The run ended before its last step because it was asked to; its checkpoint is committed."""


class StopWatch:
    """Looks whether a run was asked to stop, in a thread: storage that is away delays no step.

    Args:
        folder: the run's.
        every_s: seconds between looks; default: 1 for a local folder, 10 for an object store.
    """

    def __init__(self, folder: AnyPath, every_s: float | None = None) -> None:
        self._file = folder / STOP_FILE
        usual_s = LOOK_EVERY_S if isinstance(folder, Path) else LOOK_AWAY_EVERY_S
        self._every_s = usual_s if every_s is None else every_s
        self._asked = threading.Event()
        threading.Thread(target=self._look, name="stop-watch", daemon=True).start()

    def __call__(self) -> bool:
        """Whether it was asked, at the last look."""
        return self._asked.is_set()

    def _look(self) -> None:
        while True:
            try:
                if self._file.is_file():
                    self._asked.set()
                    return
            except OSError as error:
                logger.debug("%s cannot be looked for now (%s)", self._file, error)
            time.sleep(self._every_s)


@contextmanager
def stops_on_usr1(folder: AnyPath) -> Iterator[None]:
    """Asks the run in `folder` to stop when this process gets SIGUSR1; a request from before is dropped.

    Further signals say so and change nothing. In a thread that is not the main one no signal is handled.
    """
    (folder / STOP_FILE).unlink(missing_ok=True)
    asking: list[threading.Thread] = []

    def ask(number: int, frame: FrameType | None) -> None:
        again = bool(asking)
        asking.append(threading.Thread(target=_request, args=(folder, again), daemon=True))
        asking[-1].start()  # the main thread may be inside of what a request needs

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGUSR1, ask)
    try:
        yield
    finally:
        signal.signal(signal.SIGUSR1, before)
        for thread in asking:
            thread.join()
        with suppress(OSError):  # the next start removes it
            (folder / STOP_FILE).unlink(missing_ok=True)


def _request(folder: AnyPath, again: bool) -> None:
    if again:
        logger.info("SIGUSR1: the run was asked to stop already, and ends when its checkpoint is saved")
        return
    try:
        atomic_write(folder / STOP_FILE, b"")
    except OSError as error:
        logger.warning("SIGUSR1: the run cannot be asked to stop (%s); Ctrl-C ends it without a checkpoint", error)
        return
    logger.info("SIGUSR1: the run saves a checkpoint after the step under way and ends with status %d", STOPPED_STATUS)
