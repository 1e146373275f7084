"""A pretrained model as a job is given it: found, read, and known to fit a store.

a model's folder | a run that made one | a released .ckpt --> Pretrained: where it lies, its bytes' hash, how its
                                                              clips were normalised --check_fits--> a store
"""

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, cast

import numpy as np

from neurostorm.config import ConfigError
from neurostorm.io.local_copies import local_copy, upload_folder
from neurostorm.io.paths import AnyPath
from neurostorm.model.hub.locate import find_model
from neurostorm.model.hub.pretrained import CONFIG, WEIGHTS, HubError, NeuroStorm
from neurostorm.model.hub.reference import load_reference
from neurostorm.store import FrameStore, StoreError

SAME_PLACE_MM = 1e-3
Normalise = Literal["voxel", "global"]


@dataclass(frozen=True)
class Pretrained:
    """A model that was found.

    Attributes:
        place: its folder, absolute.
        model: the network, in eval mode, on the CPU.
        sha256: of its weights' file.
        normalise: "voxel" or "global".
    """

    place: AnyPath
    model: NeuroStorm
    sha256: str
    normalise: Normalise


def open_pretrained(
    address: AnyPath | None, normalise: Normalise | None, *, section: str, converted: AnyPath | None = None
) -> Pretrained:
    """The model at an address that the field `section`.model named.

    Args:
        address: a model's folder, a run's folder with `model/` in it, or a released Lightning `.ckpt`.
        normalise: for a model that does not say; the field `section`.normalize.
        section: of the configuration, for messages.
        converted: where a released checkpoint is kept as a model's folder; None: a checkpoint is refused.

    Raises:
        ConfigError: nothing is given or there is no model; or the normalisation is missing or contradicts it.
        HubError, ReferenceMismatch: it cannot be read.
    """
    if address is None:
        raise ConfigError(f"{section}.model is not set: give the folder of a model, --model DIR")
    folder = address.absolute()
    if converted is not None and folder.name.endswith(".ckpt") and folder.is_file():
        folder = _converted(folder, converted)
    else:
        try:
            folder = find_model(folder)
        except HubError as error:
            raise ConfigError(f"{section}.model: {error}") from error
    with local_copy(folder) as local:
        model, sha256 = NeuroStorm.from_pretrained(local), file_sha256(local / WEIGHTS)
    own = model.extra.get("normalise")
    if own is None and normalise is None:
        raise ConfigError(
            f"{section}.model={address} does not say how its clips were normalised: give --{section}.normalize global "
            "(the released models) or voxel"
        )
    if own is not None and normalise is not None and own != normalise:
        raise ConfigError(f"{section}.normalize={normalise}, but the model was trained on {own}: leave the option away")
    return Pretrained(folder, model, sha256, cast(Normalise, own or normalise))


def check_fits(model: NeuroStorm, store: FrameStore) -> None:
    """StoreError, with the fix, unless the store has the grid, mask and TR that the model was trained on.

    What the model's files do not say is not checked; the grid's shape always is.
    """
    extra, size = model.extra, tuple(model.config.img_size[:3])
    grid = extra.get("grid") or {}
    problems = []
    if tuple(store.grid.shape) != size:
        problems.append(f"grid has {store.grid.shape} voxels, not {size}")
    elif "affine" in grid and not np.allclose(store.grid.affine, grid["affine"], rtol=0, atol=SAME_PLACE_MM):
        problems.append(f"grid {store.grid.name!r} lies elsewhere than {grid.get('name')!r}")
    elif not _same_brain(model, store):
        problems.append("brain mask is another one")
    if abs(extra.get("tr_s", store.tr_s) / store.tr_s - 1) > 1e-6:
        problems.append(f"TR is {store.tr_s:g} s, not {extra['tr_s']:g} s")
    if problems:
        raise StoreError(
            f"{store.path} is not what the model was trained on: its {', and its '.join(problems)}. Ingest the files "
            f"again with the model's grid ({grid.get('name', 'see its img_size')}), mask and TR "
            "(jobs/ingest.py --grid --mask --ingest.tr_s), or take a model of this store's"
        )


def file_sha256(path: Path) -> str:
    """sha256 of a local file, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _converted(checkpoint: AnyPath, folder: AnyPath) -> AnyPath:
    """A released checkpoint as a model's folder below `folder`, named by its bytes."""
    with local_copy(checkpoint) as local:
        target = folder / f"released-{file_sha256(local)[:16]}"
        if not (target / CONFIG).is_file():
            with upload_folder(target) as out:
                load_reference(local).save_pretrained(out)
    return target


def _same_brain(model: NeuroStorm, store: FrameStore) -> bool:
    if model.brain is not None and not np.array_equal(store.mask, model.brain.cpu().numpy()):
        return False
    return bool(model.extra.get("mask_sha256", store.mask_sha256) == store.mask_sha256)
