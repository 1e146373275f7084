"""Synthetic runs for measuring an ingest, and the released steps as a plain program to measure it against.

    Kind ──make_run──> .nii.gz: int16, signal and noise inside a head-sized ellipsoid, zeros outside, MNI affine
    .nii.gz ──released_steps──> one .pt file: (T, X, Y, Z) int8 and its scale

The noise fills the low bits as a scanner's does, so the files inflate as slowly as real ones; half of a volume or more
is zeros, as behind a brain extraction. The released steps are written in our own words after what their preprocessing
does: the whole run in float64, two interpolations of all voxels, one global z-score, torch.save.
"""

import gzip
from dataclasses import dataclass
from pathlib import Path

import nibabel
import numpy as np
import torch
from einops import rearrange
from numpy.typing import NDArray
from torch.nn.functional import interpolate

LEVEL = 6  # of gzip, zlib's default: what FSL and most others write with


@dataclass(frozen=True)
class Kind:
    """A grid and a clock that runs come on: array shape, voxel edge, world mm of the first voxel, TR."""

    shape: tuple[int, int, int]
    voxel_mm: float
    origin_mm: tuple[float, float, float]
    tr_s: float
    right_to_left: bool = False

    @property
    def affine(self) -> NDArray[np.float64]:
        affine = np.diag([-self.voxel_mm if self.right_to_left else self.voxel_mm, self.voxel_mm, self.voxel_mm, 1])
        affine[:3, 3] = self.origin_mm
        return affine


KINDS = {
    "2 mm": Kind((91, 109, 91), 2.0, (90, -126, -72), 0.72, right_to_left=True),  # HCP, in FSL's MNI grid
    "2.4 mm": Kind((81, 95, 79), 2.4, (-96.5, -132.5, -78.5), 1.0),  # fMRIPrep with output at the scanner's resolution
    "4 mm": Kind((49, 58, 49), 4.0, (-96.5, -132.5, -78.5), 2.0),
}


def make_run(path: Path, kind: Kind, frames: int, seed: int = 0) -> None:
    """Write a run of `frames`: tissue around 10,000, of which noise with memory and a slow wave are some per cent."""
    rng = np.random.default_rng(seed)
    points = np.indices(kind.shape).reshape(3, -1, order="F").T @ kind.affine[:3, :3].T + kind.affine[:3, 3]
    head = (((points - (0, -18, 6)) / (72, 90, 68)) ** 2).sum(axis=1) < 1
    x, y, z = points[head].T
    tissue = (10000 + 1500 * np.sin(x / 9) * np.cos(y / 11) + 1200 * np.sin(z / 7)).astype(np.float32)
    noise = np.zeros(len(tissue), np.float32)
    image = nibabel.Nifti1Image(np.zeros((*kind.shape, 1), np.int16), kind.affine)
    header = image.header
    header.set_xyzt_units("mm", "sec")
    header["dim"][4], header["pixdim"][4], header["vox_offset"], header["magic"] = frames, kind.tr_s, 352, b"n+1"
    header.set_sform(kind.affine, 4)
    with gzip.open(path, "wb", compresslevel=LEVEL) as file:
        file.write(header.binaryblock + bytes(4))
        volume = np.zeros(len(points), np.int16)
        for frame in range(frames):
            noise = 0.9 * noise + 0.4 * rng.standard_normal(len(noise), dtype=np.float32)
            wave = np.sin(0.3 * kind.tr_s * frame + x / 40)
            volume[head] = np.rint(tissue * (1 + 0.008 * noise + 0.004 * wave))
            file.write(volume.tobytes())


def released_steps(source: Path, out: Path, voxel_mm: float = 2.0, tr_s: float = 0.8) -> None:
    """The preprocessing of the released code: `source` on a grid of `voxel_mm` and a clock of `tr_s`, saved to `out`.

    Interpolations that would change nothing are left out, and so is its crop to 96 voxels. The affine is ignored.
    """
    image = nibabel.load(source)
    data = torch.from_numpy(image.get_fdata()).float()  # (X, Y, Z, T)
    zooms = [float(zoom) for zoom in image.header.get_zooms()]
    size = [round(count * zoom / voxel_mm) for count, zoom in zip(data.shape[:3], zooms[:3], strict=True)]
    if size != list(data.shape[:3]):
        volumes = rearrange(data, "x y z t -> t 1 x y z")
        data = rearrange(interpolate(volumes, size=size, mode="trilinear"), "t 1 x y z -> x y z t")
    frames = max(round(data.shape[3] * zooms[3] / tr_s), 1)
    if frames != data.shape[3]:
        series = rearrange(data, "x y z t -> (x y z) 1 t")
        data = interpolate(series, size=frames, mode="linear").reshape(*size, frames)
    background = data == 0
    data.clamp_(min=0)
    inside = data[~background]
    data.sub_(inside.mean()).div_(inside.std())
    del inside
    data[background] = data.min()
    scale = data.abs().max() / 127
    stored = data.div_(scale).round_().clamp_(-127, 127).to(torch.int8)
    torch.save({"frames": rearrange(stored, "x y z t -> t x y z").contiguous(), "scale": scale}, out)
