"""A phantom that is a function of world mm and seconds, written as NIfTI on any grid, and a small store for it."""

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest

from neurostorm.ingest.convert import RECIPE
from neurostorm.ingest.discover import Source
from neurostorm.store import Grid, create_store

SMALL = Grid("small", (20, 24, 20), 8.0, (-76.0, -110.0, -70.0))
PERIOD_S = 20.0


def brain(points_mm: np.ndarray) -> np.ndarray:
    """Whether points (N, 3) lie in an ellipsoid the size of a brain."""
    return (((points_mm - (0, -18, 6)) / (66, 82, 60)) ** 2).sum(axis=1) < 1


def mean_of(points_mm: np.ndarray) -> np.ndarray:
    """A smooth mean image without any symmetry, (N,)."""
    x, y, z = points_mm.T
    return 1000 + 3 * x - 2 * y + 1.5 * z + 150 * np.sin(x / 25 + y / 40) + 100 * np.cos(z / 30 - x / 60)


def course_of(points_mm: np.ndarray, times_s: np.ndarray) -> np.ndarray:
    """A slow wave that travels from left to right, (T, N); amplitude 20."""
    return 20 * np.sin(2 * np.pi * times_s[:, None] / PERIOD_S + points_mm[:, 0] / 40)


def voxel_centres(shape: Iterable[int], affine: np.ndarray) -> np.ndarray:
    """World mm of every voxel, (N, 3), the array's first axis fastest."""
    index = np.indices(tuple(shape)).reshape(3, -1, order="F").T
    return index @ affine[:3, :3].T + affine[:3, 3]


def phantom(shape: tuple[int, int, int], affine: np.ndarray, frames: int, tr_s: float) -> np.ndarray:
    """The phantom on a grid, (X, Y, Z, T) float32."""
    points = voxel_centres(shape, affine)
    values = mean_of(points) + course_of(points, tr_s * np.arange(frames))
    return values.T.reshape(*shape, frames, order="F").astype(np.float32)


def save_nifti(
    path: Path,
    data: np.ndarray,
    affine: np.ndarray,
    *,
    tr_s: float = 0.8,
    units: tuple[str, str] = ("mm", "sec"),
    codes: tuple[int, int] = (4, 4),
    slope: float | None = None,
) -> Path:
    """Write an image; `tr_s` goes into the header as it is, whatever `units` says."""
    image = nibabel.Nifti1Image(data, affine)
    image.header.set_xyzt_units(*units)
    if data.ndim > 3:
        image.header["pixdim"][4] = tr_s
    image.set_sform(affine, codes[0])
    image.set_qform(affine, codes[1])
    if slope is not None:
        image.header.set_slope_inter(slope, 5.0)
    path.parent.mkdir(parents=True, exist_ok=True)
    nibabel.save(image, path)
    return path


def affine_of(axes: str, step_mm: float, shape: tuple[int, int, int], centre_mm: tuple[float, ...]) -> np.ndarray:
    """An affine by orientation code ("LAS", "AIL", ...), the array's middle at `centre_mm`."""
    affine = np.eye(4)
    affine[:3, :3] = 0
    for column, letter in enumerate(axes):
        row = next(row for row, pair in enumerate(("LR", "PA", "IS")) if letter in pair)
        affine[row, column] = step_mm * (1 if letter in "RAS" else -1)
    affine[:3, 3] = np.asarray(centre_mm) - affine[:3, :3] @ ((np.asarray(shape) - 1) / 2)
    return affine


@pytest.fixture(scope="session")
def kit() -> Any:
    """The helpers of this file, as one object (test modules cannot import a conftest)."""

    class Kit:
        small, period_s = SMALL, PERIOD_S
        brain, mean_of, course_of = staticmethod(brain), staticmethod(mean_of), staticmethod(course_of)
        voxel_centres, phantom = staticmethod(voxel_centres), staticmethod(phantom)
        save, affine_of = staticmethod(save_nifti), staticmethod(affine_of)

    return Kit


@pytest.fixture(scope="session")
def small_mask() -> np.ndarray:
    """The brain on the small grid, bool (X, Y, Z)."""
    index = np.argwhere(np.ones(SMALL.shape, bool))
    return brain(index * SMALL.voxel_mm + SMALL.origin_mm).reshape(SMALL.shape)


@pytest.fixture
def store(tmp_path: Path, small_mask: np.ndarray) -> Path:
    """An empty store on the small grid, TR .8 s."""
    path = tmp_path / "store"
    create_store(path, grid=SMALL, mask=small_mask, tr_s=0.8, recipe=RECIPE)
    return path


@pytest.fixture(scope="session")
def source_of() -> Callable[..., Source]:
    """Builds the Source of a file, as `discover` would."""

    def make(path: Path, **facts: Any) -> Source:
        known = {"dataset": "test", "subject": f"sub-{path.name.split('.')[0]}", "session": "", "task": "rest"}
        return Source(path, **(known | {"run_label": "", "stem": "task-rest", "format": "plain"} | facts))

    return make
