"""What an ingest finds before it begins, what it says it would do, and the tables that it keeps; all without Ray."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from neurostorm.commands.command import Job
from neurostorm.config import Config, IngestConfig
from neurostorm.ingest import tables as keeping
from neurostorm.ingest.convert import RECIPE, RunOutcome, attempt
from neurostorm.ingest.estimate import Estimate, dry_run, free_bytes, sampled_growth
from neurostorm.ingest.layouts.discover import discover
from neurostorm.ingest.report import IngestReport
from neurostorm.ingest.resample.template import brain_mask
from neurostorm.ingest.survey import survey
from neurostorm.ingest.tables import Tables, store_participants
from neurostorm.store import (
    GRIDS,
    MANIFEST_SCHEMA,
    FrameStore,
    create_store,
    read_manifest,
    read_participants,
    read_quarantine,
)
from neurostorm.store.maintenance.care import remove_subject

SHAPE = (26, 32, 26)
NAME = "sub-{0}/func/sub-{0}_task-rest_space-{1}_desc-preproc_bold.nii.gz"
MNI = "MNI152NLin6Asym"


@pytest.fixture
def dataset(tmp_path: Path, kit: Any) -> Path:
    """BIDS derivatives: four good runs, one empty file, one in native space, and labels."""
    root = tmp_path / "bids"
    affine = kit.affine_of("LAS", 7.5, SHAPE, (0.0, -18.0, 8.0))
    for subject in range(1, 5):
        kit.save(root / NAME.format(subject, MNI), kit.phantom(SHAPE, affine, 8, 0.8) + subject, affine)
    kit.save(root / NAME.format(6, "T1w"), kit.phantom(SHAPE, affine, 8, 0.8), affine)
    (root / "sub-5" / "func").mkdir(parents=True)
    (root / NAME.format(5, MNI)).touch()
    (root / "participants.tsv").write_text("participant_id\tage\nsub-1\t21\nsub-2\t22\nsub-3\t23\n")
    return root


@pytest.fixture
def filled(tmp_path: Path, dataset: Path) -> Path:
    """A 4 mm store, as `ingest` makes it, that holds the first three runs."""
    store = tmp_path / "store"
    create_store(store, grid=GRIDS["4mm"], mask=brain_mask(GRIDS["4mm"]), tr_s=0.8, recipe=RECIPE)
    for source in discover(dataset)[:3]:
        assert attempt(source, store).status == "ingested"
    return store


def config_of(source: Path, store: Path, **ingest: Any) -> Config:
    return Config.model_validate({"ingest": {"source": source, "grid": "4mm", **ingest}, "data": {"store": store}})


def status_of(found: Any) -> dict[str, str]:
    """Subject -> status of what needs no task."""
    return {outcome.run.split("/")[2]: outcome.status for outcome in found.known.values()}


def list_files(folder: Path) -> dict[str, bytes]:
    return {file.as_posix(): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def test_a_survey_tells_what_needs_no_task(dataset: Path, filled: Path) -> None:
    """Complete by size and time; changed by size; unsure by time alone; who withdrew is not looked at further."""
    first, second, third = (dataset / NAME.format(subject, MNI) for subject in (1, 2, 3))
    with second.open("ab") as file:
        file.write(b"more")
    third.touch()
    found = survey(IngestConfig(source=dataset), filled)
    assert status_of(found) == {"sub-1": "complete", "sub-2": "changed"}
    assert [source.path for source in found.unsure] == [third]
    assert [source.subject for source in found.waiting] == ["sub-3", "sub-4", "sub-5", "sub-6"]
    assert attempt(found.unsure[0], filled).status == "complete"
    first.unlink()
    assert "sub-1" not in status_of(survey(IngestConfig(source=dataset), filled))


def test_who_withdrew_stays_out_until_readmitted(dataset: Path, filled: Path) -> None:
    remove_subject(filled, "bids", "sub-2")
    settings = IngestConfig(source=dataset)
    assert status_of(survey(settings, filled)) == {"sub-1": "complete", "sub-2": "withdrawn", "sub-3": "complete"}
    for entry in ("sub-2", "bids/sub-2"):
        found = survey(settings.model_copy(update={"allow_removed": (entry, "sub-9", "other/sub-2")}), filled)
        assert status_of(found) == {"sub-1": "complete", "sub-3": "complete"}
        assert found.readmitted == (("bids", "sub-2"),)
        assert found.strangers == ("sub-9", "other/sub-2")
    store_participants(filled, discover(dataset))
    labels = read_participants(filled)
    assert labels is not None
    assert labels.column("participant_id").to_pylist() == ["sub-1", "sub-3"]


def test_a_dry_run_says_what_would_be_done_and_writes_nothing(dataset: Path, filled: Path, tmp_path: Path) -> None:
    """Into a store that is there, and into one that is not; then the real size of what was foretold."""
    remove_subject(filled, "bids", "sub-3")
    before = list_files(filled)
    found = dry_run(config_of(dataset, filled))
    text = "\n".join(found.lines())
    assert list_files(filled) == before
    assert "bids: 1 to ingest, 2 complete, 2 refused, 1 withdrawn" in text
    assert f"{NAME.format(4, MNI)} -> runs/bids/sub-4/task-rest" in text
    assert "bids/sub-3: 1 run(s)" in text
    assert "is an empty file" in text and "space-T1w" in text
    ((source, size),) = found.waiting
    assert (size.frames, size.file_bytes) == (8, source.path.stat().st_size)
    assert size.source_bytes == 26 * 32 * 26 * 8 * 4
    outcome = attempt(source, filled)
    assert outcome.size_bytes == pytest.approx(size.stored_bytes, rel=0.02)
    assert found.files == len(list_files(filled)) - len(before)
    assert found.in_store == 3

    nowhere = tmp_path / "not" / "yet"
    fresh = dry_run(config_of(dataset, nowhere))
    assert not (tmp_path / "not").exists()
    assert len(fresh.waiting) == 4 and fresh.files == 4 * 2 + 4 + 1
    assert fresh.stored_bytes == sampled_growth([source for source, _ in fresh.waiting], 0.8, 28210)


def test_too_little_room_is_said(dataset: Path, tmp_path: Path) -> None:
    found = dry_run(config_of(dataset, tmp_path / "store"))
    assert "NOT ENOUGH ROOM" not in "\n".join(found.lines())
    full = Estimate(**(vars(found) | {"free_bytes": 1_000_000}))
    assert "NOT ENOUGH ROOM: 0.00 GB are missing" in "\n".join(full.lines())
    assert free_bytes(tmp_path / "not" / "there") == pytest.approx(free_bytes(tmp_path), rel=0.1)


def test_time_is_shared_by_the_cores(dataset: Path, tmp_path: Path) -> None:
    """Never less than the longest run takes, however many cores there are."""
    found = dry_run(config_of(dataset, tmp_path / "store"))
    one, two, many = (Estimate(**(vars(found) | {"cores": cores})).seconds for cores in (1, 2, 1000))
    assert one == pytest.approx(2 * two)
    assert many == pytest.approx(one / 4)


def test_a_flag_needs_no_value() -> None:
    job = Job("test", "", settings=("ingest",), aliases={"--dry-run": "ingest.dry_run"})
    for words, expected in (
        ([], False), (["--dry-run"], True), (["--ingest.dry_run"], True), (["--dry-run", "false"], False),
        (["--dry-run", "--ingest.tr_s", "1"], True),
    ):  # fmt: skip
        assert job.load(words).ingest.dry_run is expected


def test_tables_are_kept_up_while_outcomes_come(dataset: Path, filled: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is lost when the driver dies between two outcomes; what failed earlier and is well now is cleared."""
    monkeypatch.setattr(keeping, "QUARANTINE_EVERY_S", -1.0)
    monkeypatch.setattr(keeping, "MANIFEST_EVERY_S", -1.0)
    monkeypatch.setattr(keeping, "MANIFEST_SHARE", 1e9)
    kept = Tables(filled)
    kept.take(RunOutcome("bad.nii", "runs/a/sub-1/x", "quarantined", "is no image"))
    assert read_quarantine(filled).select(["source", "reason"]).to_pylist() == [
        {"source": "bad.nii", "reason": "is no image"}
    ]
    assert read_manifest(filled).num_rows == 3
    kept = Tables(filled)
    kept.take(RunOutcome("bad.nii", "runs/a/sub-1/x", "ingested"))
    assert read_quarantine(filled).num_rows == 0


def test_tables_wait_longer_when_the_manifest_takes_longer(filled: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """However many outcomes come, rebuilding takes a twentieth of the time."""
    clock = [0.0]
    built: list[float] = []

    def build(store: Path) -> pa.Table:
        built.append(clock[0])
        clock[0] += 60.0
        return pa.table({})

    monkeypatch.setattr(keeping.time, "monotonic", lambda: clock[0])
    monkeypatch.setattr(keeping, "write_manifest", build)
    monkeypatch.setattr(keeping, "QUARANTINE_EVERY_S", 1e9)
    kept = Tables(filled)
    while clock[0] < 20_000:
        clock[0] += 1.0
        kept.take(RunOutcome("x", "runs/a/b/c", "complete"))
    assert 301 <= built[0] <= 302
    assert len(built) * 60 <= 20_000 * keeping.MANIFEST_SHARE + 60
    assert len(built) > 10


def test_a_report_counts_who_withdrew(tmp_path: Path) -> None:
    outcomes = [RunOutcome(f"{n}.nii", f"runs/a/sub-{n // 2}/{n}", "withdrawn", "withdrew") for n in range(3)]
    report = IngestReport(tuple(outcomes), (), 0, 1.0, tmp_path, MANIFEST_SCHEMA.empty_table())
    lines = report.lines()
    assert any("2 participant(s) withdrew" in line for line in lines)
    assert "  a/sub-0: 2 run(s)" in lines
    assert report.in_store == 0


def test_a_report_counts_what_was_there_only_if_something_was(tmp_path: Path) -> None:
    def first_line(*statuses: str) -> str:
        outcomes = [RunOutcome(f"{n}.nii", f"runs/a/sub-{n}/x", status, "r") for n, status in enumerate(statuses)]
        return IngestReport(tuple(outcomes), (), 0, 1.0, tmp_path, MANIFEST_SCHEMA.empty_table()).lines()[0]

    assert first_line("ingested", "ingested") == "2 of 2 run(s) ingested in 1 s"
    assert first_line("ingested", "complete") == "1 of 2 run(s) ingested in 1 s; 1 were there already"
    assert first_line("quarantined") == "0 of 1 run(s) ingested in 1 s; 1 quarantined"


def test_a_damaged_run_is_named(dataset: Path, filled: Path, source_of: Callable[..., Any]) -> None:
    """A torn zarr.json in the store is the store's trouble, not the file's."""
    run = FrameStore.open(filled).runs()[0]
    (filled / run / "zarr.json").write_text("{")
    outcome = attempt(discover(dataset)[0], filled)
    assert outcome.status == "unwritten"
    assert f"{run}/zarr.json" in outcome.reason
