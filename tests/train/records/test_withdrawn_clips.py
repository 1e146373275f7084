"""Who withdrew during a run is named in its folder and listed, hashed and dated, with the exported model."""

import json
import logging
import shutil

import pytest
import torch

from neurostorm.data.clips import ClipBatch
from neurostorm.data.corpus import open_corpus
from neurostorm.data.plan.split import subject_hash
from neurostorm.data.withdrawals import subject_of
from neurostorm.io.paths import to_path
from neurostorm.store import read_withdrawn
from neurostorm.store.maintenance.care import remove_subject
from neurostorm.train.checkpoint import checkpoints
from neurostorm.train.records import pinned_manifest
from neurostorm.train.records.withdrawn_clips import LeftOut, removed

STEPS, CHANGED = 4, 2


def batch(rows, runs, withdrawn):
    """Clips of plan rows and runs, those that are left out marked."""
    flags = torch.tensor(withdrawn)
    row, run = torch.tensor(rows), torch.tensor(runs).int()
    frames, waited_s = torch.zeros(len(rows), 1, 1, dtype=torch.int8), torch.zeros(len(rows))
    return ClipBatch(row, run, 4 * run, torch.zeros_like(flags), flags, waited_s, frames)


@pytest.fixture
def corpus(ball_config, ball_store, tmp_path):
    """A corpus on a copy of the ball store."""
    return open_corpus(ball_config(data={"store": shutil.copytree(ball_store, tmp_path / "store")}))


@pytest.mark.parametrize("where", ["local", "s3"])
def test_those_who_withdrew_are_listed_by_hash_date_and_first_step(where, corpus, tmp_path, make_bucket, caplog):
    folder = to_path(tmp_path / "run" if where == "local" else make_bucket())
    gone, held_out = corpus.trained_subjects[0], subject_of(corpus.runs[corpus.validation["run"][0]])
    run = next(number for number, path in enumerate(corpus.runs) if subject_of(path) == gone)
    caplog.set_level(logging.WARNING)
    for rank in range(2):
        left_out = LeftOut(folder, rank)
        left_out.note(batch([0, 1], [run, run], [False, False]), corpus.runs, 2)
        for step in (7, 5, 9):  # the worker was killed after step 7 and went on from a checkpoint before
            left_out.note(batch([10 * step + rank, 99], [run, 1], [True, False]), corpus.runs, step)
        left_out.keep(10)
        assert left_out.total == 3
        left_out.note(batch([70 + rank], [run], [True]), corpus.runs, 7)
        left_out.keep(20)
    if where == "local":
        with (folder / "withdrawn-0.jsonl").open("a") as file:
            file.write('{"step": 1, "row"')
    assert caplog.text.count(f"{gone} withdrew: their clips are left out") == 2, "once in each worker"
    for subject in (gone, held_out):
        remove_subject(corpus.store.path, *subject.split("/"))
    assert corpus.withdrawn == {}, "this process has met none of it"
    dates = {row["subject"]: row["when"] for row in read_withdrawn(corpus.store.path).to_pylist()}
    expected = [
        {"subject_sha256": subject_hash(subject), "when": dates[subject.split("/")[1]], "use": use,
         "clips_left_out": clips, "first_step_left_out": step}
        for subject, use, clips, step in ((gone, "training", 6, 5), (held_out, "validation", 0, None))
    ]  # fmt: skip
    assert removed(corpus, folder) == sorted(expected, key=lambda entry: entry["subject_sha256"])
    assert list(corpus.withdrawn) == sorted([gone, held_out])
    assert gone in corpus.trained_subjects, "an evaluation may meet what the weights have seen"


def test_a_table_that_cannot_be_read_at_the_end_ends_no_run(corpus, tmp_path, caplog):
    (corpus.store.path / "withdrawn.parquet").write_bytes(b"PAR1 cut")
    assert removed(corpus, tmp_path) == []
    assert "only subjects that are known to have withdrawn are listed" in caplog.text


@pytest.fixture(scope="module")
def runs(ball_config_in, ball_store, run_ranks, tmp_path_factory):
    """A run to its end; and one that a participant leaves after half of its steps."""
    made = tmp_path_factory.mktemp("withdrawn")

    def config(name, store):
        return ball_config_in(
            made, run={"name": name}, data={"store": store}, checkpoint={"every": CHANGED}, scale={"workers": 1},
            train={"max_steps": STEPS, "global_batch": 8, "micro_batch": 4, "validate_every": 100},
            tracking={"clip_ledger": True, "pictures": True},
        )  # fmt: skip

    whole, left = config("whole", ball_store), config("left", shutil.copytree(ball_store, made / "store"))
    left.run.folder.mkdir(parents=True)
    pinned_manifest.keep(left, pinned_manifest.choose(left))
    run_ranks([left], [-1], CHANGED)
    corpus = pinned_manifest.choose(left)
    gone = sorted(person_of(corpus, corpus.plan.rows(8 * CHANGED, 8)))[0]
    for subject in (gone, *sorted(person_of(corpus, corpus.validation))):
        remove_subject(left.data.store, *subject.split("/"))
    pinned_manifest.keep(left, pinned_manifest.choose(left))
    run_ranks([whole, left], [-1, -1])
    return whole, left, gone


def person_of(corpus, rows):
    return {subject_of(corpus.runs[run]) for run in rows["run"]}


def test_a_run_goes_on_to_its_end_without_a_participant(runs, read_ledger):
    whole, left, gone = runs
    assert checkpoints.newest(left.run.folder / "checkpoints").step == STEPS
    expected, steps = read_ledger(whole), read_ledger(left)
    assert sorted(steps) == list(range(STEPS))
    assert all(steps[step]["rows"] == expected[step]["rows"] for step in range(STEPS)), "nobody's clip is lost or moved"
    assert [steps[step]["loss"] == expected[step]["loss"] for step in range(CHANGED + 1)] == [True, True, False]
    corpus = pinned_manifest.planned(left)
    rows = corpus.plan.rows(8 * CHANGED, 8 * (STEPS - CHANGED))
    theirs = [row for row in rows if subject_of(corpus.runs[row["run"]]) == gone]
    said = [json.loads(line) for line in (left.run.folder / "withdrawn-0.jsonl").read_text().splitlines()]
    assert [(entry["step"], entry["row"]) for entry in said] == [(row["row"] // 8, row["row"]) for row in theirs]
    assert [entry["clip"] for entry in said] == [f"{corpus.runs[row['run']]}[{row['start']}]" for row in theirs]
    assert not (left.run.folder / "unreadable-0.jsonl").exists()


def test_the_model_lists_the_participant_and_no_held_out_loss_is_invented(runs):
    _, left, gone = runs
    extra = json.loads((left.run.folder / "model" / "config.json").read_text())["extra"]
    assert len(extra["withdrawn"]) == 3 and gone not in json.dumps(extra)
    (entry,) = [entry for entry in extra["withdrawn"] if entry["subject_sha256"] == subject_hash(gone)]
    assert entry["use"] == "training" and entry["first_step_left_out"] == CHANGED and entry["clips_left_out"] > 0
    assert subject_hash(gone) in extra["subjects_sha256"]
    final = json.loads((left.run.folder / "final.json").read_text())
    assert final["data/validation_clips"] == 0 and final["loss/validation"] != final["loss/validation"]
