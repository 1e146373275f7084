import numpy as np
import pytest
import torch

from neurostorm.model import strd
from neurostorm.model.geometry import dense_geometry
from neurostorm.model.strd import (
    StrdConfig,
    drop_probability,
    neighbourhood_score,
    redundancy_attention,
    token_drop_probability,
)

CPU = torch.device("cpu")


def bucket_of(window):
    """The one bucket of a grid that is a single window."""
    return dense_geometry(tuple(window), (tuple(window),), CPU).levels[0].windows(tuple(window), False).buckets[0]


def attention_reference(q, k, v, keep):
    """Dropped attention as autograd would do it, scores and all."""
    affinity = (q @ k.mT / q.shape[-1] ** 0.5).softmax(-1)
    return (affinity * keep) @ v


@pytest.mark.parametrize("name", ["strd__w2224_d24", "strd__w4444_d12_l3", "strd__w3331_emptyT"])
def test_scores_equal_the_released_ones(golden, name):
    case = golden(name)
    near = bucket_of(case.config["window"]).neighbours(case.config["l_spat"], case.config["l_temp"])
    affinity = strd._affinity(case.tensors["h"], case.tensors["h"])
    case.close(affinity, "A_hat")
    assert torch.equal(near.space[0], case.tensors["mask_s"].bool())
    assert torch.equal(near.time[0], case.tensors["mask_t"].bool())
    for mask, largest, total in ((near.space, "f_spat", "sum_s"), (near.time, "f_temp", "sum_t")):
        peak, row = neighbourhood_score(affinity, mask)
        case.close(peak, largest)
        case.close(row, case.tensors[total].squeeze(-1))
    case.close(drop_probability(affinity, near.space, near.time), "W")
    case.close(token_drop_probability(affinity, near.space, near.time), "score")


def test_neighbourhoods_equal_the_released_masks(golden):
    case = golden("strd_masks")
    for window, space, time in case.config["specs"]:
        near = bucket_of(window).neighbours(space, time)
        tokens = int(np.prod(window))
        for mask, kind in ((near.space, "s"), (near.time, "t")):
            packed = case.tensors[f"w{'x'.join(map(str, window))}_ls{space}_lt{time}_{kind}"].numpy()
            expected = np.unpackbits(packed)[: tokens**2].reshape(tokens, tokens).astype(bool)
            assert np.array_equal(mask[0].numpy(), expected), (window, space, time, kind)


def test_a_window_of_one_patch_has_no_spatial_redundancy_to_drop():
    near = bucket_of((1, 1, 1, 8)).neighbours(5, 5)
    h = torch.randn(3, 8, 4)
    assert near.time.any() and not drop_probability(strd._affinity(h, h), near.space, near.time).any()


@pytest.mark.parametrize("shifted", [False, True])
def test_gradients_equal_those_of_autograd_with_the_same_drops(shifted):
    table = dense_geometry((4, 2, 4, 4), ((2, 2, 2, 2),), CPU).levels[0].windows((2, 2, 2, 2), shifted)
    for bucket in table.buckets:
        near = bucket.neighbours(3, 3)
        windows, tokens = bucket.index.shape
        q, k, v = (torch.randn(2 * windows, 2, tokens, 3, dtype=torch.float64, requires_grad=True) for _ in range(3))
        torch.manual_seed(1)
        out, dropped = redundancy_attention(q, k, v, near)
        weight = torch.randn_like(out)
        grads = torch.autograd.grad((out * weight).sum(), (q, k, v))

        pattern = near.pattern.repeat(2)
        affinity = strd._affinity(q, k)
        chance = drop_probability(affinity, near.space[pattern][:, None], near.time[pattern][:, None])
        torch.manual_seed(1)
        keep = torch.rand_like(chance) >= chance
        expected = attention_reference(q, k, v, keep)
        assert torch.allclose(out, expected, atol=1e-12)
        assert dropped == (~keep).sum()
        for ours, plain in zip(grads, torch.autograd.grad((expected * weight).sum(), (q, k, v)), strict=True):
            assert torch.allclose(ours, plain, atol=1e-12)


def test_parts_of_the_windows_give_what_all_windows_together_give(monkeypatch):
    near = bucket_of((2, 2, 2, 2)).neighbours(1, 1)  # nobody is a neighbour, so nothing is drawn
    q, k, v = (torch.randn(5, 2, 16, 4, dtype=torch.float64, requires_grad=True) for _ in range(3))
    whole, _ = redundancy_attention(q, k, v, near)
    grads = torch.autograd.grad(whole.square().sum(), (q, k, v))
    monkeypatch.setattr(strd, "_parts", lambda keep: [slice(0, 2), slice(2, 4), slice(4, 6)])
    parts, _ = redundancy_attention(q, k, v, near)
    assert torch.allclose(parts, whole, atol=1e-14)
    for a, b in zip(torch.autograd.grad(parts.square().sum(), (q, k, v)), grads, strict=True):
        assert torch.allclose(a, b, atol=1e-13)


def test_elements_are_dropped_as_often_as_their_probability_says():
    near = bucket_of((2, 2, 2, 2)).neighbours(5, 5)
    q = torch.randn(1, 1, 16, 8).expand(4000, 1, 16, 8)
    chance = drop_probability(strd._affinity(q[:1], q[:1]), near.space, near.time)
    torch.manual_seed(0)
    _, dropped = redundancy_attention(q, q, q, near)
    assert dropped / (4000 * 256) == pytest.approx(chance.mean().item(), rel=0.05)


def test_between_forward_and_backward_only_booleans_are_as_large_as_the_scores():
    near = bucket_of((2, 2, 2, 4)).neighbours(5, 5)
    q, k, v = (torch.randn(6, 2, 32, 4, requires_grad=True) for _ in range(3))
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        redundancy_attention(q, k, v, near)
    large = [t.dtype for t in saved if t.numel() >= 6 * 2 * 32 * 32]
    assert large == [torch.bool]


@pytest.mark.parametrize("field", ["space", "time"])
def test_an_extent_below_one_is_refused(field):
    with pytest.raises(ValueError, match=f"strd.{field}"):
        StrdConfig(True, **{field: 0}).validate()
