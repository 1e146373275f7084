"""Lines that a worker adds: at once in a folder, an object per checkpoint interval in an object store."""

import json
from pathlib import Path

import pytest

from neurostorm.places import files_below, place
from neurostorm.train.journal import Journal


def lines(file):
    return [json.loads(line)["step"] for line in file.read_text().splitlines()]


def test_in_a_folder_each_line_is_there_at_once_after_those_of_earlier_starts(tmp_path):
    for step in (1, 2):
        journal = Journal(tmp_path / "ledger", "rank-0")
        journal.add(step=step, clips=["a[0]"])
        journal.keep(5)
    assert (tmp_path / "ledger" / "rank-0.jsonl").read_text().splitlines()[0] == '{"step": 1, "clips": ["a[0]"]}'
    assert lines(tmp_path / "ledger" / "rank-0.jsonl") == [1, 2]
    assert str(journal) == f"{tmp_path}/ledger/rank-0.jsonl"


@pytest.mark.parametrize("rest", [b'{"step": 2, "cl', b'{"step": 2}', b'{"st\x00' * 20_000, b""])
def test_a_line_that_was_cut_off_is_replaced(rest, tmp_path):
    file = tmp_path / "rank-0.jsonl"
    file.write_bytes(b'{"step": 1}\n' + rest)
    journal = Journal(tmp_path, "rank-0")
    for step in (2, 3):
        journal.add(step=step)
    assert lines(file) == [1, 2, 3]


def test_a_line_that_did_not_fit_on_the_disk_leaves_nothing_behind(tmp_path, monkeypatch):
    journal, file = Journal(tmp_path, "rank-0"), tmp_path / "rank-0.jsonl"
    journal.add(step=1)
    file.write_bytes(file.read_bytes() + b'{"step": 2, "c')  # what of a failed write reached the disk
    journal.add(step=3)
    assert lines(file) == [1, 3]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="/dev/full is of Linux")
def test_a_full_disk_is_named(tmp_path):
    (tmp_path / "rank-0.jsonl").symlink_to("/dev/full")
    with pytest.raises(OSError, match=r"No space left on device: '.*/rank-0\.jsonl'"):
        Journal(tmp_path, "rank-0").add(step=1)


def test_in_an_object_store_a_checkpoint_keeps_the_lines_since_the_one_before(make_bucket):
    folder = place(make_bucket()) / "run" / "ledger"
    journal = Journal(folder, "rank-0")
    journal.keep(0)
    for step in range(7):
        journal.add(step=step)
        if step in (2, 5):
            journal.keep(step + 1)
    assert sorted(name for name, _ in files_below(folder)) == [f"rank-0/step-0000000{n}.jsonl" for n in (3, 6)]
    assert [lines(folder / "rank-0" / f"step-0000000{n}.jsonl") for n in (3, 6)] == [[0, 1, 2], [3, 4, 5]]
    assert str(journal) == f"{folder}/rank-0"


def test_a_run_that_does_steps_again_replaces_their_lines_and_keeps_the_earlier(make_bucket):
    """The first start dies after step 5 was noted and before its checkpoint; the second goes on after step 2."""
    folder = place(make_bucket()) / "ledger"
    for steps in (range(5), range(2, 8)):
        journal = Journal(folder, "rank-1")
        for step in steps:
            journal.add(step=step)
            if step % 2:
                journal.keep(step + 1)
    written = [step for file in (folder / "rank-1").iterdir() for step in lines(file)]
    assert written == list(range(8)), "each step once"
