"""Which trials a sweep has: counted by brute force, and what is refused."""

from itertools import product
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from neurostorm.config import Config, ConfigError
from neurostorm.downstream.methods.fitting import settings_of
from neurostorm.downstream.methods.method import METHODS, find_method
from neurostorm.tune.space import by_key, wanted_trials

TASKS = ("age", "sex", "reid", "state")
TUNED = {"lr": (1e-3, 1e-2), "weight_decay": (0.0, 0.1, 0.2), "prompts": (5, 10)}


def config_of(**sweep: Any) -> Config:
    tree = {"tasks": ("age",), "methods": ("fc",), "replicates": 1, **sweep}
    return Config.model_validate({"sweep": tree, "run": {"output": Path("nowhere"), "seed": 3}})


@settings(deadline=None, max_examples=40)
@given(
    tasks=st.lists(st.sampled_from(TASKS), min_size=1, unique=True),
    methods=st.lists(st.sampled_from(sorted(METHODS)), min_size=1, max_size=5, unique=True),
    fractions=st.lists(st.sampled_from([0.25, 0.5, 1.0]), min_size=1, unique=True),
    replicates=st.integers(1, 3),
    tried=st.fixed_dictionaries({}, optional={name: st.just(values) for name, values in TUNED.items()}),
)
def test_every_combination_that_makes_sense_is_there_once(
    tasks: list[str], methods: list[str], fractions: list[float], replicates: int, tried: dict[str, Any]
) -> None:
    config = config_of(tasks=tasks, methods=methods, fractions=fractions, replicates=replicates, **tried)
    expected = [
        (task, method, fraction, seed, tuple(zip(own, values, strict=True)))
        for task, method, fraction, seed in product(tasks, methods, fractions, range(3, 3 + replicates))
        if (task, method) != ("reid", "constant")
        for own in [[name for name in TUNED if name in tried and name in settings_of(find_method(method))]]
        for values in product(*(TUNED[name] for name in own))
    ]
    if not expected:
        with pytest.raises(ConfigError, match=r"sweep\.methods=constant: none of them suits reid"):
            wanted_trials(config)
        return
    wanted = wanted_trials(config)
    found = []
    for one in wanted:
        own = [name for name in TUNED if name in tried and name in settings_of(find_method(one.adapt.method))]
        tuned = tuple((name, getattr(one.adapt, name)) for name in own)
        found.append((one.task.label, one.adapt.method, one.adapt.fraction, one.seed, tuned))
        for name in set(TUNED) - set(own):
            assert getattr(one.adapt, name) == getattr(config.adapt, name)
    assert found == expected


@pytest.mark.parametrize(("method", "trials"), [("fc", 1), ("constant", 1), ("linear", 1), ("full", 6), ("tpt", 12)])
def test_a_hyperparameter_that_a_method_lacks_makes_no_trials(method: str, trials: int) -> None:
    assert len(wanted_trials(config_of(methods=(method,), **TUNED))) == trials


@pytest.mark.parametrize(
    ("sweep", "message"),
    [
        ({"tasks": ()}, r"sweep\.tasks is empty"),
        ({"methods": ()}, r"sweep\.methods is empty"),
        ({"fractions": ()}, r"sweep\.fractions is empty"),
        ({"tasks": ("age", "sex", "age")}, r"sweep\.tasks=age,sex,age: name each once"),
        ({"methods": ("fc", "fc")}, r"sweep\.methods=fc,fc: name each once"),
        ({"fractions": (0.5, 0.5)}, r"sweep\.fractions=0\.5,0\.5: name each once"),
        ({"lr": (1e-3, 0.001)}, r"sweep\.lr=0\.001,0\.001: name each once"),
        ({"tasks": ("ages",)}, r"task\.name=ages: no such task.*did you mean age\?"),
        ({"methods": ("liner",)}, r"adapt\.method=liner: no such method; did you mean linear\?"),
        ({"tasks": ("reid",), "methods": ("constant",)}, "none of them suits reid"),
    ],
)
def test_what_makes_no_sweep_is_refused(sweep: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        wanted_trials(config_of(**sweep))


@given(st.lists(st.integers(0, 4)))
def test_groups_keep_the_order_of_keys_and_items(keys: list[int]) -> None:
    groups = by_key(range(len(keys)), keys)
    assert list(groups) == list(dict.fromkeys(keys))
    assert {key: [i for i, k in enumerate(keys) if k == key] for key in keys} == groups
