import pytest
import torch
from torch.nn.functional import gelu

from neurostorm.model.ops import mlp
from neurostorm.model.ops.mlp import Mlp


def plain(layer, x):
    return layer.linear2(gelu(layer.linear1(x)))


@pytest.mark.parametrize("rows_per_block", [1, 3, 100])
def test_blocks_of_rows_equal_the_two_linear_layers(rows_per_block, monkeypatch):
    monkeypatch.setattr(mlp, "_CACHED_VALUES", 20 * rows_per_block)
    layer = Mlp(5, 20).double()
    x = torch.randn(2, 7, 5, dtype=torch.float64, requires_grad=True)
    twin, weight = x.detach().clone().requires_grad_(), torch.randn(2, 7, 5, dtype=torch.float64)
    ours, theirs = layer(x), plain(layer, twin)
    assert torch.allclose(ours, theirs, atol=1e-13)
    inputs = [x, *layer.parameters()], [twin, *layer.parameters()]
    grads = [torch.autograd.grad((y * weight).sum(), i) for y, i in zip((ours, theirs), inputs, strict=True)]
    for a, b in zip(*grads, strict=True):
        assert torch.allclose(a, b, atol=1e-12)


def test_frozen_weights_pass_gradients_on_and_get_none():
    layer, x = Mlp(5, 20).requires_grad_(False), torch.randn(3, 5, requires_grad=True)
    layer(x).sum().backward()
    expected = torch.autograd.grad(plain(layer, x).sum(), x)[0]
    assert torch.allclose(x.grad, expected, atol=1e-6) and all(p.grad is None for p in layer.parameters())


def test_under_autocast_it_takes_the_dtype_that_linear_layers_take():
    layer, x = Mlp(8, 32), torch.randn(64, 8)
    with torch.autocast("cpu", torch.bfloat16):
        ours, theirs = layer(x), plain(layer, x)
    assert ours.dtype == theirs.dtype == torch.bfloat16
    assert torch.allclose(ours.float(), theirs.float(), atol=2e-2)
    ours.float().square().sum().backward()
    assert all(p.grad.dtype == torch.float32 for p in layer.parameters())


def test_the_hidden_layer_is_not_kept():
    layer, kept = Mlp(4, 64), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t):
        layer(torch.randn(100, 4, requires_grad=True))
    assert max(kept) <= 400
