"""The whole ingest on a local Ray: good and broken files together, a second start, a dying task, the exit status."""

import hashlib
import importlib.util
import os
import signal
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from neurostorm.config import Config, ConfigError
from neurostorm.ingest import map_runs as spreading
from neurostorm.ingest.convert import RunOutcome
from neurostorm.ingest.job import ingest
from neurostorm.ingest.layouts.discover import Source
from neurostorm.ingest.map_runs import map_runs
from neurostorm.store import FrameStore, read_manifest, read_participants, read_quarantine

pytestmark = [pytest.mark.integration, pytest.mark.usefixtures("local_ray")]
ROOT = Path(__file__).resolve().parents[2]
SHAPE = (26, 32, 26)
NAME = "sub-{0}/func/sub-{0}_task-rest_space-MNI152NLin6Asym_desc-preproc_bold.nii.gz"


@pytest.fixture(scope="module")
def job() -> ModuleType:
    """jobs/ingest.py as a module."""
    spec = importlib.util.spec_from_file_location("ingest_job", ROOT / "jobs" / "ingest.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def dataset(tmp_path: Path, kit: Any) -> Path:
    """BIDS derivatives: three good runs, two broken ones, one in native space, and labels."""
    root = tmp_path / "bids"
    affine = kit.affine_of("LAS", 7.5, SHAPE, (0.0, -18.0, 8.0))
    for subject in ("1", "2", "3"):
        kit.save(root / NAME.format(subject), kit.phantom(SHAPE, affine, 8, 0.8) + int(subject), affine)
    torn = kit.save(root / NAME.format("4"), kit.phantom(SHAPE, affine, 8, 0.8), affine)
    torn.write_bytes(torn.read_bytes()[:-5000])
    kit.save(root / NAME.format("5"), np.full((*SHAPE, 8), np.nan, np.float32), affine)
    native = root / NAME.format("6").replace("MNI152NLin6Asym", "T1w")
    kit.save(native, kit.phantom(SHAPE, affine, 8, 0.8), affine)
    (root / "participants.tsv").write_text("participant_id\tage\nsub-1\t21\nsub-2\tn/a\n")
    return root


def arguments(source: Path, store: Path) -> list[str]:
    return ["--source", str(source), "--store", str(store), "--grid", "4mm"]


def bytes_of(store: Path) -> dict[str, str]:
    return {str(file): hashlib.sha256(file.read_bytes()).hexdigest() for file in store.rglob("*") if file.is_file()}


def test_good_files_are_ingested_and_broken_ones_quarantined(
    tmp_path: Path, dataset: Path, kit: Any, job: ModuleType, capsys: pytest.CaptureFixture[str]
) -> None:
    """From the command line to the tables; then again, with nothing to do; then with one file repaired."""
    store = tmp_path / "store"
    assert job.main([*arguments(dataset, store), "--dataset", "demo"]) == 0
    printed = capsys.readouterr().out
    assert str(dataset) in printed.splitlines()[1]  # the summary comes first
    assert "3 of 6 run(s) ingested" in printed
    assert "3 quarantined" in printed
    assert f"python jobs/pretrain.py --preset tiny --store {store}" in printed
    runs = [f"runs/demo/sub-{subject}/task-rest" for subject in "123"]
    assert FrameStore.open(store).runs() == runs
    assert read_manifest(store)["run"].to_pylist() == runs
    participants = read_participants(store)
    assert participants is not None
    assert participants.select(["dataset", "participant_id", "age"]).to_pylist() == [
        {"dataset": "demo", "participant_id": "sub-1", "age": 21.0},
        {"dataset": "demo", "participant_id": "sub-2", "age": None},
    ]
    reasons = {Path(row["source"]).name[:5]: row["reason"] for row in read_quarantine(store).to_pylist()}
    assert "is truncated" in reasons.pop("sub-4")
    assert "NaN" in reasons.pop("sub-5")
    assert "space-T1w" in reasons.pop("sub-6")
    assert not reasons

    before = bytes_of(store / "runs")
    assert job.main([*arguments(dataset, store), "--dataset", "demo"]) == 0
    assert "0 of 6 run(s) ingested" in capsys.readouterr().out
    assert bytes_of(store / "runs") == before

    affine = kit.affine_of("LAS", 7.5, SHAPE, (0.0, -18.0, 8.0))
    kit.save(dataset / NAME.format("4"), kit.phantom(SHAPE, affine, 8, 0.8), affine)
    (dataset / NAME.format("1")).touch()
    assert job.main([*arguments(dataset, store), "--dataset", "demo"]) == 0
    assert "1 of 6 run(s) ingested" in capsys.readouterr().out
    assert len(read_quarantine(store)) == 2
    assert read_manifest(store).num_rows == 4


def test_a_second_dataset_joins_the_store(tmp_path: Path, dataset: Path, kit: Any) -> None:
    """Participants of both, columns of both; the same subject label in two datasets stays two subjects."""
    other = tmp_path / "plain"
    affine = kit.affine_of("RAS", 7.5, SHAPE, (0.0, -18.0, 8.0))
    kit.save(other / "1.nii.gz", kit.phantom(SHAPE, affine, 9, 0.8), affine)
    (other / "participants.tsv").write_text("participant_id\tsite\n1\tLeipzig\n")
    store = tmp_path / "store"
    for source in (dataset, other):
        config = Config.model_validate({"ingest": {"source": source, "grid": "4mm"}, "data": {"store": store}})
        report = ingest(config)
    assert report.participants == 1
    assert [outcome.run for outcome in report.outcomes] == ["runs/plain/sub-1/run"]
    table = read_participants(store)
    assert table is not None
    rows = {(row["dataset"], row["participant_id"]): (row["age"], row["site"]) for row in table.to_pylist()}
    assert rows == {
        ("bids", "sub-1"): (21.0, None),
        ("bids", "sub-2"): (None, None),
        ("plain", "sub-1"): (None, "Leipzig"),
    }
    assert read_manifest(store).num_rows == 4


def test_the_exit_status(tmp_path: Path, kit: Any, job: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "a.nii.gz").write_bytes(b"")
    (broken / "b.nii").write_bytes(b"no image" * 100)
    assert job.main(arguments(broken, tmp_path / "store")) == 1
    caught = capsys.readouterr()
    assert "0 of 2 run(s) ingested" in caught.out
    assert "a.nii.gz: is an empty file" in caught.out
    assert "nothing was ingested" in caught.err
    assert job.main(["--store", str(tmp_path / "store"), "--grid", "4mm"]) == 2
    assert "--source DIR" in capsys.readouterr().err
    (tmp_path / "nothing").mkdir()
    assert job.main(arguments(tmp_path / "nothing", tmp_path / "store")) == 1
    assert "no run found" in capsys.readouterr().err
    assert job.main([*arguments(broken, tmp_path / "store"), "--ingest.tr_s", "1.5"]) == 1
    assert "TR (s) 0.8 instead of 1.5" in capsys.readouterr().err


def test_no_source_is_a_setting_to_correct(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"ingest\.source"):
        ingest(Config.model_validate({"data": {"store": tmp_path / "store"}}))


def test_more_cores_than_a_node_has_end_the_ingest_before_it_begins(tmp_path: Path, dataset: Path) -> None:
    settings = {"source": dataset, "grid": "4mm", "cpus_per_run": 64}
    config = Config.model_validate({"ingest": settings, "data": {"store": tmp_path / "store"}})
    with pytest.raises(ConfigError, match=r"asked for 1 task x \(0 GPU, 64 CPU\); .* use --ingest\.cpus_per_run 2"):
        ingest(config)
    assert not (tmp_path / "store").exists()


def test_a_dying_task_costs_its_own_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The process of one run is killed each time, as for want of memory; all others are answered, in several waves."""
    monkeypatch.setattr(spreading, "WAVE_RUNS", 3)
    monkeypatch.setattr(spreading, "WAVE_RUNS_PER_CORE", 0)
    sources = [Source(tmp_path / f"{n}.nii", "test", f"sub-{n}", "", "", "", "run", "plain") for n in range(5)]
    ledger = tmp_path / "ledger"

    def work(source: Source) -> RunOutcome:
        if source.subject == "sub-1":
            with ledger.open("a") as file:
                file.write("x")
            os.kill(os.getpid(), signal.SIGKILL)
        return RunOutcome(str(source.path), source.run, "ingested", frames=7)

    outcomes = {outcome.run: outcome for outcome in map_runs(sources, work, 1.0)}
    assert len(outcomes) == 5
    assert [outcomes[source.run].status == "ingested" for source in sources] == [True, False, True, True, True]
    assert "died 3 times" in outcomes[sources[1].run].reason
    assert ledger.read_text() == "xxx"
