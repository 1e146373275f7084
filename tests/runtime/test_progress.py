"""Progress bars: in a log file a line now and then, on no total nothing."""

import threading

import pytest

from neurostorm.runtime import progress as module
from neurostorm.runtime.progress import progress, tracked

Capture = pytest.CaptureFixture[str]


def test_a_log_file_gets_lines_of_its_own_with_count_and_figures(
    capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "LOG_S", 0)
    with progress(2, "sweep", "trial") as bar:
        bar.update()
        bar.note(failed=1)
        bar.update()
    log = capsys.readouterr().err
    lines = log.splitlines()
    assert "\r" not in log and all(line.startswith("sweep: ") for line in lines)
    assert "| 1/2 [" in lines[1] and "failed=1" in lines[2] and "| 2/2 [" in lines[-1]


def test_a_log_file_is_not_flooded(capsys: Capture) -> None:
    with progress(10_000, "embed", "run") as bar:
        for _ in range(10_000):
            bar.update()
            bar.note(failed=0)
    assert len(capsys.readouterr().err.splitlines()) == 2, "at the start and at the end: ten seconds did not pass"


def test_nothing_to_do_shows_nothing(capsys: Capture) -> None:
    assert list(tracked([], 0, "embed", "run")) == [] and capsys.readouterr().err == ""
    assert list(tracked(iter("ab"), 2, "embed", "run")) == ["a", "b"] and "2/2" in capsys.readouterr().err


def test_a_wait_says_what_for_and_for_how_long(monkeypatch, caplog):
    caplog.set_level("INFO")
    monkeypatch.setattr(module, "REMIND_S", 0.01)
    reminded = threading.Event()
    monkeypatch.setattr(module.logger, "info", lambda text, *rest: (said.append(text % rest), reminded.set()))
    said: list[str] = []
    with module.waiting("starting Ray"):
        reminded.clear()
        assert reminded.wait(30)
    assert said[:2] == ["starting Ray", "still starting Ray, 0 s"]
