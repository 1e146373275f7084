"""Optimizers by name: groups, AdamW as torch has it, Muon for hidden matrices, saved and restored."""

import copy
import typing

import pytest
import torch
from torch import nn

from neurostorm.config import Config
from neurostorm.config.base import ConfigError
from neurostorm.train.optimizer import OPTIMIZERS, WHOLE, MuonWithAdamW, build_optimizer, parameter_groups


def network(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    linear = {"patch_embed": (6, 8), "hidden": (8, 8), "pred": (8, 3)}
    return nn.ModuleDict({name: nn.Linear(*shape) for name, shape in linear.items()} | {"norm": nn.LayerNorm(8)})


def loss_of(model: nn.Module) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    x, y = torch.randn(32, 6, generator=generator), torch.randn(32, 3, generator=generator)
    hidden = model["hidden"](model["norm"](model["patch_embed"](x))).relu()
    return (model["pred"](hidden) - y).square().mean()


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int) -> list[float]:
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = loss_of(model)
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses


def test_decay_is_for_matrices_and_muon_for_those_of_hidden_layers() -> None:
    model = network()
    names = {parameter: name for name, parameter in model.named_parameters()}
    matrices, rest = parameter_groups(model, 0.1)
    assert [names[p] for p in matrices["params"]] == ["patch_embed.weight", "hidden.weight", "pred.weight"]
    assert matrices["hidden"] == [False, True, False] and not any(rest["hidden"])
    assert (matrices["weight_decay"], rest["weight_decay"]) == (0.1, 0.0)
    optimizer = build_optimizer("muon", parameter_groups(model, 0.1), lr=1e-3)
    assert isinstance(optimizer, MuonWithAdamW)
    by_muon = [names[p] for group in optimizer.param_groups if "ns_steps" in group for p in group["params"]]
    assert by_muon == ["hidden.weight"]
    assert sum(len(group["params"]) for group in optimizer.param_groups) == len(names)


def test_adamw_is_torchs_to_the_last_bit() -> None:
    ours, plain = network(), network()
    groups = parameter_groups(plain, 0.1)
    reference = torch.optim.AdamW([{k: v for k, v in g.items() if k != "hidden"} for g in groups], lr=1e-2)
    losses = train(ours, build_optimizer("adamw", parameter_groups(ours, 0.1), lr=1e-2), 5)
    assert losses == train(plain, reference, 5)
    assert all(torch.equal(a, b) for a, b in zip(ours.parameters(), plain.parameters(), strict=True))


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_it_learns_and_goes_on_from_its_state_to_the_last_bit(name: str) -> None:
    model = network()
    optimizer = build_optimizer(name, parameter_groups(model, 0.01), lr=1e-2)
    losses = train(model, optimizer, 20)
    assert losses[-1] < 0.9 * losses[0]
    again = network(seed=9)
    again.load_state_dict(model.state_dict())
    restored = build_optimizer(name, parameter_groups(again, 0.01), lr=1e-2)
    restored.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert train(again, restored, 5) == train(model, optimizer, 5)


def test_a_learning_rate_that_is_set_in_the_groups_counts() -> None:
    model = network()
    optimizer = build_optimizer("muon", parameter_groups(model, 0.0), lr=1e-2)
    before = copy.deepcopy(model.state_dict())
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    train(model, optimizer, 2)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_the_configuration_knows_the_same_names_and_refuses_what_cannot_work() -> None:
    field = Config.model_fields["train"].annotation.model_fields["optimizer"]
    assert typing.get_args(field.annotation) == tuple(OPTIMIZERS)
    assert Config(train={"optimizer": "muon", "zero_stage": 0}).train.optimizer == "muon"
    for name in WHOLE:
        with pytest.raises((ConfigError, ValueError), match=r"zero_stage=1 gives each worker a part of.*zero_stage 0"):
            Config(train={"optimizer": name, "zero_stage": 1})
