import logging
import math
import sys
import types

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import silu, softplus

from neurostorm.model.geometry.tokens import geometry_of
from neurostorm.model.mixers import mamba
from neurostorm.model.mixers.mamba import Mamba, mix_windows, mix_with_kernel
from neurostorm.model.strd.dropout import StageDropout, StrdConfig


def written_out(x: torch.Tensor, p: dict[str, torch.Tensor]) -> torch.Tensor:
    """The mixer as its definition reads, token by token, in the dtype of its arguments."""
    windows, tokens, _ = x.shape
    inner, states = p["A_log"].shape
    u, z = (x @ p["in_proj.weight"].T).split(inner, -1)
    padded = torch.cat([x.new_zeros(windows, 3, inner), u], 1)
    taps = p["conv1d.weight"][:, 0]
    u = silu(p["conv1d.bias"] + sum(taps[:, k] * padded[:, k : k + tokens] for k in range(4)))
    rank = p["dt_proj.weight"].shape[1]
    step, B, C = (u @ p["x_proj.weight"].T).split([rank, states, states], -1)
    delta = softplus(step @ p["dt_proj.weight"].T + p["dt_proj.bias"])
    h, y = x.new_zeros(windows, inner, states), []
    for t in range(tokens):
        decay = torch.exp(delta[:, t, :, None] * -p["A_log"].exp())
        h = decay * h + (delta[:, t] * u[:, t])[:, :, None] * B[:, t, None, :]
        y.append((h * C[:, t, None, :]).sum(-1))
    return ((torch.stack(y, 1) + p["D"] * u) * silu(z)) @ p["out_proj.weight"].T


def random_mixer(width: int, seed: int = 0) -> Mamba:
    """Every parameter off its initial value, so that each counts."""
    torch.manual_seed(seed)
    mixer = Mamba(width)
    with torch.no_grad():
        for parameter in mixer.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return mixer


def forward_backward(mixer: Mamba, x: torch.Tensor, weight: torch.Tensor) -> dict[str, torch.Tensor]:
    """Output, gradient of the input and of each parameter, of sum(output * weight)."""
    mixer.zero_grad()
    leaf = x.detach().clone().requires_grad_()
    output = mixer(leaf, None)
    (output * weight).sum().backward()
    return {"output": output.detach(), "input": leaf.grad} | {n: p.grad.clone() for n, p in mixer.named_parameters()}


def assert_near(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], tolerance: float) -> None:
    """Largest difference of each tensor within ``tolerance`` of its largest value."""
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        error, scale = (found[name].double() - tensor.double()).abs().max(), tensor.double().abs().max()
        assert error <= tolerance * scale, f"{name}: {error} at scale {scale}"


@settings(max_examples=8, deadline=None)
@given(st.integers(1, 5), st.integers(1, 40), st.sampled_from([4, 16, 20]))
def test_equals_the_definition_in_float64(windows, tokens, width):
    mixer = random_mixer(width, seed=tokens).double()
    x, weight = torch.randn(2, windows, tokens, width, dtype=torch.float64)
    found = forward_backward(mixer, x, weight)
    leaf = x.clone().requires_grad_()
    parameters = dict(mixer.named_parameters())
    output = written_out(leaf, parameters)
    gradients = torch.autograd.grad((output * weight).sum(), [leaf, *parameters.values()])
    assert_near(found, dict(zip(["output", "input", *parameters], [output.detach(), *gradients], strict=True)), 1e-9)


def test_gradcheck():
    mixer = random_mixer(2).double()
    x = torch.randn(2, 5, 2, dtype=torch.float64, requires_grad=True)
    parameters = dict(mixer.named_parameters())

    def mix(x, *values):
        return torch.func.functional_call(mixer, dict(zip(parameters, values, strict=True)), (x, None))

    assert torch.autograd.gradcheck(mix, (x, *parameters.values()), fast_mode=True)


@pytest.mark.parametrize("name", ["mamba_block__a", "mamba_block__b"])
def test_equals_the_released_block(golden, name):
    case = golden(name)
    mixer = Mamba(case.config["d_model"])
    mixer.load_state_dict(case.state_dict)
    found = forward_backward(mixer, case.tensors["input"], case.tensors["loss_weight"])
    case.close(found["output"], "output")
    case.close(found["output"], "output_float64")
    case.close(found["input"], "grad_input")
    assert case.grads.keys() == dict(mixer.named_parameters()).keys()
    for parameter, gradient in case.grads.items():
        case.close(found[parameter], gradient)


@pytest.mark.parametrize(("width", "rank"), [(36, 3), (72, 5), (144, 9), (288, 18)])
def test_parameters_are_named_and_shaped_as_released(width, rank):
    inner = 2 * width
    assert {name: tuple(parameter.shape) for name, parameter in Mamba(width, 3, False).named_parameters()} == {
        "A_log": (inner, 16), "D": (inner,), "in_proj.weight": (2 * inner, width), "conv1d.weight": (inner, 1, 4),
        "conv1d.bias": (inner,), "x_proj.weight": (rank + 32, inner), "dt_proj.weight": (inner, rank),
        "dt_proj.bias": (inner,), "out_proj.weight": (width, inner),
    }  # fmt: skip


def test_reset_scan_undoes_a_general_initialisation():
    mixer = Mamba(36)
    for parameter in mixer.parameters():
        torch.nn.init.zeros_(parameter)
    mixer.reset_scan()
    assert torch.allclose(mixer.A_log.exp(), torch.arange(1.0, 17).expand(72, 16))
    assert (mixer.D == 1).all()
    delta = softplus(mixer.dt_proj.bias)
    assert delta.min() >= 0.999e-3 and delta.max() <= 0.1001 and delta.log().std() > 1
    assert 0.4 < mixer.dt_proj.weight.abs().max() <= 3**-0.5
    assert (mixer.in_proj.weight == 0).all(), "the projections are not the scan's to initialise"


def test_windows_are_mixed_alone_whatever_the_blocks(monkeypatch):
    mixer, x = random_mixer(8), torch.randn(7, 20, 8)
    expected = forward_backward(mixer, x, torch.ones_like(x))
    monkeypatch.setitem(mamba._BLOCK_STATES, "cpu", 3 * 16 * 16)  # 3 windows at a time
    found = forward_backward(mixer, x, torch.ones_like(x))
    assert_near(found, expected, 1e-5)
    alone = torch.cat([mixer(window[None], None) for window in x])
    assert torch.allclose(found["output"], alone, atol=1e-6)


def test_tokens_reach_no_earlier_token():
    mixer, x = random_mixer(8), torch.randn(2, 50, 8)
    changed = x.clone()
    changed[:, 33] += 1
    before, after = mixer(x, None), mixer(changed, None)
    assert torch.equal(before[:, :33], after[:, :33])
    assert not torch.allclose(before[:, 33], after[:, 33])


def test_absent_tokens_at_the_end_change_nothing_before_them():
    mixer, x = random_mixer(8), torch.randn(2, 21, 8)
    padded = torch.cat([x, torch.zeros(2, 11, 8)], 1)
    weight = torch.cat([torch.ones(2, 21, 8), torch.zeros(2, 11, 8)], 1)
    found, expected = forward_backward(mixer, padded, weight), forward_backward(mixer, x, weight[:, :21])
    found["output"], found["input"] = found["output"][:, :21], found["input"][:, :21]
    assert_near(found, expected, 1e-6)


def test_bfloat16_and_autocast_stay_close_to_float32():
    mixer, x = random_mixer(16), torch.randn(3, 64, 16)
    weight = torch.randn_like(x)
    expected = forward_backward(mixer, x, weight)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        automatic = forward_backward(mixer, x, weight)
    assert automatic["output"].dtype == torch.bfloat16 and automatic["in_proj.weight"].dtype == torch.float32
    narrow = forward_backward(mixer.bfloat16(), x.bfloat16(), weight.bfloat16())
    assert all(tensor.dtype == torch.bfloat16 for tensor in narrow.values())
    for found in (automatic, narrow):
        assert_near(found, expected, 0.05)


def test_float64_stays_float64_under_autocast():
    mixer, x = random_mixer(8).double(), torch.randn(2, 20, 8, dtype=torch.float64)
    expected = forward_backward(mixer, x, torch.ones_like(x))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert_near(forward_backward(mixer, x, torch.ones_like(x)), expected, 0.0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bias", [-100.0, 1e3])
def test_extreme_steps_and_decays_stay_finite(bias, dtype):
    mixer = Mamba(8)
    with torch.no_grad():
        mixer.dt_proj.bias.fill_(bias)
        mixer.A_log.fill_(math.log(1e3))
    x = torch.randn(2, 300, 8, dtype=dtype)
    for name, tensor in forward_backward(mixer.to(dtype), x, torch.ones_like(x)).items():
        assert tensor.isfinite().all(), name


def test_keeps_a_state_every_few_tokens_and_the_input():
    mixer, x = Mamba(16), torch.randn(4, 128, 16, requires_grad=True)
    kept: dict[int, int] = {}

    def note(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.numel()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        mixer(x, None)
    states = 4 * 128 * 32 * 16
    weights = sum(parameter.numel() for parameter in mixer.parameters())
    assert sum(kept.values()) <= states / 16 + x.numel() + weights


def test_without_gradients_nothing_is_kept():
    mixer, x = random_mixer(8), torch.randn(2, 20, 8)
    expected = mixer(x, None)
    with torch.no_grad():
        output = mixer(x, None)
    assert output.grad_fn is None and torch.equal(output, expected)


@pytest.mark.parametrize("trained", ["input", "A_log", "D", "out_proj.weight", "dt_proj.bias"])
def test_only_what_is_trained_gets_a_gradient(trained):
    """Prompt tuning freezes the parameters and trains what comes before; partial freezing leaves single ones."""
    mixer, x = random_mixer(8), torch.randn(2, 20, 8)
    expected = forward_backward(mixer, x, torch.ones_like(x))[trained]
    mixer.zero_grad()
    mixer.requires_grad_(False)
    leaves = dict(mixer.named_parameters()) | {"input": x}
    leaves[trained].requires_grad_()
    mixer(x, None).sum().backward()
    assert torch.equal(leaves[trained].grad, expected)
    assert all(leaf.grad is None for name, leaf in leaves.items() if name != trained)


def test_no_windows_give_empty_output_and_zero_gradients():
    found = forward_backward(Mamba(8), torch.zeros(0, 20, 8), torch.zeros(0, 20, 8))
    assert found.pop("output").shape == found.pop("input").shape == (0, 20, 8)
    assert all((gradient == 0).all() for gradient in found.values())


def test_strd_drops_whole_tokens_of_the_output():
    window = (2, 2, 2, 2)
    bucket = geometry_of((2, 2, 2, 4), (window,), torch.device("cpu")).levels[0].windows(window, False).buckets[0]
    mixer, x = random_mixer(8), torch.randn(64, 16, 8)
    strd = StageDropout(StrdConfig(True))
    mixed, dropped = mixer(x, bucket), mixer(x, bucket, strd)
    gone = (dropped == 0).all(-1)
    assert torch.equal(dropped, mixed * ~gone.unsqueeze(-1))
    assert 0 < gone.float().mean() == strd.rate()


def kernel_written_out(u, delta, A, B, C, D=None, z=None, delta_bias=None, delta_softplus=False):
    """mamba_ssm's selective_scan_fn in torch: u, delta, z (windows, D, L), A (D, N), B, C (windows, N, L)."""
    assert delta_softplus and all(tensor.dtype == torch.float32 for tensor in (A, D, delta_bias))
    windows, channels, tokens = u.shape
    assert A.shape == (channels, 16) and B.shape == C.shape == (windows, 16, tokens) and z.shape == u.shape
    delta = softplus(delta + delta_bias[:, None])
    h, y = torch.zeros(windows, channels, 16), []
    for t in range(tokens):
        step = (delta[..., t] * u[..., t])[..., None] * B[:, None, :, t]
        h = torch.exp(delta[..., t, None] * A) * h + step
        y.append((h * C[:, None, :, t]).sum(-1))
    return (torch.stack(y, -1) + D[:, None] * u) * silu(z)


@pytest.fixture
def installed(monkeypatch):
    """Put a module in the place of mamba_ssm's; the look-up forgets what it found before and after."""

    def install(interface: types.ModuleType | None):
        monkeypatch.setattr(mamba.importlib.util, "find_spec", lambda name: object())
        monkeypatch.setitem(sys.modules, "mamba_ssm.ops.selective_scan_interface", interface)
        mamba._cuda_kernel.cache_clear()

    yield install
    mamba._cuda_kernel.cache_clear()


def test_kernel_of_mamba_ssm_is_called_with_its_layouts(installed):
    interface = types.ModuleType("selective_scan_interface")
    interface.selective_scan_fn = kernel_written_out
    installed(interface)
    mixer, x = random_mixer(20), torch.randn(3, 19, 20)
    output = mix_with_kernel(x, mixer.weights(), mamba._cuda_kernel())
    assert torch.allclose(output, mix_windows(x, mixer.weights()), atol=1e-5)


def test_broken_install_falls_back_with_one_warning(installed, caplog):
    installed(None)  # importing it raises
    with caplog.at_level(logging.WARNING):
        assert mamba._cuda_kernel() is None and mamba._cuda_kernel() is None
    assert len(caplog.records) == 1 and "mamba_ssm" in caplog.text


def test_not_installed_is_no_reason_to_warn(monkeypatch, caplog):
    monkeypatch.setattr(mamba.importlib.util, "find_spec", lambda name: None)
    mamba._cuda_kernel.cache_clear()
    assert mamba._cuda_kernel() is None and not caplog.records
    mamba._cuda_kernel.cache_clear()
