import dataclasses
import functools

import pytest
import torch
from torch.nn.functional import cross_entropy

from neurostorm.model.autoencoder import MaskedAutoencoder
from neurostorm.model.config import SwinConfig
from neurostorm.model.encoder import SwinEncoder
from neurostorm.model.heads.adapt import METHODS, AttentionPool, adapt
from neurostorm.model.heads.pooled import build_head
from neurostorm.model.masking.masks import MaskConfig
from neurostorm.model.mixers import MIXERS
from neurostorm.model.strd.dropout import StrdConfig

TINY = SwinConfig((8, 8, 8, 4), (2, 2, 2, 1), embed_dim=8, depths=(2, 1), heads=(1, 2), window=(2, 2, 2, 2))
PARTS = {
    "linear": {"head"},
    "attention": {"pool", "head"},
    "tpt": {"prompts", "head"},
    "full": {"backbone", "head"},
}


def tiny(mixer="attention", **fields):
    torch.manual_seed(0)
    return SwinEncoder(dataclasses.replace(TINY, mixer=mixer, drop_path=0.5, **fields))


def classifier(classes=3, version="v1"):
    torch.manual_seed(1)
    return build_head("classification", 16, classes, version, tokens=32, depth=1, heads=2)


def clips(count=2, frames=4):
    return torch.randn(count, 1, 8, 8, 8, frames, generator=torch.Generator().manual_seed(2))


def corner():
    """A brain mask that leaves one half of the last stage's grid without tokens."""
    brain = torch.zeros(8, 8, 8, dtype=torch.bool)
    brain[:4, :6, 2:] = True
    return brain


def same(a, b):
    """Equal to rounding: copies of weights may lie differently in memory, and then sum in another order."""
    return torch.allclose(a, b, atol=1e-5)


def part_of(name):
    if name.endswith(".prompt"):
        return "prompts"
    return {"encoder": "backbone"}.get(name.split(".")[0], name.split(".")[0])


@pytest.mark.parametrize("mixer", MIXERS)
@pytest.mark.parametrize("method", METHODS)
def test_each_method_trains_what_it_says(method, mixer):
    model = adapt(tiny(mixer), classifier(), method, prompts=3)
    named = list(model.trainable_parameters())
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    optimizer = torch.optim.AdamW(named, lr=0.1, weight_decay=0.1)
    cross_entropy(model(clips(3)), torch.arange(3)).backward()
    optimizer.step()
    changed = {name for name, parameter in model.named_parameters() if not torch.equal(parameter, before[name])}
    assert changed == {name for name, _ in named} == {name for name in before if part_of(name) in PARTS[method]}
    for name, parameter in model.named_parameters():
        assert parameter.requires_grad == (name in changed) and (parameter.grad is not None) == (name in changed)


@pytest.mark.parametrize("method", METHODS)
def test_counts_are_those_of_the_trained_parameters(method):
    model = adapt(tiny(), classifier(), method, prompts=3)
    expected = dict.fromkeys(("backbone", "prompts", "pool", "head"), 0)
    expected["head"] = 3 * 16 + 3
    if method == "tpt":
        expected["prompts"] = 3 * (2 * 8 + 16)
    if method == "attention":
        expected["pool"] = 16 + 16 + 16 + 16 * 16 + 16 * 16 + 16  # query, norm, key, value
    if method == "full":
        expected["backbone"] = sum(parameter.numel() for parameter in tiny().parameters())
    assert model.trainable_counts == expected
    assert model.trainable_count == sum(expected.values())


@pytest.mark.parametrize(("prompts", "numbers"), [(50, 82_800), (1, 1_656)])
def test_paper_shape_has_the_released_number_of_prompts(prompts, numbers):
    with torch.device("meta"):
        encoder = SwinEncoder(SwinConfig((96, 96, 96, 20), full_last=True, mixer="mamba"))
        model = adapt(encoder, build_head("classification", 288, 2), "tpt", prompts=prompts)
    assert model.trainable_counts == {"backbone": 0, "prompts": numbers, "pool": 0, "head": 289}
    assert model.encoder.layers[2].blocks[5].prompt.shape == (1, prompts, 144)


@pytest.mark.parametrize("method", ["linear", "attention", "tpt"])
def test_a_frozen_backbone_stays_in_eval_mode(method):
    model = adapt(tiny(), classifier(), method).train()
    assert model.training and model.head.training and not any(m.training for m in model.encoder.modules())
    assert same(model(clips()), model.eval()(clips()))  # no drop path


def test_a_trained_backbone_drops_paths_in_training_only():
    model = adapt(tiny(), classifier(), "full")
    assert all(module.training for module in model.modules())
    assert not same(model(clips()), model(clips()))
    assert same(model.eval()(clips()), model(clips()))


@pytest.mark.parametrize("method", ["linear", "attention"])
def test_a_frozen_backbone_keeps_no_activations(method):
    kept = []
    model = adapt(tiny(), classifier(), method)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.shape[-1]) or t, lambda t: t):
        features = model.features(clips().requires_grad_())
    assert not kept and not features.requires_grad


@pytest.mark.parametrize("mixer", MIXERS)
def test_tuned_prompts_get_gradients_through_the_frozen_backbone(mixer):
    model = adapt(tiny(mixer), classifier(), "tpt", prompts=2)
    model(clips()).square().sum().backward()
    prompts = [parameter for name, parameter in model.named_parameters() if name.endswith(".prompt")]
    assert len(prompts) == 3 and all(prompt.grad.abs().max() > 0 for prompt in prompts)
    recomputing = adapt(tiny(mixer), classifier(), "tpt", prompts=2)
    recomputing.load_state_dict(model.state_dict())
    recomputing.encoder.activation_checkpointing = True
    recomputing(clips()).square().sum().backward()
    again = [parameter for name, parameter in recomputing.named_parameters() if name.endswith(".prompt")]
    assert all(torch.allclose(a.grad, b.grad, atol=1e-7) for a, b in zip(prompts, again, strict=True))


@pytest.mark.parametrize("mixer", MIXERS)
def test_tuning_without_prompts_is_a_linear_probe_and_prompts_change_outputs(mixer):
    encoder, head = tiny(mixer), classifier()
    plain = head(encoder.eval()(clips()))
    assert same(adapt(encoder, head, "linear")(clips()), plain)
    assert same(adapt(encoder, head, "tpt", prompts=0)(clips()), plain)
    assert not adapt(encoder, head, "tpt", prompts=0).features(clips()).requires_grad
    assert not same(adapt(encoder, head, "tpt", prompts=4)(clips()), plain)


@pytest.mark.parametrize("method", METHODS)
def test_the_given_encoder_stays_as_it_is(method):
    encoder = tiny().train()
    before = {name: parameter.detach().clone() for name, parameter in encoder.named_parameters()}
    model = adapt(encoder, classifier(), method)
    with torch.no_grad():
        for parameter in model.encoder.parameters():
            parameter.add_(1.0)
    assert encoder.training and encoder.config.prompts == 0
    for name, parameter in encoder.named_parameters():
        assert parameter.requires_grad and torch.equal(parameter, before[name])


@pytest.mark.parametrize("first", METHODS)
@pytest.mark.parametrize("second", METHODS)
def test_an_earlier_adaptation_leaves_nothing_behind(first, second):
    encoder = tiny()
    used = adapt(encoder, classifier(), first, prompts=3)
    again, fresh = (adapt(e, classifier(), second, prompts=2) for e in (used.encoder, encoder))
    flags, expected = ({n: (p.shape, p.requires_grad) for n, p in m.named_parameters()} for m in (again, fresh))
    assert flags == expected
    assert [m.training for m in again.modules()] == [m.training for m in fresh.modules()]
    if second not in ("tpt", "attention"):  # these draw anew
        assert same(again.eval()(clips()), fresh.eval()(clips()))


@pytest.mark.parametrize("method", METHODS)
def test_the_encoder_of_an_autoencoder_is_taken_without_redundancy_dropout(method):
    mae = MaskedAutoencoder(TINY, MaskConfig("random", 0.5), StrdConfig(True), loss_on="all")
    model = adapt(mae, classifier(), method, prompts=2)
    assert type(model.encoder) is SwinEncoder and not model.encoder.strd_config.enabled
    assert same(model.train()(clips()), model(clips()))
    assert mae.strd_config.enabled and mae.config.prompts == 0
    assert all(parameter.requires_grad for name, parameter in mae.named_parameters() if "mask_token" not in name)


@pytest.mark.parametrize("tokens", ["dense", "brain"])
@pytest.mark.parametrize("frames", [4, 3])
def test_features_are_the_tokens_that_exist_in_raster_order(tokens, frames):
    encoder = SwinEncoder(dataclasses.replace(TINY, tokens=tokens), brain=corner()).eval()
    model, volume = adapt(encoder, classifier(), "linear"), clips(frames=frames)
    grid = encoder(volume)
    features = model.features(volume)
    exists = (grid != 0).any(1).any(0)
    assert exists.all() == (tokens == "dense")
    assert same(features, grid[:, :, exists].mT)
    assert same(model.features(encoder.to_patches(volume)), features)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("version", ["v1", "v2", "v3"])
def test_heads_run_on_cached_features(method, version):
    model = adapt(tiny(), classifier(version=version), method, prompts=2).eval()
    expected, features = model(clips()), model.features(clips())
    assert same(model.from_features(features), expected)
    assert torch.allclose(model.from_features(features.half()), expected, atol=1e-2)


def test_a_linear_probe_runs_on_cached_averages():
    model = adapt(tiny(), classifier(), "linear")
    assert same(model.from_features(model.features(clips()).mean(1)), model(clips()))
    with pytest.raises(ValueError, match=r"features of shape \(2, 16\): attention pools tokens"):
        adapt(tiny(), classifier(), "attention").from_features(torch.randn(2, 16))


def fitted_accuracy(method, features, labels, steps):
    """Accuracy on the second half of ``features`` of what was trained on the first."""
    model = adapt(tiny(), classifier(2), method)
    optimizer = torch.optim.AdamW(model.trainable_parameters(), lr=1e-2)
    half = len(labels) // 2
    for _ in range(steps):
        optimizer.zero_grad()
        logits = model.from_features(features[:half]).squeeze(1)
        torch.nn.functional.binary_cross_entropy_with_logits(logits, labels[:half]).backward()
        optimizer.step()
    with torch.no_grad():
        correct = (model.from_features(features[half:]).squeeze(1) > 0) == (labels[half:] > 0)
    return correct.float().mean().item()


def test_a_linear_probe_learns_what_shifts_all_tokens():
    torch.manual_seed(5)
    labels = torch.randint(2, (64,)).float()
    volume = torch.randn(64, 1, 8, 8, 8, 2) + 0.3 * (labels - 0.5)[:, None, None, None, None, None]
    features = adapt(tiny(), classifier(2), "linear").features(volume)
    assert fitted_accuracy("linear", features, labels, 300) > 0.95


def test_attention_finds_a_label_that_sits_in_one_token():
    torch.manual_seed(6)
    labels, tokens = torch.randint(2, (512,)).float(), torch.randn(512, 32, 16)
    place = torch.randint(32, (512,))
    mark = torch.zeros(512, 16)
    mark[:, 0] = 6.0  # which token it is; what it says is weak against the sum of the others
    mark[:, 1] = 4.0 * labels - 2.0
    tokens[torch.arange(512), place] += mark
    accuracy = functools.partial(fitted_accuracy, features=tokens, labels=labels, steps=150)
    attended, averaged = accuracy("attention"), accuracy("linear")
    assert attended > 0.85 and averaged < 0.65


def test_attention_weighs_tokens_by_its_queries():
    pool = AttentionPool(4, heads=2)
    tokens = torch.randn(3, 5, 4)
    with torch.no_grad():
        pool.query.zero_()
        even = pool.value(pool.norm(tokens)).mean(1, keepdim=True)
        assert torch.allclose(pool(tokens), even, atol=1e-6)
        pool.query[0] = 100 * torch.tensor([1.0, 0.0])
        pool.key.weight.copy_(torch.eye(4))
    best = pool.norm(tokens)[:, :, 0].argmax(1)
    chosen = pool.value(pool.norm(tokens))[torch.arange(3), best]
    pooled = pool(tokens)[:, 0]
    assert torch.allclose(pooled[:, :2], chosen[:, :2], atol=0.05)  # the first head
    assert torch.allclose(pooled[:, 2:], even[:, 0, 2:], atol=1e-6)  # the second, whose query is still zero


@pytest.mark.parametrize("mixer", MIXERS)
@pytest.mark.parametrize("method", METHODS)
def test_bfloat16_autocast_runs_forward_and_backward(method, mixer):
    model = adapt(tiny(mixer), classifier(), method, prompts=2)
    with torch.autocast("cpu", torch.bfloat16):
        half = model.eval()(clips())
        cross_entropy(model.train()(clips()), torch.arange(2)).backward()
    full = model.eval()(clips())
    assert (half - full).abs().max() < 0.05 * full.abs().max() + 0.05
    assert all(parameter.grad.isfinite().all() for _, parameter in model.trainable_parameters())


@pytest.mark.parametrize("method", METHODS)
def test_the_head_may_have_another_type_than_the_backbone(method):
    for encoder, head in ((tiny().bfloat16(), classifier()), (tiny(), classifier().double())):
        dtype = next(head.parameters()).dtype
        assert adapt(encoder, head, method, prompts=2)(clips()).dtype == dtype


@pytest.mark.parametrize(
    ("head", "method", "prompts", "message"),
    [
        (classifier(), "lora", 50, "method = 'lora': one of linear, attention, tpt, full"),
        (classifier(), "tpt", -1, "prompts = -1"),
        (build_head("regression", 8, 1), "linear", 0, "head of width 8: the encoder's features have width 16"),
    ],
)
def test_impossible_adaptations_are_refused_by_name(head, method, prompts, message):
    with pytest.raises(ValueError, match=message):
        adapt(tiny(), head, method, prompts=prompts)
