"""Where everything in a frame store lies: the format's number, its grids, its names.

    store.zarr/
      zarr.json                                 format, grid, TR, mask hash, frame codec, recipe (root attributes)
      mask/                                     uint8 (X, Y, Z), 1 inside the brain
      runs/<dataset>/<subject>/<entities>/      one run, an array int8 (T + 8, V): zarr.json with its attributes, and
        0.0                                     T frames (z-scores, see `codec.py`), then its mean and std
      manifest.parquet participants.parquet quarantine.parquet withdrawn.parquet

A run's zarr.json comes last and is put there in one step: a run that has one is whole (`shard.py` says what its bytes
are). mean and std are in the source's units; std 0 means outside this run's field of view.

V counts the mask's voxels, in the C order of the (X, Y, Z) box. Everything that reads or writes a store takes its
names, shapes and errors from here; nothing here touches a file.
"""

import hashlib
import re
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from neurostorm.io.errors import UserError

FORMAT = 2
RECIPE_VERSION = 1
SPACE = "MNI152NLin6Asym"
MASK, RUNS, METADATA = "mask", "runs", "zarr.json"
PARTIAL = ".partial"
MANIFEST, PARTICIPANTS = "manifest.parquet", "participants.parquet"
QUARANTINE, WITHDRAWN = "quarantine.parquet", "withdrawn.parquet"

_STEP = r"[A-Za-z0-9_+-][A-Za-z0-9._+-]*"
_SAFE = re.compile(_STEP)


RUN_PATTERN = rf"\A{RUNS}(?:/{_STEP}){{3}}\z"  # all that `split_run` takes, in the words of Arrow's regular expressions


class StoreError(UserError, RuntimeError):
    """A store, or something asked of it, is not as it should be; the message names the place and the fix."""


class MissingRunError(StoreError):
    """A store has no such run, or has it no longer."""


class FrameRangeError(StoreError, IndexError):
    """Frames were asked for that the run does not have."""


class StoreUnavailableError(StoreError):
    """The storage of a store does not answer, or refuses access now; its data may be whole."""

    retry = True


class ClipReadError(StoreError):
    """A clip could not be read: missing chunk, failed checksum, unreadable file.

    Attributes:
        run: the run's path inside the store.
        start: first frame that was asked for.
        reason: what went wrong, in words.
    """

    def __init__(self, run: str, start: int, reason: str) -> None:
        super().__init__(run, start, reason)  # all three, so that the error survives pickling between processes
        self.run, self.start, self.reason = run, start, reason

    def __str__(self) -> str:
        return f"{self.run}, clip from frame {self.start}: {self.reason}"


@dataclass(frozen=True)
class Grid:
    """A box of isotropic voxels along the axes of MNI space (RAS+: x to the right, y to the front, z up).

    Attributes:
        name: key in `GRIDS`, or any name for a grid of one's own.
        shape: voxels along X, Y, Z.
        voxel_mm: edge of a voxel.
        origin_mm: centre of voxel (0, 0, 0).
    """

    name: str
    shape: tuple[int, int, int]
    voxel_mm: float
    origin_mm: tuple[float, float, float]

    @property
    def affine(self) -> NDArray[np.float64]:
        """(4, 4) float64: voxel index -> mm."""
        affine = np.diag([self.voxel_mm] * 3 + [1.0])
        affine[:3, 3] = self.origin_mm
        return affine

    def describe(self) -> dict[str, Any]:
        """The grid as it stands in the store's attributes (JSON values only)."""
        return {
            "name": self.name,
            "shape": [int(n) for n in self.shape],
            "voxel_mm": float(self.voxel_mm),
            "affine": self.affine.tolist(),
        }

    @classmethod
    def from_attributes(cls, attributes: dict[str, Any]) -> "Grid":
        """The inverse of `describe`. Raises KeyError, TypeError or ValueError for anything that is not one."""
        x, y, z = (int(n) for n in attributes["shape"])
        origin = np.asarray(attributes["affine"], np.float64)[:3, 3]
        grid = cls(str(attributes["name"]), (x, y, z), float(attributes["voxel_mm"]), tuple(origin.tolist()))
        if not np.allclose(grid.affine, attributes["affine"]):
            raise ValueError(f"the affine {attributes['affine']} is not that of an upright {grid.voxel_mm:g} mm grid")
        return grid


# Every grid keeps to the voxel centres of the FSL/HCP grids (x = -90 + 2i, y = -126 + 2j, z = -72 + 2k; every second
# one at 4 mm), so a run on those is copied by integer crop and pad. Attention windows start at index 0 and are 24
# voxels wide (4 patches of 6), so where the brain lies in the box decides how many windows, and how many patches,
# hold any of it. All integer offsets that keep the ICBM152 brain mask inside the box were measured, and the one taken
# with the fewest windows, among those the fewest patches, among those the most central:
#
#   grid       windows with brain   patches with brain       brain in the box (first-last)   offset from the FSL grid
#   2mm        41 of 64  (64.1 %)   1,470 of 4,096 (35.9 %)  x 0-72, y 4-93, z 1-78          -9, -6, +1
#   4mm         8 of 8  (100.0 %)     228 of 512   (44.5 %)  x 6-41, y 2-46, z 2-40          +1, -3, +2
#   reference  53 of 64  (82.8 %)   1,476 of 4,096 (36.0 %)  x 11-83, y 4-93, z 3-80         +2, -6, +3
#
# At 2 mm the brain centred in the box touches 56 windows, the worst offset 58. The left-right mirror image of the
# offset (+14 in x) ties exactly. The nine planes of the FSL grid that fall off at the low x hold no brain. The table is
# for nilearn's mask of 235,375 voxels; one of 229,137, a layer of fluid thinner, fills 40 windows and 1,439 patches
# here, and 39 at best of all offsets that keep the wider one inside.
#
# `reference` is what the released code makes of an FSL/HCP file: it pads x and z from 91 to 96, the larger half at
# the low index, and crops y from 109 to 96 about its centre, all in the order of the file's array. Those files run from
# right to left, so along our x, left to right, the larger half comes last.
GRIDS: dict[str, Grid] = {
    grid.name: grid
    for grid in (
        Grid("2mm", (96, 96, 96), 2.0, (-72.0, -114.0, -74.0)),
        Grid("4mm", (48, 48, 48), 4.0, (-94.0, -114.0, -80.0)),
        Grid("reference", (96, 96, 96), 2.0, (-94.0, -114.0, -78.0)),
    )
}


def safe_name(part: str) -> str:
    """`part`, if it can be one step of a path inside a store on any file system; else ValueError naming it."""
    if not isinstance(part, str) or not _SAFE.fullmatch(part):
        raise ValueError(
            f"{part!r} cannot name a dataset, subject or run: use letters, digits and . _ + - only, and no leading dot"
        )
    return part


def run_path(dataset: str, subject: str, entities: str) -> str:
    """The path of a run inside its store: `runs/hcp/sub-100307/ses-1_task-rest_run-1`. ValueError as `safe_name`."""
    return "/".join((RUNS, safe_name(dataset), safe_name(subject), safe_name(entities)))


def split_run(run: str) -> tuple[str, str, str]:
    """Dataset, subject and entities of a run's path. ValueError for anything that is not such a path."""
    parts = run.split("/")
    if len(parts) != 4 or parts[0] != RUNS:
        raise ValueError(f"{run!r} is not the path of a run; it reads {RUNS}/<dataset>/<subject>/<entities>")
    dataset, subject, entities = (safe_name(part) for part in parts[1:])
    return dataset, subject, entities


def mask_hash(mask: NDArray[Any]) -> str:
    """sha256 in hex of a mask's shape and its bits; `mask` (X, Y, Z), anything non-zero counts as inside."""
    mask = np.asarray(mask) != 0
    digest = hashlib.sha256(np.asarray(mask.shape, "<i8").tobytes())
    digest.update(np.packbits(mask, axis=None).tobytes())
    return digest.hexdigest()
