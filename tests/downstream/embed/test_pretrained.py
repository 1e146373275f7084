"""Finding a model: each form of it, what it must say of itself, and the store that it fits."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from neurostorm.config import ConfigError
from neurostorm.data.plan.split import subject_hash
from neurostorm.downstream.embed import pretrained
from neurostorm.downstream.embed.pretrained import check_fits, open_pretrained
from neurostorm.downstream.methods.backbone import Backbone, pretrained_backbone
from neurostorm.model.autoencoder import MaskedAutoencoder
from neurostorm.model.config import SwinConfig
from neurostorm.model.encoder import SwinEncoder
from neurostorm.model.hub.pretrained import CONFIG, WEIGHTS, HubError, NeuroStorm, save_pretrained
from neurostorm.model.hub.reference import ReferenceEncoder, ReferenceMismatch
from neurostorm.model.strd.dropout import StrdConfig
from neurostorm.store import FrameStore, Grid, StoreError, create_store
from tests.people_store import CLIP_FRAMES, SHAPE, write_model

RELEASED = {
    "img_size": (*SHAPE, CLIP_FRAMES), "patch_size": (6, 6, 6, 1), "in_chans": 1, "embed_dim": 8, "depths": (1, 1),
    "num_heads": (1, 2), "window_size": (2, 2, 2, 2), "first_window_size": (2, 2, 2, 2), "last_layer_full_MSA": False,
}  # fmt: skip


def open_it(address: Any, normalise: Any = None, **options: Any) -> pretrained.Pretrained:
    return open_pretrained(address, normalise, section="adapt", **options)


def released(file: Path) -> Path:
    """A checkpoint as the released code writes it."""
    torch.manual_seed(3)
    swin = SwinConfig(
        RELEASED["img_size"], RELEASED["patch_size"], 1, 8, (1, 1), (1, 2), (2, 2, 2, 2), (2, 2, 2, 2), False,
        mixer="attention", layout="paper",
    )  # fmt: skip
    weights = {f"model.{name}": value for name, value in ReferenceEncoder(swin, StrdConfig()).state_dict().items()}
    torch.save({"state_dict": weights, "hyper_parameters": RELEASED}, file)
    return file


def test_a_folder_and_the_run_that_made_it_are_one_model(tmp_path: Path, people_store: Path) -> None:
    folder = write_model(tmp_path / "run" / "model", people_store)
    for address in (folder, tmp_path / "run"):
        found = open_it(address)
        assert found.place == folder and found.normalise == "voxel"
        assert found.sha256 == pretrained.file_sha256(folder / WEIGHTS)
    check_fits(found.model, FrameStore.open(people_store))


def test_what_is_no_model_is_named_with_the_option(tmp_path: Path, people_store: Path) -> None:
    with pytest.raises(ConfigError, match=r"adapt\.model is not set.*--model DIR"):
        open_it(None)
    with pytest.raises(ConfigError, match=rf"adapt\.model: no model in {tmp_path}: .*{CONFIG}"):
        open_it(tmp_path)
    with pytest.raises(ConfigError, match=r"adapt\.model: .*x\.ckpt"):
        open_it(released(tmp_path / "x.ckpt"))  # nowhere to convert it to
    folder = write_model(tmp_path / "model", people_store)
    (folder / CONFIG).write_text("{")
    with pytest.raises(HubError):
        open_it(folder)


def test_the_normalisation_is_known_and_not_contradicted(tmp_path: Path, people_store: Path) -> None:
    silent = write_model(tmp_path / "silent", people_store, normalise=None)
    with pytest.raises(ConfigError, match=r"does not say how its clips were normalised.*--adapt\.normalize global"):
        open_it(silent)
    assert open_it(silent, "global").normalise == "global"
    says = write_model(tmp_path / "says", people_store, normalise="voxel")
    assert open_it(says, "voxel").normalise == "voxel"
    with pytest.raises(ConfigError, match=r"adapt\.normalize=global, but the model was trained on voxel"):
        open_it(says, "global")


def test_a_released_checkpoint_is_converted_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file, kept = released(tmp_path / "released.ckpt"), tmp_path / "cache" / "models"
    first = open_it(file, "global", converted=kept)
    assert first.place.parent == kept and (first.place / CONFIG).is_file()
    volume = torch.randn(1, 1, *SHAPE, CLIP_FRAMES)
    direct = pretrained.load_reference(file)
    with torch.no_grad():
        torch.testing.assert_close(first.model.network.features(volume), direct.features(volume))
    monkeypatch.setattr(pretrained, "load_reference", None)  # a second conversion would fail
    again = open_it(file, "global", converted=kept)
    assert (again.place, again.sha256) == (first.place, first.sha256)
    with pytest.raises(ConfigError, match="does not say how its clips were normalised"):
        open_it(file, converted=kept)
    monkeypatch.undo()
    (tmp_path / "broken.ckpt").write_bytes(b"nothing")
    with pytest.raises(ReferenceMismatch, match=r"broken|cannot be read|refused"):
        open_it(tmp_path / "broken.ckpt", "global", converted=kept)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"shape": (30, 24, 24)}, r"grid has \(30, 24, 24\) voxels, not \(24, 24, 24\)"),
        ({"origin": (-91.0, -92.0, -92.0)}, "lies elsewhere than 'ball'"),
        ({"drop": 1}, "brain mask is another one"),
        ({"tr_s": 1.2}, r"TR is 1\.2 s, not 0\.8 s"),
        ({"drop": 1, "tr_s": 1.2}, r"brain mask is another one, and its TR is 1\.2 s"),
    ],
)
def test_a_store_of_another_kind_is_refused(
    tmp_path: Path, people_store: Path, change: dict[str, Any], message: str
) -> None:
    model, given = open_it(write_model(tmp_path / "model", people_store)).model, FrameStore.open(people_store)
    shape = change.get("shape", SHAPE)
    mask = np.ones(shape, bool) if shape != SHAPE else given.mask.copy()
    mask.flat[np.flatnonzero(mask)[: change.get("drop", 0)]] = False
    grid = Grid("other", shape, 8.0, change.get("origin", (-92.0, -92.0, -92.0)))
    create_store(tmp_path / "other", grid=grid, mask=mask, tr_s=change.get("tr_s", 0.8), recipe="test")
    with pytest.raises(StoreError, match=message) as error:
        check_fits(model, FrameStore.open(tmp_path / "other"))
    assert "jobs/ingest.py" in str(error.value) and str(tmp_path / "other") in str(error.value)


def test_who_was_seen_in_pretraining_is_counted(tmp_path: Path, people_store: Path) -> None:
    seen = tuple(f"people/sub-{n:03d}" for n in range(3))
    backbone = pretrained_backbone(open_it(write_model(tmp_path / "model", people_store, subjects=seen)))
    assert backbone.seen == {subject_hash(subject) for subject in seen}
    assert backbone.overlap(("people/sub-002", "people/sub-003", "people/sub-004", "people/sub-005")) == 0.25
    assert replace(backbone, seen=None).overlap(seen) is None
    silent: Backbone = pretrained_backbone(open_it(write_model(tmp_path / "silent", people_store)))
    assert silent.seen is None and silent.clip_frames == CLIP_FRAMES


@pytest.mark.parametrize("tokens", ["dense", "brain"])
@pytest.mark.parametrize("frames", [CLIP_FRAMES, 2])
@pytest.mark.parametrize("whole", [True, False])
def test_places_are_those_of_the_feature_grid_in_raster_order(
    tmp_path: Path, people_store: Path, tokens: str, frames: int, whole: bool
) -> None:
    """Against the dense features, place after place; and the mean over places is what `embed` gives."""
    brain = torch.from_numpy(FrameStore.open(people_store).mask)
    swin = SwinConfig(
        (*SHAPE, CLIP_FRAMES), embed_dim=8, depths=(1, 1), heads=(1, 2), tokens=tokens, window=(4, 4, 4, 2),
        patch_size=(3, 3, 3, 1),
    )  # fmt: skip
    torch.manual_seed(1)
    network = MaskedAutoencoder(swin, brain=brain) if whole else SwinEncoder(swin, brain=brain)
    save_pretrained(network, tmp_path / "model", {})
    model = NeuroStorm.from_pretrained(tmp_path / "model")
    volume = torch.randn(2, 1, *SHAPE, frames) * brain[..., None]
    places = model.embed_places(model.network.to_patches(volume))
    with torch.no_grad():
        grid: Tensor = model.network.features(volume).mean(-1)  # (B, C', d, h, w)
    kept = [row for row in grid.flatten(2).movedim(1, 2).unbind(1) if bool((row != 0).any())]
    assert places.shape == (2, 64 if tokens == "dense" else 56, 16)  # 4 x 4 x 4, of which 8 corners lie outside
    torch.testing.assert_close(places, torch.stack(kept, 1), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(
        places.mean(1), model.embed_patches(model.network.to_patches(volume)), atol=1e-5, rtol=1e-5
    )
