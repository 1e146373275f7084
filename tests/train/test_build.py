"""What an exported model says of its training: on whom, so that an evaluation can tell who is new to it."""

import hashlib
import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from neurostorm.data.corpus import open_corpus
from neurostorm.data.plan.split import subject_hash
from neurostorm.store import Grid, create_store, run_path, write_manifest, write_run
from neurostorm.train.build import build_model, export, trained_subjects

SHAPE = (12, 12, 12)
FACTS = {"session": "", "task": "rest", "run_label": "", "entities": {}, "source_tr_s": 0.8, "tsnr_median": 50.0}
FACTS |= {"clipped_fraction": 0.0, "coverage": 1.0, "global_mean": 100.0, "global_std": 1.0}


def fill(store: Path, people: dict[tuple[str, str], tuple[int, ...]]) -> Path:
    """A store in which each (dataset, subject) has runs of these many frames."""
    mask = np.ones(SHAPE, bool)
    create_store(store, grid=Grid("cube", SHAPE, 8.0, (0.0, 0.0, 0.0)), mask=mask, tr_s=0.8, recipe="test")
    ones = np.ones(mask.sum(), np.float32)
    for (dataset, subject), lengths in people.items():
        for number, length in enumerate(lengths):
            run = run_path(dataset, subject, f"run-{number}")
            source = {"source": run, "source_sha256": hashlib.sha256(run.encode()).hexdigest(), "source_frames": length}
            frames = np.ones((length, mask.sum()), np.int8)
            write_run(store, run, frames=frames, mean=ones, std=ones, attributes=FACTS | source)
    write_manifest(store)
    return store


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eight people in two datasets with a namesake in each, and one whose runs are shorter than a clip."""
    people = {(dataset, f"sub-{n}"): (8, 9) for dataset in ("hcp", "ukb") for n in range(4)}
    return fill(tmp_path_factory.mktemp("study") / "study.zarr", people | {("hcp", "sub-short"): (3, 2)})


@pytest.fixture
def open_study(study, ball_config):
    """Opens the study as a corpus; `seed` and fields of `data` by keyword."""

    def make(seed=0, **data):
        data = {"store": study, "clip_frames": 4, "held_out": 0.3, **data}
        return open_corpus(ball_config(run={"seed": seed}, data=data, mask={"window": (1, 1, 1, 1)}))

    return make


def people_of(corpus, rows):
    """Hashes of `dataset/subject`, computed here, of the runs of plan rows."""
    people = {"/".join(corpus.runs[run].split("/")[1:3]) for run in rows["run"]}
    return {hashlib.sha256(person.encode()).hexdigest()[:12] for person in people}


def test_a_subjects_hash_is_that_of_dataset_and_label():
    assert subject_hash("hcp/sub-001") == hashlib.sha256(b"hcp/sub-001").hexdigest()[:12] == "df19e222d066"
    assert subject_hash("ukb/sub-001") != subject_hash("hcp/sub-001")


@pytest.mark.parametrize("seed", range(5))
def test_those_trained_on_are_the_splits_training_side(seed, open_study):
    """By the clips that an epoch draws: everybody of whom there is one, and nobody who is held out."""
    corpus = open_study(seed)
    listed = trained_subjects(corpus)
    assert listed == sorted(people_of(corpus, corpus.plan.epoch(0)))
    assert not set(listed) & people_of(corpus, corpus.validation)
    assert subject_hash("hcp/sub-short") not in listed


def test_a_left_out_dataset_was_not_trained_on(open_study):
    everybody = set(trained_subjects(open_study()))
    some = set(trained_subjects(open_study(weights={"ukb": 0.0})))
    assert some == everybody & {subject_hash(f"hcp/sub-{n}") for n in range(4)}
    assert 0 < len(some) < len(everybody)


def test_one_person_parted_in_time_was_trained_on(tmp_path, open_study):
    alone = fill(tmp_path / "alone.zarr", {("hcp", "sub-7"): (40,)})
    assert trained_subjects(open_study(store=alone)) == [subject_hash("hcp/sub-7")]


def test_the_models_files_name_them(open_study, ball_config, study, tmp_path):
    corpus = open_study()
    config = ball_config(data={"store": study, "clip_frames": 4}, mask={"window": (1, 1, 1, 1)})
    model = build_model(config, corpus.store)
    engine = SimpleNamespace(full_weights=model.state_dict)
    loop = SimpleNamespace(engine=engine, rank=0, config=config, model=model, total_steps=3)
    export(loop, corpus, tmp_path / "model")
    extra = json.loads((tmp_path / "model" / "config.json").read_text())["extra"]
    assert extra["subjects_sha256"] == trained_subjects(corpus)
    assert extra["steps"] == 3 and extra["store_sha256"] == corpus.content_sha256
    loop.rank = 1
    export(loop, corpus, tmp_path / "other")
    assert not (tmp_path / "other").exists()
