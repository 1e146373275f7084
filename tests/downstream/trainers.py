"""Trainers on tokens in which something was planted, for the tests of training by gradient."""

import math
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from neurostorm.config import AdaptConfig
from neurostorm.downstream.methods.inputs import HeldInputs
from neurostorm.downstream.methods.objective import objective_of
from neurostorm.downstream.methods.training import Trainer
from neurostorm.downstream.tasks.examples import Examples
from neurostorm.model.heads.adapt import AttentionPool

PLACES, WIDTH = 4, 8
METRIC = {"regression": "r", "classification": "balanced_accuracy", "identification": "map"}
RNG = np.random.default_rng


def settings_of(**changes: Any) -> AdaptConfig:
    return AdaptConfig.model_validate({"lr": 0.03, "epochs": 10, "patience": 5, "batch_clips": 16, **changes})


def tokens_of(examples: Examples, shown: NDArray[np.float64], noise: float, seed: int) -> NDArray[np.float32]:
    """(N, P, C) of noise, with what is `shown` of each unit, (M, K), in K directions of every place."""
    rng = RNG(seed)
    tokens = noise * rng.standard_normal((len(examples), PLACES, WIDTH))
    tokens += (shown[examples.unit] @ rng.standard_normal((shown.shape[1], WIDTH)))[:, None]
    return tokens.astype(np.float32)


def trainer_of(
    kind: str,
    examples: Examples,
    tokens: NDArray[np.float32],
    train: NDArray[np.int64],
    *,
    seed: int = 0,
    **changes: Any,
) -> Trainer:
    """An attention pool and a head on tokens, for a kind of task, as `fitting.py` makes them."""
    torch.manual_seed(seed)
    objective = objective_of(
        kind, examples.take(train), embedding=16, temperature=0.1, gallery=20, repeats=5, seed=seed
    )
    network = nn.Sequential(OrderedDict(pool=AttentionPool(WIDTH, 2), head=objective.head(WIDTH)))
    return Trainer(
        network=network, inputs=HeldInputs(tokens, "cpu"), examples=examples, objective=objective, metric=METRIC[kind],
        settings=settings_of(**changes), seed=seed, backbone_lr=0.0, device="cpu",
    )  # fmt: skip


def quiet(epoch: int, measured: dict[str, float], state: object) -> None:
    assert math.isfinite(measured["loss"]) and epoch > 0


def parts_of(count: int) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
    """Of so many units the last half, and a quarter and a quarter; so that a unit's place in a part is another one."""
    test, validation, train = np.split(np.arange(count), [count // 4, count // 2])
    return train, validation, test


def one_hot(targets: NDArray[np.int64], classes: int) -> NDArray[np.float64]:
    return np.eye(classes)[targets]


def planted(make_subjects, make_runs, kind: str, classes: int, seed: int, signal: float = 1.0):
    """Examples of a kind and tokens that show each unit's target by `signal`."""
    rng = RNG([seed, 7])
    if kind == "identification":
        examples = make_runs(40, clips=3)
        own = rng.standard_normal((40, 4))[examples.targets]
        shown = np.concatenate([own, 5 * rng.standard_normal((len(own), 2))], 1)  # much of a session and little of whom
    elif kind == "regression":
        examples = make_subjects(50 + 10 * rng.standard_normal(80))
        shown = ((examples.targets - 50) / 10)[:, None]
    else:
        examples = make_subjects(rng.permutation(np.arange(80) % classes), classes=tuple("abc"[:classes]))
        shown = one_hot(examples.targets, classes)
    return examples, tokens_of(examples, signal * shown, 1.0, seed)


def noting(told: list[tuple[int, dict[str, float], Any]]) -> Callable[[int, dict[str, float], Any], None]:
    """What `fit` is to tell its epochs to, which are added to the list."""
    return lambda *said: told.append(said)
