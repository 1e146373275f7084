"""A small store for the tests: a 6 x 7 x 8 box, an uneven mask, runs of random frames."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from neurostorm.store import INT8_16, Grid, create_store, run_path, write_run


@dataclass(frozen=True)
class Example:
    """A store on disk and what its runs are made of."""

    path: Path
    grid: Grid
    mask: NDArray[np.bool_]
    tr_s: float = 0.8

    @property
    def voxels(self) -> int:
        return int(self.mask.sum())

    @property
    def properties(self) -> dict[str, Any]:
        """Keyword arguments of `create_store`."""
        return {"grid": self.grid, "mask": self.mask, "tr_s": self.tr_s, "recipe": "voxel_z"}

    def arrays(self, frames: int = 25, seed: int = 0) -> dict[str, Any]:
        """Keyword arguments of `write_run`."""
        rng = np.random.default_rng(seed)
        return {
            "frames": INT8_16.encode(rng.standard_normal((frames, self.voxels))),
            "mean": rng.uniform(500, 1500, self.voxels).astype(np.float32),
            "std": rng.uniform(1, 20, self.voxels).astype(np.float32),
            "attributes": {
                "session": "1",
                "task": "rest",
                "run_label": "1",
                "entities": {"ses": "1", "task": "rest"},
                "source": f"raw/{seed}.nii.gz",
                "source_sha256": f"{seed:064x}",
                "source_tr_s": 2.0,
                "source_frames": frames,
                "tsnr_median": 60.0,
                "clipped_fraction": 0.0,
                "coverage": 1.0,
                "global_mean": 1000.0,
                "global_std": 250.0,
            },
        }

    def true_arrays(self, frames: int = 70, seed: int = 0) -> dict[str, Any]:
        """The same for a run that an ingest could have made: real z-scores, and figures that follow from the arrays.

        Voxels 0 to 4 lie outside its field of view; voxel 5 has a spike that is cut off.
        """
        rng = np.random.default_rng(seed)
        values = rng.normal(1000, 20, (frames, self.voxels)) + rng.uniform(-300, 300, self.voxels)
        values[3, 5] += 1e5
        values[:, :5] = 0
        mean, std = values.mean(axis=0), values.std(axis=0)
        inside = std > 0
        q = INT8_16.encode(np.divide(values - mean, std, out=np.zeros_like(values), where=inside))
        level, spread = mean[inside], std[inside]
        figures = {
            "source_frames": frames,
            "tsnr_median": float(np.median(level / spread)),
            "clipped_fraction": float((np.abs(q[:, inside]) == 127).mean()),
            "coverage": float(inside.mean()),
            "global_mean": float(level.mean()),
            "global_std": float(values[:, inside].std()),
        }
        arrays = {"frames": q, "mean": mean.astype(np.float32), "std": std.astype(np.float32)}
        return arrays | {"attributes": self.arrays(2, seed)["attributes"] | figures}

    def add_true(self, subject: str = "sub-01", dataset: str = "made", seed: int = 0, **options: Any) -> str:
        """`add` with `true_arrays`; long enough for the spike of voxel 5 to be cut off."""
        run = run_path(dataset, subject, "ses-1_task-rest")
        assert write_run(self.path, run, **(self.true_arrays(seed=seed) | options))
        return run

    def add(
        self, subject: str = "sub-01", dataset: str = "made", frames: int = 25, seed: int = 0, **options: Any
    ) -> str:
        run = run_path(dataset, subject, "ses-1_task-rest")
        assert write_run(self.path, run, **(self.arrays(frames, seed) | options))
        return run


@pytest.fixture
def make_example(tmp_path: Path) -> Callable[..., Example]:
    """Describes a store below `tmp_path` without making it."""

    def make(name: str = "store.zarr") -> Example:
        grid = Grid("box", (6, 7, 8), 4.0, (-10.0, -12.0, -14.0))
        mask = np.random.default_rng(7).random(grid.shape) < 0.3
        return Example(tmp_path / name, grid, mask)

    return make


@pytest.fixture
def example(make_example: Callable[..., Example]) -> Example:
    """An empty store."""
    made = make_example()
    create_store(made.path, **made.properties)
    return made
