"""A file written by a thread: the newest content wins, few writes, and no failure reaches the caller."""

import threading

import pytest

from neurostorm.train.records import latest_file
from neurostorm.train.records.latest_file import LatestFile


@pytest.fixture
def writes(monkeypatch):
    made = []
    plain = latest_file.replace

    def write(file, content):
        made.append(content)
        plain(file, content)

    monkeypatch.setattr(latest_file, "replace", write)
    return made


def test_the_newest_content_is_written_and_older_content_is_passed_over(tmp_path, writes, monkeypatch):
    free, begun = threading.Event(), threading.Event()
    plain = latest_file.replace

    def slow(file, content):
        begun.set()
        free.wait(60)
        plain(file, content)

    monkeypatch.setattr(latest_file, "replace", slow)
    file = LatestFile(tmp_path / "account.json")
    file.put(b"0")
    begun.wait(60)
    for number in range(1, 100):
        file.put(str(number).encode())
    free.set()
    assert file.flush(60)
    assert writes == [b"0", b"99"] and (tmp_path / "account.json").read_bytes() == b"99"


def test_a_failure_is_said_once_and_ends_nothing(tmp_path, caplog, writes):
    file = LatestFile(tmp_path / "no folder" / "account.json", every_s=0.0)
    for number in range(5):
        file.put(str(number).encode())
        assert file.flush(60)
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    (tmp_path / "no folder").mkdir()
    file.put(b"now")
    assert file.flush(60) and (tmp_path / "no folder" / "account.json").read_bytes() == b"now"


def test_a_store_that_hangs_does_not_hold_up_the_end(tmp_path, monkeypatch):
    free = threading.Event()
    monkeypatch.setattr(latest_file, "replace", lambda file, content: free.wait(60))
    file = LatestFile(tmp_path / "account.json")
    file.put(b"0")
    assert not file.flush(0.05)
    free.set()


def test_a_file_that_has_nothing_new_is_flushed(tmp_path):
    assert LatestFile(tmp_path / "account.json").flush(1)
