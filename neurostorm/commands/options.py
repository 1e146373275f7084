"""Command-line options made from the configuration tree: their texts, their values, their errors.

    Config's fields --> `--section.field VALUE` with unit, range and default --> text --> partial tree --> Config

Every option follows from its field in `config.py`, so `--help` explains all of them and no name is written twice.
"""

import argparse
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import yaml
from pydantic import ValidationError
from pydantic.fields import FieldInfo

from neurostorm.commands.suggest import nearest_option
from neurostorm.config import Config, ConfigError, Section
from neurostorm.config.base import SQLITE
from neurostorm.config.presets import PRESETS
from neurostorm.io.errors import did_you_mean

Tree = dict[str, dict[str, Any]]


def section_of(name: str) -> type[Section]:
    """The model class of a section of the tree."""
    annotation = Config.model_fields[name].annotation
    assert isinstance(annotation, type) and issubclass(annotation, Section)
    return annotation


def field_of(target: str) -> FieldInfo:
    """The description of `section.field`."""
    section, name = target.split(".")
    return section_of(section).model_fields[name]


def targets_of(settings: Sequence[str]) -> list[str]:
    """`section.field` of every field that `settings` names, each by its section or by itself."""
    return [
        f"{section}.{name}"
        for section, _, only in (setting.partition(".") for setting in settings)
        for name in section_of(section).model_fields
        if only in ("", name)
    ]


def argparse_options(target: str) -> dict[str, Any]:
    """How argparse takes the value of `section.field`; one that is true or false needs none to be true."""
    if field_of(target).annotation is bool:
        return {"dest": target, "metavar": "true|false", "nargs": "?", "const": "true"}
    return {"dest": target, "metavar": "VALUE"}


def explain(target: str, default: Any) -> str:
    """The help line of `section.field`: what it is, what is allowed, its default."""
    info = field_of(target)
    if isinstance(default, tuple | list):
        default = ",".join(str(part) for part in default)
    allowed = allowed_values(info)
    return f"{info.description}{f' [{allowed}]' if allowed else ''} (default: {default})".replace("%", "%%")


def allowed_values(info: FieldInfo) -> str:
    """The values a field takes, in words: `> 0 and <= 10`, `voxel or global`, or nothing when any will do."""
    choices: list[str] = []
    for annotation in (info.annotation, *get_args(info.annotation)):
        if get_origin(annotation) is Literal:
            choices = [str(choice) for choice in get_args(annotation)]
    if choices:
        return " or ".join(choices)
    constraints = [*info.metadata]
    for part in get_args(info.annotation):
        constraints += [
            item for meta in getattr(part, "__metadata__", ()) for item in getattr(meta, "metadata", [meta])
        ]
    words = []
    for attribute, sign in (("gt", ">"), ("ge", ">="), ("lt", "<"), ("le", "<=")):
        words += [
            f"{sign} {getattr(item, attribute)}" for item in constraints if getattr(item, attribute, None) is not None
        ]
    return " and ".join(words)


def value_of(text: str, info: FieldInfo) -> Any:
    """An option's text as pydantic reads it: tuples split at commas or spaces, dicts as YAML, `none` for None."""
    options = get_args(info.annotation)
    if type(None) in options and text.lower() in ("none", "null"):
        return None
    if get_origin(info.annotation) is tuple:
        return [part for part in re.split(r"[,\s\[\]()]+", text) if part]
    if get_origin(info.annotation) is dict:
        return dict_from_text(text)
    return text


def dict_from_text(text: str) -> dict[Any, Any]:
    """`{hcp: 2, ukb: 1}` or `hcp: 2, ukb: 1` as a dict; ValueError with an example for anything else."""
    try:
        value = yaml.safe_load(text if text.lstrip().startswith("{") else f"{{{text}}}")
    except yaml.YAMLError:
        value = None
    # YAML takes `hcp:2` and `hcp=2` for a name without a value.
    if not isinstance(value, dict) or None in value.values():
        raise ValueError(f"{text!r} is not a list of names with values: write '{{hcp: 2, ukb: 1}}', a space after `:`")
    return value


def preset(name: str) -> Tree:
    """The partial tree of a preset; ConfigError with the nearest name for a wrong one."""
    if name not in PRESETS:
        meant = did_you_mean(name, PRESETS)
        there = f"{meant} There are" if meant else "; there are"
        raise ConfigError(f"--preset {name}: no such preset{there} {', '.join(PRESETS)}")
    return PRESETS[name]


def read_yaml(path: Path) -> Tree:
    """A configuration file as a tree of sections; ConfigError naming the file when it is not one."""
    try:
        tree = yaml.safe_load(path.read_text())
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--config {path}: cannot be read ({error})") from error
    except yaml.YAMLError as error:
        raise ConfigError(f"--config {path}: not valid YAML: {error}") from error
    if not isinstance(tree, dict) or not all(isinstance(value, dict) for value in tree.values()):
        raise ConfigError(f"--config {path}: expected `section:` keys with `field: value` below them")
    return tree


def overlay(tree: Tree, upper: Tree) -> None:
    """Writes `upper`'s fields over `tree`'s, in place."""
    for section, fields in upper.items():
        tree.setdefault(section, {}).update(fields)


def relative_paths(tree: Tree, targets: Sequence[str]) -> Iterator[tuple[str, str, bool]]:
    """(`section.field`, its path, whether somebody gave it) of settings whose path depends on the working directory."""
    for target in targets:
        section, name = target.split(".")
        given = name in tree.get(section, {})
        value = tree[section][name] if given else field_of(target).get_default(call_default_factory=True)
        if value is None:
            continue
        text = str(value)
        if target == "tracking.uri" and text.startswith(SQLITE):
            text = text.removeprefix(SQLITE)
        elif "://" in text or not is_path(target):
            continue
        if not Path(text).expanduser().is_absolute():
            yield target, str(value), given


def is_path(target: str) -> bool:
    """Whether `section.field` is a path or a URI of an object store."""
    return _holds_path(field_of(target).annotation)


def build(tree: Tree) -> Config:
    """The validated Config of a partial tree; ConfigError with one line per wrong field."""
    try:
        return Config.model_validate(tree)
    except ValidationError as error:
        raise ConfigError("; ".join(describe(dict(issue)) for issue in error.errors())) from error


def describe(issue: dict[str, Any]) -> str:
    """One pydantic issue in our words: the field, the value, what is allowed, the nearest valid name."""
    path = [str(part) for part in issue["loc"]]
    where = ".".join(path)
    if issue["type"] == "extra_forbidden":
        return f"{where}: unknown setting{_meant(path)}"
    if issue["type"] == "value_error":
        return f"{where}: {issue['ctx']['error']}" if where else str(issue["ctx"]["error"])
    allowed = ""
    if len(path) > 1 and path[0] in Config.model_fields and path[1] in section_of(path[0]).model_fields:
        allowed = allowed_values(field_of(f"{path[0]}.{path[1]}"))
    return f"{where}={issue['input']}: {issue['msg']}" + (f" (allowed: {allowed})" if allowed else "")


def descriptions(targets: Sequence[str], prefix: str = "") -> dict[str, str]:
    """`section.field`, with `prefix` before it, -> the field's description."""
    return {f"{prefix}{target}": field_of(target).description or "" for target in targets}


def _meant(path: Sequence[str]) -> str:
    """`; did you mean train.lr?` for the steps of a setting that does not exist; "" without a guess."""
    if len(path) == 1:
        return did_you_mean(path[0], Config.model_fields)
    own = targets_of([path[0]]) if path[0] in Config.model_fields else []
    every = targets_of(tuple(Config.model_fields))
    near = nearest_option(".".join(path), descriptions(own)) or nearest_option(".".join(path), descriptions(every))
    return f"; did you mean {near}?" if near else ""


def _holds_path(annotation: Any) -> bool:
    return annotation is Path or any(_holds_path(part) for part in get_args(annotation))


def refuse_missing_folder(parser: argparse.ArgumentParser, name: str, file: Path | None) -> None:
    """End with the reason if a file that is to be written has no folder."""
    if file and not file.absolute().parent.is_dir():
        parser.error(f"{name} {file}: there is no folder {file.absolute().parent}")
