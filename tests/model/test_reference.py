import pytest
import torch

from neurostorm.model.reference import ReferenceMismatch, load_reference

ENCODERS = [
    "mini:swift_encoder__mini",
    "swift_encoder__a_pad_shift",
    "swift_encoder__b_fullmsa_3stage",
    "swift_encoder__c_patch6",
]


@pytest.mark.parametrize("name", ENCODERS)
def test_outputs_equal_the_released_encoder(golden, name):
    case = golden(name)
    encoder = load_reference(case.state_dict, case.config)
    assert not encoder.training
    case.close(encoder(case.tensors["input"]), "output")
    assert encoder.missing_keys == () and set(encoder.unused_keys) == {"norm.weight", "norm.bias"}
    if "input_short" in case.tensors:
        case.close(encoder(case.tensors["input_short"]), "output_short")


@pytest.mark.parametrize("name", ENCODERS[1:])
def test_every_stage_equals_the_released_one(golden, name):
    case = golden(name)
    encoder = load_reference(case.state_dict, case.config)
    geometry = encoder.geometry(case.tensors["input"].shape[-1])
    seen = {}

    def record(key, level):
        return lambda _module, _inputs, out: seen.update({key: level.to_grid(out)})

    encoder.patch_embed.register_forward_hook(record("patch_embed_out", geometry.levels[0]))
    for number, stage in enumerate(encoder.layers):
        after = geometry.levels[min(number + 1, len(geometry.levels) - 1)]
        stage.register_forward_hook(record(f"stage{number}_out", after))
    for number, key in enumerate(("stage0_block0_out", "stage0_block1_out_shifted")):
        encoder.layers[0].blocks[number].register_forward_hook(record(key, geometry.levels[0]))
    encoder(case.tensors["input"])
    for key in seen:
        case.close(seen[key].movedim(1, -1) if "block" in key else seen[key], key)


@pytest.mark.parametrize("name", ["swift_encoder__a_pad_shift", "swift_encoder__c_patch6"])
def test_gradients_equal_the_released_encoder(golden, name):
    case = golden(name)
    encoder = load_reference(case.state_dict, case.config)
    (encoder(case.tensors["input"]) * case.tensors["loss_weight"]).sum().backward()
    ours = {key: parameter.grad for key, parameter in encoder.named_parameters()}
    assert ours.keys() == case.grads.keys() - {"norm.weight", "norm.bias"}
    for key, grad in ours.items():
        case.close(grad, case.grads[key])


def test_keys_of_a_lightning_checkpoint_lose_their_prefix(golden):
    case = golden("mini:swift_encoder__mini")
    wrapped = {f"model.{key}": value for key, value in case.state_dict.items()}
    wrapped["output_head.head.weight"] = torch.zeros(1, 12)
    encoder = load_reference(wrapped, {**case.config, "learning_rate": 1e-3})
    case.close(encoder(case.tensors["input"]), "output")
    assert "output_head.head.weight" in encoder.unused_keys


def test_a_renamed_a_missing_and_an_extra_key_are_all_named(golden):
    case = golden("mini:swift_encoder__mini")
    weights = case.state_dict
    weights["patch_embed.proj.weight"] = weights.pop("patch_embed.fc.weight")
    del weights["layers.0.downsample.norm.bias"]
    weights["layers.9.extra"] = torch.zeros(1)
    weights["layers.1.blocks.0.norm1.weight"] = torch.zeros(5)
    with pytest.raises(ReferenceMismatch) as error:
        load_reference(weights, case.config)
    missing, unexpected, shapes = str(error.value).split(". ")[1:]
    assert "patch_embed.fc.weight" in missing and "layers.0.downsample.norm.bias" in missing
    assert "patch_embed.proj.weight" in unexpected and "layers.9.extra" in unexpected
    assert "layers.1.blocks.0.norm1.weight (5,) instead of (12,)" in shapes


@pytest.mark.parametrize("extra", ["layers.0.blocks.0.mamba.D", "decoder_pred.bias"])
def test_a_key_too_many_is_refused(golden, extra):
    case = golden("mini:swift_encoder__mini")
    with pytest.raises(ReferenceMismatch, match=f"Unexpected: \\['{extra}'\\]"):
        load_reference({**case.state_dict, extra: torch.zeros(1)}, case.config)


def test_missing_hyperparameters_are_named(golden):
    case = golden("mini:swift_encoder__mini")
    config = {key: value for key, value in case.config.items() if key not in ("num_heads", "window_size")}
    with pytest.raises(ReferenceMismatch, match="num_heads, window_size"):
        load_reference(case.state_dict, config)
