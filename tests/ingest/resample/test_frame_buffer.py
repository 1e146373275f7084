"""The three ways to hold a run while it is read: each against plain matrix products, for every type of number."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from neurostorm.ingest.nifti import open_nifti, read_stored
from neurostorm.ingest.resample.frame_buffer import ResampledBuffer, SourceBuffer, VoxelBuffer, buffer_frames
from neurostorm.ingest.resample.standardize import SpatialPlan, Standardised, plan_spatial, plan_temporal, standardise
from neurostorm.store import INT8_16

KINDS = {
    VoxelBuffer: ("LPS", (22, 26, 22), 8.0, (-1, -18, 3)),  # centred so that voxels coincide with the small grid's
    SourceBuffer: ("LPS", (15, 17, 15), 12.0, (0.0, -18.0, 6.0)),
    ResampledBuffer: ("LPS", (36, 42, 36), 5.0, (0.0, -18.0, 6.0)),
}


def a_run(kit: Any, kind: type, frames: int = 21) -> tuple[np.ndarray, np.ndarray]:
    """A phantom run (X, Y, Z, T) float32 and its affine, such that it is held as `kind` on the small grid."""
    axes, shape, step_mm, centre_mm = KINDS[kind]
    if kind is VoxelBuffer:
        centre_mm = tuple(kit.small.origin_mm + kit.small.voxel_mm * (np.asarray(kit.small.shape) - 1) / 2)
    affine = kit.affine_of(axes, step_mm, shape, centre_mm)
    return kit.phantom(shape, affine, frames, 1.7), affine


def held_as(monkeypatch: pytest.MonkeyPatch) -> list[type]:
    """Records which kind of hold each run gets."""
    found: list[type] = []
    monkeypatch.setattr(
        "neurostorm.ingest.resample.standardize.buffer_frames",
        lambda *a: found.append(type(made := buffer_frames(*a))) or made,
    )
    return found


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("dtype", "slope", "intercept"), [("<f4", 1, 0), ("<i2", 1, 0), (">i2", 0.5, 7), ("u1", 8, 0), ("<f8", 1, 0)]
)
def test_every_hold_and_number_type_equals_matrix_products(
    kit: Any, small_mask: np.ndarray, monkeypatch: Any, kind: type, dtype: str, slope: float, intercept: float
) -> None:
    """Copied by index, packed from series or packed while reading: always the products of the two plans."""
    run, affine = a_run(kit, kind)
    stored = np.rint((run - intercept) / slope).astype(dtype) if dtype[-2] in "iu" else run.astype(dtype)
    values = stored.astype(np.float64) * slope + intercept
    spatial = plan_spatial(run.shape[:3], affine, kit.small.affine, small_mask)
    temporal = plan_temporal(21, 1.7, 0.8)
    found = held_as(monkeypatch)
    frames = (frame.ravel(order="F") for frame in np.moveaxis(stored, -1, 0))
    result = standardise(frames, 21, spatial, temporal, scaling=(slope, intercept))
    assert found == [
        SourceBuffer
        if (kind, dtype[-1]) in {(ResampledBuffer, "2"), (ResampledBuffer, "1")} and few(spatial, dtype)
        else kind
    ]
    packed = temporal.matrix @ (spatial.matrix @ values.reshape(-1, 21, order="F")).T.astype(np.float64)
    inside = spatial.inside
    np.testing.assert_allclose(result.mean[inside], packed.mean(axis=0)[inside], rtol=1e-5)
    np.testing.assert_allclose(result.std[inside], packed.std(axis=0)[inside], rtol=3e-4)
    assert not result.frames[:, ~inside].any() and not result.std[~inside].any()
    z = (packed - packed.mean(axis=0))[:, inside] / packed.std(axis=0)[inside]
    assert np.abs(INT8_16.decode(result.frames)[:, inside] - z).max() < 1 / 32 + 1e-3


def few(spatial: SpatialPlan, dtype: str) -> bool:
    """Whether the source voxels take less room in their own type than the packed ones in float32."""
    return len(np.unique(spatial.matrix.indices)) * np.dtype(dtype).itemsize <= 4 * len(spatial.inside)


@pytest.mark.parametrize("kind", KINDS)
def test_threads_change_no_byte(tmp_path: Path, kit: Any, small_mask: np.ndarray, monkeypatch: Any, kind: type) -> None:
    """Read ahead and worked on in blocks by three threads, or by one: equal to the last bit."""
    monkeypatch.setattr("neurostorm.ingest.resample.standardize._LEAST_BLOCK", 100)
    monkeypatch.setattr("neurostorm.ingest.resample.standardize._BLOCK_VALUES", 1)
    run, affine = a_run(kit, kind)
    header = open_nifti(kit.save(tmp_path / "run.nii.gz", run, affine, tr_s=1.7))
    spatial = plan_spatial(header.shape, affine, kit.small.affine, small_mask)
    assert len(spatial.inside) > 1000
    results = [
        standardise(read_stored(header, threads=threads), 21, spatial, plan_temporal(21, 1.7, 0.8), threads=threads)
        for threads in (1, 3)
    ]
    for name in Standardised.__dataclass_fields__:
        np.testing.assert_array_equal(*(getattr(result, name) for result in results), err_msg=name)
