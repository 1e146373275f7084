"""Local folders and object stores do the same for whoever asks; what several do at once is not lost."""

import contextlib
import errno
import multiprocessing
import os
import pickle
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PurePosixPath
from typing import Any

import obstore
import pytest
from obstore.exceptions import BaseError, PreconditionError

from neurostorm.io import atomic, paths
from neurostorm.io.atomic import atomic_update, atomic_write, copy_if_absent, put_if_absent
from neurostorm.io.object_store import ObjectPath
from neurostorm.io.paths import AnyPath, copy_files, list_files, remove_tree, to_path

KINDS = ["local", "s3"]


@pytest.fixture
def make_place(make_bucket: Callable[[], str], tmp_path: Path) -> Callable[[str], AnyPath]:
    """An empty place of a kind."""

    def make(kind: str) -> AnyPath:
        if kind == "s3":
            return to_path(make_bucket()) / "some" / "prefix"
        (tmp_path / "folder").mkdir()
        return tmp_path / "folder"

    return make


@pytest.fixture(params=KINDS)
def home(request: pytest.FixtureRequest, make_place: Callable[[str], AnyPath]) -> AnyPath:
    return make_place(request.param)


def put(home: AnyPath, **files: bytes) -> None:
    """Files by name; `__` stands for a slash."""
    for name, data in files.items():
        file = home / name.replace("__", "/")
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(data)


def test_a_place_is_what_its_address_says(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/ana")
    assert to_path("stores/hcp") == Path("stores/hcp")
    assert to_path(Path("/a/b")) == Path("/a/b") == to_path("file:///a/b")
    assert to_path("~/hcp") == Path("/home/ana/hcp")
    assert to_path("s3://bucket/a/b/") == ObjectPath("s3", "bucket", "a/b") == to_path("S3://bucket//a/b")
    assert to_path("gs://bucket") == ObjectPath("gs", "bucket", "")
    assert to_path(to_path("s3://bucket/a")) == to_path("s3://bucket/a")
    assert to_path(str(to_path("s3://bucket/a b/ü#?%20"))).key == "a b/ü#?%20"


@pytest.mark.parametrize(
    "address",
    ["s3://", "s3:///key", "s3:/bucket/key", "gs:/b", "http://host/x", "abfs://c/x", "s3://b/../x", "s3://b/./x"],
)
def test_addresses_that_are_not_understood_are_refused(address: str) -> None:
    with pytest.raises(ValueError) as caught:
        to_path(address)
    assert address in str(caught.value)


@pytest.mark.parametrize("value", [None, 3, b"s3://bucket", ["a"]])
def test_what_is_no_address_is_refused(value: Any) -> None:
    with pytest.raises(ValueError, match="is no place"):
        to_path(value)


def test_names_are_those_of_paths(home: AnyPath) -> None:
    file = home / "a/b" / "run.nii.gz"
    assert (file.name, file.suffix, file.parent.name) == ("run.nii.gz", ".gz", "b")
    assert file == home / PurePosixPath("a", "b", "run.nii.gz") and file.with_name("x").parent == home / "a" / "b"
    assert file.relative_to(home).as_posix() == "a/b/run.nii.gz" and home / "" == home
    assert file.parents[2] == home and home.absolute() == home and str(file) == f"{home}/a/b/run.nii.gz"
    assert len({file, home / "a" / "b/run.nii.gz"}) == 1 and pickle.loads(pickle.dumps(file)) == file
    assert sorted([home / "b", home / "a"]) == [home / "a", home / "b"]
    with pytest.raises(ValueError):
        home.relative_to(file)


def test_what_is_written_is_there(home: AnyPath) -> None:
    put(home, ab__c=b"123", a=b"\xef\xbb\xbfsubject\r\nsub-1\r\n", empty=b"")
    assert (home / "ab/c").read_bytes() == b"123" and (home / "empty").read_bytes() == b""
    assert (home / "a").read_text(encoding="utf-8-sig") == "subject\nsub-1\n"
    assert (home / "ab/c").stat().st_size == 3 and time.time() - (home / "a").stat().st_mtime_ns / 1e9 < 60
    with (home / "ab/c").open("rb") as stream:
        assert (stream.read(2), stream.read(), stream.read()) == (b"12", b"3", b"")
    with (home / "a").open("rb") as stream:
        assert sum(1 for _ in stream) == 2
    names = {
        name: ((home / name).exists(), (home / name).is_file(), (home / name).is_dir()) for name in ("a", "ab", "b")
    }
    assert names == {"a": (True, True, False), "ab": (True, False, True), "b": (False, False, False)}
    assert sorted(home.iterdir()) == [home / "a", home / "ab", home / "empty"]
    assert sorted(list_files(home)) == [("a", 19), ("ab/c", 3), ("empty", 0)]
    assert list(list_files(home / "a")) == list(list_files(home / "nowhere")) == []
    (home / "a").unlink()
    (home / "a").unlink(missing_ok=True)
    assert not (home / "a").exists()


def test_what_is_not_there_is_a_missing_file(home: AnyPath) -> None:
    for ask in (
        (home / "x").read_bytes,
        (home / "x").read_text,
        (home / "x").stat,
        (home / "x").unlink,
        lambda: (home / "x").open("rb").read(1),
    ):
        with pytest.raises(FileNotFoundError, match=r"(prefix|folder)/x"):
            ask()


def test_odd_names_survive(home: AnyPath) -> None:
    names = ["sp ace/é.txt", "50%20#?.txt", "plus+&=;.txt", "~tilde", "[a]*"]
    for name in names:
        (home / name).parent.mkdir(parents=True, exist_ok=True)
        (home / name).write_bytes(name.encode())
    assert sorted(name for name, _ in list_files(home)) == sorted(names)
    assert all((home / name).read_bytes() == name.encode() for name in names)
    remove_tree(home)
    assert not home.exists()


def test_replacing_and_creating(home: AnyPath) -> None:
    file = home / "table"
    assert put_if_absent(file, b"one") is True and put_if_absent(file, b"two") is False
    assert file.read_bytes() == b"one"
    atomic_write(file, b"three")
    assert file.read_bytes() == b"three"
    assert [name for name, _ in list_files(home)] == ["table"], "no temporary file stays"


def test_only_one_of_many_creates(home: AnyPath) -> None:
    with ThreadPoolExecutor(6) as pool:
        made = list(pool.map(lambda i: put_if_absent(home / "claim", b"%d" % i), range(12)))
    assert sum(made) == 1
    assert (home / "claim").read_bytes() == b"%d" % made.index(True)


@pytest.mark.parametrize("code", [errno.EPERM, errno.EOPNOTSUPP])
def test_creating_without_hard_links(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int) -> None:
    def refuse(*_: Any) -> None:
        raise OSError(code, "no links here")

    monkeypatch.setattr(os, "link", refuse)
    with ThreadPoolExecutor(4) as pool:
        made = list(pool.map(lambda i: put_if_absent(tmp_path / "claim", b"%d" % i), range(8)))
    assert sum(made) == 1 and (tmp_path / "claim").read_bytes() == b"%d" % made.index(True)


def test_a_folder_that_is_not_there_or_a_full_disk_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for write in (atomic_write, put_if_absent):
        with pytest.raises(FileNotFoundError, match="nowhere"):
            write(tmp_path / "nowhere" / "file", b"")

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    for write in (atomic_write, put_if_absent):
        with pytest.raises(OSError, match=r"No space left on device: '.*/file'"):
            write(tmp_path / "file", b"data")
    assert list(tmp_path.iterdir()) == []


def append(home: AnyPath, word: str) -> None:
    atomic_update(home / "list", lambda old: (old or b"") + word.encode() + b"\n")


def test_changes_at_the_same_time_are_all_kept(home: AnyPath) -> None:
    words = [f"{i:02d}" for i in range(16)]
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda word: append(home, word), words))
    assert sorted((home / "list").read_text().split()) == words


def test_changes_of_several_processes_are_all_kept(make_place: Callable[[str], AnyPath]) -> None:
    both = [make_place(kind) for kind in KINDS]
    words = [f"{i:02d}" for i in range(10)]
    with multiprocessing.get_context("spawn").Pool(2) as pool:
        pool.starmap(append, [(home, word) for word in words for home in both], chunksize=1)
    assert [sorted((home / "list").read_text().split()) for home in both] == [words, words]


def test_a_change_to_nothing_writes_nothing(home: AnyPath) -> None:
    seen: list[bytes | None] = []
    atomic_update(home / "x", lambda old: seen.append(old))  # type: ignore[func-returns-value]
    assert seen == [None] and not (home / "x").exists()
    put(home, x=b"1")
    before = (home / "x").stat().st_mtime_ns
    atomic_update(home / "x", lambda old: old)
    assert (home / "x").stat().st_mtime_ns == before

    def broken(_: bytes | None) -> bytes:
        raise KeyError("no such column")

    with pytest.raises(KeyError):
        atomic_update(home / "x", broken)
    assert (home / "x").read_bytes() == b"1"


def test_a_change_survives_that_the_object_goes_meanwhile(
    make_place: Callable[[str], AnyPath], monkeypatch: pytest.MonkeyPatch
) -> None:
    home = make_place("s3")
    put(home, x=b"old")
    send = obstore.put

    def as_amazon_does(*given: Any, **options: Any) -> Any:
        try:
            return send(*given, **options)
        except PreconditionError:
            raise FileNotFoundError("404 NoSuchKey") from None

    monkeypatch.setattr(obstore, "put", as_amazon_does)

    def change(old: bytes | None) -> bytes:
        if old is not None:
            (home / "x").unlink()
        return (old or b"") + b"new"

    atomic_update(home / "x", change)
    assert (home / "x").read_bytes() == b"new"


def test_too_many_others_are_an_error(make_place: Callable[[str], AnyPath], monkeypatch: pytest.MonkeyPatch) -> None:
    home = make_place("s3")
    monkeypatch.setattr(atomic, "_UPDATES", 2)
    count = iter(range(99))

    def disturbed(old: bytes | None) -> bytes:
        put(home, x=b"%d" % next(count))
        return b"mine"

    with pytest.raises(OSError, match="others changed it 2 times"):
        atomic_update(home / "x", disturbed)


def test_a_tree_is_removed_and_nothing_beside_it(home: AnyPath) -> None:
    put(home, a__b__c=b"1", a__d=b"2", ab=b"3")
    remove_tree(home / "a")
    remove_tree(home / "a")
    assert [name for name, _ in list_files(home)] == ["ab"]


def test_a_tree_that_cannot_be_removed_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put(tmp_path, a__b=b"1")

    def refuse(*_: Any, **__: Any) -> None:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(os, "unlink", refuse)
    with pytest.raises(PermissionError):
        remove_tree(tmp_path / "a")
    monkeypatch.undo()

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(PermissionError):
        list(list_files(tmp_path))


@pytest.mark.parametrize(("source", "target"), [(a, b) for a in KINDS for b in KINDS])
def test_files_are_copied_between_places(
    make_place: Callable[[str], AnyPath], source: str, target: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(paths, "STREAM_BYTES", 100_000)
    here = make_place(source)
    there = make_place(target) if target != source else here / "there"
    big = os.urandom(1 << 20)  # more than is streamed at once
    put(here, x__big=big, y=b"1", z=b"not copied")
    copy_files(here, there, ["x/big", "y"])
    assert sorted(list_files(there)) == [("x/big", len(big)), ("y", 1)]
    assert (there / "x/big").read_bytes() == big
    with pytest.raises(FileNotFoundError, match="/gone"):
        copy_files(here, there, ["y", "gone"])


def refuse_copy(*_: Any) -> None:
    raise BaseError("403 Forbidden")


@pytest.mark.parametrize(
    ("limit_bytes", "refused", "passes"),
    [(1 << 20, False, False), ((1 << 20) - 1, False, True), (1 << 20, True, True)],
)
def test_what_stays_in_a_bucket_passes_through_here_only_if_it_must(
    make_place: Callable[[str], AnyPath], limit_bytes: int, refused: bool, passes: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    home, opened, put_here = make_place("s3"), [], ObjectPath.open
    put(home, x=b"1" * (1 << 20))
    monkeypatch.setattr(paths, "COPY_BYTES", limit_bytes)
    if refused:
        monkeypatch.setattr(paths.obstore, "copy", refuse_copy)
    monkeypatch.setattr(ObjectPath, "open", lambda self, mode: opened.append(self) or put_here(self, mode))
    copy_files(home, home / "there", ["x"])
    assert (home / "there" / "x").read_bytes() == b"1" * (1 << 20)
    assert bool(opened) == passes


def test_a_copy_that_fails_in_the_middle_is_not_to_be_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put(tmp_path, a__x=b"new" * 1000, b__x=b"old")
    monkeypatch.setattr(paths, "STREAM_BYTES", 100)
    written = iter(range(5))

    class Full:
        def __init__(self, file: Any) -> None:
            self.file = file

        def __getattr__(self, name: str) -> Any:
            return getattr(self.file, name)

        def write(self, data: bytes) -> int:
            if next(written, None) is None:
                raise OSError(errno.ENOSPC, "No space left on device")
            return int(self.file.write(data))

    opened = atomic.open_locked

    @contextlib.contextmanager
    def full_disk(file: Path) -> Any:
        with opened(file) as handle:
            yield Full(handle)

    monkeypatch.setattr(atomic, "open_locked", full_disk)
    with pytest.raises(OSError, match=r"No space left on device.*a/x.*b/x"):
        copy_files(tmp_path / "a", tmp_path / "b", ["x"])
    assert (tmp_path / "b" / "x").read_bytes() == b"old" and len(list((tmp_path / "b").iterdir())) == 1


def test_an_upload_takes_its_place_once(make_place: Callable[[str], AnyPath]) -> None:
    home = make_place("s3")
    put(home, first=b"1", second=b"2")
    assert isinstance(home, ObjectPath)
    assert copy_if_absent(home / "first", home / "place") and not copy_if_absent(home / "second", home / "place")
    assert (home / "place").read_bytes() == b"1"
    with pytest.raises(FileNotFoundError):
        copy_if_absent(home / "gone", home / "other")
