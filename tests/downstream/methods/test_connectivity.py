"""Region series of a store, and the matrices that are made of them."""

import json
import shutil
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest
from nilearn.connectome import ConnectivityMeasure

from neurostorm.downstream.methods import connectivity as module
from neurostorm.downstream.methods.connectivity import (
    Kind,
    build_parcels,
    fit_connectivity,
    region_series,
    series_cached,
    upper,
)
from neurostorm.downstream.methods.parcels import Parcels, parcels_from_mask
from neurostorm.io.paths import to_path
from neurostorm.store import INT8_16, FrameStore, StoreError, create_store, run_path, write_run

REGIONS = 6


def some_series(count: int = 8, regions: int = REGIONS, seed: int = 0) -> list[np.ndarray]:
    """Runs of different lengths whose regions share signal."""
    rng = np.random.default_rng(seed)
    mixing = np.eye(regions) + 0.3 * rng.standard_normal((regions, regions))
    return [(rng.standard_normal((40 + 5 * n, regions)) @ mixing + 3).astype(np.float32) for n in range(count)]


def connectivity(series: list[np.ndarray], kind: Kind) -> np.ndarray:
    """Of the kinds that are fitted on nothing."""
    return fit_connectivity(series, kind).transform(series)


def test_correlation_is_pearsons_as_fishers_z() -> None:
    series = some_series()
    matrices = connectivity(series, "correlation")
    assert matrices.dtype == np.float32 and matrices.shape == (8, REGIONS, REGIONS)
    for values, matrix in zip(series, matrices, strict=True):
        r = np.corrcoef(values.T)
        np.fill_diagonal(r, 0)
        np.testing.assert_allclose(matrix, np.arctanh(r), rtol=2e-5, atol=1e-6)


@pytest.mark.parametrize("kind", ["partial correlation", "tangent"])
def test_the_other_kinds_are_nilearns(kind: Any) -> None:
    train, test = some_series(8), some_series(3, seed=1)
    found = fit_connectivity(train, kind).transform(test)
    scaled = [[(values - values.mean(0)) / values.std(0) for values in part] for part in (train, test)]
    expected = np.array(ConnectivityMeasure(kind=kind, standardize=False).fit(scaled[0]).transform(scaled[1]))
    if kind != "tangent":
        for matrix in expected:
            np.fill_diagonal(matrix, 0)
        expected = np.arctanh(expected)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


def test_tangent_knows_the_training_runs_alone() -> None:
    train, test, other = some_series(6), some_series(2, seed=1), some_series(6, seed=2)
    fitted = fit_connectivity(train, "tangent")
    alone = np.concatenate([fitted.transform([values]) for values in test])
    np.testing.assert_array_equal(fitted.transform(test), alone)  # what else is transformed does not matter
    assert np.abs(fit_connectivity(other, "tangent").transform(test) - alone).max() > 0.01
    assert np.abs(fitted.transform(train).mean(0)).max() < 1e-5  # the tangent space is that at the training runs' mean


@pytest.mark.parametrize("kind", ["correlation", "partial correlation"])
def test_what_is_fitted_does_not_matter_to_the_others(kind: Any) -> None:
    test = some_series(3, seed=1)
    np.testing.assert_array_equal(fit_connectivity(some_series(), kind).transform(test), connectivity(test, kind))


def test_many_runs_are_the_runs_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    series = some_series(8)
    whole = connectivity(series, "correlation")
    monkeypatch.setattr(module, "_RUNS_AT_ONCE", 3)
    np.testing.assert_array_equal(connectivity(series, "correlation"), whole)


@pytest.mark.parametrize("kind", ["correlation", "partial correlation", "tangent"])
def test_a_region_without_signal_is_connected_to_nothing(kind: Any) -> None:
    series = [values.astype(np.float64) for values in some_series(4)]
    series[1][:, 2] = 0
    series[2][:, 4] = 0.3
    series[2][::2, 4] = 0.1 + 0.2  # varies by a rounding error
    matrices = fit_connectivity(series, kind).transform(series)
    assert np.isfinite(matrices).all()
    if kind != "tangent":
        assert np.abs(matrices[1, 2]).max() < 1e-6 and np.abs(matrices[2, 4]).max() < 1e-6
        assert np.abs(matrices[0, 2]).max() > 0.05


def test_regions_with_one_signal_stay_finite() -> None:
    (values,) = some_series(1)
    values[:, 1], values[:, 3] = values[:, 0], -values[:, 0]
    matrix = connectivity([values], "correlation")[0]
    assert 7 < matrix[0, 1] < 8 and -8 < matrix[0, 3] < -7 and np.array_equal(matrix, matrix.T)


@pytest.mark.parametrize(
    ("series", "message"),
    [
        ([], "no runs"),
        ([np.zeros((9, 4)), np.zeros((9, 5))], r"series 1 has shape \(9, 5\): \(T, 4\)"),
        ([np.zeros((1, 4))], "series 0 .* T [23] or more"),
        ([np.zeros(4)], "series 0"),
        ([np.ones((9, 4)), np.full((9, 4), np.nan)], "series 1 .* not finite"),
    ],
)
def test_series_that_do_not_fit_are_refused_by_number(series: list[np.ndarray], message: str) -> None:
    for kind in ("correlation", "partial correlation", "tangent"):
        with pytest.raises(ValueError, match=message):
            fit_connectivity(series, kind)
    with pytest.raises(ValueError, match=message):
        fit_connectivity(some_series(3, 4), "correlation").transform(series)


@pytest.mark.parametrize("kind", ["partial correlation", "tangent"])
def test_what_is_inverted_needs_three_frames(kind: Any) -> None:
    short = [values[:3] for values in some_series(4)]
    assert np.isfinite(fit_connectivity(short, kind).transform(short)).all()
    with pytest.raises(ValueError, match=r"series 1 .* T 3 or more"):
        fit_connectivity([short[0], short[1][:2]], kind)


def test_an_unknown_kind_is_refused_with_the_known() -> None:
    with pytest.raises(ValueError, match="'covariance': one of correlation, partial correlation, tangent"):
        fit_connectivity(some_series(), "covariance")  # type: ignore[arg-type]


def test_upper_holds_each_edge_once() -> None:
    matrices = np.random.default_rng(0).standard_normal((3, 5, 5)).astype(np.float32)
    edges = upper(matrices)
    assert edges.dtype == np.float32
    assert edges.tolist() == [
        [m[i, j] for i in range(5) for j in range(i + 1, 5)]
        for m in matrices.tolist()
        for m in [np.array(m, np.float32)]
    ]


def test_a_runs_series_are_its_regions_means(ball_store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = FrameStore.open(ball_store)
    parcels = build_parcels(8, store)
    run = store.runs()[2]
    z = INT8_16.decode(store.frames(run))
    expected = np.stack([z[:, parcels.labels == number].mean(1) for number in range(1, 9)], 1)
    for block_bytes in (1 << 25, 5 * store.voxel_count):  # in one piece, and in blocks of 5 of the 48 frames
        monkeypatch.setattr(module, "_BLOCK_BYTES", block_bytes)
        series = region_series(store, run, parcels)
        assert series.shape == (48, 8) and series.dtype == np.float32
        np.testing.assert_allclose(series, expected, atol=1e-5)


def test_voxels_outside_a_runs_field_of_view_do_not_count(tmp_path: Path, ball_store: Path) -> None:
    opened = FrameStore.open(ball_store)
    create_store(tmp_path / "s", grid=opened.grid, mask=opened.mask, tr_s=0.8, recipe="test")
    parcels = parcels_from_mask(opened.grid, opened.mask, 4)
    outside = parcels.labels == 2
    outside[np.flatnonzero(parcels.labels == 1)[::2]] = True
    frames = np.full((12, opened.voxel_count), 16, np.int8)
    frames[::2] = -16
    frames[:, outside] = 0
    std = np.where(outside, 0, 1).astype(np.float32)
    run = run_path("d", "sub-1", "task-rest")
    write_run(tmp_path / "s", run, frames=frames, mean=std, std=std, attributes={"source_sha256": "a"})
    series = region_series(FrameStore.open(tmp_path / "s"), run, parcels)
    assert series.tolist() == [[-1, 0, -1, -1], [1, 0, 1, 1]] * 6


def test_kept_series_are_the_same_bits(ball_store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store, folder = FrameStore.open(ball_store), tmp_path / "new" / "cache"
    runs, parcels = store.runs()[:3], parcels_from_mask(store.grid, store.mask, 5)
    first = series_cached(store, runs, parcels, folder)
    assert len(list(folder.iterdir())) == 3
    for run, values in zip(runs, first, strict=True):
        assert np.array_equal(values, region_series(store, run, parcels))

    def unexpected(*_: object) -> np.ndarray:
        raise AssertionError("read again")

    with monkeypatch.context() as patched:
        patched.setattr(module, "region_series", unexpected)
        again = series_cached(store, runs[::-1], parcels, folder)
        others = Parcels(6 - parcels.labels, parcels.names)
        with pytest.raises(AssertionError, match="read again"):  # as many regions, but others
            series_cached(store, runs, others, folder)
    for values, kept in zip(first[::-1], again, strict=True):
        assert kept.dtype == np.float32 and kept.tobytes() == values.tobytes()


def test_a_damaged_file_and_a_run_ingested_anew_are_made_again(ball_store: Path, tmp_path: Path) -> None:
    path = tmp_path / "store"
    shutil.copytree(ball_store, path)
    store = FrameStore.open(path)
    runs, parcels = store.runs()[:1], parcels_from_mask(store.grid, store.mask, 5)
    (expected,) = series_cached(store, runs, parcels, tmp_path / "cache")
    (file,) = (tmp_path / "cache").iterdir()
    whole = file.read_bytes()
    for damage in (whole[:-4], b"", b"not an array", whole[:20]):
        file.write_bytes(damage)
        (found,) = series_cached(store, runs, parcels, tmp_path / "cache")
        assert np.array_equal(found, expected) and file.read_bytes() == whole
    metadata = path / runs[0] / "zarr.json"
    tree = json.loads(metadata.read_text())
    tree["attributes"]["source_sha256"] = "another"
    metadata.write_text(json.dumps(tree))
    series_cached(FrameStore.open(path), runs, parcels, tmp_path / "cache")
    assert len(list((tmp_path / "cache").iterdir())) == 2


def test_series_are_kept_in_an_object_store_too(ball_store: Path, make_bucket: Any) -> None:
    store, folder = FrameStore.open(ball_store), to_path(f"{make_bucket()}/cache")
    runs, parcels = store.runs()[:2], parcels_from_mask(store.grid, store.mask, 5)
    first, second = (series_cached(store, runs, parcels, folder) for _ in range(2))
    assert all(a.tobytes() == b.tobytes() for a, b in zip(first, second, strict=True))


def test_an_absent_run_and_regions_of_another_mask_are_refused(ball_store: Path, tmp_path: Path) -> None:
    store = FrameStore.open(ball_store)
    with pytest.raises(StoreError, match="has no run"):
        series_cached(store, ["runs/balls/sub-9/task-rest"], build_parcels(4, store), tmp_path)
    with pytest.raises(ValueError, match="V the same"):
        region_series(store, store.runs()[0], Parcels(np.ones(7, np.int32), ("a",)))


def test_parcels_come_from_a_file_or_a_number(ball_store: Path, tmp_path: Path) -> None:
    store = FrameStore.open(ball_store)
    labels = np.random.default_rng(0).integers(1, 4, store.grid.shape).astype(np.int16)
    nibabel.save(nibabel.Nifti1Image(labels, store.grid.affine), tmp_path / "atlas.nii.gz")
    assert np.array_equal(build_parcels(tmp_path / "atlas.nii.gz", store).labels, labels[store.mask])
    assert len(build_parcels(7, store)) == 7
