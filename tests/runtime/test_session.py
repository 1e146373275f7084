"""A Ray of our own asks for a token that its user alone can read; its dashboard is on loopback; else it is said."""

import logging
import signal
import stat
from pathlib import Path
from typing import Any

import pytest
import ray

from neurostorm.runtime import session
from neurostorm.runtime.interrupts import interruptible

GIVEN = ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH", "RAY_ADDRESS")


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[dict[str, Any]]:
    """What `ray.init` is called with, on a home folder of its own and without settings for Ray."""
    calls: list[dict[str, Any]] = []
    for name in GIVEN:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr(ray, "init", lambda **options: calls.append(options))
    monkeypatch.setattr(ray, "is_initialized", lambda: bool(calls))
    monkeypatch.setattr(ray, "shutdown", calls.clear)
    return calls


def token(home: Path) -> Path:
    return home / ".ray" / "auth_token"


def test_a_local_ray_has_a_private_token_and_its_dashboard_on_loopback(
    started: list[dict[str, Any]], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    session.ensure_ray()
    session.ensure_ray()
    ((options),) = started
    assert (options["address"], options["dashboard_host"]) == ("local", "127.0.0.1")
    assert stat.S_IMODE(token(tmp_path).stat().st_mode) == 0o600
    assert len(bytes.fromhex(token(tmp_path).read_text())) == 32
    assert [path.name for path in token(tmp_path).parent.iterdir()] == ["auth_token"]
    assert caplog.text == ""


def test_a_token_that_is_there_stays_and_one_that_others_can_read_is_reported(
    started: list[dict[str, Any]], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    token(tmp_path).parent.mkdir()
    token(tmp_path).write_text("mine")
    token(tmp_path).chmod(0o600)
    session.start_local()
    assert caplog.text == ""
    token(tmp_path).chmod(0o644)
    session.start_local()
    assert f"{token(tmp_path)} can be read by others on this machine" in caplog.text
    assert token(tmp_path).read_text() == "mine"
    assert "mine" not in caplog.text


@pytest.mark.parametrize("name", ["RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"])
def test_a_token_that_is_given_is_taken(
    name: str, started: list[dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(name, "given")
    session.start_local()
    assert started and not token(tmp_path).exists()


def test_only_who_turns_it_off_has_no_token_and_is_told(
    started: list[dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(session, "asks_for_token", lambda: False)
    with pytest.raises(RuntimeError, match="Ray started without token authentication: RAY_AUTH_MODE=None"):
        session.start_local()
    assert not started, "it was shut down again"
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    session.start_local(dashboard_host="10.0.0.1")
    assert started[0]["dashboard_host"] == "10.0.0.1"
    assert "RAY_AUTH_MODE=disabled: whoever reaches the ports" in caplog.text


def test_a_cluster_that_asks_for_no_token_is_used_with_a_warning(
    started: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.10:6379")
    caplog.set_level(logging.WARNING)
    session.ensure_ray()
    assert "address" not in started[0] and caplog.text == ""
    started.clear()
    monkeypatch.setattr(session, "asks_for_token", lambda: False)
    session.ensure_ray()
    assert "10.0.0.10:6379 is used without a token" in caplog.text


def test_the_end_of_ray_is_said_once(started: list[dict[str, Any]], caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    session.start_local()
    session.stop_ray()
    session.stop_ray()
    assert not started and caplog.messages == ["stopping Ray"]


def test_starting_ray_sets_the_handlers_of_an_interruptible_job_again(
    started: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ray, "init", lambda **options: signal.signal(signal.SIGTERM, signal.SIG_DFL))
    with interruptible("again"):
        own = signal.getsignal(signal.SIGTERM)
        session.ensure_ray()
        assert signal.getsignal(signal.SIGTERM) == own
