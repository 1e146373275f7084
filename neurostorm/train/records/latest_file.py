"""A small file that is written again and again, by a thread, where writing it must not hold up or end training.

put(content) --> the newest content waits --> thread: written, at most every 10 s; a failure is said once
flush(within_s)  waits until what was put last is written
"""

import logging
import threading
import time

from neurostorm.io.paths import Place, replace

logger = logging.getLogger(__name__)
EVERY_S = 10.0


class LatestFile:
    """Keeps `file` at what was put last, as well as its storage allows.

    Args:
        file: what is written.
        every_s: shortest time between two writes, seconds.
    """

    def __init__(self, file: Place, every_s: float = EVERY_S) -> None:
        self._file, self._every_s = file, every_s
        self._changed = threading.Condition()
        self._waiting: bytes | None = None
        self._writing = self._urgent = False
        threading.Thread(target=self._run, name=f"writes {file.name}", daemon=True).start()

    def put(self, content: bytes) -> None:
        """Has `content` written soon, unless other content comes before."""
        with self._changed:
            self._waiting = content
            self._changed.notify_all()

    def flush(self, within_s: float) -> bool:
        """Waits until what was put last is written, `within_s` seconds at most; whether it is."""
        with self._changed:
            self._urgent = True
            self._changed.notify_all()
            return self._changed.wait_for(lambda: self._waiting is None and not self._writing, within_s)

    def _run(self) -> None:
        failed = False
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._waiting is not None)
                content, self._waiting, self._writing, self._urgent = self._waiting, None, True, False
            assert content is not None
            began_s = time.monotonic()
            try:
                replace(self._file, content)
                failed = False
            except OSError as error:
                if not failed:
                    logger.warning("%s cannot be written (%s); training goes on without it", self._file, error)
                failed = True
            with self._changed:
                self._writing = False
                self._changed.notify_all()
                rest_s = self._every_s - (time.monotonic() - began_s)
                self._changed.wait_for(lambda: self._urgent, max(rest_s, 0.0))
