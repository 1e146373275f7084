"""What is written by file name appears in its place, local or not; what is read by file name is there."""

import os
import stat
import tempfile
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from neurostorm.io.atomic import atomic_write
from neurostorm.io.local_copies import local_copy, upload_folder
from neurostorm.io.paths import list_files, to_path


@pytest.fixture(params=["local", "s3"])
def target(request, tmp_path, make_bucket):
    return tmp_path / "out" / "deep" if request.param == "local" else to_path(make_bucket()) / "out"


@pytest.fixture(autouse=True)
def scratch(tmp_path, monkeypatch):
    """The machine's temporary folder."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "scratch"))
    (tmp_path / "scratch").mkdir()
    return tmp_path / "scratch"


def names(folder):
    return sorted(name for name, _ in list_files(folder))


def test_what_was_written_appears_at_the_end_and_nothing_stays_behind(target, scratch):
    replace_first(target)
    with upload_folder(target) as folder:
        assert not list(folder.iterdir())
        (folder / "a").mkdir()
        (folder / "a" / "one.bin").write_bytes(b"new")
        (folder / "two.bin").write_bytes(b"2")
        assert (target / "a/one.bin").read_bytes() == b"old"
    assert names(target) == ["a/one.bin", "kept.bin", "two.bin"]
    assert [(target / name).read_bytes() for name in names(target)] == [b"new", b"kept", b"2"]
    assert not list(scratch.iterdir()) and not folder.exists()


def replace_first(target):
    for name, data in (("a/one.bin", b"old"), ("kept.bin", b"kept")):
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        atomic_write(target / name, data)


def test_nothing_appears_when_writing_fails(target, scratch):
    with pytest.raises(OSError, match="disk"), upload_folder(target) as folder:
        (folder / "half.bin").write_bytes(b"h")
        raise OSError("disk full")
    assert names(target) == [] and not list(scratch.iterdir())


def test_two_who_write_to_one_place_do_not_meet(target):
    with upload_folder(target) as one, upload_folder(target) as two:
        (one / "one.bin").write_bytes(b"1")
        (two / "two.bin").write_bytes(b"2")
        assert names(one) == ["one.bin"] and names(two) == ["two.bin"]
    assert names(target) == ["one.bin", "two.bin"]


def test_files_and_folders_are_fetched_whole_or_in_part(target, scratch):
    replace_first(target)
    with local_copy(target) as local:
        assert isinstance(local, Path) and names(local) == ["a/one.bin", "kept.bin"]
    with local_copy(target / "a" / "one.bin") as local:
        assert local.read_bytes() == b"old" and local.name == "one.bin"
    with local_copy(target, ["kept.bin"]) as local:
        assert (local / "kept.bin").read_bytes() == b"kept"
    assert not list(scratch.iterdir())


def test_only_what_is_asked_for_is_fetched(make_bucket):
    target = to_path(make_bucket()) / "out"
    replace_first(target)
    with local_copy(target, ["kept.bin"]) as local:
        assert names(local) == ["kept.bin"]
    with pytest.raises(FileNotFoundError, match=r"none\.bin"), local_copy(target, ["none.bin"]):
        pass


@pytest.fixture(params=[(0o022, 0o644), (0o027, 0o640)], ids=["022", "027"])
def umask(request):
    """Sets the umask and gives the permissions of a new file under it."""
    mask, mode = request.param
    before = os.umask(mask)
    yield mode
    os.umask(before)


def test_files_have_the_permissions_that_the_umask_leaves(tmp_path, umask):
    with upload_folder(tmp_path / "out") as folder:
        (folder / "deep").mkdir()
        save_file({"weights": np.zeros(3)}, folder / "deep" / "model.safetensors")  # 0600 whatever the umask is
        (folder / "metrics.json").write_text("{}")
        os.close(tempfile.mkstemp(dir=folder, suffix=".part")[0])
        (folder / "program.py").touch(mode=0o700)
    found = {file: stat.S_IMODE((tmp_path / "out" / file).stat().st_mode) for file in names(tmp_path / "out")}
    assert found.pop("program.py") == umask | (umask & 0o444) >> 2, "what is executable stays so"
    assert set(found.values()) == {umask} and len(found) == 3
    assert stat.S_IMODE((tmp_path / "out").stat().st_mode) == stat.S_IMODE((tmp_path / "out/deep").stat().st_mode)
