"""Objects behave as files do, and what goes wrong on the way to them is sat out, or named."""

import errno
import json
import multiprocessing
import os
import pickle
import queue
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import boto3
import obstore
import pytest

from neurostorm.io import object_requests
from neurostorm.io.atomic import atomic_update, atomic_write, put_if_absent
from neurostorm.io.object_store import ObjectPath, ObjectStoreError, UnavailableError
from neurostorm.io.paths import copy_files, is_unavailable, list_files, remove_tree, to_path
from tests.faulty_s3 import Network, bad_network

BIG = bytes(range(256)) * (12 << 12)  # 12 MiB: three parts of an upload, two pieces of a stream
SOME = BIG[: 1 << 20]


@pytest.fixture
def home(make_bucket: Callable[[], str]) -> ObjectPath:
    made = to_path(make_bucket())
    assert isinstance(made, ObjectPath)
    return made


@pytest.fixture
def network(s3_server: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Network]:
    with bad_network(s3_server, monkeypatch) as made:
        yield made


def test_the_bucket_itself_is_a_folder(home: ObjectPath) -> None:
    assert home.is_dir() and home.exists() and not home.is_file() and list(home.iterdir()) == []
    assert home.parent == home and home.parents == () and str(home) == f"s3://{home.bucket}"
    for ask in (home.read_bytes, home.stat, home.open, home.unlink, lambda: home.write_bytes(b"")):
        with pytest.raises(IsADirectoryError, match=home.bucket):
            ask()
    (home / "a").write_bytes(b"1")
    assert list(home.iterdir()) == [home / "a"] and list(list_files(home)) == [("a", 1)]


def test_an_object_and_a_prefix_of_one_name_are_both_there(home: ObjectPath) -> None:
    (home / "d").write_bytes(b"1")
    (home / "d/e").write_bytes(b"23")
    assert (home / "d").is_file() and (home / "d").is_dir()
    assert list(home.iterdir()) == [home / "d"] and list(list_files(home / "d")) == [("e", 2)]
    remove_tree(home / "d")
    assert (home / "d").is_file() and not (home / "d").is_dir()


def test_markers_of_folders_are_no_files(home: ObjectPath, s3_server: str) -> None:
    s3 = boto3.client("s3", endpoint_url=s3_server)
    for key in ("m/", "m/x", "empty/"):
        s3.put_object(Bucket=home.bucket, Key=key, Body=b"")
    assert list((home / "m").iterdir()) == [home / "m/x"] and list(list_files(home / "m")) == [("x", 0)]
    assert list(list_files(home / "empty")) == [] and not (home / "empty").is_file()


def test_parts_join_as_steps(home: ObjectPath) -> None:
    assert (home / "/a//b/" / "" / "c").key == "a/b/c"
    for part in ("..", "a/../b", "."):
        with pytest.raises(ValueError, match="no meaning"):
            home / part
    with pytest.raises(ValueError):
        (home / "a").relative_to(ObjectPath("gs", home.bucket))


def test_a_range_is_cut_at_the_end(home: ObjectPath) -> None:
    (home / "a").write_bytes(b"0123456789")
    (home / "empty").write_bytes(b"")
    ranges = [(0, 10), (3, 4), (8, 5), (10, 1), (99, 3), (4, 0)]
    assert [bytes((home / "a").read_range(*part)) for part in ranges] == [b"0123456789", b"3456", b"89", b"", b"", b""]
    assert bytes((home / "empty").read_range(0, 3)) == b""
    with pytest.raises(FileNotFoundError):
        (home / "b").read_range(3, 4)


def test_large_objects_go_up_and_come_down(home: ObjectPath) -> None:
    assert (home / "whole").write_bytes(BIG) == len(BIG)
    pieces = [BIG[first : first + 1_000_000] for first in range(0, len(BIG), 1_000_000)]
    assert (home / "pieces").write_bytes([*pieces, b""]) == len(BIG)
    for name in ("whole", "pieces"):
        with (home / name).open() as stream:
            assert stream.read(10) == BIG[:10] and stream.read() == BIG[10:]
    assert (home / "nothing").write_bytes([]) == 0 and (home / "nothing").read_bytes() == b""
    with pytest.raises(ValueError, match="open\\('rb'\\)"):
        (home / "whole").open("wb")


def test_pieces_may_come_from_the_same_store(home: ObjectPath) -> None:
    (home / "a").write_bytes(b"12")
    (home / "b").write_bytes((home / "a").read_bytes() for _ in range(3))
    assert (home / "b").read_bytes() == b"121212"


def test_pieces_that_cannot_be_made_leave_no_object(home: ObjectPath) -> None:
    def broken() -> Iterator[bytes]:
        yield BIG[: 6 << 20]
        raise ZeroDivisionError("half way")

    with pytest.raises(ZeroDivisionError, match="half way"):
        (home / "a").write_bytes(broken())
    assert list(list_files(home)) == []


def test_a_bucket_that_is_not_there_is_named() -> None:
    lost = ObjectPath("s3", "no-such-bucket", "a/b")
    asks: list[Callable[[], object]] = [
        lost.read_bytes, lost.exists, lost.is_dir, lambda: list(lost.iterdir()), lambda: lost.write_bytes(b"1"),
        lambda: lost.write_bytes(BIG), lambda: put_if_absent(lost, b"1"), lambda: atomic_write(lost, b"1"),
        lambda: atomic_update(lost, lambda _: b"1"), lambda: list(list_files(lost)), lambda: remove_tree(lost),
    ]  # fmt: skip
    for ask in asks:
        with pytest.raises(ObjectStoreError, match="there is no bucket 'no-such-bucket'"):
            ask()


def test_many_objects_are_listed_and_removed(home: ObjectPath, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MOTO_S3_DEFAULT_MAX_KEYS", "4")  # the server's pages
    for number in range(10):
        put_if_absent(home / f"a/{number:04d}", b"")
    assert len(list(list_files(home))) == len(list((home / "a").iterdir())) == 10
    remove_tree(home / "a")
    assert list(list_files(home)) == []


def test_a_pickled_path_is_only_an_address(home: ObjectPath) -> None:
    (home / "a").write_bytes(b"1")
    data = pickle.dumps(home / "a")
    assert len(data) < 200 and pickle.loads(data).read_bytes() == b"1"


def read_in(name: ObjectPath, answers: Any) -> None:
    try:
        answers.put(name.read_bytes())
    except OSError as error:
        answers.put(str(error))


def test_a_forked_process_is_told_instead_of_waiting_for_ever(home: ObjectPath) -> None:
    (home / "a").write_bytes(b"1")
    context = multiprocessing.get_context("fork")
    answers = context.Queue()
    child = context.Process(target=read_in, args=(home / "a", answers))
    child.start()
    try:
        assert "forked" in str(answers.get(timeout=20))
    except queue.Empty:
        child.kill()
        raise
    finally:
        child.join()


# A fault that ends before the retries do costs time only.
@pytest.mark.parametrize("kind", ["refuse", "cut answer", "lose answer"])
def test_reading_sits_out_a_short_fault(home: ObjectPath, network: Network, kind: Any) -> None:
    (home / "a").write_bytes(SOME)
    for ask in (
        lambda: (home / "a").read_bytes(),
        lambda: (home / "a").open().read(),
        lambda: bytes((home / "a").read_range(0, len(SOME))),
    ):
        network.fail(kind, "GET", "/a")
        assert ask() == SOME
    assert all(fault.left == 0 for fault in network.faults)


def test_a_stalled_request_is_given_up_and_sent_again(
    home: ObjectPath, network: Network, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(object_requests, "REQUEST_TIMEOUT_S", 0.4)
    (home / "a").write_bytes(b"data")
    network.fail("stall", "GET", "/a")
    assert (home / "a").read_bytes() == b"data"
    network.fail("stall", "PUT", "/b")
    (home / "b").write_bytes(b"data")
    network.fail("stall", "GET", "list-type")
    assert sorted(list_files(home)) == [("a", 4), ("b", 4)]
    network.fail("stall", "GET", "/a", times=99)
    with pytest.raises(ObjectStoreError, match=f"^{home}/a: "):
        (home / "a").read_bytes()


@pytest.mark.parametrize("kind", ["refuse", "cut upload", "lose answer"])
def test_writing_sits_out_a_short_fault(home: ObjectPath, network: Network, kind: Any) -> None:
    network.fail(kind, "PUT", "/small", times=2)
    (home / "small").write_bytes(b"data")
    network.fail(kind, "PUT", "partNumber=2")
    (home / "large").write_bytes(BIG)
    network.fail(kind, "POST", "/listed")
    (home / "listed").write_bytes(iter([BIG]))
    assert [(home / name).read_bytes() for name in ("small", "large", "listed")] == [b"data", BIG, BIG]
    assert all(fault.left == 0 for fault in network.faults)


@pytest.mark.parametrize("kind", ["refuse", "cut answer"])
def test_a_long_fault_names_the_object(home: ObjectPath, network: Network, kind: Any) -> None:
    (home / "a").write_bytes(SOME)
    network.fail(kind, "GET", "/a", times=999)
    for ask in ((home / "a").read_bytes, lambda: (home / "a").open().read()):
        with pytest.raises(UnavailableError, match=f"^{home}/a: "):
            ask()
    assert len(network.requests) < 60


@pytest.mark.parametrize("kind", ["refuse", "cut upload"])
def test_an_upload_that_fails_for_good_leaves_nothing_and_the_next_succeeds(
    home: ObjectPath, network: Network, kind: Any
) -> None:
    network.fail(kind, "PUT", "partNumber=2", times=999)
    with pytest.raises(ObjectStoreError, match=f"^{home}/large: "):
        (home / "large").write_bytes(BIG if kind == "refuse" else iter([BIG]))
    assert not (home / "large").exists()
    network.faults.clear()
    (home / "large").write_bytes(BIG)
    assert (home / "large").read_bytes() == BIG


def test_a_change_whose_answer_is_lost_is_made(home: ObjectPath, network: Network) -> None:
    network.fail("refuse", "PUT", "/a")
    atomic_update(home / "a", lambda old: b"1" if old is None else old)
    network.fail("refuse", "GET", "/a")
    network.fail("refuse", "PUT", "/a", times=2)
    atomic_update(home / "a", lambda old: (old or b"") + b"2")
    assert (home / "a").read_bytes() == b"12"


def test_a_refusal_is_not_taken_for_a_missing_object(home: ObjectPath, network: Network) -> None:
    (home / "a").write_bytes(b"1")
    for method in ("GET", "HEAD", "PUT", "POST", "DELETE"):
        network.fail("forbid", method, times=999)
    asks: list[Callable[[], object]] = [
        (home / "a").read_bytes, (home / "a").is_file, (home / "a").exists, (home / "a").open, (home / "a").stat,
        (home / "a").unlink, lambda: list(home.iterdir()), lambda: (home / "a").write_bytes(b""),
        lambda: put_if_absent(home / "b", b""), lambda: atomic_update(home / "a", lambda _: b"2"),
        lambda: remove_tree(home),
        lambda: copy_files(home, home / "there", ["a"]),
    ]  # fmt: skip
    for ask in asks:
        with pytest.raises(ObjectStoreError, match=f"^s3://{home.bucket}"):
            ask()
    with pytest.raises(ObjectStoreError, match=r"AccessDenied, Not for you\.$"):
        (home / "a").read_bytes()


def test_a_server_that_is_gone_is_an_error(home: ObjectPath, network: Network) -> None:
    network.close()
    with pytest.raises(UnavailableError, match=f"^{home}/a: "):
        (home / "a").read_bytes()


def test_refused_credentials_are_unavailable_storage_and_a_missing_bucket_is_not(
    home: ObjectPath, network: Network
) -> None:
    (home / "a").write_bytes(b"1")
    network.fail("forbid", "GET", "/a", times=9)
    with pytest.raises(UnavailableError, match="AccessDenied"):
        (home / "a").read_range(0, 1)
    network.faults.clear()
    with pytest.raises(ObjectStoreError, match="no bucket") as missing:
        to_path("s3://no-such-bucket/a").read_bytes()
    assert not is_unavailable(missing.value)


@pytest.mark.parametrize(
    ("number", "away"),
    [
        *((number, True) for number in (errno.EIO, errno.ESTALE, errno.EACCES, errno.ETIMEDOUT)),
        *((number, False) for number in (errno.ENOENT, errno.ENOSPC, errno.EISDIR)),
    ],
)
def test_a_file_system_that_does_not_answer_is_unavailable(number: int, away: bool) -> None:
    error = OSError(number, os.strerror(number), "file")
    assert is_unavailable(error) is away
    outer = ValueError("wrapped")
    outer.__cause__ = error
    assert is_unavailable(outer) is away


@pytest.mark.parametrize("kind", ["refuse", "cut answer", "lose answer"])
def test_every_kind_of_request_outlasts_a_store_that_is_busy_for_seconds(
    kind: Any, home: ObjectPath, network: Network, monkeypatch: pytest.MonkeyPatch, tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    monkeypatch.setattr(object_requests, "RETRY_S", 60.0)
    monkeypatch.setattr(object_requests, "_clients", {})
    monkeypatch.setattr(object_requests, "_SAY_FIRST_S", 0.2)
    monkeypatch.setattr(object_requests, "_watches", {})
    for name in ("read", "old", "copied", "changed"):
        (home / name).write_bytes(SOME)
    (home / "tree/x").write_bytes(b"1")
    (tmp_path / "up").write_bytes(BIG)
    network.outage = kind
    asks: dict[str, Callable[[], object]] = {
        "get": (home / "read").read_bytes, "range": lambda: (home / "read").read_range(3, 9),
        "head": (home / "read").stat, "put": lambda: (home / "put").write_bytes(SOME),
        "large": lambda: (home / "large").write_bytes(BIG), "upload": lambda: copy_files(tmp_path, home, ["up"]),
        "list": lambda: dict(list_files(home / "tree")), "folder": (home / "tree").is_dir,
        "copy": lambda: copy_files(home, home / "there", ["copied"]),
        "create": lambda: put_if_absent(home / "new", b"1"),
        "update": lambda: atomic_update(home / "changed", lambda _: b"2"),
        "delete": lambda: (home / "old").unlink(True),
        "stream": lambda: (home / "read").open().read(),
    }  # fmt: skip
    with ThreadPoolExecutor(len(asks)) as pool:
        asked = {name: pool.submit(ask) for name, ask in asks.items()}
        time.sleep(3)
        network.outage = None
        found = {name: answer.result(60) for name, answer in asked.items()}
    assert found["get"] == found["stream"] == SOME and bytes(found["range"]) == SOME[3:12]  # type: ignore[call-overload]
    assert found["list"] == {"x": 1} and found["folder"] is True
    sizes = dict(list_files(home))
    assert sizes["put"] == len(SOME) and sizes["large"] == sizes["up"] == len(BIG) and sizes["new"] == 1
    assert "old" not in sizes and sizes["there/copied"] == len(SOME) and (home / "changed").read_bytes() == b"2"
    assert f"s3://{home.bucket}" in caplog.text and "has not answered for" in caplog.text


def test_a_long_listing_that_breaks_off_goes_on_where_it_was(home: ObjectPath, network: Network) -> None:
    for number in range(12):
        (home / f"{number:02d}").write_bytes(b"1")
    with pytest.MonkeyPatch.context() as patched:
        listing, pages = obstore.list, []

        def two_at_a_time(client: Any, prefix: Any, offset: Any, chunk_size: int) -> Any:
            for page in listing(client, prefix, offset=offset, chunk_size=2):
                pages.append(offset)
                if len(pages) in (2, 5):
                    raise obstore.exceptions.GenericError("HTTP error: request or response body error")
                yield page

        patched.setattr(obstore, "list", two_at_a_time)
        assert [name for name, _ in list_files(home)] == [f"{number:02d}" for number in range(12)]
    assert pages[:2] == [None, None] and pages[2] == "01" and pages[-1] is not None


def test_threads_share_one_client(home: ObjectPath, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(object_requests, "_clients", {})
    found: list[Any] = []
    threads = [threading.Thread(target=lambda: found.append(home.client)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len({id(client) for client in found}) == 1


def test_google_addresses_have_a_client_of_their_own(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    key = tmp_path / "key.json"
    key.write_text(json.dumps({
        "gcs_base_url": "http://127.0.0.1:9", "disable_oauth": True, "client_email": "", "private_key": "",
        "private_key_id": "",
    }))  # fmt: skip
    monkeypatch.setenv("GOOGLE_SERVICE_ACCOUNT", os.fspath(key))
    monkeypatch.setattr(object_requests, "_clients", {})
    monkeypatch.setattr(object_requests, "RETRY_S", 0.1)
    there = to_path("gs://bucket/a")
    assert isinstance(there, ObjectPath) and type(there.client).__name__ == "GCSStore"
    with pytest.raises(ObjectStoreError, match=r"^gs://bucket/a: "):
        there.read_bytes()
