"""A small store for the tests: a 6 x 7 x 8 box, an uneven mask, runs of random frames."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from neurostorm.store import Grid, create_store, quantise, run_path, write_run


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
            "frames": quantise(rng.standard_normal((frames, self.voxels))),
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
