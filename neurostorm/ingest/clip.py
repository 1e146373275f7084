"""The clips of one preprocessed NIfTI file, equal to those that a store of the same grid, mask and TR would hold.

    path --its mask, its sidecars--> Source --bring_to_target (convert.py)--> int8 (T, V) --/16, scale--> (X, Y, Z, L)

The signal is rounded to the store's bytes on purpose: a model sees of a file what it would see of it in a store, to the
last bit, and a result does not depend on the way that was taken.
"""

from collections.abc import Iterator
from fnmatch import fnmatchcase
from pathlib import Path, PurePosixPath

import numpy as np
import torch
from einops import rearrange
from numpy.typing import NDArray
from torch import Tensor

from neurostorm.ingest.convert import Target, bring_to_target
from neurostorm.ingest.discover import DESCRIPTION, Source
from neurostorm.ingest.names import bids_name, entities_of, hcp_name, is_bids_bold, mask_names, plain_name, stem_of
from neurostorm.ingest.nifti import RunError, open_run
from neurostorm.ingest.standardize import Standardised
from neurostorm.store.codec import SCALE


def read_clips(
    run: Path | Source,
    *,
    grid_affine: NDArray[np.float64],
    brain: NDArray[np.bool_],
    tr_s: float,
    frames: int,
    normalise: str,
    stride: int | None = None,
) -> Iterator[Tensor]:
    """The clips of one file, in order; read at once and held as bytes, made into floats one clip at a time.

    Args:
        run: the file, or what `discover` found of it.
        grid_affine: (4, 4), voxel index -> mm, of the clips' grid.
        brain: (X, Y, Z) bool on that grid.
        tr_s: seconds between two frames of a clip.
        frames: of a clip; a shorter run gives one shorter clip.
        normalise: "voxel" (z of each voxel over the run) or "global" (z over all brain voxels and frames).
        stride: frames between clip starts; default: `frames`. A rest that is shorter than a clip is left out.

    Returns:
        Iterator of (X, Y, Z, L) float32; outside the brain 0, or for "global" where an intensity of 0 lies.

    Raises:
        RunError: the file, its mask or its sidecar cannot be used; the message is the reason.
        ValueError: `normalise` is neither of the two.
    """
    if normalise not in ("voxel", "global"):
        raise ValueError(f"normalise = {normalise!r}: voxel or global")
    source = run if isinstance(run, Source) else source_of(run)
    if source.refused:
        raise RunError(source.refused)
    target = Target(grid_affine, brain, tr_s)
    result = bring_to_target(source, open_run(source.path), target).result
    return _clips(result, brain, frames, normalise, stride or frames)


def source_of(path: Path) -> Source:
    """One file as `discover` finds it: with the brain mask beside it and the sidecars of its folder and dataset.

    The dataset reaches up to the outermost folder with a dataset_description.json; without any it is the file's own
    folder. RunError when the name is not that of a preprocessed run.
    """
    path = path.absolute()
    pure = PurePosixPath(path.as_posix())
    candidates = {"bids": bids_name(pure), "hcp": hcp_name(pure)}
    if not is_bids_bold(pure):
        candidates["plain"] = plain_name(PurePosixPath(path.name))
    scheme, name = next(((scheme, name) for scheme, name in candidates.items() if name), ("", None))
    if name is None:
        raise RunError(
            "is not named as a preprocessed run: neither *_desc-preproc_bold.nii.gz, nor HCP's, nor another .nii or "
            ".nii.gz that is not a mask, a reference or anatomy"
        )
    homes = _dataset_folders(path)
    return Source(
        path=path,
        dataset=homes[-1].name,
        subject=name.subject,
        session=name.session,
        task=name.task,
        run_label=name.run_label,
        stem=name.stem,
        format=scheme,
        entities=name.entities,
        mask_path=_mask_beside(path, scheme),
        sidecars=_sidecars(pure, homes),
        refused=name.refused,
    )


def _clips(
    result: Standardised, brain: NDArray[np.bool_], frames: int, normalise: str, stride: int
) -> Iterator[Tensor]:
    stored = torch.from_numpy(result.frames)
    total, length = len(stored), min(frames, len(stored))
    voxels = torch.from_numpy(np.flatnonzero(brain))
    centre, spread = result.global_mean, result.global_std
    shift = torch.from_numpy((result.mean - centre) / spread)
    scale = torch.from_numpy(result.std / spread)
    outside = -centre / spread if normalise == "global" else 0.0  # the intensity is zero there
    for start in range(0, total - length + 1, stride):
        values = stored[start : start + length].float() / SCALE
        if normalise == "global":
            values = torch.addcmul(shift, values, scale)
        box = torch.full((length, brain.size), outside)
        box[:, voxels] = values
        x, y, z = brain.shape
        yield rearrange(box, "t (x y z) -> x y z t", x=x, y=y, z=z)


def _dataset_folders(path: Path) -> list[Path]:
    """The file's folder and those above it, up to the outermost that describes a dataset."""
    described = [number for number, home in enumerate(path.parents) if (home / DESCRIPTION).is_file()]
    return list(path.parents[: described[-1] + 1 if described else 1])


def _mask_beside(path: Path, scheme: str) -> Path | None:
    if not path.parent.is_dir():
        return None
    beside = sorted(file.name for file in path.parent.iterdir() if file.name != path.name)
    for pattern in mask_names(PurePosixPath(path.as_posix()), scheme):
        for name in beside:
            if fnmatchcase(name, pattern):
                return path.parent / name
    return None


def _sidecars(path: PurePosixPath, homes: list[Path]) -> tuple[Path, ...]:
    """JSON files that apply to a BIDS run: with no entity that it lacks; the nearest first, then the most specific."""
    parsed = entities_of(stem_of(path) or "")
    if parsed is None:
        return ()
    wanted = {f"{key}-{value}" for key, value in parsed[0].items()}
    found: list[Path] = []
    for home in homes:
        fitting = [(set(file.stem.split("_")[:-1]), file) for file in home.glob("*bold.json")]
        fitting = [(parts, file) for parts, file in fitting if parts <= wanted]
        found += [file for _, file in sorted(fitting, key=lambda entry: (-len(entry[0]), entry[1].name))]
    return tuple(found)
