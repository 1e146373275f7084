"""Where a model is found and put, what is said when it is not there, and how documents use it."""

import os
import stat
from pathlib import Path

import numpy as np
import pytest
import torch

from neurostorm.model.autoencoder import MaskedAutoencoder
from neurostorm.model.config import SwinConfig
from neurostorm.model.encoder import SwinEncoder
from neurostorm.model.hub.pretrained import HubError, NeuroStorm, save_pretrained
from neurostorm.model.masking.masks import MaskConfig

SHAPE = {"img_size": (12, 12, 12, 4), "patch_size": (3, 3, 3, 1), "embed_dim": 8, "depths": (1, 1), "heads": (1, 2)}
SWIN = SwinConfig(**SHAPE, window=(2, 2, 2, 2))
EXTRA = {"normalise": "voxel", "tr_s": 0.8, "grid": {"affine": np.diag([8.0, 8.0, 8.0, 1.0]).tolist()}}


@pytest.fixture
def saved(tmp_path: Path) -> tuple[MaskedAutoencoder, Path]:
    model = MaskedAutoencoder(SWIN, MaskConfig("window", 0.5), brain=torch.ones(12, 12, 12) > 0)
    save_pretrained(model, tmp_path / "model", EXTRA)
    return model, tmp_path / "model"


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o027, 0o640)])
def test_a_models_files_have_the_permissions_that_the_umask_leaves(tmp_path, umask, mode):
    before = os.umask(umask)
    try:
        save_pretrained(SwinEncoder(SWIN), tmp_path / "model")
    finally:
        os.umask(before)
    found = {file.name: stat.S_IMODE(file.stat().st_mode) for file in (tmp_path / "model").iterdir()}
    assert found == {"model.safetensors": mode, "config.json": mode}


@pytest.mark.parametrize("kind", ["local", "s3"])
def test_a_model_is_found_in_the_folder_of_its_run(saved, tmp_path, make_bucket, kind):
    model, _ = saved
    run = str(tmp_path / "run") if kind == "local" else f"{make_bucket()}/outputs/run"
    save_pretrained(model, f"{run}/model", EXTRA)
    for address in (run, f"{run}/model"):
        again = NeuroStorm.from_pretrained(address)
        assert again.extra == EXTRA and again.config == model.config
        for name, tensor in model.state_dict().items():
            assert torch.equal(again.network.state_dict()[name], tensor)
    assert not list(tmp_path.glob("s3:*"))


def test_what_holds_no_model_says_what_to_give(saved, tmp_path, make_bucket):
    _, folder = saved
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    bucket, empty = make_bucket(), tmp_path / "empty"
    empty.mkdir()
    for address, words in (
        (empty, rf"no model in {empty}: neither {empty}/config\.json nor {empty}/model/config\.json is there"),
        (tmp_path / "run", "is a pretraining run that has not ended.*start it again"),
        (folder / "model.safetensors", r"is a file: give the folder that holds .*neurostorm\.model\.hub\.reference"),
        (f"{bucket}/none", rf"no model in {bucket}/none: neither .* nor {bucket}/none/model/config\.json"),
        ("ftp://host/model", "'ftp://host/model' .*use a local path, s3://BUCKET/KEY or gs://BUCKET/KEY"),
    ):
        with pytest.raises(HubError, match=words):
            NeuroStorm.from_pretrained(address)
    with pytest.raises(HubError, match="is a file: name a folder"):
        save_pretrained(SwinEncoder(SWIN), folder / "config.json")


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("text.nii.gz", "no image", "is not a NIfTI file"),
        ("empty.nii.gz", "", r"is an empty file \(0 bytes\)"),
        ("notes.txt", "x", "is not named as a preprocessed run"),
        ("folder", None, "is a folder: give one 4D NIfTI file, or embed all .* --source"),
    ],
)
def test_a_wrong_file_is_named_in_one_sentence(saved, tmp_path, name, content, reason):
    _, folder = saved
    if content is None:
        (tmp_path / name).mkdir()
    else:
        (tmp_path / name).write_text(content)
    with pytest.raises(HubError, match=rf"^{tmp_path}/{name}:? {reason}") as error:
        NeuroStorm.from_pretrained(folder).embed(tmp_path / name)
    assert "\n" not in str(error.value)


def test_the_documents_snippet_runs_as_it_stands(saved, tmp_path, monkeypatch):
    """Relative paths, a run's folder, clips of random numbers of the model's own size."""
    (tmp_path / "outputs").mkdir()
    (tmp_path / "model").rename(tmp_path / "outputs" / "model")
    monkeypatch.chdir(tmp_path)
    model = NeuroStorm.from_pretrained("outputs")
    clips = torch.randn(2, 1, *model.config.img_size)
    assert model.network.features(clips).shape == (2, 16, 2, 2, 2, 4)
    assert model.embed(clips).shape == (2, 16)
