"""The batches of one worker, made in a thread, so that waiting for them can be watched and given up.

poll(within_s) --> the next batch, or None when it is not there yet (a line in the log every minute of waiting)
               --> BatchTimeout, with what was waited for and what to check, after `timeout_s`
"""

import logging
import queue
import threading
import time
from collections.abc import Callable, Iterator

from neurostorm.data.clips import ClipBatch

logger = logging.getLogger(__name__)
SAY_EVERY_S = 60  # of waiting for a batch
Made = tuple[ClipBatch | None, BaseException | None]


class BatchTimeout(RuntimeError):
    """No clips came in time; the message says what was waited for and what to check."""


class BatchStream(Iterator[ClipBatch]):
    """The same batches, each made when it is first asked for, or when the one before it is taken.

    Args:
        batches: makes them; used in a thread of its own.
        rank, first_step: of the worker and the first batch, for messages.
        timeout_s: longest wait for one batch, seconds.
        words: what is waited for now, and what to check, for messages.
        ask_ahead: asks for a batch when the one before it is taken: it is made while that one is in use.
    """

    def __init__(
        self,
        batches: Iterator[ClipBatch],
        *,
        rank: int = 0,
        first_step: int = 0,
        timeout_s: float = 1800.0,
        words: Callable[[], tuple[str, str]] = lambda: ("reads of clips", "the store answers"),
        ask_ahead: bool = False,
    ) -> None:
        self._rank, self._timeout_s, self._words, self._ask_ahead = rank, timeout_s, words, ask_ahead
        self.step = first_step  # of the next batch
        self._asked: queue.SimpleQueue[bool] = queue.SimpleQueue()
        self._made: queue.SimpleQueue[Made] = queue.SimpleQueue()
        self._is_asked = False  # for the next batch
        self._began_s: float | None = None  # of the wait for the next batch; None: no poll is waiting
        self._said_s = 0.0  # of that wait, when it was last logged
        # Not a method: its thread would keep this object, whose end is to end the thread.
        arguments = (batches, self._asked, self._made)
        threading.Thread(target=_make, args=arguments, name="batches", daemon=True).start()

    def poll(self, within_s: float) -> ClipBatch | None:
        """Returns the next batch if it comes within `within_s` seconds, else None.

        Raises:
            StopIteration: there are no more.
            BatchTimeout: it did not come within `timeout_s` of the first call for it.
        """
        if not self._is_asked:
            self._ask()
        if self._began_s is None:
            self._began_s, self._said_s = time.monotonic(), 0.0
        left_s = self._timeout_s - (time.monotonic() - self._began_s)
        try:
            batch, error = self._made.get(timeout=max(0.0, min(within_s, left_s)))
        except queue.Empty:
            self._not_yet(time.monotonic() - self._began_s)
            return None
        self._began_s, self._is_asked = None, False
        self.step += 1
        if error is not None:
            raise error
        if batch is None:
            raise StopIteration
        if self._ask_ahead:
            self._ask()
        return batch

    def _ask(self) -> None:
        self._asked.put(True)
        self._is_asked = True

    def __next__(self) -> ClipBatch:
        while (batch := self.poll(SAY_EVERY_S)) is None:
            pass
        return batch

    def close(self) -> None:
        """Ends the thread, once the batch that it makes is made."""
        self._asked.put(False)

    def __del__(self) -> None:
        self.close()

    def _not_yet(self, waited_s: float) -> None:
        """Says what is waited for: in the log, once a minute, or as the error when it was too long."""
        what, check = self._words()
        if waited_s >= self._timeout_s:
            raise BatchTimeout(
                f"no clips of step {self.step} came to worker {self._rank} in {waited_s:.0f} s (data.batch_timeout_s): "
                f"it waited for {what}. Check that {check}; if that is only slow, raise --data.batch_timeout_s"
            )
        if waited_s - self._said_s >= SAY_EVERY_S:
            self._said_s = waited_s
            logger.warning(
                "worker %d waits for the clips of step %d for %.0f s: %s", self._rank, self.step, waited_s, what
            )


def _make(batches: Iterator[ClipBatch], asked: "queue.SimpleQueue[bool]", made: "queue.SimpleQueue[Made]") -> None:
    """The thread: makes a batch each time that one is asked for; None after the last one."""
    try:
        while asked.get():
            made.put((next(batches, None), None))
    except BaseException as error:
        made.put((None, error))
