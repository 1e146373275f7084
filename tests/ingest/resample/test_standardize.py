"""Resampling in space and time, z-scores and bytes: against numpy, scipy and analytic functions of the world."""

import itertools
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import ndimage
from scipy.spatial.transform import Rotation

from neurostorm.ingest.nifti import RunError, open_nifti, read_stored
from neurostorm.ingest.resample.standardize import SpatialPlan, plan_spatial, plan_temporal, standardise
from neurostorm.store import GRIDS, INT8_16

ORIENTATIONS = ["".join(axes[place] for place in order)
                for order in itertools.permutations(range(3))
                for axes in itertools.product("LR", "PA", "IS")]  # fmt: skip


def apply(plan: SpatialPlan, volume: np.ndarray) -> np.ndarray:
    return plan.matrix @ volume.ravel(order="F").astype(np.float32)


def flat_frames(run: np.ndarray) -> Any:
    """The frames of (X, Y, Z, T) as `read_frames` yields them."""
    return (frame.ravel(order="F") for frame in np.moveaxis(run, -1, 0).astype(np.float32))


def everywhere(shape: tuple[int, int, int]) -> np.ndarray:
    return np.ones(shape, bool)


@pytest.mark.parametrize("axes", ORIENTATIONS)
def test_every_orientation_is_an_exact_copy(kit: Any, small_mask: np.ndarray, axes: str) -> None:
    """All 48 storage orders of the same voxels land bit-exactly on the same packed voxels."""
    grid = kit.small
    rng = np.random.default_rng(0)
    world = rng.normal(size=grid.shape).astype(np.float32)
    order = [next(row for row, pair in enumerate(("LR", "PA", "IS")) if letter in pair) for letter in axes]
    stored = np.transpose(world, order)[tuple(slice(None, None, 1 if letter in "RAS" else -1) for letter in axes)]
    middle = np.asarray(grid.origin_mm) + grid.voxel_mm * (np.asarray(grid.shape) - 1) / 2
    affine = kit.affine_of(axes, grid.voxel_mm, stored.shape, middle)
    plan = plan_spatial(stored.shape, affine, grid.affine, small_mask)
    assert plan.kind == "copy"
    assert plan.inside.all()
    np.testing.assert_array_equal(apply(plan, stored), world[small_mask])


@settings(deadline=None, max_examples=30)
@given(st.tuples(*[st.integers(-9, 9)] * 3), st.tuples(*[st.integers(3, 30)] * 3))
def test_integer_crop_and_pad(shift: tuple[int, int, int], shape: tuple[int, int, int]) -> None:
    """A source on the grid's lattice: the voxels that both have are copied, the others are outside."""
    grid_shape = (10, 12, 11)
    source = np.random.default_rng(1).normal(size=shape).astype(np.float32)
    affine = np.diag([2.0, 2, 2, 1])
    affine[:3, 3] = 2.0 * np.asarray(shift)
    plan = plan_spatial(shape, affine, np.diag([2.0, 2, 2, 1]), everywhere(grid_shape))
    expected = np.full(grid_shape, np.nan, np.float32)
    for x, y, z in np.ndindex(grid_shape):
        index = (x - shift[0], y - shift[1], z - shift[2])
        if all(0 <= place < size for place, size in zip(index, shape, strict=True)):
            expected[x, y, z] = source[index]
    np.testing.assert_array_equal(plan.inside.reshape(grid_shape), ~np.isnan(expected))
    np.testing.assert_array_equal(apply(plan, source).reshape(grid_shape), np.nan_to_num(expected))


def test_fsl_grid_is_copied_onto_the_stores_2mm_grid() -> None:
    """91x109x91 LAS, as FSL and HCP have it, and its every second voxel onto 4 mm as a box average."""
    affine = np.diag([-2.0, 2, 2, 1])
    affine[:3, 3] = (90, -126, -72)
    volume = np.random.default_rng(0).normal(size=(91, 109, 91)).astype(np.float32)
    grid = GRIDS["2mm"]
    mask = np.zeros(grid.shape, bool)
    mask[10:70:7, 10:90:9, 8:80:7] = True
    plan = plan_spatial(volume.shape, affine, grid.affine, mask)
    places = np.argwhere(mask) * 2.0 + grid.origin_mm  # mm
    index = np.rint((places - (90, -126, -72)) / (-2, 2, 2)).astype(int)
    assert plan.kind == "copy"
    np.testing.assert_array_equal(apply(plan, volume), volume[tuple(index.T)])


@pytest.mark.parametrize(
    "shape_and_origin", [((97, 115, 97), (-96.5, -132.5, -78.5)), ((61, 73, 61), (-90, -126, -72))]
)
@pytest.mark.parametrize("name", ["2mm", "4mm"])
def test_trilinear_equals_scipy_and_the_world(
    kit: Any, shape_and_origin: tuple[tuple[int, int, int], tuple[float, ...]], name: str
) -> None:
    """2009cAsym at 2 mm (half a mm off the lattice) and 3 mm: the phantom's own values, and scipy's where linear."""
    shape, origin = shape_and_origin
    step = 2.0 if shape[0] == 97 else 3.0
    affine = np.diag([step] * 3 + [1.0])
    affine[:3, 3] = origin
    grid = GRIDS[name]
    points = np.argwhere(everywhere(grid.shape)) * grid.voxel_mm + grid.origin_mm
    mask = kit.brain(points).reshape(grid.shape)
    mask[::2] = False  # half of it is enough
    plan = plan_spatial(shape, affine, grid.affine, mask)
    volume = kit.mean_of(kit.voxel_centres(shape, affine)).reshape(shape, order="F").astype(np.float32)
    found = apply(plan, volume)
    assert plan.inside.all()
    truth = kit.mean_of(points[mask.ravel()])
    assert np.abs(found - truth).max() < (2.5 if name == "4mm" else 1.5)  # of 1000 +- 400: the curvature inside a voxel
    if step >= grid.voxel_mm:
        index = (points[mask.ravel()] - origin) / step
        expected = ndimage.map_coordinates(volume, index.T, order=1)
        np.testing.assert_allclose(found, expected, rtol=2e-6)


@pytest.mark.parametrize("step_mm", [1.7, 2.0, 2.6, 4.0, 7.0])
def test_an_oblique_source_keeps_linear_fields(small_mask: np.ndarray, kit: Any, step_mm: float) -> None:
    """Turned by 20 and 35 degrees, with uneven steps: whatever the kernel, a linear field stays what it is."""
    turn = Rotation.from_euler("xz", [20, 35], degrees=True).as_matrix()
    affine = np.eye(4)
    affine[:3, :3] = turn @ np.diag([step_mm, step_mm * 1.3, step_mm])
    shape = tuple(int(np.ceil(260 / np.linalg.norm(affine[:3, axis]))) for axis in range(3))
    affine[:3, 3] = np.array([0, -18, 6]) - affine[:3, :3] @ ((np.asarray(shape) - 1) / 2)

    def field(points: np.ndarray) -> np.ndarray:
        return points @ (1.0, -0.7, 0.4) + 500

    volume = field(kit.voxel_centres(shape, affine)).reshape(shape, order="F")
    plan = plan_spatial(shape, affine, kit.small.affine, small_mask)
    places = np.argwhere(small_mask) * kit.small.voxel_mm + kit.small.origin_mm
    assert plan.inside.all()
    np.testing.assert_allclose(apply(plan, volume), field(places), rtol=1e-5)


@pytest.mark.parametrize("ratio", [1.3, 2.0, 3.6])
def test_a_finer_source_is_averaged_not_sampled(ratio: float) -> None:
    """Each voxel is the mean of the trilinear interpolant over a box of sqrt(ratio^2 - 1) voxels (numerically)."""
    shape = (16, 16, 16)
    target = np.diag([ratio, ratio, ratio, 1])
    target[:3, 3] = 4.1
    plan = plan_spatial(shape, np.eye(4), target, everywhere((2, 2, 2)))
    assert plan.kind == "average"
    volume = np.random.default_rng(0).normal(size=shape)
    offsets = (np.arange(200) + 0.5) / 200 - 0.5
    for row, place in enumerate(np.ndindex(2, 2, 2)):
        expected = volume
        for index in place:
            points = 4.1 + ratio * index + np.sqrt(ratio**2 - 1) * offsets
            along_axis = np.stack([np.interp(points, np.arange(16), line).mean() for line in np.eye(16)])
            expected = np.tensordot(along_axis, expected, axes=(0, 0))
        assert apply(plan, volume)[row] == pytest.approx(expected, abs=2e-4)


def test_a_pattern_too_fine_for_the_target_vanishes() -> None:
    """A checkerboard at 2 mm, sampled at 8 mm, would be a constant 1; averaged it is next to nothing."""
    shape = (32, 32, 32)
    board = np.indices(shape).sum(axis=0) % 2 * 2.0 - 1
    coarse = np.diag([8.0, 8, 8, 1])
    coarse[:3, 3] = 8.0
    plan = plan_spatial(shape, np.diag([2.0, 2, 2, 1]), coarse, everywhere((6, 6, 6)))
    assert plan.inside.all()
    assert np.abs(apply(plan, board)).max() < 1e-4
    edge = plan_spatial(shape, np.diag([2.0, 2, 2, 1]), np.diag([8.0, 8, 8, 1]), everywhere((8, 8, 8)))
    assert not edge.inside.reshape(8, 8, 8)[0].any()  # the first box sticks out


def test_rows_are_means_or_empty(kit: Any, small_mask: np.ndarray) -> None:
    """Weights of a voxel in the field of view sum to one; a slab of a few slices leaves the rest empty."""
    affine = kit.affine_of("LAS", 5.0, (40, 45, 6), (0.0, -18.0, 10.0))
    plan = plan_spatial((40, 45, 6), affine, kit.small.affine, small_mask)
    sums = np.asarray(plan.matrix.sum(axis=1)).ravel()
    np.testing.assert_allclose(sums[plan.inside], 1, rtol=1e-6)
    assert not sums[~plan.inside].any()
    height = (np.argwhere(small_mask) * kit.small.voxel_mm + kit.small.origin_mm)[:, 2]
    np.testing.assert_array_equal(plan.inside, np.abs(height - 10) <= 12.5 - 2.5 * np.sqrt(1.6**2 - 1))


def test_zeros_around_a_brain_do_not_bleed_into_it() -> None:
    """A skull-stripped ball of ones stays one up to its rim; voxels with most of their weight outside are left out."""
    index = np.indices((20, 20, 20)).reshape(3, -1).T
    ball = (((index - 9.5) ** 2).sum(axis=1) < 60).reshape(20, 20, 20)
    target = np.diag([1.3, 1.3, 1.3, 1])
    plan = plan_spatial(ball.shape, np.eye(4), target, everywhere((14, 14, 14)))
    inner = plan.within(ball.ravel(order="F"))
    values = apply(inner, ball)
    np.testing.assert_allclose(values[inner.inside], 1, rtol=1e-6)
    np.testing.assert_array_equal(inner.inside, apply(plan, ball) > 0.5)
    assert apply(plan, ball)[inner.inside].min() < 0.6  # without it, the rim loses up to half of its signal


@settings(deadline=None, max_examples=60)
@given(st.integers(2, 60), st.floats(0.3, 3.5), st.floats(0.3, 3.5))
def test_a_ramp_in_time_stays_on_true_time(frames: int, source_tr_s: float, target_tr_s: float) -> None:
    """Frame n of the result is the signal at n * target TR, whether frames are interpolated or averaged."""
    try:
        plan = plan_temporal(frames, source_tr_s, target_tr_s)
    except RunError:
        assert (frames - 1) * source_tr_s < target_tr_s
        return
    ramp = plan.matrix @ (np.arange(frames) * source_tr_s).astype(np.float32)
    np.testing.assert_allclose(ramp, np.arange(plan.frames) * target_tr_s, atol=2e-5 * frames)
    last = (plan.frames - 1) * target_tr_s
    assert last <= (frames - 1) * source_tr_s * (1 + 1e-6) < last + target_tr_s * (1 + 1e-5)


@pytest.mark.parametrize(
    ("source_tr_s", "kind"), [(2.0, "linear"), (1.5, "linear"), (0.8, "copy"), (0.72, "average"), (0.2, "average")]
)
def test_a_sine_keeps_its_phase(source_tr_s: float, kind: str) -> None:
    frequency_hz, phase = 0.03, 0.7
    frames = int(240 / source_tr_s)
    plan = plan_temporal(frames, source_tr_s, 0.8)
    assert plan.kind == kind
    found = plan.matrix @ np.sin(2 * np.pi * frequency_hz * np.arange(frames) * source_tr_s + phase).astype(np.float32)
    times = 0.8 * np.arange(plan.frames)
    basis = np.exp(-2j * np.pi * frequency_hz * times)
    window = np.hanning(plan.frames)
    measured = np.angle((found * basis * window).sum()) + np.pi / 2
    assert measured == pytest.approx(phase, abs=2e-3)
    assert np.abs(found - np.sin(2 * np.pi * frequency_hz * times + phase)).max() < 0.025


def test_fast_signal_is_not_aliased_by_a_longer_tr() -> None:
    """1.2 Hz, sampled at .1 s, would fold to .05 Hz at .8 s: the average leaves a small part of it."""
    plan = plan_temporal(600, 0.1, 0.8)
    fast = np.sin(2 * np.pi * 1.2 * np.arange(600) * 0.1).astype(np.float32)
    assert np.abs((plan.matrix @ fast)[2:-2]).max() < 0.1
    assert np.abs(fast[::8]).max() > 0.9


def test_equal_times_within_rounding_are_copied() -> None:
    plan = plan_temporal(7, float(np.float32(0.8)), 0.8)
    assert plan.kind == "copy"
    np.testing.assert_array_equal(plan.matrix.toarray(), np.eye(7))


def identity_plan(voxels: int) -> SpatialPlan:
    return plan_spatial((voxels, 1, 1), np.eye(4), np.eye(4), everywhere((voxels, 1, 1)))


def test_bytes_and_moments_give_the_signal_back() -> None:
    rng = np.random.default_rng(0)
    run = rng.normal(size=(300, 1, 1, 80)) * rng.uniform(1, 50, (300, 1, 1, 1)) + rng.uniform(200, 9000, (300, 1, 1, 1))
    result = standardise(flat_frames(run), 80, identity_plan(300), plan_temporal(80, 0.8, 0.8))
    signal = run[:, 0, 0].T  # (T, V)
    np.testing.assert_allclose(result.mean, signal.mean(axis=0), rtol=1e-6)
    np.testing.assert_allclose(result.std, signal.std(axis=0), rtol=1e-4)
    restored = INT8_16.decode(result.frames) * result.std + result.mean
    assert (np.abs(restored - signal) / result.std).max() < 1 / 32 + 1e-3
    assert result.global_mean == pytest.approx(signal.mean(), rel=1e-6)
    assert result.global_std == pytest.approx(signal.std(), rel=1e-5)
    assert result.tsnr_median == pytest.approx(np.median(signal.mean(axis=0) / signal.std(axis=0)), rel=1e-4)
    assert result.coverage == 1
    assert 34 < result.quantisation_db < 36


def test_clipped_values_are_counted() -> None:
    """A spike of more than 8 standard deviations, in 1 of 2 voxels, in 1 of 200 frames."""
    run = np.random.default_rng(0).normal(1000, 1, (2, 1, 1, 200))
    run[1, 0, 0, 50] = 1100
    result = standardise(flat_frames(run), 200, identity_plan(2), plan_temporal(200, 0.8, 0.8))
    assert result.clipped_fraction == pytest.approx(1 / 400)
    assert result.frames[50, 1] == 127


def test_voxels_without_signal_have_zero_std() -> None:
    """NaN or infinity in a single frame, and constants (interpolated in time), take only their own voxel out."""
    run = np.random.default_rng(0).normal(1000, 10, (6, 1, 1, 30)).astype(np.float32)
    run[1, 0, 0, 7] = np.nan
    run[2, 0, 0, 0] = np.inf
    run[3] = 1234.567
    run[4] = 0
    result = standardise(flat_frames(run), 30, identity_plan(6), plan_temporal(30, 1.1, 0.8))
    dead = np.array([False, True, True, True, True, False])
    np.testing.assert_array_equal(result.std == 0, dead)
    assert not result.mean[dead].any()
    assert not result.frames[:, dead].any()
    assert result.coverage == pytest.approx(2 / 6)
    assert result.global_mean == pytest.approx(1000, abs=10)


@pytest.mark.parametrize(("value", "reason"), [(np.nan, "NaN or infinite"), (5.0, "is constant")])
def test_runs_without_any_signal_are_refused(value: float, reason: str) -> None:
    run = np.full((4, 1, 1, 10), value, np.float32)
    with pytest.raises(RunError, match=reason):
        standardise(flat_frames(run), 10, identity_plan(4), plan_temporal(10, 0.8, 0.8))


def test_the_figure_of_some_voxels_is_that_of_all(monkeypatch: pytest.MonkeyPatch) -> None:
    run = np.random.default_rng(0).normal(1000, 10, (4000, 1, 1, 120))
    results = []
    for voxels in (4000, 250):
        monkeypatch.setattr("neurostorm.ingest.resample.standardize._FIGURE_VOXELS", voxels)
        results.append(standardise(flat_frames(run), 120, identity_plan(4000), plan_temporal(120, 0.8, 0.8)))
    assert results[0].quantisation_db != results[1].quantisation_db
    assert results[0].quantisation_db == pytest.approx(results[1].quantisation_db, abs=0.1)


def test_a_wrong_number_of_frames_is_refused() -> None:
    run = np.random.default_rng(0).normal(1000, 10, (4, 1, 1, 9))
    for announced in (8, 10):
        with pytest.raises(ValueError, match="zip"):
            standardise(flat_frames(run), announced, identity_plan(4), plan_temporal(announced, 0.8, 0.8))


def test_plans_are_remembered_by_geometry_and_mask() -> None:
    wanted = everywhere((4, 4, 4))
    first = plan_spatial((4, 4, 4), np.eye(4), np.eye(4), wanted)
    assert plan_spatial((4, 4, 4), np.eye(4), np.eye(4), wanted.copy()) is first
    wanted[0, 0, 0] = False
    assert plan_spatial((4, 4, 4), np.eye(4), np.eye(4), wanted).matrix.shape[0] == 63
    assert plan_spatial((4, 4, 4), np.diag([2.0, 2, 2, 1]), np.eye(4), wanted).kind == "linear"


@pytest.mark.parametrize("step_mm", [3.0, 5.0])
def test_memory_stays_below_three_runs(tmp_path: Path, kit: Any, small_mask: np.ndarray, step_mm: float) -> None:
    """Peak of reading and standardising a compressed run, in units of the run as float32 (loading it whole is 1)."""
    shape = (int(180 / step_mm), int(216 / step_mm), int(180 / step_mm))
    affine = kit.affine_of("LAS", step_mm, shape, (0.0, -18.0, 18.0))
    run = np.random.default_rng(0).integers(900, 1100, (*shape, 60)).astype(np.int16)
    path = kit.save(tmp_path / "run.nii.gz", run, affine)
    size_bytes = run.size * 4
    del run
    grid = GRIDS["4mm"]
    points = np.argwhere(everywhere(grid.shape)) * grid.voxel_mm + grid.origin_mm
    mask = kit.brain(points).reshape(grid.shape)
    tracemalloc.start()
    try:
        header = open_nifti(path)
        spatial, temporal = plan_spatial(shape, affine, grid.affine, mask), plan_temporal(60, 0.72, 0.8)
        result = standardise(read_stored(header), 60, spatial, temporal)
        peak_bytes = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert result.coverage > 0.9
    assert peak_bytes < (0.8 if step_mm == 3.0 else 1.6) * size_bytes


def test_a_coarse_run_is_held_as_its_own_voxels() -> None:
    """4 mm brought to 2 mm: the peak stays below half of what the packed voxels would take in float32."""
    target = np.diag([2.0, 2, 2, 1])
    spatial = plan_spatial((20, 20, 20), np.diag([4.0, 4, 4, 1]), target, everywhere((38, 38, 38)))
    temporal = plan_temporal(300, 0.8, 0.8)
    rng = np.random.default_rng(0)
    frames = (rng.integers(900, 1100, 8000).astype(np.int16) for _ in range(300))
    tracemalloc.start()
    try:
        result = standardise(frames, 300, spatial, temporal)
        peak_bytes = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak_bytes < 0.5 * 4 * result.frames.size
