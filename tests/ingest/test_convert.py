"""One run from file to store: it lands in the right place, keeps its signal, and every defect has its reason."""

import errno
import hashlib
import json
import os
import signal
import subprocess
import sys
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from neurostorm.ingest.convert import RECIPE, attempt, ingest_run
from neurostorm.ingest.layouts.discover import Source, discover
from neurostorm.ingest.nifti import RunError, open_nifti, read_frames
from neurostorm.ingest.resample.standardize import plan_spatial, plan_temporal
from neurostorm.ingest.resample.target import bring_to_target, check_size
from neurostorm.ingest.resample.template import brain_mask
from neurostorm.store import GRIDS, INT8_16, FrameStore, build_manifest, create_store, remove_partials
from neurostorm.synthetic.people import make_subject
from neurostorm.synthetic.render import render_run, write_bold, write_mask
from neurostorm.synthetic.sites import Site

ROOT = Path(__file__).resolve().parents[2]
FEEDS = ROOT.parent / "shared" / "data" / "feeds_bids"
SHAPE = (34, 40, 34)
MIDDLE = (0.0, -18.0, 6.0)


@pytest.fixture
def good(tmp_path: Path, kit: Any) -> Path:
    """A run of the phantom, 30 frames at 6 mm, LAS."""
    affine = kit.affine_of("LAS", 6.0, SHAPE, MIDDLE)
    return kit.save(tmp_path / "good.nii.gz", kit.phantom(SHAPE, affine, 30, 0.8), affine)


@pytest.fixture(scope="module")
def real_store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An empty 4 mm store with the template's mask."""
    path = tmp_path_factory.mktemp("real") / "store"
    create_store(path, grid=GRIDS["4mm"], mask=brain_mask(GRIDS["4mm"]), tr_s=0.8, recipe=RECIPE)
    return path


def content_of(store: Path) -> dict[str, str]:
    """sha256 of every file below a store."""
    return {
        file.relative_to(store).as_posix(): hashlib.sha256(file.read_bytes()).hexdigest()
        for file in sorted(store.rglob("*"))
        if file.is_file()
    }


@pytest.mark.parametrize(
    ("axes", "step_mm", "tr_s", "shape"),
    [
        ("RAS", 8.0, 0.8, (26, 30, 26)),
        ("LAS", 4.0, 0.8, (50, 60, 50)),
        ("RAS", 3.0, 0.72, (67, 78, 67)),
        ("AIL", 6.0, 2.0, (40, 34, 34)),
        ("PSR", 7.0, 1.3, (40, 34, 34)),
        ("SLA", 12.0, 0.4, (20, 20, 22)),
    ],
)
def test_any_grid_and_clock_lands_on_the_same_voxels_and_times(
    tmp_path: Path, kit: Any, store: Path, source_of: Callable[..., Source],
    axes: str, step_mm: float, tr_s: float, shape: tuple[int, int, int],
) -> None:  # fmt: skip
    """The stored mean and time courses are those of the phantom at the packed voxels' own millimetres and seconds."""
    affine = kit.affine_of(axes, step_mm, shape, MIDDLE)
    frames = int(24 / tr_s + 1e-9) + 1
    path = kit.save(tmp_path / "run.nii.gz", kit.phantom(shape, affine, frames, tr_s), affine, tr_s=tr_s)
    source = source_of(path)
    outcome = ingest_run(source, store)
    opened = FrameStore.open(store)
    mean, std = opened.moments(source.run)
    points = np.argwhere(opened.mask) * kit.small.voxel_mm + kit.small.origin_mm
    times = 0.8 * np.arange(outcome.frames)
    assert outcome.frames == int((frames - 1) * tr_s / 0.8 + 1e-9) + 1
    assert outcome.coverage == 1.0
    course = kit.course_of(points, times)
    assert np.abs(mean - kit.mean_of(points) - course.mean(axis=0)).max() < 10  # of +-400: curvature within a voxel
    restored = INT8_16.decode(opened.frames(source.run)) * std
    expected = course - course.mean(axis=0)
    correlation = (restored * expected).sum() / np.sqrt((restored**2).sum() * (expected**2).sum())
    assert correlation > 0.995
    assert outcome.quantisation_db > 32


def test_what_a_run_records(tmp_path: Path, good: Path, store: Path, source_of: Callable[..., Source]) -> None:
    source = source_of(good, session="1", run_label="2", entities={"sub": "good", "task": "rest"})
    outcome = ingest_run(source, store, chunk_frames=7, compression="zstd")
    facts = FrameStore.open(store).run_attributes(source.run)
    assert facts["source_sha256"] == hashlib.sha256(good.read_bytes()).hexdigest()
    assert (facts["source"], facts["source_frames"], facts["source_tr_s"]) == (str(good), 30, 0.8)
    assert (facts["resampling"], facts["resampling_time"], facts["recipe"]) == ("average", "copy", RECIPE)
    assert facts["entities"] == source.entities
    assert facts["quantisation_db"] == outcome.quantisation_db
    (row,) = build_manifest(store).to_pylist()
    assert None not in row.values()
    assert (row["session"], row["run_label"], row["task"], row["subject"]) == ("1", "2", "rest", "sub-good")
    files = [file for file in (store / source.run).rglob("*") if file.is_file()]
    assert outcome.size_bytes == sum(file.stat().st_size for file in files)


Break = Callable[[Path, Any], Path]


def unusable(data: Any = None, **options: Any) -> Break:
    """A file with other data, or other header entries, than the good one."""

    def make(path: Path, kit: Any) -> Path:
        affine = options.pop("affine", None)
        affine = kit.affine_of("LAS", 6.0, SHAPE, options.pop("middle", MIDDLE)) if affine is None else affine
        run = kit.phantom(SHAPE, affine, 6, 0.8)
        return kit.save(path, run if data is None else data(run), affine, **options)

    return make


def content(change: Callable[[bytes], bytes]) -> Break:
    """A file with other bytes than the good one."""

    def make(path: Path, kit: Any) -> Path:
        path.write_bytes(change(unusable()(path, kit).read_bytes()))
        return path

    return make


@pytest.mark.parametrize(
    ("broken", "reason"),
    [
        pytest.param(content(lambda raw: raw[: len(raw) * 2 // 3]), "is truncated: the data end in frame", id="cut"),
        pytest.param(content(lambda raw: b"nothing of the kind" * 50), "is not a NIfTI file", id="text"),
        pytest.param(content(lambda raw: b""), "is an empty file", id="empty"),
        pytest.param(unusable(lambda run: run * np.nan), "every voxel there is NaN", id="nan"),
        pytest.param(unusable(lambda run: run * 0 + 7), "is constant", id="constant"),
        pytest.param(unusable(lambda run: run[..., 0]), "one volume", id="3D"),
        pytest.param(unusable(lambda run: run[..., :1]), "one frame", id="one frame"),
        pytest.param(unusable(codes=(0, 0)), "no usable affine", id="no affine"),
        pytest.param(unusable(tr_s=0.0), "has no TR", id="no TR"),
        pytest.param(unusable(tr_s=800.0), "TR of 800 s .*milliseconds", id="absurd TR"),
        pytest.param(unusable(middle=(400.0, 0.0, 0.0)), "lies outside the grid: it covers 0.0%", id="elsewhere"),
        pytest.param(unusable(lambda run: run[..., :2], tr_s=0.3), "too short", id="too short"),
    ],
)
def test_every_defect_is_quarantined_with_its_reason(
    tmp_path: Path, kit: Any, store: Path, source_of: Callable[..., Source], broken: Break, reason: str
) -> None:
    source = source_of(broken(tmp_path / "broken.nii.gz", kit))
    with pytest.raises(RunError, match=reason):
        ingest_run(source, store)
    outcome = attempt(source, store)
    assert outcome.status == "quarantined"
    assert outcome.source == str(source.path)
    assert FrameStore.open(store).runs() == []
    assert not [file for file in store.glob(".partial/*") if file.exists()]


def test_defects_of_names_masks_and_sidecars(
    tmp_path: Path, kit: Any, good: Path, store: Path, source_of: Callable[..., Source]
) -> None:
    affine = kit.affine_of("LAS", 6.0, SHAPE, MIDDLE)
    ones = np.ones(SHAPE, np.uint8)
    corner = ones * 0
    corner[:3] = 1
    masks = {
        "empty": (ones * 0, "empty brain mask"),
        "cropped": (ones[2:], "of shape .* with the same affine"),
        "corner": (corner, "meets only 0.0%"),
    }
    for name, (data, reason) in masks.items():
        mask = kit.save(tmp_path / f"{name}.nii.gz", data, affine)
        with pytest.raises(RunError, match=reason):
            ingest_run(source_of(good, mask_path=mask), store)
    (tmp_path / "torn.nii.gz").write_bytes(b"\x1f\x8b\x08")
    with pytest.raises(RunError, match=r"brain mask, torn.nii.gz, that is a truncated"):
        ingest_run(source_of(good, mask_path=tmp_path / "torn.nii.gz"), store)
    (tmp_path / "bad.json").write_text("{")
    with pytest.raises(RunError, match="sidecar that cannot be read"):
        ingest_run(source_of(good, sidecars=(tmp_path / "bad.json",)), store)
    (tmp_path / "text.json").write_text('{"RepetitionTime": "2 s"}')
    with pytest.raises(RunError, match="no number of seconds"):
        ingest_run(source_of(good, sidecars=(tmp_path / "text.json",)), store)
    (tmp_path / "long.json").write_text(f'{{"RepetitionTime": {"9" * 401}}}')
    with pytest.raises(RunError, match="no number of seconds"):
        ingest_run(source_of(good, sidecars=(tmp_path / "long.json",)), store)
    (tmp_path / "deep.json").write_text("[" * 100_000)
    with pytest.raises(RunError, match="sidecar that cannot be read"):
        ingest_run(source_of(good, sidecars=(tmp_path / "deep.json",)), store)
    with pytest.raises(RunError, match="not in MNI space"):
        ingest_run(source_of(good, refused="is in space-T1w, not in MNI space"), store)
    assert FrameStore.open(store).runs() == []


def test_an_unexpected_error_costs_one_file(
    good: Path, store: Path, source_of: Callable[..., Source], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: object, **options: object) -> None:
        raise ZeroDivisionError("no such thing")

    monkeypatch.setattr("neurostorm.ingest.convert.bring_to_target", fail)
    outcome = attempt(source_of(good), store)
    assert (outcome.status, outcome.reason) == ("quarantined", "unexpected ZeroDivisionError: no such thing")


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES])
def test_a_store_that_cannot_be_written_is_not_the_files_fault(
    good: Path, store: Path, source_of: Callable[..., Source], monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    def fail(*args: object, **options: object) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr("neurostorm.ingest.convert.write_run", fail)
    outcome = attempt(source_of(good), store)
    assert outcome.status == "unwritten" and not outcome.again
    assert os.strerror(code) in outcome.reason
    monkeypatch.undo()
    monkeypatch.setattr(Path, "open", fail)
    outcome = attempt(source_of(good), store)
    assert (outcome.status, outcome.reason) == ("quarantined", f"cannot be read: {os.strerror(code)}")


@pytest.mark.parametrize(("more", "status"), [(b"", "complete"), (bytes(7), "changed")])
def test_who_comes_second_hears_whether_it_was_the_same_file(
    tmp_path: Path, good: Path, store: Path, source_of: Callable[..., Source], monkeypatch: pytest.MonkeyPatch,
    more: bytes, status: str,
) -> None:  # fmt: skip
    """Another ingest writes the run between our look at the store and our own write."""
    first = tmp_path / "first.nii.gz"
    first.write_bytes(good.read_bytes() + more)

    def meanwhile(*args: Any, **options: Any) -> Any:
        monkeypatch.undo()
        assert ingest_run(source_of(first, subject="sub-good"), store).status == "ingested"
        return bring_to_target(*args, **options)

    monkeypatch.setattr("neurostorm.ingest.convert.bring_to_target", meanwhile)
    assert attempt(source_of(good), store).status == status


@pytest.mark.parametrize(
    ("frames", "tr_s", "voxels", "reason"),
    [(5000, 20.0, 10, "would last 28 h"), (80_000, 0.8, 10**9, "needs about .* GB of memory as 80,001 frames")],
)
def test_a_run_of_impossible_size_is_refused(frames: int, tr_s: float, voxels: int, reason: str) -> None:
    with pytest.raises(RunError, match=reason):
        check_size(frames, tr_s, 0.8, voxels)
    check_size(5400, 0.8, 0.8, 230_000)  # 72 minutes at 2 mm


def test_the_nearest_sidecar_sets_the_time(
    tmp_path: Path, good: Path, store: Path, source_of: Callable[..., Source]
) -> None:
    sidecars = {"near": {"TaskName": "rest"}, "far": {"RepetitionTime": 1.6}, "farther": {"RepetitionTime": 9}}
    for name, facts in sidecars.items():
        (tmp_path / f"{name}.json").write_text(json.dumps(facts))
    source = source_of(good, sidecars=tuple(tmp_path / f"{name}.json" for name in sidecars))
    assert ingest_run(source, store).frames == 59  # 29 steps of 1.6 s, two frames each, and the first
    assert FrameStore.open(store).run_attributes(source.run)["source_tr_s"] == 1.6


def test_a_mask_on_another_grid_works_by_its_affine(
    tmp_path: Path, kit: Any, good: Path, store: Path, source_of: Callable[..., Source]
) -> None:
    """Only the right half of the brain, given as a RAS mask at 5 mm beside the LAS run at 6 mm."""
    shape = (40, 46, 40)
    affine = kit.affine_of("RAS", 5.0, shape, MIDDLE)
    right = (kit.voxel_centres(shape, affine)[:, 0] > 1).reshape(shape, order="F")
    mask = kit.save(tmp_path / "mask.nii.gz", right.astype(np.uint8), affine)
    source = source_of(good, mask_path=mask)
    outcome = ingest_run(source, store)
    opened = FrameStore.open(store)
    x_mm = (np.argwhere(opened.mask) * kit.small.voxel_mm + kit.small.origin_mm)[:, 0]
    inside = opened.moments(source.run)[1] > 0
    assert inside[x_mm > 8].all()
    assert not inside[x_mm < -8].any()
    assert outcome.coverage == pytest.approx(0.5, abs=0.06)


def test_a_second_start_changes_nothing(good: Path, store: Path, source_of: Callable[..., Source]) -> None:
    source = source_of(good)
    first = ingest_run(source, store)
    before = content_of(store)
    again = ingest_run(source, store)
    assert (first.status, again.status) == ("ingested", "complete")
    assert (again.frames, again.coverage) == (first.frames, first.coverage)
    os.utime(good)  # another time, the same bytes
    assert ingest_run(source, store).status == "complete"
    good.write_bytes(good.read_bytes() + b"\0")
    changed = ingest_run(source, store)
    assert changed.status == "changed"
    assert "was left, delete that folder" in changed.reason
    assert content_of(store) == before


def test_a_killed_run_leaves_nothing_that_is_seen(
    good: Path, store: Path, source_of: Callable[..., Source], small_mask: np.ndarray
) -> None:
    """SIGKILL after the last byte was written and before the rename: no run; the next start makes it whole."""
    script = (
        "import os, signal, sys\n"
        "from pathlib import Path\n"
        "from neurostorm.ingest import convert\n"
        "from neurostorm.ingest.layouts.discover import Source\n"
        "from neurostorm.store import writer\n"
        "writer._rename = lambda *paths: os.kill(os.getpid(), signal.SIGKILL)\n"
        "good, store = map(Path, sys.argv[1:])\n"
        "convert.ingest_run(Source(good, 'test', 'sub-good', '', 'rest', '', 'task-rest', 'plain'), store)\n"
    )
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    killed = subprocess.run([sys.executable, "-c", script, good, store], env=environment, timeout=120, check=False)
    assert killed.returncode == -signal.SIGKILL
    assert list(store.glob(".partial/*"))
    assert FrameStore.open(store).runs() == []
    assert build_manifest(store).num_rows == 0
    source = source_of(good)
    assert ingest_run(source, store).status == "ingested"
    assert FrameStore.open(store).frames(source.run).shape == (30, small_mask.sum())
    assert remove_partials(store) == 1
    assert FrameStore.open(store).runs() == [source.run]


def test_two_sites_of_one_subject_agree(tmp_path: Path, real_store: Path, source_of: Callable[..., Source]) -> None:
    """A 4 mm LAS and a 2 mm RAS scan of one synthetic subject: same voxels, and its mirror image does not pass."""
    subject = make_subject(0, 0)
    means = {}
    for site in (Site("las", 4.0, 0.8, orientation="LAS"), Site("ras", 2.0, 0.8, orientation="RAS")):
        run = render_run(subject, site, frames=16)
        path, mask = tmp_path / f"{site.name}.nii.gz", tmp_path / f"{site.name}_mask.nii.gz"
        write_bold(path, run)
        write_mask(mask, run)
        source = source_of(path, mask_path=mask)
        ingest_run(source, real_store)
        means[site.name] = FrameStore.open(real_store).moments(source.run)
    opened = FrameStore.open(real_store)
    seen = (means["las"][1] > 0) & (means["ras"][1] > 0)
    assert seen.mean() > 0.98

    def agreement(first: np.ndarray, second: np.ndarray) -> float:
        return float(np.corrcoef(first[seen], second[seen])[0, 1])

    las, ras = means["las"][0], means["ras"][0]
    assert agreement(las, ras) > 0.95
    mirrored = opened.unpack(las)[::-1][opened.mask]  # x of the grid is symmetric: -94 to 94 mm
    both = seen & (mirrored > 0)
    assert np.corrcoef(mirrored[both], ras[both])[0, 1] < 0.92


@pytest.mark.parametrize("step_mm", [3.0, 4.0, 6.0])
def test_memory_stays_below_three_runs(
    tmp_path: Path, kit: Any, real_store: Path, source_of: Callable[..., Source], step_mm: float
) -> None:
    """Peak of a whole ingest, writing included, in units of the run as float32; finer and coarser than the store."""
    shape = (int(186 / step_mm), int(222 / step_mm), int(186 / step_mm))
    affine = kit.affine_of("LAS", step_mm, shape, (0.0, -18.0, 12.0))
    run = np.random.default_rng(0).integers(900, 1100, (*shape, 80)).astype(np.int16)
    source = source_of(kit.save(tmp_path / f"memory{step_mm:g}.nii.gz", run, affine))
    size_bytes = run.size * 4
    del run
    FrameStore.open(real_store)
    tracemalloc.start()
    try:
        outcome = ingest_run(source, real_store)
        peak_bytes = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert outcome.coverage > 0.9
    assert peak_bytes < 3 * size_bytes


@pytest.mark.skipif(not FEEDS.is_dir(), reason=f"the real run is not at {FEEDS}")
def test_a_real_run_keeps_32_db(real_store: Path) -> None:
    """FEEDS: stored frames against the resampled float data, median over voxels of the temporal signal to noise."""
    (source,) = discover(FEEDS)
    outcome = ingest_run(source, real_store)
    opened = FrameStore.open(real_store)
    header = open_nifti(source.path)
    spatial = plan_spatial(header.shape, header.affine, opened.grid.affine, opened.mask)
    temporal = plan_temporal(header.frames, 3.0, opened.tr_s)
    packed = temporal.matrix @ np.stack([spatial.matrix @ frame for frame in read_frames(header)])
    mean, std = opened.moments(source.run)
    inside = (std > 0) & np.isclose(mean, packed.mean(axis=0), rtol=1e-5)  # the mask changes the weights at the rim
    assert inside.sum() > 0.8 * (std > 0).sum()
    restored = INT8_16.decode(opened.frames(source.run)) * std + mean
    noise = (packed - restored)[:, inside].var(axis=0, dtype=np.float64)
    decibels = 10 * np.log10(packed[:, inside].var(axis=0, dtype=np.float64) / noise)
    assert np.median(decibels) >= 32
    assert outcome.quantisation_db == pytest.approx(np.median(decibels), abs=0.2)
    assert outcome.coverage > 0.6
