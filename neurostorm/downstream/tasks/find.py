"""Finding a task by its name, or in a file of one's own."""

import hashlib
import importlib.util
import inspect
import sys
from collections.abc import Mapping
from pathlib import Path

from neurostorm.config import ConfigError
from neurostorm.downstream.tasks.task import REGISTRY, Task, UnknownTask
from neurostorm.io.errors import did_you_mean


def find_task(text: str, column: str | None = None) -> Task:
    """The task that NAME, NAME:COLUMN or FILE.py[:COLUMN] asks for.

    A name that is not known is looked for as NAME.py in the working directory: a file with one Task class of that name,
    or with one only. It reaches the workers by value, so that they need not have the file.

    Raises:
        UnknownTask: there is no such task, naming the nearest.
        ConfigError: the file cannot be used, and why.
    """
    name, _, asked = text.partition(":")
    file = Path(name) if name.endswith(".py") else Path(f"{name}.py")
    if name not in REGISTRY and not file.is_file():
        meant = did_you_mean(name, REGISTRY, cutoff=0.6)
        hint = f"{meant} Tasks" if meant else "; tasks"
        raise UnknownTask(
            f"task.name={text}: no such task, and no file {file} in {Path.cwd()}{hint} are "
            f"{', '.join(sorted(REGISTRY))}; a column of your table is phenotype:COLUMN or diagnosis:COLUMN"
        )
    task_class = REGISTRY[name] if name in REGISTRY else _from_file(file)
    return task_class(asked or column)


def _from_file(file: Path) -> type[Task]:
    """The task class of a file; what was registered before stays as it was when the file cannot be used."""
    before = dict(REGISTRY)
    # By its whole path: two files of one name are two modules, and a file that is read again replaces its own class.
    module_name = f"neurostorm_task_{file.stem}_{hashlib.sha256(str(file.resolve()).encode()).hexdigest()[:8]}"
    for name in [name for name, cls in REGISTRY.items() if cls.__module__ == module_name]:
        del REGISTRY[name]
    try:
        _load(file, module_name)
        return _chosen(file, module_name, before)
    except ConfigError:
        REGISTRY.clear()
        REGISTRY.update(before)
        raise


def _load(file: Path, module_name: str) -> None:
    spec = importlib.util.spec_from_file_location(module_name, file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[module_name] = module
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        raise ConfigError(f"{file}: cannot be imported as a task ({type(error).__name__}: {error})") from error
    from ray import cloudpickle  # the class travels to workers, which lack the file

    cloudpickle.register_pickle_by_value(module)


def _chosen(file: Path, module_name: str, before: Mapping[str, type[Task]]) -> type[Task]:
    """The task that a loaded file is about. ConfigError: none, several, one that is not whole, a name that is taken."""
    found = {name: cls for name, cls in REGISTRY.items() if cls.__module__ == module_name}
    taken = sorted(name for name in found if name in before and before[name].__module__ != module_name)
    if taken:
        raise ConfigError(f"{file}: the name {taken[0]!r} belongs to another task; give the class another `name`")
    if file.stem not in found and len(found) != 1:
        raise ConfigError(f"{file}: {len(found)} tasks in it have a `name`; one is needed, or one called {file.stem}")
    chosen = found[file.stem] if file.stem in found else next(iter(found.values()))
    if inspect.isabstract(chosen):
        lacking = ", ".join(sorted(chosen.__abstractmethods__))
        raise ConfigError(f"{file}: {chosen.__name__} lacks {lacking}: write it, or derive from Regression or another")
    return chosen
