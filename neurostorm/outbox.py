"""Calls to a server that may be away for a while, made in order by a thread, so that training does not wait for it.

    put(call) --> queue --> thread: call() --ok--> next
                               └─ away --> warned once --> tried again and again --> back: all that waited is sent
    flush() waits until the queue is empty, or until a server was away for too long

A call that the server refuses (a bad name, say) would be refused again: its error is raised by the next `put` or
`flush`. What waits lies in memory: a process that is killed while the server is away takes it along.
"""

import logging
import math
import threading
import time
from collections import deque
from collections.abc import Callable

logger = logging.getLogger(__name__)


class Outbox:
    """Makes calls from a thread of its own, in the order in which they were put.

    is_away     whether an error of a call means that the server could not be reached
    patience_s  for how long `flush` waits for a server that is away
    pause_s     between two tries
    """

    def __init__(
        self, name: str, is_away: Callable[[Exception], bool], patience_s: float = 600.0, pause_s: float = 1.0
    ) -> None:
        self._name, self._is_away, self._patience_s, self._pause_s = name, is_away, patience_s, pause_s
        self._waiting: deque[Callable[[], object]] = deque()
        self._changed = threading.Condition()
        self._refused: Exception | None = None
        self._away_since_s: float | None = None
        threading.Thread(target=self._send_all, name="outbox", daemon=True).start()

    def put(self, call: Callable[[], object]) -> None:
        """Has `call` made soon. Raises the error of an earlier call that was refused."""
        with self._changed:
            self._raise_refused()
            self._waiting.append(call)
            self._changed.notify_all()

    def flush(self, within_s: float = math.inf) -> int:
        """Waits until all calls are made; returns how many are not, as the server was away for `patience_s`.

        within_s  it waits no longer, whether or not the server is known to be away: a call may try for minutes
        """
        end_s = time.monotonic() + within_s
        with self._changed:
            while self._waiting and not self._refused and self._away_s() <= self._patience_s:
                left_s = end_s - time.monotonic()
                if left_s <= 0:
                    break
                self._changed.wait(min(self._pause_s, left_s))
            self._raise_refused()
            return len(self._waiting)

    def _raise_refused(self) -> None:
        refused, self._refused = self._refused, None
        if refused is not None:
            raise refused

    def _away_s(self) -> float:
        return 0.0 if self._away_since_s is None else time.monotonic() - self._away_since_s

    def _send_all(self) -> None:
        while True:
            with self._changed:
                while not self._waiting:
                    self._changed.wait()
                call = self._waiting[0]
            try:
                call()
            except Exception as error:
                if self._is_away(error):
                    self._note_away(error)
                    time.sleep(self._pause_s)
                    continue
                with self._changed:
                    self._refused = self._refused or error
            else:
                self._note_back()
            with self._changed:
                self._waiting.popleft()
                self._changed.notify_all()

    def _note_away(self, error: Exception) -> None:
        if self._away_since_s is None:
            self._away_since_s = time.monotonic()
            logger.warning("%s does not answer (%s): the run goes on, and what it logs waits", self._name, error)

    def _note_back(self) -> None:
        if self._away_since_s is not None:
            away_s, waited = time.monotonic() - self._away_since_s, len(self._waiting)
            self._away_since_s = None
            logger.warning("%s answers again after %.0f s; %d calls had to wait", self._name, away_s, waited)
