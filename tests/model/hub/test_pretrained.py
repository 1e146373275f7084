"""Models as files: what is saved comes back bit-equal, older formats too, and everything else is refused by name."""

import copy
import json
import pickle
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from neurostorm.model.autoencoder import MaskedAutoencoder
from neurostorm.model.config import SwinConfig
from neurostorm.model.encoder import SwinEncoder
from neurostorm.model.hub.pretrained import FORMAT, HubError, NeuroStorm, load_pretrained, save_pretrained, upgrade_1
from neurostorm.model.hub.reference import ReferenceEncoder, ReferenceMae, load_reference
from neurostorm.model.masking.masks import MaskConfig
from neurostorm.model.strd.dropout import StrdConfig

SHAPE = {"img_size": (12, 12, 12, 4), "patch_size": (3, 3, 3, 1), "embed_dim": 8, "depths": (1, 1), "heads": (1, 2)}
SWIN = SwinConfig(**SHAPE, window=(2, 2, 2, 2))
EXTRA = {"normalise": "voxel", "tr_s": 0.8, "grid": {"affine": np.diag([8.0, 8.0, 8.0, 1.0]).tolist()}}
FORMAT_1 = {
    "swin": (
        "img_size", "patch_size", "in_chans", "embed_dim", "depths", "heads", "window", "first_window", "full_last",
        "mlp_ratio", "qkv_bias", "drop_path", "c_multiplier", "mixer",
    ),
    "strd": ("enabled", "space", "time"),
    "mask": ("kind", "ratio", "window"),
}  # fmt: skip


@pytest.fixture
def brain() -> Tensor:
    """A ball on the 12^3 grid: its corner patches hold none of it."""
    axes = torch.meshgrid(*[torch.linspace(-1, 1, 12)] * 3, indexing="ij")
    return sum(axis**2 for axis in axes) < 0.9


@pytest.fixture
def saved(tmp_path: Path, brain: Tensor) -> tuple[MaskedAutoencoder, Path]:
    model = MaskedAutoencoder(SWIN, MaskConfig("window", 0.5, (2, 2, 2, 4)), StrdConfig(True, 3, 5), brain=brain)
    save_pretrained(model, tmp_path / "model", EXTRA)
    return model, tmp_path / "model"


def config_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "config.json").read_text())


def edit(folder: Path, **changes: Any) -> None:
    (folder / "config.json").write_text(json.dumps({**config_of(folder), **changes}))


def edit_weights(folder: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


def equal(ours: Any, theirs: Any) -> bool:
    return all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


def clip_of(config: SwinConfig, frames: int = 4, batch: int = 2) -> Tensor:
    return torch.randn(batch, 1, *config.img_size[:3], frames)


def test_a_model_comes_back_bit_equal(saved):
    model, folder = saved
    again = load_pretrained(folder)
    assert isinstance(again, MaskedAutoencoder) and not again.training and again.extra == EXTRA
    assert (again.config, again.mask_config, again.strd_config) == (model.config, model.mask_config, model.strd_config)
    assert torch.equal(again.brain, model.brain)
    patches = torch.randn(1, len(model.geometry(4).levels[0]), 27)
    mask = model.draw_mask(1, 4)
    assert equal(model.eval()(patches, mask), again(patches, mask))
    assert {p.requires_grad for p in again.parameters()} == {True, False}


def test_every_choice_comes_back(tmp_path, brain):
    """Each field away from its default, with the atlas, the brain's tokens and the targets of the loss."""
    swin = SwinConfig(
        **SHAPE, window=(2, 2, 2, 4), first_window=(4, 4, 4, 2), full_last=True, mlp_ratio=2.0, qkv_bias=False,
        drop_path=0.1, c_multiplier=3, mixer="mamba", layout="clean", tokens="brain",
    )  # fmt: skip
    atlas = torch.arange(64).view(4, 4, 4) % 5
    strd = StrdConfig(True, 3, 5, rate=0.2)
    model = MaskedAutoencoder(swin, MaskConfig("atlas", 0.4), strd, "all", brain, True, atlas).eval()
    save_pretrained(model, tmp_path)
    again = load_pretrained(tmp_path)
    assert (again.config, again.mask_config, again.strd_config) == (swin, model.mask_config, strd)
    assert (again.loss_on, again.normalise_targets) == ("all", True)
    assert torch.equal(again.atlas_map, model.atlas_map) and again.atlas_mask_token.requires_grad
    patches = torch.randn(2, len(model.geometry(4).levels[0]), 27)
    first, second = (net(patches, generator=torch.Generator().manual_seed(3)) for net in (model, again))
    assert torch.equal(first.mask, second.mask) and equal(first, second)


def test_tubes_and_prompts_come_back(tmp_path):
    model = MaskedAutoencoder(SWIN, MaskConfig("tube", 0.5, tube_frames=2), loss_on="all").eval()
    model.set_prompts(3)
    NeuroStorm(model).save_pretrained(tmp_path)
    again = load_pretrained(tmp_path)
    assert again.mask_config.tube_frames == 2 and again.config.prompts == 3
    clip, mask = clip_of(SWIN), model.draw_mask(2, 4)
    patches = model.to_patches(clip)
    assert equal(model(patches, mask), again(patches, mask))


def test_two_files_and_no_pickle(saved):
    _, folder = saved
    assert sorted(path.name for path in folder.iterdir()) == ["config.json", "model.safetensors"]


@pytest.mark.parametrize("tokens", ["dense", "brain"])
def test_an_encoder_its_dtype_and_its_brain_come_back(tmp_path, brain, tokens):
    encoder = SwinEncoder(SwinConfig(**SHAPE, tokens=tokens), brain=brain).bfloat16().eval()
    encoder.extra = {"from": "memory"}
    save_pretrained(encoder, tmp_path)
    again = load_pretrained(tmp_path)
    assert type(again) is SwinEncoder and again.extra == {"from": "memory"} and torch.equal(again.brain, brain)
    clip = clip_of(SWIN, frames=3)
    assert again(clip).dtype == torch.bfloat16 and torch.equal(again(clip), encoder(clip))


def test_released_models_are_saved_as_what_they_are(tmp_path):
    """From a released checkpoint to our files and back: the same class, the same bits."""
    swin = SwinConfig(**SHAPE, window=(3, 3, 3, 3), layout="paper", mixer="mamba")
    hparams = {
        "img_size": [12, 12, 12, 4], "patch_size": [3, 3, 3, 1], "embed_dim": 8, "depths": [1, 1], "num_heads": [1, 2],
        "window_size": [3, 3, 3, 3], "spatial_mask": "window", "time_mask": "random", "mask_ratio": 0.5,
    }  # fmt: skip
    clip = clip_of(swin)
    for module in (SwinEncoder(swin), MaskedAutoencoder(swin, MaskConfig("window"), loss_on="all")):
        weights = {f"model.{name}": value for name, value in module.state_dict().items()}
        torch.save({"state_dict": weights, "hyper_parameters": hparams}, tmp_path / "released.ckpt")
        released = load_reference(tmp_path / "released.ckpt")
        released.save_pretrained(tmp_path / "ours")
        again = NeuroStorm.from_pretrained(tmp_path / "ours")
        assert isinstance(released, ReferenceEncoder | ReferenceMae) and type(again.network) is type(module)
        if isinstance(module, MaskedAutoencoder):
            blocks = released.blocks(4).total
            mask = (torch.arange(2 * blocks).view(2, -1) % 2).float()
            assert equal(released(clip, mask=mask), again(clip, mask=mask))
        else:
            assert torch.equal(released(clip), again(clip))


def test_a_gathered_state_dict_is_saved_instead_of_the_parameters(saved, tmp_path):
    model, _ = saved
    gathered = {key: value + 1 for key, value in model.state_dict().items()}
    save_pretrained(model, tmp_path / "other", EXTRA, gathered)
    assert torch.equal(load_pretrained(tmp_path / "other").mask_token, model.mask_token + 1)
    del gathered["mask_token"]
    with pytest.raises(HubError, match="missing \\['mask_token'\\]"):
        save_pretrained(model, tmp_path / "other", EXTRA, gathered)


def as_format_1(folder: Path) -> None:
    """What the first version would have written of the same model."""
    config = config_of(folder)
    for section, names in FORMAT_1.items():
        if section in config:
            config[section] = {name: config[section][name] for name in names}
    for name in ("normalise_targets", "decoder", "decoder_depth", "predicted"):
        config.pop(name, None)
    (folder / "config.json").write_text(json.dumps({**config, "format": 1}))
    edit_weights(folder, lambda tensors: tensors.pop("atlas_mask_token", None))


def test_a_model_of_format_1_is_the_papers_layout_and_dense(tmp_path, brain):
    swin = SwinConfig(**SHAPE, window=(3, 3, 3, 3), layout="paper")
    model = MaskedAutoencoder(swin, MaskConfig("window", 0.5), StrdConfig(True, 3, 3), brain=brain).eval()
    save_pretrained(model, tmp_path, EXTRA)
    as_format_1(tmp_path)
    again = load_pretrained(tmp_path)
    assert again.config == swin and again.extra == EXTRA and not again.normalise_targets
    assert again.mask_config == model.mask_config and again.strd_config == model.strd_config
    assert torch.equal(again.atlas_mask_token, torch.zeros(8)) and torch.equal(again.brain, brain)
    patches, mask = torch.randn(1, len(model.geometry(4).levels[0]), 27), model.draw_mask(1, 4)
    assert equal(model(patches, mask), again(patches, mask))
    NeuroStorm(again).save_pretrained(tmp_path / "now")
    assert config_of(tmp_path / "now")["format"] == FORMAT
    assert equal(load_pretrained(tmp_path / "now")(patches, mask), again(patches, mask))


def test_a_model_of_format_2_has_the_papers_decoder(saved):
    model, folder = saved
    config = config_of(folder)
    for name in ("decoder", "decoder_depth", "predicted"):
        config.pop(name)
    (folder / "config.json").write_text(json.dumps({**config, "format": 2}))
    again = load_pretrained(folder)
    assert again.decoder == "paper" and again.predicted == 1
    patches, mask = torch.randn(1, len(model.geometry(4).levels[0]), 27), model.draw_mask(1, 4)
    assert equal(model.eval()(patches, mask), again(patches, mask))


def test_a_light_decoder_comes_back(tmp_path, brain):
    swin = SwinConfig(**SHAPE, window=(2, 2, 2, 2), tokens="brain")
    model = MaskedAutoencoder(swin, brain=brain, decoder="light", decoder_depth=1, predicted=0.5).eval()
    save_pretrained(model, tmp_path)
    again = load_pretrained(tmp_path)
    assert (again.decoder, again.decoder_depth, again.predicted) == ("light", 1, 0.5)
    patches, mask = torch.randn(2, len(model.geometry(4).levels[0]), 27), model.draw_mask(2, 4)
    assert equal(model(patches, mask), again(patches, mask))


def test_an_encoder_of_format_1_comes_back(tmp_path):
    encoder = SwinEncoder(SwinConfig(**SHAPE, window=(3, 3, 3, 3), layout="paper")).eval()
    save_pretrained(encoder, tmp_path)
    as_format_1(tmp_path)
    clip = clip_of(SWIN)
    assert torch.equal(load_pretrained(tmp_path)(clip), encoder(clip))


def test_upgrading_changes_nothing_in_place():
    config = {"format": 1, "class": "MaskedAutoencoder", "swin": {}, "strd": {}, "mask": {}, "extra": {"a": 1}}
    tensors = {"mask_token": torch.ones(4, dtype=torch.bfloat16)}
    before = copy.deepcopy(config)
    new, weights = upgrade_1(config, tensors)
    assert config == before and list(tensors) == ["mask_token"]
    assert new["format"] == 2 and new["extra"] == {"a": 1} and new["swin"]["layout"] == "paper"
    assert weights["atlas_mask_token"].dtype == torch.bfloat16 and not weights["atlas_mask_token"].any()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"format": 4}, r"config.json: format is 4, this version reads 1 to 3; update neurostorm"),
        ({"format": "2"}, r"format is '2', .* not written by save_pretrained"),
        ({"format": None}, r"format is None"),
        ({"format": True}, r"format is True"),
        ({"class": "Perceptron"}, r"config\.json: class is 'Perceptron'"),
        ({"swin": [1]}, r"config\.json: swin is \[1\]"),
        ({"learning_rate": 1.0}, r"config.json: missing nothing, unexpected \['learning_rate'\]"),
        ({"strd": {"enabled": True, "space": 3}}, r"missing \['strd.rate', 'strd.time'\]"),
        ({"loss_on": "moon"}, r"config.json: loss_on = 'moon'"),
    ],
)
def test_a_configuration_that_cannot_be_used_is_refused_with_the_reason(saved, changes, words):
    _, folder = saved
    edit(folder, **changes)
    with pytest.raises(HubError, match=words):
        load_pretrained(folder)


@pytest.mark.parametrize(("change", "named"), [({"colour": 1}, "colour"), ({"heads": [1, 3]}, "heads")])
def test_a_bad_network_field_is_named(saved, change, named):
    _, folder = saved
    edit(folder, swin={**config_of(folder)["swin"], **change})
    with pytest.raises(HubError, match=f"config.json: .*{named}"):
        load_pretrained(folder)


def test_parameters_that_do_not_match_are_named(saved):
    _, folder = saved
    edit_weights(folder, lambda t: t.update({"norm_up.gain": t.pop("norm_up.weight")}))
    with pytest.raises(HubError, match=r"safetensors: missing \['norm_up.weight'\], unexpected \['norm_up.gain'\]"):
        load_pretrained(folder)


def test_parameters_of_another_shape_are_named(saved):
    _, folder = saved
    edit_weights(folder, lambda t: t.update({"mask_token": torch.zeros(3)}))
    with pytest.raises(HubError, match=r"mask_token \(3,\) instead of \(8,\)"):
        load_pretrained(folder)


def test_missing_and_broken_files_are_named(saved, tmp_path):
    _, folder = saved
    with pytest.raises(HubError, match=rf"there is no folder {tmp_path}/nowhere: give that of a pretraining run"):
        load_pretrained(tmp_path / "nowhere")
    (folder / "model.safetensors").write_bytes(b"nonsense")
    with pytest.raises(HubError, match=r"model\.safetensors: cannot be read"):
        load_pretrained(folder)


def test_a_pretrained_model_acts_as_its_network(saved):
    network, folder = saved
    model = NeuroStorm.from_pretrained(folder)
    assert not model.training and model.config == network.config and model.extra == EXTRA
    patches, mask = torch.randn(1, len(model.geometry(4).levels[0]), 27), model.draw_mask(1, 4)
    assert equal(model(patches, mask=mask), network.eval()(patches, mask))
    assert equal(pickle.loads(pickle.dumps(model))(patches, mask), model(patches, mask))
    with pytest.raises(AttributeError, match="colour"):
        _ = model.colour


@pytest.mark.parametrize("tokens", ["dense", "brain"])
def test_an_embedding_is_the_mean_of_the_tokens_that_exist(brain, tokens):
    brain[6:] = False
    encoder = SwinEncoder(SwinConfig(**SHAPE, tokens=tokens), StrdConfig(True, 3, 3), brain)
    model = NeuroStorm(encoder)
    clip = clip_of(SWIN)
    embedded = model.embed(clip)
    coarse = encoder.eval().features(clip)
    exists = torch.ones(2, 2, 2, 4, dtype=torch.bool)
    if tokens == "brain":
        exists = (coarse[0] != 0).any(0)
        cut = torch.nn.functional.max_pool3d(brain.float()[None], 6)[0].bool()
        assert torch.equal(exists, cut[..., None].expand(-1, -1, -1, 4)) and not exists.all()
    assert embedded.dtype == torch.float32 and not embedded.requires_grad and embedded.shape == (2, 16)
    torch.testing.assert_close(embedded, coarse[..., exists].mean(-1), atol=1e-6, rtol=1e-5)


def test_one_clip_has_one_vector_whatever_axes_it_comes_with(saved):
    _, folder = saved
    model, clip = NeuroStorm.from_pretrained(folder), clip_of(SWIN, batch=1)
    vector = model.embed(clip[0, 0])
    assert vector.shape == (16,)
    assert torch.equal(model.embed(clip[0]), vector) and torch.equal(model.embed(clip)[0], vector)
    assert torch.equal(model.embed(clip[0, 0].numpy()), vector)
    with pytest.raises(ValueError, match=r"clip of shape \(12, 12, 12\)"):
        model.embed(clip[0, 0, ..., 0])
    with pytest.raises(ValueError, match="volume of shape"):
        model.embed(clip[..., :6, :])


def test_a_longer_clip_is_the_mean_of_its_clips(saved):
    _, folder = saved
    model, long = NeuroStorm.from_pretrained(folder), clip_of(SWIN, frames=11)
    parts = torch.stack([model.embed(long[..., 0:4]), model.embed(long[..., 4:8])])
    torch.testing.assert_close(model.embed(long), parts.mean(0))
    assert not torch.allclose(parts[0], parts[1])
    assert model.embed(long[..., :3]).shape == (2, 16)


def test_embedding_drops_nothing_and_leaves_the_modes_as_they_were(brain):
    swin = SwinConfig(**SHAPE, drop_path=0.5)
    model = NeuroStorm(SwinEncoder(swin, StrdConfig(True, 3, 3, rate=0.5), brain)).train()
    model.network.layers[0].eval()
    modes = [part.training for part in model.modules()]
    clip = clip_of(SWIN)
    assert torch.equal(model.embed(clip), model.embed(clip))
    assert [part.training for part in model.modules()] == modes and True in modes and False in modes


def test_a_file_needs_a_model_that_says_how_its_clips_were_made(tmp_path, brain):
    network = SwinEncoder(SWIN).eval()
    with pytest.raises(
        HubError, match=r"extra.grid.affine in config.json, extra.tr_s .*extra.normalise .*brain in model"
    ):
        NeuroStorm(network).embed(tmp_path / "run.nii.gz")
    network = SwinEncoder(SWIN, brain=brain).eval()
    network.extra = {**EXTRA, "tr_s": None}
    with pytest.raises(HubError, match=r"missing: extra.tr_s in config.json\).*embed the store"):
        NeuroStorm(network).embed(str(tmp_path / "run.nii.gz"))


def test_a_file_that_cannot_be_used_is_named_with_the_reason(saved, tmp_path):
    _, folder = saved
    model = NeuroStorm.from_pretrained(folder)
    with pytest.raises(HubError, match=r"there is no file .*run\.nii\.gz"):
        model.embed(tmp_path / "run.nii.gz")
    image = nibabel.Nifti1Image(np.random.default_rng(0).normal(size=(12, 12, 12, 9)).astype("f4"), np.eye(4) * 8)
    image.set_sform(np.diag([8.0, 8, 8, 1]), 4)
    image.header.set_xyzt_units("mm", "sec")
    image.header["pixdim"][4] = 0
    nibabel.save(image, tmp_path / "run.nii.gz")
    with pytest.raises(HubError, match=r"run\.nii\.gz: has no TR"):
        model.embed(tmp_path / "run.nii.gz")
    image.header["pixdim"][4] = 0.8
    nibabel.save(image, tmp_path / "run.nii.gz")
    assert model.embed(tmp_path / "run.nii.gz").shape == (16,)


def test_without_the_half_that_reads_files_the_reason_is_said(saved, tmp_path, monkeypatch):
    _, folder = saved
    (tmp_path / "run.nii").touch()
    monkeypatch.setitem(sys.modules, "neurostorm.ingest.resample.clip", None)
    with pytest.raises(HubError, match=r"run\.nii: reading NIfTI files needs all of neurostorm with nibabel"):
        NeuroStorm.from_pretrained(folder).embed(tmp_path / "run.nii")
