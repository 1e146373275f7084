"""Logs from a thread to a server that may be away, so that the program neither waits for it nor fails because of it.

    put(sink, entry) --> queue --> thread: sink.send(entry) --ok--> next
                           |          |-- AWAY ----> one warning, tried again and again; what waits goes to sink.keep
                           |          |-- REFUSED -> one warning, counted, dropped
                           |          '-- LATER ---> one warning, kept with sink.keep, and the next one
                           '-- too much in memory: pictures are dropped first

A sink is what entries belong to, here an MLflow run. What it keeps lies in files, which are queued in place of the
entries and are sent first when the server is back. `flush` waits until the queue is empty, or the server has been away
for too long; `release` keeps the rest in files and ends the waiting.

A process that is killed while its server is away loses what it logged since entries were last kept: `keep_after_s`.
"""

import logging
import math
import threading
import time
from collections import deque
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass
from textwrap import shorten
from weakref import WeakKeyDictionary

from neurostorm.tracking.sink import Sink, Verdict
from neurostorm.tracking.unsent import IMAGE, Entry, Part

logger = logging.getLogger(__name__)

_LONGEST_REASON = 300  # characters


@dataclass(eq=False)
class _Item:
    """An entry, a file of entries (`part` alone), or the opening of the sink (neither).

    An entry with a part was read from that file; the last one (`closes`) takes the file away.
    """

    sink: Sink
    entry: Entry | None = None
    part: Part | None = None
    expanded: bool = False
    closes: bool = False
    tries: int = 0

    @property
    def in_memory(self) -> bool:
        return self.entry is not None and self.part is None

    @property
    def weight(self) -> int:
        """How many entries it stands for."""
        return int(self.entry is not None) if self.expanded or self.part is None else self.part.count


class AsyncLogger:
    """Sends entries in the order in which they were put, from a thread of its own.

    Args:
        name: of the server, for messages.
        patience_s: for how long `flush` waits for a server that is away.
        pause_s, longest_pause_s: between the first two tries, and the most to which it doubles.
        keep_after_s: how long entries may wait in memory, while the server is away, before they are kept in files.
        memory_bytes: the most that waits in memory.
    """

    def __init__(
        self,
        name: str,
        *,
        patience_s: float = 60.0,
        pause_s: float = 1.0,
        longest_pause_s: float = 15.0,
        keep_after_s: float = 30.0,
        memory_bytes: int = 64 << 20,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._name, self._patience_s, self._pause_s, self._clock = name, patience_s, pause_s, clock
        self._longest_pause_s = longest_pause_s
        self._keep_after_s, self._memory_bytes = keep_after_s, memory_bytes
        self._queue: deque[_Item] = deque()
        self._bytes = 0
        self._changed = threading.Condition()
        self._keeping = threading.Lock()  # held from the choice of entries until they are kept
        self._flushing = self._failures = 0
        self._away_since_s: float | None = None
        self._kept_s = -math.inf
        self._warned: WeakKeyDictionary[Sink, set[str]] = WeakKeyDictionary()
        threading.Thread(target=self._send_all, name="async-logger", daemon=True).start()

    def open(self, sink: Sink, parts: Iterable[Part] = ()) -> None:
        """Has the sink opened, and what an earlier process kept for it sent."""
        with self._changed:
            self._queue.append(_Item(sink))
            self._queue.extend(_Item(sink, part=part) for part in parts)
            self._changed.notify_all()

    def put(self, sink: Sink, entry: Entry) -> None:
        """Has an entry sent soon; returns at once."""
        with self._changed:
            self._queue.append(_Item(sink, entry))
            self._bytes += entry.size_bytes
            while self._bytes > self._memory_bytes:
                if not self._drop_one():
                    break
            self._changed.notify_all()

    def flush(self, within_s: float = math.inf) -> int:
        """Waits until all is sent; returns how many entries are not, as the server was away for `patience_s`.

        It is tried once more at least, however long the server has been away.

        Args:
            within_s: the longest wait, whether or not the server is known to be away: a call may take minutes.
        """
        end_s = self._clock() + within_s
        with self._changed:
            self._flushing += 1
            self._changed.notify_all()  # ends a pause between two tries
            before = self._failures
            while self._queue and (self._away_s() <= self._patience_s or self._failures == before):
                left_s = end_s - self._clock()
                if left_s <= 0:
                    break
                self._changed.wait(min(self._pause_s, left_s))
            self._flushing -= 1
            return sum(item.weight for item in self._queue)

    def release(self, sinks: Collection[Sink]) -> None:
        """Keeps what waits for `sinks` in files and sends no more of it in this process."""
        with self._keeping:
            with self._changed:
                items = [item for item in self._queue if item.sink in sinks]
                self._queue = deque(item for item in self._queue if item.sink not in sinks)
                self._bytes = _memory_bytes(self._queue)
                self._changed.notify_all()
            for sink in _sinks(items):
                entries = [item.entry for item in items if item.sink is sink and item.in_memory and item.entry]
                if entries:
                    self._keep(sink, entries)

    def _away_s(self) -> float:
        return 0.0 if self._away_since_s is None else self._clock() - self._away_since_s

    def _send_all(self) -> None:
        while True:
            with self._changed:
                while not self._queue:
                    self._changed.wait()
                item = self._queue[0]
            try:
                self._one(item)
            except Exception as error:  # the thread must not die; this entry is not tried again
                logger.exception("%s: an entry cannot be logged", self._name)
                self._refuse(item, error)

    def _one(self, item: _Item) -> None:
        if item.part is not None and not item.expanded:
            self._expand(item, item.part)
            return
        if item.closes and item.part is not None:
            self._finish(item)
            return
        try:
            item.sink.send(item.entry)
        except Exception as error:
            item.tries += 1
            verdict = item.sink.judge(error, item.entry, item.tries)
            if verdict is Verdict.AWAY:
                self._note_away(error)
                self._keep_waiting()
                self._pause(item.tries)
                return
            self._note_back()
            if verdict is Verdict.REFUSED or item.entry is None:
                self._refuse(item, error)
            else:
                self._set_aside(item, item.entry, error)
            return
        self._note_back()
        self._finish(item)

    def _pause(self, tries: int) -> None:
        """Waits before the next try: longer each time, but not while a caller waits in `flush`."""
        end_s = time.monotonic() + min(self._pause_s * 2 ** min(tries - 1, 10), self._longest_pause_s)
        with self._changed:
            if self._flushing:
                end_s = time.monotonic() + self._pause_s
            while (left_s := end_s - time.monotonic()) > 0:
                before = self._flushing
                self._changed.wait(left_s)
                if self._flushing > before:
                    return

    def _expand(self, item: _Item, part: Part) -> None:
        """Puts the entries of a file in its place in the queue."""
        try:
            entries = item.sink.read(part)
        except (OSError, ValueError) as error:
            self._warn(
                item.sink, "read", "%s: %s cannot be read and stays there: %s", item.sink.title, part.name, error
            )
            self._finish(item)
            return
        with self._changed:
            if not self._first(item):
                return
            self._queue.popleft()
            self._queue.appendleft(_Item(item.sink, None, part, expanded=True, closes=True))
            for entry in reversed(entries):
                self._queue.appendleft(_Item(item.sink, entry, part, expanded=True))

    def _first(self, item: _Item) -> bool:
        """Whether an item still heads the queue: `release` may have taken it away meanwhile."""
        return bool(self._queue) and self._queue[0] is item

    def _finish(self, item: _Item) -> None:
        """Takes a sent item out of the queue, and the file whose last entry it was away."""
        if item.closes and item.part is not None:
            with self._changed:
                ours = self._first(item)
            if ours:
                try:
                    item.sink.remove(item.part)
                except OSError as error:  # sent again by the next start, which changes nothing
                    logger.warning("%s: %s cannot be deleted: %s", item.sink.title, item.part.name, error)
        with self._changed:
            if self._first(item):
                self._queue.popleft()
                if item.in_memory and item.entry is not None:
                    self._bytes -= item.entry.size_bytes
            self._changed.notify_all()

    def _refuse(self, item: _Item, error: Exception) -> None:
        item.sink.count(refused=1)
        what = item.entry.kind if item.entry else "run"
        self._warn(
            item.sink, "refused", "%s: the server refuses an entry (%s), which is dropped, as are others that it "
            "refuses: %s", item.sink.title, what, error,
        )  # fmt: skip
        self._finish(item)

    def _set_aside(self, item: _Item, entry: Entry, error: Exception) -> None:
        self._warn(
            item.sink, "later", "%s: %s cannot be stored now and is kept for later: %s", item.sink.title,
            entry.facts.get("path", entry.kind), error,
        )  # fmt: skip
        with self._keeping:
            self._keep(item.sink, [entry])
        self._finish(item)

    def _keep(self, sink: Sink, entries: list[Entry]) -> None:
        """Writes entries that are sent no more by this process to a file."""
        try:
            sink.keep(entries)
        except OSError as error:
            sink.count(lost=len(entries))
            self._warn(sink, "lost", "%s: entries that were not sent are lost: %s", sink.title, error)

    def _keep_waiting(self) -> None:
        """Moves what waits in memory to files, when it has waited for long or is much."""
        now_s = self._clock()
        with self._keeping:
            with self._changed:
                due = self._away_s() >= self._keep_after_s and now_s - self._kept_s >= self._keep_after_s
                if not due and self._bytes <= self._memory_bytes // 2:
                    return
                items = [item for item in self._queue if item.in_memory]
            self._kept_s = now_s
            for sink in _sinks(items):
                mine = [item for item in items if item.sink is sink]
                try:
                    part = sink.keep([item.entry for item in mine if item.entry is not None])
                except OSError as error:
                    self._warn(sink, "keep", "%s: what waits cannot be kept in a file: %s", sink.title, error)
                    continue
                self._exchange(mine, _Item(sink, part=part))

    def _exchange(self, kept: list[_Item], part: _Item) -> None:
        """Puts a file into the queue in place of entries that it holds now."""
        with self._changed:
            gone = {id(item) for item in kept}
            places = [nth for nth, item in enumerate(self._queue) if id(item) in gone]
            if not places:
                return
            left = [item for item in self._queue if id(item) not in gone]
            left.insert(places[0], part)
            self._queue = deque(left)
            self._bytes = _memory_bytes(left)
            self._changed.notify_all()

    def _drop_one(self) -> bool:
        """Drops an entry for want of memory: the oldest picture, or else the oldest entry; False if there is none."""
        waiting = [item for item in list(self._queue)[1:] if item.in_memory and item.entry is not None]
        pictures = (item for item in waiting if item.entry is not None and item.entry.kind == IMAGE)
        item = next(pictures, next(iter(waiting), None))
        if item is None or item.entry is None:
            return False
        self._queue.remove(item)
        self._bytes -= item.entry.size_bytes
        item.sink.count(lost=1)
        self._warn(item.sink, "lost", "%s: too much waits to be sent; pictures are dropped first", item.sink.title)
        return True

    def _warn(self, sink: Sink, kind: str, text: str, *values: object) -> None:
        """A warning of one kind, once for each sink."""
        warned = self._warned.setdefault(sink, set())
        if kind not in warned:
            warned.add(kind)
            logger.warning(text, *values)

    def _note_away(self, error: Exception) -> None:
        with self._changed:
            self._failures += 1
            self._changed.notify_all()
        if self._away_since_s is None:
            self._away_since_s = self._clock()
            reason = shorten(str(error), _LONGEST_REASON)
            logger.warning("%s does not answer (%s): the run goes on, and what it logs waits", self._name, reason)

    def _note_back(self) -> None:
        if self._away_since_s is not None:
            away_s = self._clock() - self._away_since_s
            self._away_since_s = None
            with self._changed:
                waited = sum(item.weight for item in self._queue)
            logger.warning("%s answers again after %.0f s; %d entries had to wait", self._name, away_s, waited)


def _sinks(items: list[_Item]) -> list[Sink]:
    """The sinks of items, in order of their first item."""
    return list({id(item.sink): item.sink for item in items}.values())


def _memory_bytes(items: Iterable[_Item]) -> int:
    return sum(item.entry.size_bytes for item in items if item.in_memory and item.entry is not None)
