"""Which trials a sweep consists of: pure.

    tasks x methods x fractions x replicates = cells --hyperparameters of the method--> trials

Of the trials of a cell one is selected on validation. A hyperparameter that a method does not have makes no trials.
"""

from collections.abc import Hashable, Iterable, Sequence
from itertools import product
from typing import TypeVar

from neurostorm.config import AdaptConfig, Config, ConfigError
from neurostorm.downstream.evaluation import task_of
from neurostorm.downstream.methods.fitting import settings_of
from neurostorm.downstream.methods.method import find_method
from neurostorm.downstream.prepare import Wanted, suits

HYPER = ("lr", "weight_decay", "prompts")
Item = TypeVar("Item")
Key = TypeVar("Key", bound=Hashable)


def wanted_trials(config: Config) -> list[Wanted]:
    """Every trial of the sweep, cell by cell.

    Raises:
        ConfigError: a task, method, fraction or hyperparameter is unknown or named twice, or no method suits any task.
    """
    sweep = config.sweep
    for name in ("tasks", "methods", "fractions", *HYPER):
        values = getattr(sweep, name)
        if not values and name not in HYPER:
            raise ConfigError(f"sweep.{name} is empty: name at least one")
        if len(set(values)) < len(values):
            raise ConfigError(f"sweep.{name}={','.join(map(str, values))}: name each once")
    tasks = [task_of(name, config.task, option="--tasks") for name in sweep.tasks]
    seeds = range(config.run.seed, config.run.seed + sweep.replicates)
    wanted = [
        Wanted(task, adapt, seed)
        for task, method, fraction, seed in product(tasks, sweep.methods, sweep.fractions, seeds)
        if suits(find_method(method), task)
        for adapt in settings_tried(config, method, fraction)
    ]
    if not wanted:
        raise ConfigError(f"sweep.methods={','.join(sweep.methods)}: none of them suits {','.join(sweep.tasks)}")
    return wanted


def settings_tried(config: Config, method: str, fraction: float) -> list[AdaptConfig]:
    """The settings that are tried for one cell of a method."""
    own = [name for name in HYPER if name in settings_of(find_method(method)) and getattr(config.sweep, name)]
    update = {"method": method, "fraction": fraction}
    return [
        config.adapt.model_copy(update=update | dict(zip(own, values, strict=True)))
        for values in product(*(getattr(config.sweep, name) for name in own))
    ]


def by_key(items: Iterable[Item], keys: Sequence[Key]) -> dict[Key, list[Item]]:
    """Items by their keys, both in order."""
    groups: dict[Key, list[Item]] = {}
    for item, key in zip(items, keys, strict=True):
        groups.setdefault(key, []).append(item)
    return groups
