"""Operations against torch's own counter, memory against what autograd keeps, the paper's shape against its figures."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import gelu
from torch.utils.flop_counter import FlopCounterMode

from neurostorm.model.autoencoder import MaskedAutoencoder
from neurostorm.model.config import SwinConfig
from neurostorm.model.cost import clip_cost, copy_rate, measured_peak
from neurostorm.model.encoder import SwinEncoder
from neurostorm.model.masking.masks import MaskConfig
from neurostorm.model.mixers import scan_kernel
from neurostorm.model.ops.mlp import Mlp

# Neither space nor frames are a multiple of the window: "paper" pads both, "clean" cuts windows at both edges.
SMALL = SwinConfig((8, 12, 8, 5), (2, 2, 2, 1), embed_dim=16, depths=(2, 2), heads=(2, 4), window=(2, 4, 2, 2))
PAPER = SwinConfig((96, 96, 96, 20), full_last=True, layout="paper")
SHAPES = {
    "dense": {},
    "padded": {"layout": "paper"},
    "brain": {"tokens": "brain"},
    "padded-brain": {"tokens": "brain", "layout": "paper"},
    "full-last": {"layout": "paper", "full_last": True},
}


def shape(name, mixer):
    return replace(SMALL, mixer=mixer, **SHAPES[name])


def brain():
    mask = torch.zeros(8, 12, 8, dtype=torch.bool)
    mask[1:7, 3:, 1:5] = True
    return mask


def build(kind, config):
    torch.manual_seed(0)
    if kind == "encoder":
        return SwinEncoder(config, brain=brain())
    return MaskedAutoencoder(config, MaskConfig("random"), brain=brain())


def loss_of(model, volume):
    return model(volume).loss if isinstance(model, MaskedAutoencoder) else model(volume).square().sum()


def counted(model, backward=False):
    """Operations that torch counts in a pass, by operator; attention runs as the products that it consists of."""
    volume = torch.randn(1, 1, *model.config.img_size)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        loss = loss_of(model, volume)
        if backward:
            loss.backward()
    found = {str(operator).removeprefix("aten."): n for operator, n in counter.get_flop_counts()["Global"].items()}
    return SimpleNamespace(
        linear=found.get("mm", 0) + found.get("addmm", 0),
        batched=found.get("bmm", 0) + found.get("baddbmm", 0),
        total=counter.get_total_flops(),
    )


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("kind", ["encoder", "mae"])
def test_attention_forward_and_backward_equal_torchs_count(kind, name, monkeypatch):
    # As the MLP runs on a GPU; what a CPU computes a second time is no part of the model's cost.
    monkeypatch.setattr(Mlp, "forward", lambda mlp, x: mlp.linear2(gelu(mlp.linear1(x))))
    model = build(kind, shape(name, "attention"))
    cost = clip_cost(model)
    forward = counted(model)
    assert (cost.forward.linear, cost.forward.attention) == (forward.linear, forward.batched)
    assert cost.train_flops == counted(model, backward=True).total
    assert cost.forward.scan == cost.forward.convolution == 0


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("kind", ["encoder", "mae"])
def test_matrix_products_around_a_scan_equal_torchs_count(kind, name):
    model = build(kind, shape(name, "mamba"))
    cost = clip_cost(model)
    assert cost.forward.linear == counted(model).linear
    assert cost.forward.attention == 0


@pytest.mark.parametrize("mixer", ["attention", "mamba"])
def test_prompts_are_rows_and_keys(mixer):
    model = SwinEncoder(replace(SMALL, mixer=mixer, prompts=3))
    cost, forward = clip_cost(model), counted(model)
    assert cost.forward.linear == forward.linear
    if mixer == "attention":
        assert cost.forward.attention == forward.batched


def test_a_scan_costs_what_it_does_to_each_token_channel_and_state():
    model = build("encoder", shape("padded", "mamba"))
    per_token = sum(
        # rows x 2C channels: 7 per state, 3 per channel, and 4 taps of the convolution
        rows * 2 * width * torch.tensor([7 * 16 + 3, 2 * 4])
        # both blocks of a stage scan the padded grid: 4 x 8 x 4 x 6, then 2 x 3 x 2 x 6 (one window along d, h, w)
        for rows, width in [(4 * 8 * 4 * 6, 16), (4 * 8 * 4 * 6, 16), (2 * 3 * 2 * 6, 32), (2 * 3 * 2 * 6, 32)]
    )
    cost = clip_cost(model)
    assert [cost.forward.scan, cost.forward.convolution] == per_token.tolist()


def kept_by_autograd(model):
    """Float values that a forward pass keeps for the backward pass, weights apart."""
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept = {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights and tensor.is_floating_point():
            kept[storage.data_ptr()] = (storage.nbytes() // 4, tensor)  # the tensor lives on, its address stays taken
        return tensor

    volume = torch.randn(1, 1, *model.config.img_size)
    with saved_tensors_hooks(keep, lambda tensor: tensor):
        loss_of(model, volume)
    return sum(values for values, _ in kept.values())


@pytest.mark.parametrize("name", ["dense", "padded", "brain"])
@pytest.mark.parametrize("mixer", ["attention", "mamba"])
@pytest.mark.parametrize("kind", ["encoder", "mae"])
@pytest.mark.parametrize("kernel", [True, False])
def test_kept_activations_are_those_that_autograd_keeps(kind, mixer, name, kernel, monkeypatch):
    model = build(kind, shape(name, mixer))
    with monkeypatch.context() as patch:  # without the kernel a scan keeps a state every few tokens
        patch.setattr(scan_kernel, "applies_to", lambda *_: False)
        found, expected = clip_cost(model).kept_values, kept_by_autograd(model)
    few = 0.02 * expected
    if kernel:
        found, expected = clip_cost(model).kept_values, kept_by_autograd(model)
    assert found == pytest.approx(expected, abs=few, rel=0)


def paper(kind, **changes):
    with torch.device("meta"):
        return (SwinEncoder if kind == "encoder" else MaskedAutoencoder)(
            replace(PAPER, **changes), **({} if kind == "encoder" else {"loss_on": "all"})
        )


def test_the_released_mambas_figures():
    encoder, mae = clip_cost(paper("encoder", mixer="mamba")), clip_cost(paper("mae", mixer="mamba"))
    assert encoder.parameters == 5_173_020 and mae.parameters == 7_712_964
    products = [cost.forward.linear + cost.forward.convolution for cost in (encoder, mae)]
    assert products[0] == pytest.approx(17.7e9, rel=0.005)
    assert products[1] - products[0] == pytest.approx(16.9e9, rel=0.005)
    assert encoder.forward.scan == pytest.approx(2.0e9, rel=0.02)
    assert mae.forward.scan - encoder.forward.scan == pytest.approx(1.95e9, rel=0.005)


def test_swifts_figure_but_for_the_pairs_that_its_mask_discards():
    cost = clip_cost(paper("encoder"))
    windows = [(81920, 256, 36), (81920, 256, 36), (10240, 256, 72), (10240, 256, 72)]
    windows += [(1280, 256, 144)] * 6 + [(160, 32, 288)] * 2
    released = sum(4 * tokens * keys * width for tokens, keys, width in windows)
    assert cost.forward.linear + released == pytest.approx(22.8e9, rel=0.005)
    assert 0.75 * released < cost.forward.attention < 0.85 * released  # rolled windows are cut here, not masked


def test_cost_needs_no_memory_and_no_device():
    real = build("mae", shape("brain", "attention"))
    mask = brain()
    with torch.device("meta"):
        shadow = MaskedAutoencoder(real.config, MaskConfig("random"), brain=mask)
    assert shadow.patch_embed.fc.weight.is_meta
    assert clip_cost(shadow) == clip_cost(real)


def test_shorter_clips_cost_less():
    model = build("encoder", shape("dense", "attention"))
    whole, part = clip_cost(model), clip_cost(model, 1)
    assert whole.tokens == 5 * part.tokens and whole.forward.linear == 5 * part.forward.linear
    assert whole.forward.attention > 5 * part.forward.attention  # windows of one frame have fewer keys
    assert whole.parameters == part.parameters


def test_bytes_of_a_step():
    cost = clip_cost(build("encoder", shape("dense", "attention")))
    assert cost.kept_bytes(2) * 2 == cost.kept_bytes() == 4 * cost.kept_values
    assert cost.state_bytes == 16 * cost.parameters
    per_clip = cost.moved_bytes(3) - cost.moved_bytes(2)
    assert per_clip == 5 * cost.kept_bytes() and cost.moved_bytes(0) == 40 * cost.parameters


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_machines_rates_are_upper_bounds(dtype):
    rate = measured_peak("cpu", dtype)
    assert 1e8 < rate < 1e15
    assert 1e8 < copy_rate("cpu") < 1e13
