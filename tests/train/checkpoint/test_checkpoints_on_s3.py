"""Checkpoints in an object store: the same promises, kept without renames; two ranks are two threads."""

import json
import logging

import pytest

from neurostorm.io import atomic
from neurostorm.io.object_store import ObjectPath, ObjectStoreError
from neurostorm.io.paths import list_files, to_path
from neurostorm.train.checkpoint import checkpoints
from neurostorm.train.checkpoint.checkpoints import CheckpointError

OWN = {rank: f"state/rank-{rank}.bin" for rank in range(2)}


@pytest.fixture
def folder(make_bucket):
    return to_path(make_bucket()) / "runs" / "mine" / "checkpoints"


@pytest.fixture
def save_two(ranks):
    """Saves `step` by two ranks, 3 kB each; what each returned or raised."""

    def save(folder, step, keep=9, **trainer):
        def work(rank, gather):
            def write(path):
                (path / "state").mkdir()
                (path / OWN[rank]).write_text(f"step {step} of rank {rank} " * 150)

            checkpoints.save(folder, step, write_shards=write, gather=gather, rank=rank, trainer=trainer, keep=keep)

        return ranks(2, work)

    return save


@pytest.fixture
def restore_two(ranks):
    """Each rank's (step, files that it was given by name with their first words), or its error."""

    def restore(folder):
        def work(rank, gather):
            given = {}

            def load(path):
                given.update({name: (path / name).read_text() for name, _ in list_files(path)})
                given["path"] = path

            found = checkpoints.choose(folder, gather=gather, rank=rank)
            if found is None:
                return None
            checkpoints.restore(found, load, gather=gather, rank=rank)
            assert not given.pop("path").exists(), "the local copy stays behind"
            return found.step, {name: text.split(" step")[0] for name, text in given.items()}

        return ranks(2, work)

    return restore


@pytest.fixture
def two(folder, save_two):
    for step in (50, 100):
        assert save_two(folder, step, workers=2) == [None, None]
    return folder


def flip(file):
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 4
    file.write_bytes(bytes(content))


def restored(step):
    first, second = (f"step {step} of rank {rank}" for rank in range(2))
    return [(step, {OWN[0]: first}), (step, {OWN[0]: first, OWN[1]: second})]


def test_what_two_ranks_save_is_committed_found_and_restored(folder, two, restore_two):
    found = checkpoints.newest(folder)
    assert (found.step, found.path) == (100, folder / "step-00000100")
    assert found.trainer == {"step": 100, "workers": 2}
    names = {name for name, _ in list_files(found.path)}
    assert names == {*OWN.values(), "trainer.json", "COMMITTED"}
    marker = json.loads((found.path / "COMMITTED").read_text())
    assert set(marker["files"]) == names - {"COMMITTED"} and marker["ranks"] == [[OWN[0]], [OWN[1]]]
    assert restore_two(folder) == restored(100), "each rank takes its own files and those of rank 0"


def test_without_a_checkpoint_there_is_nothing_to_restore(folder, restore_two):
    assert checkpoints.newest(folder) is None
    assert not checkpoints.is_begun(folder)
    assert restore_two(folder) == [None, None]


NEWEST_AND_NEXT = (("step-00000100", "copy-00000100"), ("copy-00000100", "step-00000050"))


@pytest.mark.parametrize("name", [OWN[0], OWN[1]])
def test_a_flipped_byte_is_found_by_who_fetches_it_and_then_passed_over_by_all(name, two, restore_two, caplog):
    """The driver and the feed, which fetch nothing, must come to the same step as the ranks."""
    for path, then in NEWEST_AND_NEXT:
        flip(two / path / name)
        assert checkpoints.newest(two).path.name == path, "sizes alone do not show it"
        for error in restore_two(two):
            assert isinstance(error, CheckpointError)
            assert f"{path}: {name} is damaged" in str(error) and "start again" in str(error)
        with caplog.at_level(logging.WARNING, "neurostorm.train.checkpoint.checkpoints"):
            assert checkpoints.newest(two).path.name == then
        assert path in caplog.text and name in caplog.text
        assert restore_two(two) == restored(int(then[-8:]))


def test_a_step_that_was_broken_is_saved_anew(two, save_two, restore_two):
    flip(two / "step-00000100" / OWN[0])
    restore_two(two)
    assert save_two(two, 100) == [None, None]
    assert restore_two(two) == restored(100)


DAMAGES = [
    (OWN[1], lambda file: file.unlink(), "rank-1.bin has no bytes"),
    (OWN[1], lambda file: file.write_bytes(file.read_bytes()[:-1]), "rank-1.bin has "),
    ("COMMITTED", lambda file: file.unlink(), "not committed"),
    ("COMMITTED", lambda file: file.write_bytes(b"{"), "COMMITTED cannot be read"),
    ("COMMITTED", lambda file: file.write_bytes(b"{}"), "COMMITTED cannot be read"),
]


@pytest.mark.parametrize(("name", "damage", "words"), DAMAGES)
def test_what_a_listing_shows_is_passed_over_at_once(name, damage, words, two, restore_two, caplog):
    for path, then in NEWEST_AND_NEXT:
        damage(two / path / name)
        with caplog.at_level(logging.WARNING, "neurostorm.train.checkpoint.checkpoints"):
            assert checkpoints.newest(two).path.name == then
        assert path in caplog.text and words in caplog.text
        assert restore_two(two) == restored(int(then[-8:]))


def test_a_store_that_does_not_answer_is_no_broken_checkpoint(two, monkeypatch):
    def refuse(self):
        raise ObjectStoreError(f"{self}: 503")

    monkeypatch.setattr(ObjectPath, "read_bytes", refuse)
    with pytest.raises(ObjectStoreError, match="503"):
        checkpoints.newest(two)


def test_an_interrupted_upload_commits_nothing_and_is_later_replaced(two, save_two, restore_two, monkeypatch):
    put = atomic.obstore.put

    def interrupted(client, key, *arguments, **options):
        if key.endswith(OWN[1]):
            raise ObjectStoreError("connection lost")
        return put(client, key, *arguments, **options)

    (two / "step-00000150" / "state" / "rank-7.bin").write_bytes(b"of an earlier attempt with more workers")
    monkeypatch.setattr(atomic.obstore, "put", interrupted)
    first, second = save_two(two, 150, keep=1)
    assert isinstance(first, BrokenPipeError) and "connection lost" in str(second)
    monkeypatch.undo()
    assert (two / "step-00000150" / OWN[0]).is_file(), "the other rank's part had arrived"
    assert restore_two(two) == restored(100), "nothing is pruned for a checkpoint that is not there"
    assert save_two(two, 150) == [None, None]
    assert restore_two(two) == restored(150)
    assert not (two / "step-00000150" / "state" / "rank-7.bin").exists()


def test_files_that_did_not_arrive_are_not_committed(folder, save_two, monkeypatch):
    """Each rank believes that it has written; rank 0 looks."""
    monkeypatch.setattr("neurostorm.io.local_copies.copy_files", lambda *_: None)
    first, _ = save_two(folder, 10)
    assert isinstance(first, CheckpointError) and "state/rank-0.bin has no bytes there" in str(first)
    assert not checkpoints.is_begun(folder)


def test_old_ones_go_marker_first(folder, save_two, monkeypatch):
    removed = []
    unlink, remove_tree = ObjectPath.unlink, checkpoints.remove_tree
    for step in (10, 20, 30):
        assert save_two(folder, step) == [None, None]
    monkeypatch.setattr(ObjectPath, "unlink", lambda self, **how: (removed.append(self.name), unlink(self, **how))[1])
    monkeypatch.setattr(checkpoints, "remove_tree", lambda path: (removed.append(path.name), remove_tree(path))[1])
    assert save_two(folder, 40, keep=2) == [None, None]
    folders = ["step-00000040", "copy-00000040", "step-00000010", "step-00000020", "copy-00000030"]
    assert removed == [name for path in folders for name in ("COMMITTED", path)]
    assert [path.name for path in folder.iterdir()] == ["copy-00000040", "step-00000030", "step-00000040"]
