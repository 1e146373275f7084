"""The runs that a training run is planned on, kept with it: an ingest into its store may go on meanwhile.

    first start: the store's manifest --> RUN/manifest.parquet --> driver, feed and every worker plan from it
    later ones:  RUN/manifest.parquet again, if the store still has all its runs as they were

Runs that come later are left out until another training run begins, so the clip order stays what it was.
"""

from dataclasses import replace as with_fields

import pyarrow as pa
import pyarrow.parquet as pq

from neurostorm.config import Config, ConfigError
from neurostorm.data.corpus import KEPT_COLUMNS, Corpus, open_corpus, read_kept
from neurostorm.places import Place, replace
from neurostorm.run_folder import MANIFEST, saved_store
from neurostorm.store.manifest import check_paths, read_manifest, with_columns
from neurostorm.train import checkpoint

KEPT = MANIFEST
_LISTED = 3


def choose(config: Config) -> Corpus:
    """The corpus that a start of the run plans on; the driver calls it, and `keep`s it once the run may begin.

    Raises ConfigError when the run has checkpoints, and runs that it was planned on are gone or changed.
    """
    folder = config.run.folder
    kept = _kept(folder)
    if kept is None or not checkpoint.is_begun(folder / "checkpoints"):
        return _with_manifest(config, read_kept(config.data.store))
    lost = _lost(kept, read_manifest(config.data.store))
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
    return _with_manifest(config, kept)


def _with_manifest(config: Config, table: pa.Table) -> Corpus:
    return with_fields(open_corpus(config, table), manifest=table)


def keep(config: Config, corpus: Corpus) -> None:
    """Writes RUN/manifest.parquet for a corpus that `choose` gave."""
    assert corpus.manifest is not None
    sink = pa.BufferOutputStream()
    pq.write_table(corpus.manifest, sink, compression="zstd")
    replace(config.run.folder / KEPT, sink.getvalue().to_pybytes())


def planned(config: Config) -> Corpus:
    """The corpus that was kept; the store's own when none was."""
    return open_corpus(config, _kept(config.run.folder))


def is_other(folder: Place, corpus: Corpus) -> bool:
    """Whether RUN/manifest.parquet is there and lists other runs than a corpus."""
    kept = _kept(folder)
    return kept is not None and corpus.store.content_hash(kept) != corpus.content_sha256


def _kept(folder: Place) -> pa.Table | None:
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
