"""The runs that a training run is planned on, kept with it: an ingest into its store may go on meanwhile.

    first start: the store's manifest --> RUN/manifest.parquet --> driver, feed and every worker plan from it
    later ones:  RUN/manifest.parquet again, if the store still has all its runs as they were, but for those of
                 subjects who withdrew: their clips keep their places in the plan and are left out

Runs that come later are left out until another training run begins, so the clip order stays what it was.
"""

import logging
from dataclasses import replace as with_fields

import pyarrow as pa
import pyarrow.parquet as pq

from neurostorm.config import Config, ConfigError
from neurostorm.data.corpus import KEPT_COLUMNS, Corpus, open_corpus, read_kept
from neurostorm.data.withdrawals import subject_of
from neurostorm.io.atomic import atomic_write
from neurostorm.io.paths import AnyPath
from neurostorm.runtime.run_folder import MANIFEST, saved_store
from neurostorm.store.manifest import check_paths, with_columns
from neurostorm.train.checkpoint import checkpoints
from neurostorm.train.records.log_lines import NOBODY_HELD_OUT

KEPT = MANIFEST
logger = logging.getLogger(__name__)
_LISTED = 3


def choose(config: Config) -> Corpus:
    """The corpus that a start of the run plans on; the driver calls it, and `keep`s it once the run may begin.

    Runs whose subjects withdrew stay in the plan, and their clips are left out: `Corpus.withdrawn`.

    Raises ConfigError when the run has checkpoints, and runs that it was planned on are gone for another reason, or
    changed, or none is left to train on.
    """
    folder = config.run.folder
    kept = _kept(folder)
    if kept is None or not checkpoints.is_begun(folder / "checkpoints"):
        return _with_manifest(config, read_kept(config.data.store))
    corpus = _with_manifest(config, kept)
    lost = [run for run in _lost(kept, read_kept(config.data.store)) if subject_of(run) not in corpus.withdrawn]
    if lost:
        names = ", ".join(lost[:_LISTED]) + (f" and {len(lost) - _LISTED} more" if len(lost) > _LISTED else "")
        before = saved_store(folder)
        if before is not None and before != str(config.data.store):
            raise ConfigError(
                f"{folder} was planned on the store {before}, and {config.data.store} does not have {names}: give "
                f"--store {before} to resume it, or choose another --name"
            )
        raise ConfigError(
            f"{folder} was planned on another content of {config.data.store}: {names} removed or ingested anew since; "
            "choose another --name"
        )
    _check_who_is_left(config, corpus)
    return corpus


def _check_who_is_left(config: Config, corpus: Corpus) -> None:
    """Says who of the plan withdrew. ConfigError when nobody is left to train on."""
    gone = corpus.withdrawn
    if not gone:
        return
    if set(corpus.trained_subjects) <= gone.keys():
        raise ConfigError(
            f"everybody whom {config.run.folder} trains on withdrew from {config.data.store}: choose another --name"
        )
    names = ", ".join(f"{subject} ({when})" for subject, when in gone.items())
    logger.warning(
        "%d subject(s) of this run's plan withdrew from %s; it keeps its clip order and leaves out their clips: %s",
        len(gone), config.data.store, names,
    )  # fmt: skip
    if {subject_of(corpus.runs[run]) for run in corpus.validation["run"]} <= gone.keys():
        logger.warning("%s", NOBODY_HELD_OUT)


def _with_manifest(config: Config, table: pa.Table) -> Corpus:
    return with_fields(open_corpus(config, table), manifest=table)


def keep(config: Config, corpus: Corpus) -> None:
    """Writes RUN/manifest.parquet for a corpus that `choose` gave."""
    assert corpus.manifest is not None
    sink = pa.BufferOutputStream()
    pq.write_table(corpus.manifest, sink, compression="zstd")
    atomic_write(config.run.folder / KEPT, sink.getvalue().to_pybytes())


def planned(config: Config) -> Corpus:
    """The corpus that was kept; the store's own when none was."""
    return open_corpus(config, _kept(config.run.folder))


def is_other(folder: AnyPath, corpus: Corpus) -> bool:
    """Whether RUN/manifest.parquet is there and lists other runs than a corpus."""
    kept = _kept(folder)
    return kept is not None and corpus.store.content_hash(kept) != corpus.content_sha256


def _kept(folder: AnyPath) -> pa.Table | None:
    try:
        data = (folder / KEPT).read_bytes()
    except FileNotFoundError:
        return None
    try:
        table = pq.read_table(pa.BufferReader(data), use_threads=False, pre_buffer=False)
        return check_paths(with_columns(table, KEPT_COLUMNS), folder / KEPT)
    except (pa.ArrowException, KeyError) as error:
        raise ConfigError(f"{folder / KEPT} cannot be read ({error}): choose another --name") from error


def _lost(kept: pa.Table, now: pa.Table) -> list[str]:
    """Runs of `kept` that `now` does not have, or has with another content."""
    content = ["run", "frames", "source_sha256"]
    there = {tuple(row.values()) for row in now.select(content).to_pylist()}
    return [row["run"] for row in kept.select(content).to_pylist() if tuple(row.values()) not in there]
