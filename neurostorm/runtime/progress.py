"""One progress bar for all jobs: on a terminal a line that is redrawn, in a log file a line every ten seconds at most.

with progress(len(runs), "embed", "run") as bar:
    bar.update()              # one more is done; shows the count, the rate and the time left
    bar.note(failed=2)        # figures beside the count; also keeps the clock going while nothing ends
"""

import logging
import sys
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, TextIO, TypeVar

from tqdm import tqdm

TERMINAL_S, LOG_S = 0.2, 10.0  # seconds between two showings
REMIND_S = 20.0
logger = logging.getLogger(__name__)
Item = TypeVar("Item")


class Bar(tqdm):
    """A tqdm bar whose figures can change between updates. Made by `progress`."""

    last_print_t: float  # of tqdm: when the bar was last shown

    def note(self, **figures: object) -> None:
        """Show `figures` beside the count, at once when the last showing is long enough ago."""
        if self.disable:
            return
        self.set_postfix(figures, refresh=False)
        if time.time() - self.last_print_t >= self.mininterval:
            self.last_print_t = time.time()
            self.refresh()


def progress(total: int, title: str, unit: str, *, scale: bool = False) -> Bar:
    """A progress bar with the time left, on stderr; silent for a `total` of 0. Use it in a `with` statement.

    Args:
        total: steps until the end.
        title: what goes on, in front of the bar.
        unit: of one step, for the rate.
        scale: show counts as 1.2k, 3.4M: for bytes.
    """
    terminal = sys.stderr.isatty()
    return Bar(
        total=total,
        desc=title,
        unit=unit,
        unit_scale=scale,
        file=sys.stderr if terminal else _Lines(sys.stderr),
        ascii=not terminal,
        mininterval=TERMINAL_S if terminal else LOG_S,
        miniters=1,
        smoothing=0,  # the time left by the mean rate: steps end in bursts, one for each worker
        disable=total == 0,
    )


def tracked(items: Iterable[Item], total: int, title: str, unit: str) -> Iterator[Item]:
    """The same items under a progress bar."""
    with progress(total, title, unit) as bar:
        for item in items:
            yield item
            bar.update()


@contextmanager
def waiting(what: str) -> Iterator[None]:
    """Logs what the body waits for, at once and then every 20 s with the time so far: `still starting Ray, 40 s`."""
    logger.info("%s", what)
    ended, begun_s = threading.Event(), time.monotonic()

    def remind() -> None:
        while not ended.wait(REMIND_S):
            logger.info("still %s, %.0f s", what, time.monotonic() - begun_s)

    threading.Thread(target=remind, daemon=True).start()
    try:
        yield
    finally:
        ended.set()


class _Lines:
    """A log file: what a terminal would redraw in place becomes a line of its own."""

    def __init__(self, file: TextIO) -> None:
        self._file = file

    def write(self, text: str) -> int:
        line = text.strip("\r\n ")
        return self._file.write(f"{line}\n") if line else 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)
