"""A checkpoint is whole or does not count: interrupted, damaged and foreign ones are passed over, old ones removed."""

import json
import logging
import os
from pathlib import Path
from types import SimpleNamespace

import pytest

from neurostorm.train.checkpoint import checkpoints
from neurostorm.train.checkpoint.checkpoints import CheckpointError


def alone(value):
    """What a single rank gathers."""
    return [value]


def shard(text, name="rank-0.bin"):
    """Writes one rank's part, 3 kB of `text`, as the engine would."""

    def write(path):
        (path / "state").mkdir(exist_ok=True)
        (path / "state" / name).write_text(text * (3000 // len(text)))

    return write


def save(folder, step, *, write_shards=None, gather=alone, rank=0, keep=9, **trainer):
    checkpoints.save(
        folder, step, write_shards=write_shards or shard(f"step {step}"), gather=gather, rank=rank,
        trainer=trainer, keep=keep,
    )  # fmt: skip


def steps_in(folder):
    return sorted(path.name for path in folder.iterdir())


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "run" / "checkpoints"


@pytest.fixture
def two(folder):
    """A folder with the checkpoints of steps 50 and 100."""
    save(folder, 50, config={"a": 1})
    save(folder, 100, config={"a": 1})
    return folder


def test_the_newest_committed_checkpoint_is_found_with_what_it_keeps(folder):
    assert checkpoints.newest(folder) is None
    for step in (9, 100, 50):
        save(folder, step, workers=2, config={"lr": step})
    found = checkpoints.newest(folder)
    assert (found.step, found.path.name) == (100, "step-00000100")
    assert found.trainer == {"step": 100, "workers": 2, "config": {"lr": 100}}
    assert (found.path / "state" / "rank-0.bin").read_text().startswith("step 100")


def flip(file):
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 4
    file.write_bytes(content)


def cut(file):
    file.write_bytes(file.read_bytes()[:-1])


def lengthen(file):
    file.write_bytes(file.read_bytes() + b"\0")


DAMAGES = [
    ("state/rank-0.bin", flip, "state/rank-0.bin is damaged"),
    ("state/rank-0.bin", cut, "state/rank-0.bin is damaged"),
    ("state/rank-0.bin", lengthen, "state/rank-0.bin is damaged"),
    ("state/rank-0.bin", lambda file: file.unlink(), "state/rank-0.bin cannot be read"),
    ("trainer.json", flip, "trainer.json is damaged"),
    ("trainer.json", lambda file: file.unlink(), "trainer.json cannot be read"),
    ("COMMITTED", lambda file: file.unlink(), "not committed"),
    ("COMMITTED", cut, "COMMITTED cannot be read"),
    ("COMMITTED", lambda file: file.write_bytes(b""), "COMMITTED cannot be read"),
    ("COMMITTED", lambda file: file.write_bytes(b"\xff\xfe\0"), "COMMITTED cannot be read"),
    ("COMMITTED", lambda file: file.write_text("{}"), "COMMITTED cannot be read"),
    ("COMMITTED", lambda file: file.write_text("null"), "COMMITTED cannot be read"),
]


@pytest.mark.parametrize(("name", "damage", "words"), DAMAGES)
def test_a_broken_checkpoint_is_passed_over_for_its_copy_and_then_the_next_older(name, damage, words, two, caplog):
    whole = {file.name: file.read_bytes() for file in (two / "step-00000100").rglob("*") if file.is_file()}
    with caplog.at_level(logging.WARNING, "neurostorm.train.checkpoint.checkpoints"):
        for path, then in (("step-00000100", (100, "copy-00000100")), ("copy-00000100", (50, "step-00000050"))):
            damage(two / path / name)
            found = checkpoints.newest(two)
            assert (found.step, found.path.name) == then
            assert path in caplog.messages[-1] and words in caplog.messages[-1]
            if then[0] == 100:
                assert {file.name: file.read_bytes() for file in found.path.rglob("*") if file.is_file()} == whole


def test_when_all_are_broken_there_is_none(two, caplog):
    for step in ("step-00000050", "step-00000100", "copy-00000100"):
        flip(two / step / "state" / "rank-0.bin")
    assert checkpoints.newest(two) is None
    assert len(caplog.records) == 3


def test_only_the_newest_committed_ones_stay(folder):
    for step in range(10, 60, 10):
        save(folder, step, keep=2)
        assert checkpoints.newest(folder).step == step
    assert steps_in(folder) == ["copy-00000050", "step-00000040", "step-00000050"]


def test_an_uncommitted_folder_neither_counts_as_kept_nor_is_it_removed(folder):
    save(folder, 10, keep=2)
    (folder / "step-00000015").mkdir()  # perhaps another start is writing it
    save(folder, 20, keep=2)
    assert steps_in(folder) == ["copy-00000020", "step-00000010", "step-00000015", "step-00000020"]


def test_what_an_interrupted_save_of_the_same_step_left_is_replaced(folder):
    left = folder / "step-00000010" / "state"
    left.mkdir(parents=True)
    (left / "rank-7.bin").write_text("from a run with more workers")
    save(folder, 10)
    found = checkpoints.newest(folder)
    assert found.step == 10
    assert not (found.path / "state" / "rank-7.bin").exists()
    assert set(json.loads((found.path / "COMMITTED").read_text())["files"]) == {"state/rank-0.bin", "trainer.json"}


def test_a_save_that_fails_while_writing_commits_nothing(two):
    def full_disk(path):
        shard("half")(path)
        assert not (path / "COMMITTED").exists()
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space left"):
        save(two, 150, write_shards=full_disk, keep=1)
    assert not list((two / "step-00000150").iterdir()), "half a shard is no file of the checkpoint"
    assert checkpoints.newest(two).step == 100
    assert len(steps_in(two)) == 4, "nothing is pruned for a checkpoint that is not there"


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), RuntimeError("file write failed")])
def test_a_full_disk_is_named(error, two, monkeypatch):
    """On a disk with room the error is the engine's own."""

    def fail(_):
        raise error

    with pytest.raises(type(error), match=str(error.args[-1])):
        save(two, 150, write_shards=fail)
    monkeypatch.setattr(checkpoints.shutil, "disk_usage", lambda _: SimpleNamespace(free=3 << 20))
    with pytest.raises(CheckpointError, match=r"step-00000150 cannot be written: No space left on device.*3\.1 MB"):
        save(two, 150, write_shards=fail)
    assert checkpoints.newest(two).step == 100


def test_nothing_is_committed_before_all_ranks_have_written(two):
    reached = []

    def second_fails(value):
        reached.append(value)
        if len(reached) == 2:
            raise RuntimeError("a rank died")
        return [value]

    with pytest.raises(RuntimeError, match="a rank died"):
        save(two, 150, gather=second_fails)
    assert checkpoints.newest(two).step == 100


def test_the_marker_is_the_last_file_to_appear(folder, monkeypatch):
    appeared = []
    replace = checkpoints.atomic_write

    def watched(target, data):
        there = sorted(path.name for path in target.parent.rglob("*") if path.is_file())
        appeared.append((target.name, there))
        replace(target, data)

    monkeypatch.setattr(checkpoints, "atomic_write", watched)
    save(folder, 10)
    once = [("trainer.json", ["rank-0.bin"]), ("COMMITTED", ["rank-0.bin", "trainer.json"])]
    assert appeared == [*once, ("COMMITTED", ["rank-0.bin", "trainer.json"])]  # the copy's files are not made by it


class Disk:
    """What a power failure would leave: files whose content, and names whose folder, were forced to disk."""

    def __init__(self, monkeypatch):
        self.contents, self.names, self.commits = set(), set(), []
        self._real = {name: getattr(os, name) for name in ("fsync", "mkdir", "replace")}
        for name in self._real:
            monkeypatch.setattr(os, name, getattr(self, name))

    def fsync(self, handle):
        self._real["fsync"](handle)
        self.contents.add(os.fstat(handle).st_ino)
        synced = Path(os.readlink(f"/proc/self/fd/{handle}"))
        if synced.is_dir():
            self.names |= {path for path in synced.iterdir()}

    def mkdir(self, path, *args, **options):
        self._real["mkdir"](path, *args, **options)
        self.names.discard(Path(path))

    def replace(self, source, target):
        if Path(target).name == checkpoints.MARKER:
            self.commits.append((Path(target).parent.name, self.lost(Path(target).parent)))
        self._real["replace"](source, target)
        self.names.discard(Path(target))

    def lost(self, path):
        """What of a checkpoint a power failure would take now."""
        found = [file for file in path.rglob("*") if file.is_file() and not file.name.startswith(".")]
        above = {folder for file in found for folder in (file, *file.parents) if folder.is_relative_to(path.parent)}
        return {file for file in found if file.stat().st_ino not in self.contents} | (above - self.names)


def test_a_checkpoint_is_on_the_disk_before_its_marker_and_then_the_marker(folder, tmp_path, monkeypatch):
    disk = Disk(monkeypatch)
    save(folder, 50)
    save(folder, 100, keep=1)
    assert disk.commits == [
        (name, set()) for name in ("step-00000050", "copy-00000050", "step-00000100", "copy-00000100")
    ]
    assert not disk.lost(folder / "step-00000100") and not disk.lost(folder / "copy-00000100")
    assert folder.parent in disk.names, "the run's folder is on the disk as well"


def test_a_copy_counts_only_when_all_ranks_have_made_their_part(folder, ranks):
    def work(rank, gather):
        calls = iter(range(99))

        def dies(value):
            if rank == 1 and next(calls) == 3:  # its part of the copy is made, which the other rank never hears
                raise RuntimeError("a rank died")
            return gather(value)

        save(folder, 10, write_shards=shard(f"rank {rank}", f"rank-{rank}.bin"), gather=dies, rank=rank)

    assert "a rank died" in str(ranks(2, work)[1])
    assert checkpoints.newest(folder).path.name == "step-00000010"
    assert not (folder / "copy-00000010" / "COMMITTED").exists()


def test_a_full_disk_under_the_copy_is_named_and_the_checkpoint_stays(two, monkeypatch):
    def fail(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoints, "copy_files", fail)
    monkeypatch.setattr(checkpoints.shutil, "disk_usage", lambda _: SimpleNamespace(free=3 << 20))
    with pytest.raises(CheckpointError, match=r"copy-00000150 cannot be written: No space left on device"):
        save(two, 150, keep=1)
    assert checkpoints.newest(two).step == 150
    assert steps_in(two)[:2] == ["copy-00000100", "step-00000050"]


def test_a_file_damaged_before_it_was_copied_makes_no_good_copy(two, monkeypatch):
    copy_files = checkpoints.copy_files

    def late(source, target, names):
        flip(source / "state" / "rank-0.bin")
        copy_files(source, target, names)

    monkeypatch.setattr(checkpoints, "copy_files", late)
    save(two, 150)
    assert checkpoints.newest(two).step == 100


@pytest.fixture
def save_two(ranks):
    def save_step(folder, step):
        def work(rank, gather):
            save(folder, step, write_shards=shard(f"rank {rank}", f"rank-{rank}.bin"), gather=gather, rank=rank)

        assert ranks(2, work) == [None, None]

    return save_step


@pytest.fixture
def restore_two(ranks):
    """Each rank's (step, names and first words of the files it was given), or its error."""

    def restore(folder):
        def work(rank, gather):
            given = {}

            def load(path):
                given.update({file.name: file.read_text()[:6] for file in (path / "state").iterdir()})

            found = checkpoints.choose(folder, gather=gather, rank=rank)
            if found is not None:
                checkpoints.restore(found, load, gather=gather, rank=rank)
            return found and (found.step, given)

        return ranks(2, work)

    return restore


def test_ranks_save_together_and_the_marker_covers_all_of_them(folder, save_two):
    save_two(folder, 10)
    assert checkpoints.newest(folder).step == 10
    for path in ("step-00000010", "copy-00000010"):
        assert len(list((folder / path / "state").iterdir())) == 2
        flip(folder / path / "state" / "rank-1.bin")
    assert checkpoints.newest(folder) is None


def test_ranks_restore_together_what_they_saved(folder, save_two, restore_two):
    assert restore_two(folder) == [None, None]
    save_two(folder, 10)
    save_two(folder, 20)
    both = {"rank-0.bin": "rank 0", "rank-1.bin": "rank 1"}
    assert restore_two(folder) == [(20, both), (20, both)]
    flip(folder / "step-00000020" / "state" / "rank-1.bin")
    assert restore_two(folder) == [(20, both), (20, both)]
    flip(folder / "copy-00000020" / "state" / "rank-0.bin")
    assert restore_two(folder) == [(10, both), (10, both)]


def test_more_or_fewer_ranks_are_given_the_files_of_all(folder, save_two, restore_two, ranks):
    save(folder, 10)
    assert restore_two(folder) == [(10, {"rank-0.bin": "step 1"})] * 2
    save_two(folder, 20)
    found = checkpoints.newest(folder)
    given = []

    def load(path):
        given.extend(sorted(file.name for file in (path / "state").iterdir()))

    checkpoints.restore(found, load, gather=lambda value: [value], rank=0)
    assert given == ["rank-0.bin", "rank-1.bin"]


def test_a_checkpoint_whose_files_other_ranks_do_not_see_is_not_committed(folder):
    def elsewhere(value):
        return [value, {"state/rank-1.bin": [3000, 1]}] if isinstance(value, dict) else [value, value]

    with pytest.raises(
        CheckpointError, match=r"step-00000010: state/rank-1.bin has no bytes there, 3000 .*run\.output"
    ):
        save(folder, 10, gather=elsewhere)
    assert checkpoints.newest(folder) is None


def test_ranks_above_zero_write_their_shard_only(folder):
    save(folder, 10, rank=1)
    for path in ("step-00000010", "copy-00000010"):
        assert [file.name for file in (folder / path).rglob("*") if file.is_file()] == ["rank-0.bin"]


def test_a_broken_later_checkpoint_costs_no_good_one_its_place(folder, caplog):
    for step in (10, 20, 30):
        save(folder, step)
    for path in ("step-00000020", "step-00000030", "copy-00000030"):
        flip(folder / path / "trainer.json")
    assert checkpoints.newest(folder).step == 10
    save(folder, 20, keep=1)
    assert checkpoints.newest(folder).step == 20, "the broken one of step 30 was kept in place of the new one"
