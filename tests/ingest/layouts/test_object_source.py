"""Source and store in an object store: found by one listing, ingested to the same bytes, and bad lines have an end."""

import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from neurostorm.config import Config, IngestConfig
from neurostorm.ingest.convert import RECIPE, attempt
from neurostorm.ingest.estimate import dry_run
from neurostorm.ingest.layouts.discover import Source, discover, read_participants, source_of
from neurostorm.ingest.survey import survey
from neurostorm.io.object_store import ObjectPath
from neurostorm.io.paths import AnyPath, copy_files, list_files, to_path
from neurostorm.store import FrameStore, create_store

SHAPE = (26, 32, 26)
NAME = "sub-{0}/func/sub-{0}_task-rest_space-MNI152NLin6Asym_desc-preproc_bold.nii.gz"
FIRST = NAME.format(1)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, kit: Any) -> Path:
    """BIDS derivatives with everything that a run may inherit: masks, sidecars, labels, a name."""
    root = tmp_path_factory.mktemp("source") / "bids"
    affine = kit.affine_of("LAS", 7.5, SHAPE, (0.0, -18.0, 8.0))
    for subject in range(1, 4):
        path = kit.save(root / NAME.format(subject), kit.phantom(SHAPE, affine, 8, 0.8) + subject, affine, tr_s=0.0)
        mask = path.with_name(path.name.replace("desc-preproc_bold", "desc-brain_mask"))
        kit.save(mask, np.ones(SHAPE, np.uint8), affine)
    (root / "task-rest_bold.json").write_text('{"RepetitionTime": 0.8}')
    (root / "dataset_description.json").write_text('{"Name": "far away"}')
    (root / "participants.tsv").write_text("participant_id\tage\n1\t30\n")
    return root


@pytest.fixture
def bucket(folder: Path, make_bucket: Callable[[], str]) -> ObjectPath:
    """The same files in a bucket, below `derivatives/bids`."""
    target = to_path(make_bucket()) / "derivatives" / "bids"
    assert isinstance(target, ObjectPath)
    copy_files(folder, target, [name for name, _ in list_files(folder)])
    return target


@pytest.fixture
def far_store(make_bucket: Callable[[], str], kit: Any, small_mask: np.ndarray) -> AnyPath:
    """An empty store in another bucket, on the small grid."""
    path = to_path(make_bucket()) / "store"
    create_store(path, grid=kit.small, mask=small_mask, tr_s=0.8, recipe=RECIPE)
    return path


def relative(source: Source, root: AnyPath) -> tuple[Any, ...]:
    """All that discovery found, with its places relative to the root."""
    places = (source.path, source.mask_path, source.participants, *source.sidecars)
    return source.run, source.format, source.refused, *(str(found).removeprefix(str(root)) for found in places)


def shards(store: AnyPath) -> dict[str, bytes]:
    """The frames of every run, as they lie."""
    return {name: (store / name).read_bytes() for name, _ in list_files(store) if name.endswith("/0.0")}


def test_a_bucket_is_discovered_like_a_folder(proxy: Any, folder: Path, bucket: ObjectPath) -> None:
    """By one listing and a few looks at the dataset's description, not by a request per file."""
    proxy.seen.clear()
    found = discover(bucket)
    assert len(proxy.seen) <= 8
    assert [relative(source, bucket) for source in found] == [relative(source, folder) for source in discover(folder)]
    first = found[0]
    assert first.run == "runs/far-away/sub-1/task-rest"
    assert first.participants is not None and first.mask_path is not None and first.sidecars
    assert read_participants(first.participants, "x")["participant_id"].to_pylist() == ["sub-1"]
    assert source_of(bucket / FIRST).mask_path == first.mask_path
    assert source_of(bucket / FIRST).sidecars == first.sidecars


def test_a_run_becomes_the_same_bytes_from_and_to_any_place(
    folder: Path, store: Path, bucket: ObjectPath, far_store: AnyPath
) -> None:
    for source in discover(folder):
        assert attempt(source, store).status == "ingested"
    found = discover(bucket)
    outcomes = [attempt(source, far_store) for source in found]
    assert [outcome.status for outcome in outcomes] == ["ingested"] * 3
    assert [outcome.size_bytes for outcome in outcomes] == [
        sum(size for name, size in list_files(far_store) if name.startswith(source.run)) for source in found
    ]
    assert shards(far_store) == shards(store)
    facts = FrameStore.open(far_store).run_attributes(found[0].run)
    assert facts["source"] == f"{bucket}/{FIRST}"
    settings = IngestConfig.model_validate({"source": str(bucket)})
    again = survey(settings, far_store)
    assert [outcome.status for outcome in again.known.values()] == ["complete"] * 3 and not again.waiting
    assert attempt(found[0], far_store).status == "complete"


def test_a_dry_run_fetches_headers_only(proxy: Any, bucket: ObjectPath, make_bucket: Callable[[], str]) -> None:
    target = f"{make_bucket()}/store"
    sections = {"ingest": {"source": str(bucket), "grid": "4mm"}, "data": {"store": target}}
    proxy.sent_bytes = 0
    found = dry_run(Config.model_validate(sections))
    assert proxy.sent_bytes < 3 * (1 << 16) + 50_000 < sum(size.file_bytes for _, size in found.waiting)
    assert len(found.waiting) == 3
    assert found.free_bytes is None
    assert found.files == 3 * 2 + 3 + 1
    assert not list(list_files(to_path(target)))


def test_an_object_that_is_gone_costs_its_own_run(bucket: ObjectPath, store: Path) -> None:
    first, second, _ = discover(bucket)
    assert isinstance(first.path, ObjectPath)
    first.path.unlink()
    outcome = attempt(first, store)
    assert (outcome.status, outcome.reason) == ("quarantined", "cannot be read: No such object")
    assert attempt(second, store).status == "ingested"


def test_trouble_that_passes_is_sat_out(proxy: Any, bucket: ObjectPath, store: Path) -> None:
    """The first answer to every request for the run is a refusal, the second breaks off in the middle."""
    (first, *_) = discover(bucket)
    times: dict[tuple[str, str], int] = {}

    def plan(method: str, key: str) -> str:
        if FIRST not in key:
            return ""
        times[method, key] = times.get((method, key), 0) + 1
        return "503" if times[method, key] == 1 else ""

    proxy.plan = plan
    assert attempt(first, store).status == "ingested"
    assert max(times.values()) > 1


@pytest.mark.parametrize("how", ["503", "stall"])
def test_trouble_that_stays_names_the_run_after_a_bounded_time(
    proxy: Any, bucket: ObjectPath, store: Path, how: str
) -> None:
    (first, second, _) = discover(bucket)
    proxy.plan = lambda method, key: how if FIRST in key and method == "GET" else ""
    outcome = attempt(first, store)
    assert outcome.status == "quarantined"
    assert outcome.reason.startswith("cannot be read: ")
    assert f"{bucket}/{FIRST}" in outcome.reason
    assert 1 < proxy.count("GET", FIRST) <= 60
    assert attempt(second, store).status == "ingested"


def test_a_store_that_refuses_is_not_the_files_fault(proxy: Any, folder: Path, far_store: AnyPath) -> None:
    source = discover(folder)[0]
    proxy.plan = lambda method, key: "503" if method in ("PUT", "POST") else ""
    outcome = attempt(source, far_store)
    assert outcome.status == "unwritten" and outcome.again
    assert str(far_store) in outcome.reason
    proxy.plan = lambda method, key: ""
    assert attempt(source, far_store).status == "ingested"


def test_a_process_killed_in_the_middle_of_an_upload_leaves_no_run(
    proxy: Any, folder: Path, far_store: AnyPath
) -> None:
    """Its put is never answered; the same run again, by another process, is whole."""
    source = discover(folder)[0]
    proxy.plan = lambda method, key: "swallow" if method in ("PUT", "POST") and "0.0" in key else ""
    script = (
        "import sys\n"
        "from pathlib import Path\n"
        "from neurostorm.ingest.convert import attempt\n"
        "from neurostorm.ingest.layouts.discover import discover\n"
        "from neurostorm.io.paths import to_path\n"
        "attempt(discover(Path(sys.argv[1]))[0], to_path(sys.argv[2]))\n"
    )
    process = subprocess.Popen([sys.executable, "-c", script, str(folder), str(far_store)])
    try:
        end_s = time.monotonic() + 60
        while not (proxy.count("PUT", "0.0") or proxy.count("POST", "0.0")):
            assert process.poll() is None and time.monotonic() < end_s
            time.sleep(0.02)
    finally:
        process.kill()
        process.wait()
    assert FrameStore.open(far_store).runs() == []
    proxy.plan = lambda method, key: ""
    assert attempt(source, far_store).status == "ingested"
    store = FrameStore.open(far_store, verify="always")
    assert store.runs() == [source.run]
    assert store.frames(source.run).shape == (8, store.voxel_count)
