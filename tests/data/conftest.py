"""A store in which every axis, voxel, run and person differs, so that mixing up any two of them shows."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from neurostorm.data.clips import ClipReader
from neurostorm.data.plan.clip_plan import ROW
from neurostorm.store import (
    INT8_16,
    FrameStore,
    Grid,
    create_store,
    read_manifest,
    run_path,
    write_manifest,
    write_run,
)
from neurostorm.store.run_index import RunIndex

SHAPE = (12, 24, 36)
CHUNK_FRAMES = 4
# dataset, subject, session, frames: two runs of each person, and a namesake in another study
PEOPLE = [("made", f"sub-{person}", session, 26 + 3 * person + session) for person in range(4) for session in (1, 2)]
PEOPLE += [("other", "sub-0", 1, 25)]


@dataclass(frozen=True)
class Uneven:
    """The store on disk and, by run, what was written: frames (T, V) int8; mean, std (V); global mean and std."""

    path: Path
    mask: NDArray[np.bool_]
    frames: dict[str, NDArray[np.int8]]
    mean: dict[str, NDArray[np.float32]]
    std: dict[str, NDArray[np.float32]]
    overall: dict[str, tuple[float, float]]

    @property
    def runs(self) -> tuple[str, ...]:
        return tuple(sorted(self.frames))

    def reader(self, clip_frames: int = 6, normalise: str = "voxel", path: Path | None = None) -> ClipReader:
        runs = RunIndex(read_manifest(self.path), moments=normalise == "global")
        return ClipReader(FrameStore.open(path or self.path), runs, clip_frames, normalise)


@pytest.fixture(scope="session")
def uneven(tmp_path_factory: pytest.TempPathFactory) -> Uneven:
    """The store: nine runs of five people, random mask, a tenth of the voxels outside each run's field of view."""
    rng = np.random.default_rng(11)
    mask = rng.random(SHAPE) < 0.3
    mask[:6, :6, :6] = False  # one patch without any brain
    made = Uneven(tmp_path_factory.mktemp("uneven") / "uneven.zarr", mask, {}, {}, {}, {})
    create_store(made.path, grid=Grid("uneven", SHAPE, 4.0, (0.0, 0.0, 0.0)), mask=mask, tr_s=0.8, recipe="test")
    for number, (dataset, subject, session, length) in enumerate(PEOPLE):
        run = run_path(dataset, subject, f"ses-{session}_task-rest")
        frames = INT8_16.encode(rng.standard_normal((length, mask.sum())))
        frames[frames == 0] = 1
        outside = rng.random(mask.sum()) < 0.1
        frames[:, outside] = 0
        made.frames[run], made.overall[run] = frames, (900.0 + number, 200.0 + 10 * number)
        made.mean[run] = np.where(outside, 0, rng.uniform(500, 1500, mask.sum())).astype(np.float32)
        made.std[run] = np.where(outside, 0, rng.uniform(1, 20, mask.sum())).astype(np.float32)
        write_run(
            made.path, run, frames=frames, mean=made.mean[run], std=made.std[run], chunk_frames=CHUNK_FRAMES,
            attributes={
                "session": str(session), "task": "rest", "run_label": "", "entities": {}, "source": f"{number}.nii",
                "source_sha256": f"{number:064x}", "source_tr_s": 0.8, "source_frames": length, "tsnr_median": 50.0,
                "clipped_fraction": 0.0, "coverage": 0.9, "global_mean": made.overall[run][0],
                "global_std": made.overall[run][1],
            },
        )  # fmt: skip
    write_manifest(made.path)
    return made


@pytest.fixture(scope="session")
def rows_of() -> Callable[[Iterable[tuple[int, int]]], NDArray[Any]]:
    """Plan rows of (run, start) pairs, at places 100, 101, ... of the stream."""

    def make(places: Iterable[tuple[int, int]]) -> NDArray[Any]:
        return np.array([(100 + nth, run, start) for nth, (run, start) in enumerate(places)], ROW)

    return make
