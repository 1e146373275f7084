import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from neurostorm.model.hub import HubError, load_pretrained, save_pretrained
from neurostorm.model.mae import MaskedAutoencoder
from neurostorm.model.masking import MaskConfig
from neurostorm.model.strd import StrdConfig
from neurostorm.model.swin4d import SwinConfig, SwinEncoder

SWIN = SwinConfig((12, 12, 12, 4), (3, 3, 3, 1), embed_dim=8, depths=(1, 1), heads=(1, 2), window=(2, 2, 2, 2))
EXTRA = {"normalisation": "voxel", "grid": {"voxel_mm": 4.0}}


@pytest.fixture
def saved(tmp_path):
    brain = torch.rand(12, 12, 12) > 0.5
    model = MaskedAutoencoder(SWIN, MaskConfig("window", 0.5, (2, 2, 2, 4)), StrdConfig(True, 3, 5), brain=brain)
    save_pretrained(model, tmp_path / "model", EXTRA)
    return model, tmp_path / "model"


def edit(folder, **changes):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **changes}))


def edit_weights(folder, change):
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


def test_a_model_comes_back_bit_equal(saved):
    model, folder = saved
    again = load_pretrained(folder)
    assert isinstance(again, MaskedAutoencoder) and not again.training and again.extra == EXTRA
    assert (again.config, again.mask_config, again.strd_config) == (model.config, model.mask_config, model.strd_config)
    assert torch.equal(again.brain, model.brain)
    clip = torch.randn(1, 1, 12, 12, 12, 4)
    mask = model.draw_mask(1, 4)
    ours, theirs = model.eval()(clip, mask), again(clip, mask)
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
    assert {p.requires_grad for p in again.parameters()} == {True, False}


def test_two_files_and_no_pickle(saved):
    _, folder = saved
    assert sorted(path.name for path in folder.iterdir()) == ["config.json", "model.safetensors"]


def test_an_encoder_and_its_dtype_come_back(tmp_path):
    encoder = SwinEncoder(SWIN).bfloat16().eval()
    encoder.extra = {"from": "memory"}
    save_pretrained(encoder, tmp_path)
    again = load_pretrained(tmp_path)
    clip = torch.randn(1, 1, 12, 12, 12, 3)
    assert type(again) is SwinEncoder and again.extra == {"from": "memory"}
    assert again(clip).dtype == torch.bfloat16 and torch.equal(again(clip), encoder(clip))


def test_a_gathered_state_dict_is_saved_instead_of_the_parameters(saved, tmp_path):
    model, _ = saved
    gathered = {key: value + 1 for key, value in model.state_dict().items()}
    save_pretrained(model, tmp_path / "other", EXTRA, gathered)
    assert torch.equal(load_pretrained(tmp_path / "other").mask_token, model.mask_token + 1)
    del gathered["mask_token"]
    with pytest.raises(HubError, match="missing \\['mask_token'\\]"):
        save_pretrained(model, tmp_path / "other", EXTRA, gathered)


def test_an_unknown_format_or_class_is_refused(saved):
    _, folder = saved
    edit(folder, format=2)
    with pytest.raises(HubError, match=r"config.json: format is 2, this version reads 1"):
        load_pretrained(folder)
    edit(folder, format=1, **{"class": "Perceptron"})
    with pytest.raises(HubError, match=r"config\.json: class is 'Perceptron'"):
        load_pretrained(folder)


def test_fields_that_do_not_match_are_named(saved):
    _, folder = saved
    edit(folder, learning_rate=1.0)
    with pytest.raises(HubError, match=r"config.json: missing nothing, unexpected \['learning_rate'\]"):
        load_pretrained(folder)


@pytest.mark.parametrize(("change", "named"), [({"colour": 1}, "colour"), ({"heads": [1, 3]}, "heads")])
def test_a_bad_network_field_is_named(saved, change, named):
    _, folder = saved
    swin = json.loads((folder / "config.json").read_text())["swin"]
    edit(folder, swin={**swin, **change})
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
    with pytest.raises(HubError, match=r"config\.json: cannot be read"):
        load_pretrained(tmp_path / "nowhere")
    (folder / "model.safetensors").write_bytes(b"nonsense")
    with pytest.raises(HubError, match=r"model\.safetensors: cannot be read"):
        load_pretrained(folder)
