"""A store as training sees it: who is held out, in which words, and what is refused."""

import shutil

import pytest

from neurostorm.config import ConfigError
from neurostorm.data.corpus import open_corpus
from neurostorm.store import StoreError

DATA = {"clip_frames": 6, "held_out": 0.4, "val_clips": 7}


@pytest.fixture
def open_uneven(uneven, ball_config):
    """Opens the uneven store as a corpus; `seed` and fields of `data` by keyword."""

    def make(seed=0, **data):
        return open_corpus(ball_config(run={"seed": seed}, data={"store": uneven.path, **DATA, **data}))

    return make


def person(run):
    """`dataset/subject` of a run's path."""
    return "/".join(run.split("/")[1:3])


def people_of(corpus, rows):
    return {person(corpus.runs[run]) for run in rows["run"]}


@pytest.mark.parametrize("seed", range(4))
def test_held_out_clips_never_come_from_a_training_subject(seed, open_uneven):
    corpus = open_uneven(seed)
    training, held_out = people_of(corpus, corpus.plan.rows(0, 200)), people_of(corpus, corpus.validation)
    assert len(held_out) == 2
    assert not training & held_out
    assert training | held_out == {person(run) for run in corpus.runs}


def test_the_corpus_says_what_it_holds_and_how_it_is_parted(open_uneven, uneven):
    corpus = open_uneven()
    assert tuple(corpus.runs) == uneven.runs
    assert corpus.frames == sum(len(frames) for frames in uneven.frames.values())
    assert corpus.subjects == 5, "two people who share a label in two studies are two people"
    assert corpus.split == "2 of 5 subjects held out"
    assert len(corpus.validation) == 7


def test_rows_name_the_clips_of_the_manifests_runs(open_uneven, uneven):
    corpus = open_uneven()
    rows = corpus.plan.rows(0, 3)
    for clip, row in zip(corpus.reader.read(rows)["frames"], rows, strict=True):
        expected = uneven.frames[uneven.runs[row["run"]]][row["start"] : row["start"] + 6]
        assert (clip == expected).all()


def test_a_corpus_is_the_same_when_opened_again_and_another_with_another_seed(open_uneven):
    one, again, other = open_uneven(3), open_uneven(3), open_uneven(4)
    assert (one.plan.rows(0, 100) == again.plan.rows(0, 100)).all()
    assert (one.validation == again.validation).all()
    assert (one.plan.rows(0, 20)["start"] != other.plan.rows(0, 20)["start"]).any()
    assert len({frozenset(people_of(open_uneven(seed), open_uneven(seed).validation)) for seed in range(6)}) > 1


def test_clips_follow_each_other_unless_a_stride_is_given(open_uneven):
    plain, overlapping = open_uneven(), open_uneven(clip_stride_frames=2)
    assert plain.plan.stride_frames == 6
    assert overlapping.plan.clips_per_epoch > 2 * plain.plan.clips_per_epoch


def test_a_missing_store_is_refused_with_its_path(open_uneven, tmp_path):
    with pytest.raises(StoreError, match=r"nowhere\.zarr"):
        open_uneven(store=tmp_path / "nowhere.zarr")


def test_a_store_without_a_manifest_is_refused_with_its_path(open_uneven, uneven, tmp_path):
    path = shutil.copytree(uneven.path, tmp_path / "bare.zarr")
    (path / "manifest.parquet").unlink()
    with pytest.raises(StoreError, match=r"bare\.zarr"):
        open_uneven(store=path)


def test_runs_shorter_than_a_clip_are_refused_with_the_store_and_the_field(open_uneven):
    with pytest.raises(ConfigError, match=r"uneven\.zarr: .*data\.clip_frames=38"):
        open_uneven(clip_frames=38)


def test_datasets_are_mixed_as_the_configuration_says(open_uneven):
    plain = open_uneven().plan
    assert set(plain.clips_by_dataset) == {"made", "other"}
    weighted = open_uneven(weights={"made": 0.5}, temperature=3.0).plan
    made, other = (plain.clips_by_dataset[name] for name in ("made", "other"))
    share = 0.5 * made ** (1 / 3) / (0.5 * made ** (1 / 3) + other ** (1 / 3))
    assert weighted.clips_by_dataset["made"] == pytest.approx(share * (made + other), abs=1)
    assert weighted.clips_per_epoch == made + other


def test_a_left_out_dataset_is_neither_trained_on_nor_held_out_and_moves_nobody_else(open_uneven):
    for seed in range(6):
        whole, part = open_uneven(seed), open_uneven(seed, weights={"other": 0.0})
        for side in (lambda corpus: corpus.plan.rows(0, 200), lambda corpus: corpus.validation):
            everybody = people_of(whole, side(whole))
            assert people_of(part, side(part)) == {name for name in everybody if name.startswith("made/")}


def test_clips_of_a_subject_are_capped_kept_together_and_repeated(open_uneven):
    corpus = open_uneven(max_clips_per_subject=2, clips_per_read=2, masks_per_clip=3)
    rows = corpus.plan.epoch(0)
    drawn = [person(corpus.runs[run]) for run in rows["run"]]
    assert all(drawn.count(name) == 3 * 2 for name in set(drawn)), "two clips of each, three times"
    starts = rows["start"].reshape(-1, 3)
    assert (starts == starts[:, :1]).all()
    assert (rows["run"].reshape(-1, 2, 3) == rows["run"].reshape(-1, 2, 3)[:, :1, :1]).mean() > 0.5


@pytest.mark.parametrize(
    ("weights", "words"),
    [
        ({"mode": 2.0}, r"uneven\.zarr: data\.weights: there is no dataset 'mode'; did you mean made\?"),
        ({"made": 0.0, "other": 0.0}, "leaves every dataset out"),
        ({"made": 0.0}, "no (training|validation) run"),
    ],
)
def test_weights_that_fit_no_dataset_are_refused(weights, words, open_uneven):
    with pytest.raises(ConfigError, match=words):
        open_uneven(weights=weights)
