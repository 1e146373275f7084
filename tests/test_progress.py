"""Progress bars: in a log file a line now and then, on no total nothing."""

import io
import sys

import pytest

from neurostorm import progress as module
from neurostorm.progress import progress, tracked


@pytest.fixture
def log(monkeypatch: pytest.MonkeyPatch) -> io.StringIO:
    file = io.StringIO()
    monkeypatch.setattr(sys, "stderr", file)
    return file


def test_a_log_file_gets_lines_of_its_own_with_count_and_figures(
    log: io.StringIO, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "LOG_S", 0)
    with progress(2, "sweep", "trial") as bar:
        bar.update()
        bar.note(failed=1)
        bar.update()
    lines = log.getvalue().splitlines()
    assert "\r" not in log.getvalue() and all(line.startswith("sweep: ") for line in lines)
    assert "| 1/2 [" in lines[1] and "failed=1" in lines[2] and "| 2/2 [" in lines[-1]


def test_a_log_file_is_not_flooded(log: io.StringIO) -> None:
    with progress(10_000, "embed", "run") as bar:
        for _ in range(10_000):
            bar.update()
            bar.note(failed=0)
    assert len(log.getvalue().splitlines()) == 2, "one at the start, one at the end: ten seconds did not pass"


def test_nothing_to_do_shows_nothing(log: io.StringIO) -> None:
    assert list(tracked([], 0, "embed", "run")) == [] and log.getvalue() == ""
    assert list(tracked(iter("ab"), 2, "embed", "run")) == ["a", "b"] and "2/2" in log.getvalue()
