"""A training run keeps to the runs that it was planned on, while its store may grow."""

import shutil

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from neurostorm.config import ConfigError
from neurostorm.data.corpus import PLANNED_COLUMNS, open_corpus
from neurostorm.data.withdrawals import subject_of
from neurostorm.io.atomic import atomic_write
from neurostorm.io.paths import copy_files, list_files, to_path
from neurostorm.runtime.run_folder import keep_config
from neurostorm.store import write_manifest
from neurostorm.store.maintenance.care import remove_subject
from neurostorm.train.checkpoint import checkpoints
from neurostorm.train.controller import feed
from neurostorm.train.records import pinned_manifest
from tests.faulty_s3 import bad_network

LAST = "runs/balls/sub-5"


@pytest.fixture(params=["local", "s3"])
def config(request, ball_config, ball_store, tmp_path, make_bucket):
    """A run on a copy of the ball store without its last subject, which lies aside."""
    store = tmp_path / "store"
    shutil.copytree(ball_store, store)
    shutil.move(store / LAST, tmp_path / "aside")
    write_manifest(store)
    output = tmp_path / "outputs" if request.param == "local" else make_bucket()
    return ball_config(data={"store": store}, run={"output": output})


@pytest.fixture
def begin(config):
    """Starts the run, with a checkpoint or before the first."""

    def start(step=None):
        corpus = pinned_manifest.choose(config)
        config.run.folder.mkdir(parents=True, exist_ok=True)
        pinned_manifest.keep(config, corpus)
        if step is not None:
            checkpoints.save(
                config.run.folder / "checkpoints", step, write_shards=lambda path: (path / "shard").write_text("w"),
                gather=lambda value: [value], rank=0, trainer={}, keep=9,
            )  # fmt: skip
        return corpus

    return start


def grow(config, tmp_path):
    shutil.move(tmp_path / "aside", config.data.store / LAST)
    write_manifest(config.data.store)


def same(one, other):
    steps = range(one.plan.total_steps(2, None))
    return (
        tuple(one.runs) == tuple(other.runs)
        and one.content_sha256 == other.content_sha256
        and all((one.plan.step_rows(step, 0, 1) == other.plan.step_rows(step, 0, 1)).all() for step in steps)
    )


def test_an_ingest_meanwhile_changes_nothing_for_workers_feed_and_later_starts(config, begin, tmp_path, monkeypatch):
    first = begin(step=4)
    assert same(first, open_corpus(config)) and len(first.runs) == 5
    grow(config, tmp_path)
    assert len(open_corpus(config).runs) == 6
    assert same(pinned_manifest.planned(config), first) and same(pinned_manifest.choose(config), first)
    fed = []
    monkeypatch.setattr(feed, "clip_dataset", lambda reader, plan, **how: fed.append((*reader.runs, how["last_step"])))
    feed.training_data(config)
    assert fed == [(*first.runs, first.plan.total_steps(config.train.epochs, None))]


def test_a_manifest_that_an_earlier_version_kept_says_no_layouts_and_is_planned_on(config, begin):
    first = begin(step=4)
    sink = pa.BufferOutputStream()
    pq.write_table(first.manifest.select(PLANNED_COLUMNS), sink)
    atomic_write(to_path(str(config.run.folder)) / pinned_manifest.KEPT, sink.getvalue().to_pybytes())
    for corpus in (pinned_manifest.planned(config), pinned_manifest.choose(config)):
        assert same(corpus, first)
        assert not corpus.reader.read(corpus.plan.step_rows(0, 0, 1))["bad"].any()


def test_a_worker_asks_an_object_store_for_little_before_its_first_clips(
    ball_config, ball_store, make_bucket, s3_server, monkeypatch
):
    far, output = to_path(make_bucket()) / "store", make_bucket()
    copy_files(ball_store, far, [name for name, _ in list_files(ball_store) if not name.endswith(".lock")])
    config = ball_config(data={"store": far, "normalize": "global"}, run={"output": output})
    pinned_manifest.keep(config, pinned_manifest.choose(config))
    with bad_network(s3_server, monkeypatch) as network:
        corpus = pinned_manifest.planned(config)
        assert len(network.requests) < 9, network.requests
        assert sum(name.endswith("zarr.json") for name in network.requests) == 2, "the store's and its mask's"
        network.requests.clear()
        rows = corpus.plan.step_rows(0, 0, 1)
        assert not corpus.reader.read(rows)["bad"].any()
    assert {name.split("?")[0].rpartition("/")[2] for name in network.requests} == {"0.0"}
    assert len(network.requests) == 2 * len(rows), "frames and moments of each clip"


def test_a_run_without_a_checkpoint_is_planned_anew(config, begin, tmp_path):
    begin()
    grow(config, tmp_path)
    assert len(pinned_manifest.planned(config).runs) == 5, "the workers of the first start"
    assert len(begin().runs) == 6
    assert len(pinned_manifest.planned(config).runs) == 6


def test_a_run_is_not_resumed_without_what_it_was_planned_on(config, begin, tmp_path):
    begin(step=4)
    shutil.rmtree(config.data.store / "runs/balls/sub-2")
    write_manifest(config.data.store)
    with pytest.raises(ConfigError, match=r"another content of .*/store: runs/balls/sub-2/task-rest removed .*--name"):
        pinned_manifest.choose(config)


def person(corpus, rows):
    return {subject_of(corpus.runs[run]) for run in rows["run"]}


def test_a_run_goes_on_without_the_clips_of_a_subject_who_withdrew(config, begin, caplog):
    first = begin(step=4)
    gone = next(iter(sorted(first.trained_subjects)))
    remove_subject(config.data.store, *gone.split("/"))
    for corpus in (pinned_manifest.choose(config), pinned_manifest.planned(config)):
        assert same(corpus, first), "the plan stays"
        assert list(corpus.withdrawn) == [gone] and corpus.trained_subjects == first.trained_subjects
        rows = corpus.plan.step_rows(0, 0, 1)
        batch = corpus.reader.read(corpus.plan.epoch(0))
        theirs = [subject_of(corpus.runs[run]) == gone for run in corpus.plan.epoch(0)["run"]]
        assert batch["withdrawn"].tolist() == theirs and any(theirs) and not batch["bad"].any()
        assert len(rows) == config.train.global_batch
    assert f"1 subject(s) of this run's plan withdrew from {config.data.store}" in caplog.text
    assert f"{gone} (20" in caplog.text and "held out withdrew" not in caplog.text


def test_what_is_lost_beside_a_withdrawal_is_refused_by_name(config, begin):
    first = begin(step=4)
    gone, lost = sorted(first.trained_subjects)[:2]
    remove_subject(config.data.store, *gone.split("/"))
    shutil.rmtree(config.data.store / "runs" / lost)
    write_manifest(config.data.store)
    with pytest.raises(ConfigError, match=rf"content of .*/store: runs/{lost}/task-rest removed"):
        pinned_manifest.choose(config)


def test_a_run_that_loses_all_held_out_subjects_says_so_and_one_without_training_subjects_ends(config, begin, caplog):
    first = begin(step=4)
    for gone in sorted(person(first, first.validation)):
        remove_subject(config.data.store, *gone.split("/"))
    assert same(pinned_manifest.choose(config), first)
    assert "Everybody who was held out withdrew: from now on there is no held-out loss" in caplog.text
    for gone in first.trained_subjects:
        remove_subject(config.data.store, *gone.split("/"))
    with pytest.raises(ConfigError, match=rf"everybody whom {config.run.folder} trains on withdrew .*--name"):
        pinned_manifest.choose(config)


def test_another_store_is_named_with_the_one_that_the_run_was_planned_on(config, begin):
    begin(step=4)
    keep_config(config, "pretrain")
    shutil.rmtree(config.data.store / "runs/balls/sub-2")
    other = config.data.store.rename(config.data.store.with_name("other"))
    write_manifest(other)
    moved = config.model_copy(update={"data": config.data.model_copy(update={"store": other})})
    with pytest.raises(
        ConfigError, match=rf"planned on the store {config.data.store}, and {other} does not have runs/"
    ):
        pinned_manifest.choose(moved)


def test_a_run_that_was_ingested_anew_from_another_file_is_another_content(config, begin):
    begin(step=4)
    header = config.data.store / "runs/balls/sub-2/task-rest/zarr.json"
    header.write_text(header.read_text().replace(f"{2:064x}", f"{7:064x}"))
    write_manifest(config.data.store)
    with pytest.raises(ConfigError, match="sub-2/task-rest removed or ingested anew"):
        pinned_manifest.choose(config)


def test_a_kept_table_that_cannot_be_read_is_named(config, begin):
    begin(step=4)
    atomic_write(to_path(str(config.run.folder)) / pinned_manifest.KEPT, b"PAR1")
    with pytest.raises(ConfigError, match=r"manifest\.parquet cannot be read"):
        pinned_manifest.planned(config)
