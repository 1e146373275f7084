import pytest
import torch
from einops import rearrange

from neurostorm.model.heads.pooled import KINDS, build_head, head_from_released

PREDICTIONS = ["cls_v1_bin", "cls_v1_multi", "cls_v2_multi", "cls_v3_multi", "reg_v1"]
BUILT = [(kind, version) for kind, versions in KINDS.items() for version in versions]


def released(golden, name):
    """A golden case, and the released head of that name in eval mode."""
    case = golden("heads")
    return case, head_from_released(case.group(f"{name}.sd."), heads=2)


def built(kind, version, outputs=5, width=12, tokens=24):
    return build_head(kind, width, outputs, version, tokens=tokens, depth=2, heads=2)


@pytest.mark.parametrize("name", PREDICTIONS)
def test_predictions_equal_the_released_ones(golden, name):
    case, head = released(golden, name)
    grid = case.tensors["input"]
    tokens = rearrange(grid, "b c d h w t -> b (d h w t) c")
    for features in (grid, tokens):
        case.close(head(features), f"{name}.out")
        if f"{name}.features" in case.tensors:
            case.close(head.features(features), f"{name}.features")


def test_embeddings_equal_the_released_ones_in_both_modes(golden):
    case, head = released(golden, "emb")
    case.close(head(case.tensors["input"]), "emb.out")
    case.close(head.train()(case.tensors["input"]), "emb.out_train")


@pytest.mark.parametrize(
    ("name", "arguments", "keywords"),
    [
        ("cls_v1_bin", ("classification", 24, 2), {}),
        ("cls_v1_multi", ("classification", 24, 7), {}),
        ("cls_v2_multi", ("classification", 24, 7, "v2"), {}),
        ("cls_v3_multi", ("classification", 24, 7, "v3"), {"tokens": 40, "depth": 2, "heads": 2}),
        ("reg_v1", ("regression", 24, 1), {}),
        ("emb", ("embedding", 24, 16), {}),
    ],
)
def test_built_heads_take_the_released_parameters(golden, name, arguments, keywords):
    case = golden("heads")
    head = build_head(*arguments, **keywords)
    head.load_state_dict(case.group(f"{name}.sd."))
    case.close(head.eval()(case.tensors["input"]), f"{name}.out")


def test_a_v3_head_has_the_released_size_by_default():
    head = build_head("classification", 288, 4, "v3", tokens=160)
    layers = head.head.transformer_encoder["layers"]
    assert len(layers) == 6 and layers[0].self_attn.num_heads == 8 and layers[0].linear1.out_features == 4 * 288
    assert not layers[0].norm_first and layers[0].activation is torch.nn.functional.relu
    assert not torch.equal(layers[0].linear1.weight, layers[1].linear1.weight)


@pytest.mark.parametrize(("kind", "version"), BUILT)
def test_kind_and_size_follow_from_the_parameters(kind, version):
    head, x = built(kind, version).eval(), torch.randn(3, 12, 2, 3, 2, 2)
    lightning = {f"output_head.{key}": value for key, value in head.state_dict().items()}
    for state_dict in (head.state_dict(), lightning | {"model.patch_embed.fc.bias": torch.zeros(12)}):
        again = head_from_released(state_dict, heads=2)
        assert type(again) is type(head) and torch.equal(again(x), head(x)) and not again.training


@pytest.mark.parametrize(("kind", "version"), BUILT)
def test_a_grid_counts_as_its_tokens_in_raster_order(kind, version):
    head, grid = built(kind, version).eval(), torch.randn(3, 12, 2, 3, 2, 2)
    tokens = torch.stack(
        [grid[:, :, d, h, w, t] for d in range(2) for h in range(3) for w in range(2) for t in range(2)], 1
    )
    assert torch.allclose(head(grid), head(tokens), atol=1e-6)
    assert head(grid).shape == (3, 5)


@pytest.mark.parametrize(("kind", "version"), [case for case in BUILT if case[1] != "v3"])
def test_heads_on_the_mean_take_the_mean_too(kind, version):
    head, tokens = built(kind, version).eval(), torch.randn(3, 24, 12)
    assert torch.allclose(head(tokens.mean(1)), head(tokens), atol=1e-6)
    assert torch.allclose(head(tokens[:, torch.randperm(24)]), head(tokens), atol=1e-6)


def test_v3_knows_where_its_tokens_are():
    head, tokens = built("classification", "v3").eval(), torch.randn(3, 24, 12)
    assert not torch.allclose(head(tokens.flip(1)), head(tokens), atol=1e-4)
    assert head(tokens[:, :6]).shape == (3, 5)
    with pytest.raises(ValueError, match="features of 25 tokens: this head has positions for 24"):
        head(torch.randn(3, 25, 12))
    with pytest.raises(ValueError, match=r"features of shape \(3, 12\): tokens"):
        head(tokens.mean(1))


def test_v2_is_linear_as_released():
    head, x, y = built("classification", "v2"), torch.randn(3, 24, 12), torch.randn(3, 24, 12)
    assert torch.allclose(head(x) + head(y) - head(x * 0), head(x + y), atol=1e-5)


def test_two_classes_have_one_logit_and_two_targets_two_outputs():
    x = torch.randn(4, 6, 12)
    for version in KINDS["classification"]:
        assert built("classification", version, outputs=2)(x).shape == (4, 1)
        assert built("classification", version, outputs=3)(x).shape == (4, 3)
    assert built("regression", "v1", outputs=2)(x).shape == (4, 2)


def test_embeddings_have_unit_length_also_of_a_single_clip():
    head = built("embedding", "v1")
    assert torch.allclose(head(torch.randn(4, 24, 12)).norm(dim=1), torch.ones(4))
    assert torch.allclose(head.eval()(torch.randn(1, 24, 12)).norm(dim=1), torch.ones(1))


@pytest.mark.parametrize(("kind", "version"), BUILT)
def test_bfloat16_autocast_stays_near_float32(kind, version):
    head, x = built(kind, version).eval(), torch.randn(3, 24, 12)
    with torch.autocast("cpu", torch.bfloat16):
        half = head(x)
    assert (half - head(x)).abs().max() < 0.05 * head(x).abs().max() + 0.01


def test_keys_that_fit_no_head_are_listed():
    state_dict = built("classification", "v2").state_dict()
    state_dict["head.hidden2.weight"] = state_dict.pop("head.hidden.bias")
    state_dict["head.head.bias"] = torch.zeros(6)
    with pytest.raises(ValueError) as error:
        head_from_released(state_dict)
    for part in ("Missing: ['head.hidden.bias']", "Unexpected: ['head.hidden2.weight']", "head.head.bias (6,) instead"):
        assert part in str(error.value)
    with pytest.raises(ValueError, match=r"no released head has these keys: \['model.norm.bias'\]"):
        head_from_released({"model.norm.bias": torch.zeros(3)})
    with pytest.raises(ValueError, match=r"head.head.weight of shape \(3,\): 2 axes"):
        head_from_released({"head.head.weight": torch.zeros(3)})


@pytest.mark.parametrize(
    ("arguments", "keywords", "message"),
    [
        (("segmentation", 12, 2), {}, "kind = 'segmentation': one of classification, regression, embedding"),
        (("regression", 12, 1, "v2"), {}, "version = 'v2': for regression one of v1"),
        (("classification", 12, 2, "v4"), {}, "version = 'v4': for classification one of v1, v2, v3"),
        (("classification", 12, 1), {}, "outputs = 1: for classification at least 1 and 2"),
        (("regression", 12, 0), {}, "outputs = 0: for regression"),
        (("embedding", 0, 8), {}, "width = 0"),
        (("classification", 12, 3, "v3"), {}, "tokens = None: v3 has a position per token"),
        (("classification", 12, 3, "v3"), {"tokens": 4}, "heads = 8: it must divide the features' width 12"),
        (("classification", 12, 3, "v3"), {"tokens": 4, "heads": 2, "depth": 0}, "depth = 0"),
    ],
)
def test_impossible_heads_are_refused_by_name(arguments, keywords, message):
    with pytest.raises(ValueError, match=message):
        build_head(*arguments, **keywords)
