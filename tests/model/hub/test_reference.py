import pytest
import torch
from safetensors.torch import save_file

from neurostorm.model.config import SwinConfig
from neurostorm.model.hub.reference import _FIELDS, ReferenceEncoder, ReferenceMae, ReferenceMismatch, load_reference

ENCODERS = [
    "mini:swift_encoder__mini",
    "mini:neurostorm_encoder__mini",
    *(
        f"{kind}_encoder__{case}"
        for kind in ("swift", "neurostorm")
        for case in ("a_pad_shift", "b_fullmsa_3stage", "c_patch6")
    ),
    "neurostorm_encoder__prompt",
    "neurostorm_encoder__prompt_fullmsa",
]
WITH_GRADS = ["swift_encoder__a_pad_shift", "swift_encoder__c_patch6", "neurostorm_encoder__a_pad_shift"]
WITH_GRADS += ["neurostorm_encoder__c_patch6", "neurostorm_encoder__prompt"]
MAES = [
    "mini:mae__mini_random",
    "mini:mae__mini_window",
    "mae__random_random",
    "mae__random_random_padT",
    "mae__window_random",
    "mae__window_random_fw2",
    "mae__atlas_random",
    "mae__strd_window_random",
]
UNUSED = {"norm.weight", "norm.bias"}  # the released SwiFT has them and never calls them


def load(case):
    """The released module; where the released run drew STRD, in training mode with its seed set."""
    module = load_reference(case.state_dict, case.config)
    assert not module.training
    if case.config.get("use_strd"):
        module.train()
        torch.manual_seed(case.seed)
    return module


@pytest.mark.parametrize("name", ENCODERS)
def test_outputs_equal_the_released_encoder(golden, name):
    case = golden(name)
    encoder = load(case)
    assert type(encoder) is ReferenceEncoder and encoder.config.layout == "paper"
    case.close(encoder(case.tensors["input"]), "output")
    assert encoder.missing_keys == () and set(encoder.unused_keys) == case.state_dict.keys() & UNUSED
    if "input_short" in case.tensors:
        case.close(encoder(case.tensors["input_short"]), "output_short")


@pytest.mark.parametrize("name", [name for name in ENCODERS if "mini:" not in name] + MAES[2:])
def test_every_stage_equals_the_released_one(golden, name):
    case = golden(name)
    module = load(case)
    levels = module.geometry(case.tensors["input"].shape[-1]).levels
    seen = {}

    def record(key, level):
        return lambda _module, _inputs, out: seen.update({key: level.to_grid(out)})

    module.patch_embed.register_forward_hook(record("patch_embed_out", levels[0]))
    for number, stage in enumerate(module.layers):
        stage.register_forward_hook(record(f"stage{number}_out", levels[min(number + 1, len(levels) - 1)]))
    for number, key in enumerate(("stage0_block0_out", "stage0_block1_out_shifted")):
        module.layers[0].blocks[number].register_forward_hook(record(key, levels[0]))
    if isinstance(module, ReferenceMae):
        module.first_patch_expanding.register_forward_hook(record("first_expand_out", levels[-2]))
        for number, stage in enumerate(module.layers_up):
            stage.register_forward_hook(record(f"up{number}_out", levels[max(0, len(levels) - 3 - number)]))
        module(case.tensors["input"], mask=case.tensors["mask"])
        assert "up2_out" in seen
    else:
        module.feature_tokens(module.to_patches(case.tensors["input"]))
    for key, value in seen.items():
        case.close(value.movedim(1, -1) if "block" in key or "expand" in key else value, key)


@pytest.mark.parametrize("name", WITH_GRADS)
def test_gradients_equal_the_released_encoder(golden, name):
    case = golden(name)
    encoder = load(case)
    (encoder(case.tensors["input"]) * case.tensors["loss_weight"]).sum().backward()
    ours = {key: parameter.grad for key, parameter in encoder.named_parameters()}
    assert ours.keys() == case.grads.keys() - UNUSED
    for key, grad in ours.items():
        case.close(grad, case.grads[key])


@pytest.mark.parametrize("name", MAES)
def test_autoencoder_equals_the_released_one(golden, name):
    case = golden(name)
    mae = load(case)
    assert type(mae) is ReferenceMae and mae.missing_keys == () == mae.unused_keys
    out = mae(case.tensors["input"], mask=case.tensors["mask"])
    case.close(out.prediction, "pred")
    case.close(out.latent, "latent")
    case.close(out.loss[None], "loss")
    assert out.masked_fraction.item() == pytest.approx(case.tensors["mask"].float().mean().item())


@pytest.mark.parametrize("name", ["mae__random_random", "mae__window_random", "mae__strd_window_random"])
def test_gradients_equal_the_released_autoencoder(golden, name):
    case, grads = golden(name), golden(f"{name}_grads").grads
    mae = load(case)
    mae(case.tensors["input"], mask=case.tensors["mask"]).loss.backward()
    for key, parameter in mae.named_parameters():
        if parameter.requires_grad:
            case.close(parameter.grad, grads[key])
        else:
            assert not grads[key].any()


def test_released_strd_drops_the_same_tokens(golden):
    case = golden("mae__strd_window_random")
    mae = load(case)
    out = mae(case.tensors["input"], mask=case.tensors["mask"])
    keeps = [case.tensors[f"strd0{number}_keep"].float() for number in range(8)]
    dropped = [1 - torch.cat([a.flatten(), b.flatten()]).mean() for a, b in zip(keeps[::2], keeps[1::2], strict=True)]
    assert torch.allclose(out.strd_rates, torch.stack(dropped), atol=1e-6) and out.strd_rates[1] > 0.03


def names_of(config, released):
    """Parameter and buffer names of our model of a released default configuration, on the meta device."""
    keys = {key: torch.empty(shape, device="meta") for key, (shape, _) in released.items()}
    with torch.device("meta"):
        return load_reference(keys, config).state_dict()


@pytest.mark.parametrize(
    ("name", "keys", "parameters"),
    [
        ("NeuroSTORMMAE_fw4", 409, 7_712_964),
        ("NeuroSTORMMAE_fw2", 409, 7_712_964),
        ("NeuroSTORM_fw4", 223, 5_173_020),
        ("NeuroSTORM_fw4_prompt50", 235, 5_255_820),
        ("NS_SwiFT_fw4", 163, 4_314_636),
        ("SwiFT_SwinTransformer4D_fw4", 163, 4_314_636),
    ],
)
def test_default_models_have_the_released_names_shapes_and_counts(golden_names, name, keys, parameters):
    released = golden_names(name)
    ours = names_of(released["config"], released["state_dict"])
    expected = {key: tuple(shape) for key, (shape, _) in released["state_dict"].items() if key not in UNUSED}
    assert {key: tuple(value.shape) for key, value in ours.items()} == expected
    assert len(ours) == keys and sum(value.numel() for value in ours.values()) == parameters


def test_released_hyperparameters_map_both_ways():
    config = SwinConfig((8, 8, 8, 4))
    assert len(set(_FIELDS.values())) == len(_FIELDS)
    assert all(hasattr(config, field) for field in _FIELDS.values())


@pytest.fixture
def lightning(golden, tmp_path):
    """A Lightning-style checkpoint of the mini encoder with a head, on disk."""
    case = golden("mini:neurostorm_encoder__mini")
    weights = {f"model.{key}": value for key, value in case.state_dict.items()}
    weights["output_head.head.head.weight"] = torch.zeros(1, 12)
    content = {
        "state_dict": weights, "hyper_parameters": {**case.config, "learning_rate": 1e-3}, "epoch": 3,
        "optimizer_states": [{"state": {}}], "lr_schedulers": [], "loops": {"fit": 1}, "callbacks": {},
    }  # fmt: skip
    torch.save(content, tmp_path / "last.ckpt")
    return case, tmp_path / "last.ckpt"


def test_a_lightning_checkpoint_brings_its_hyperparameters(lightning):
    case, path = lightning
    encoder = load_reference(path)
    case.close(encoder(case.tensors["input"]), "output")
    assert encoder.unused_keys == ("output_head.head.head.weight",)
    with pytest.raises(ReferenceMismatch, match="Other shapes"):
        load_reference(path, {"embed_dim": 12})  # what is given goes before what is stored


def test_a_state_dict_file_and_a_safetensors_file_load(golden, tmp_path):
    case = golden("mini:mae__mini_window")
    torch.save(case.state_dict, tmp_path / "weights.pt")
    save_file(case.state_dict, tmp_path / "weights.safetensors")
    for name in ("weights.pt", "weights.safetensors"):
        mae = load_reference(tmp_path / name, case.config)
        case.close(mae(case.tensors["input"], mask=case.tensors["mask"]).prediction, "pred")


class Trap:
    """What a malicious checkpoint would hold: code that runs when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


def test_a_checkpoint_cannot_run_code(lightning, tmp_path):
    case, _ = lightning
    torch.save({"state_dict": case.state_dict, "hyper_parameters": Trap(tmp_path / "owned")}, tmp_path / "bad.ckpt")
    with pytest.raises(ReferenceMismatch, match=r"bad\.ckpt: refused, it holds more than tensors"):
        load_reference(tmp_path / "bad.ckpt", case.config)
    assert not (tmp_path / "owned").exists()


def test_files_without_weights_are_refused_by_name(tmp_path):
    (tmp_path / "text.ckpt").write_text("nothing")
    torch.save([1, 2], tmp_path / "list.ckpt")
    for name in ("text.ckpt", "list.ckpt", "absent.ckpt"):
        with pytest.raises(ReferenceMismatch, match=name):
            load_reference(tmp_path / name, {})


@pytest.mark.parametrize("name", ["mini:neurostorm_encoder__mini", "mini:mae__mini_window"])
@pytest.mark.parametrize("prefixed", [False, True])
def test_a_renamed_a_missing_and_an_extra_key_are_all_named(golden, name, prefixed):
    case = golden(name)
    weights = case.state_dict
    weights["patch_embed.proj.weight"] = weights.pop("patch_embed.fc.weight")
    del weights["layers.0.downsample.norm.bias"]
    weights["layers.9.extra"] = torch.zeros(1)
    weights["layers.1.blocks.0.norm1.weight"] = torch.zeros(5)
    if prefixed:
        weights = {f"model.{key}": value for key, value in weights.items()} | {"metric.total": torch.zeros(1)}
    with pytest.raises(ReferenceMismatch) as error:
        load_reference(weights, case.config)
    missing, unexpected, shapes = str(error.value).split(". ")[1:]
    assert "patch_embed.fc.weight" in missing and "layers.0.downsample.norm.bias" in missing
    assert "patch_embed.proj.weight" in unexpected and "layers.9.extra" in unexpected
    assert ("metric.total" in unexpected) == prefixed
    assert "layers.1.blocks.0.norm1.weight (5,) instead of (12,)" in shapes


@pytest.mark.parametrize("extra", ["layers.0.blocks.0.mamba.D", "decoder_pred.bias"])
def test_a_key_too_many_is_refused(golden, extra):
    case = golden("mini:swift_encoder__mini")
    with pytest.raises(ReferenceMismatch, match=f"Unexpected: \\['{extra}'\\]"):
        load_reference({**case.state_dict, extra: torch.zeros(1)}, case.config)


def test_mask_tokens_of_other_strategies_may_be_missing_and_are_named(golden):
    case = golden("mini:mae__mini_window")
    weights = case.state_dict
    del weights["mask_token"], weights["atlas_mask_token"]
    mae = load_reference(weights, case.config)
    assert mae.missing_keys == ("atlas_mask_token", "mask_token")
    case.close(mae(case.tensors["input"], mask=case.tensors["mask"]).prediction, "pred")
    with pytest.raises(ReferenceMismatch, match=r"Missing: \['mask_token'\]"):
        load_reference(weights, {**case.config, "spatial_mask": "random"})


@pytest.mark.parametrize(
    ("spatial", "time", "shape"),
    [("random", "tube", (1, 8**3 * 4 // 2)), ("window", "tube", (1, 4**3)), ("window", "random", (1, 4**3 * 2))],
)
def test_tube_masks_have_the_released_shapes_and_a_defined_loss(golden, spatial, time, shape):
    case = golden("mini:mae__mini_random")
    mae = load_reference(case.state_dict, {**case.config, "spatial_mask": spatial, "time_mask": time})
    mask = torch.arange(shape[1])[None] % 2
    out = mae(case.tensors["input"], mask=mask)
    assert out.masked_fraction.item() == 0.5
    hidden = out.mask.view(8, 8, 8, 4)
    volume, prediction = case.tensors["input"][0, 0], out.prediction[0, 0]
    assert out.loss.item() == pytest.approx((volume - prediction)[hidden].square().mean().item(), rel=1e-5)
    size = {("random", "tube"): (1, 1, 1, 2), ("window", "tube"): (2, 2, 2, 4), ("window", "random"): (2, 2, 2, 2)}
    blocks = mask.view([n // s for n, s in zip((8, 8, 8, 4), size[spatial, time], strict=True)]).bool()
    for axis, repeat in enumerate(size[spatial, time]):
        blocks = blocks.repeat_interleave(repeat, axis)
    assert torch.equal(hidden, blocks)


def test_a_mask_of_another_shape_is_refused(golden):
    case = golden("mini:mae__mini_window")
    with pytest.raises(ValueError, match=r"\(1, 100\): expected \(B, 2048\).*\(B, 128\)"):
        load_reference(case.state_dict, case.config)(case.tensors["input"], mask=torch.ones(1, 100))


def test_bad_hyperparameters_are_named(golden):
    case = golden("mini:mae__mini_random")
    config = {key: value for key, value in case.config.items() if key not in ("num_heads", "window_size")}
    with pytest.raises(ReferenceMismatch, match="num_heads, window_size"):
        load_reference(case.state_dict, config)
    with pytest.raises(ReferenceMismatch, match="spatial_mask = 'tube'"):
        load_reference(case.state_dict, {**case.config, "spatial_mask": "tube"})
