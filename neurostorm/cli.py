"""From a command line to a validated `Config`: presets, a YAML file, `--section.field VALUE`, short aliases.

    defaults  <-  --preset NAME  <-  --config FILE.yaml  <-  --section.field VALUE  ->  Config or one clear error

Every option is generated from the tree in `config.py`, so `--help` always explains each field with its unit, range
and default. A wrong name is answered with the nearest right one, a wrong value with the allowed range.
"""

import argparse
import difflib
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import yaml
from pydantic import ValidationError
from pydantic.fields import FieldInfo

from neurostorm import ray_output
from neurostorm.config import Config, ConfigError, Section
from neurostorm.presets import PRESETS

ray_output.configure()  # before a job imports Ray
Tree = dict[str, dict[str, Any]]


@dataclass(frozen=True)
class Job:
    """One entry point: its name, what it does, the sections it reads and its short options (`--store` etc.)."""

    name: str
    purpose: str
    sections: tuple[str, ...]
    aliases: dict[str, str] = field(default_factory=dict)

    def parse(self, argv: Sequence[str] | None = None) -> Config:
        """The job's configuration from `argv` (default: the process's), or exit status 2 with the reason."""
        try:
            return self.load(sys.argv[1:] if argv is None else argv)
        except ConfigError as error:
            sys.exit(f"jobs/{self.name}.py: {error}\nSee: python jobs/{self.name}.py --help")

    def load(self, argv: Sequence[str]) -> Config:
        """As `parse`, but raises ConfigError instead of leaving the process."""
        options, unknown = self.parser().parse_known_args(list(argv))
        for word in unknown:
            raise ConfigError(
                unknown_option(word, [*self.aliases, "--preset", "--config", *option_names(self.sections)])
            )
        tree: Tree = {}
        if options.preset is not None:
            overlay(tree, preset(options.preset))
        if options.config is not None:
            overlay(tree, read_yaml(options.config))
        for target, text in vars(options).items():
            if text is not None and "." in target:
                section, name = target.split(".")
                try:
                    value = from_text(text, field_of(section, name))
                except ValueError as error:
                    raise ConfigError(f"--{target}: {error}") from error
                overlay(tree, {section: {name: value}})
        return build(tree)

    def parser(self) -> argparse.ArgumentParser:
        """An argparse parser with one option per field of the job's sections, and the aliases."""
        parser = argparse.ArgumentParser(
            prog=f"python jobs/{self.name}.py",
            description=self.purpose,
            allow_abbrev=False,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        parser.add_argument("--preset", metavar="NAME", help=f"named settings to start from: {', '.join(PRESETS)}")
        parser.add_argument(
            "--config", metavar="FILE.yaml", type=Path, help="settings as YAML, `section: {field: value}`"
        )
        for alias, target in self.aliases.items():
            parser.add_argument(alias, **option(target), help=f"the same as --{target}")
        for section in self.sections:
            model = section_of(section)
            group = parser.add_argument_group(section, model.__doc__)
            for name, info in model.model_fields.items():
                group.add_argument(f"--{section}.{name}", **option(f"{section}.{name}"), help=explain(info))
        return parser


def option(target: str) -> dict[str, Any]:
    """How argparse takes the value of `section.field`; one that is true or false needs none to be true."""
    section, name = target.split(".")
    if field_of(section, name).annotation is bool:
        return {"dest": target, "metavar": "true|false", "nargs": "?", "const": "true"}
    return {"dest": target, "metavar": "VALUE"}


def section_of(name: str) -> type[Section]:
    """The model class of a section of the tree."""
    annotation = Config.model_fields[name].annotation
    assert isinstance(annotation, type) and issubclass(annotation, Section)
    return annotation


def field_of(section: str, name: str) -> FieldInfo:
    """The description of one field of the tree."""
    return section_of(section).model_fields[name]


def option_names(sections: Sequence[str]) -> list[str]:
    """`--section.field` of every field of `sections`."""
    return [f"--{section}.{name}" for section in sections for name in section_of(section).model_fields]


def explain(info: FieldInfo) -> str:
    """A field's help line: what it is, what is allowed, its default."""
    default = info.get_default(call_default_factory=True)
    if isinstance(default, tuple):
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


def from_text(text: str, info: FieldInfo) -> Any:
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


def unknown_option(word: str, known: Sequence[str]) -> str:
    """The message for an option that no field has, with the nearest one that exists."""
    name = word.split("=")[0]
    by_leaf = [option for option in known if option.split(".")[-1].lstrip("-") == name.split(".")[-1].lstrip("-")]
    near = by_leaf or difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return f"unknown option {name}" + (f"; did you mean {near[0]}?" if near else "")


def preset(name: str) -> Tree:
    """The partial tree of a preset; ConfigError with the nearest name for a wrong one."""
    if name not in PRESETS:
        near = difflib.get_close_matches(name, PRESETS, n=1, cutoff=0.4)
        hint = f"did you mean {near[0]}?" if near else "choose one of:"
        raise ConfigError(f"--preset {name}: no such preset; {hint} (presets: {', '.join(PRESETS)})")
    return PRESETS[name]


def read_yaml(path: Path) -> Tree:
    """A configuration file as a tree of sections; ConfigError naming the file when it is not one."""
    try:
        tree = yaml.safe_load(path.read_text())
    except OSError as error:
        raise ConfigError(f"--config {path}: cannot be read ({error.strerror})") from error
    except yaml.YAMLError as error:
        raise ConfigError(f"--config {path}: not valid YAML: {error}") from error
    if not isinstance(tree, dict) or not all(isinstance(value, dict) for value in tree.values()):
        raise ConfigError(f"--config {path}: expected `section:` keys with `field: value` below them")
    return tree


def overlay(tree: Tree, upper: Tree) -> None:
    """Writes `upper`'s fields over `tree`'s, in place."""
    for section, fields in upper.items():
        tree.setdefault(section, {}).update(fields)


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
        known = (
            [option[2:] for option in option_names(tuple(Config.model_fields))]
            if len(path) > 1
            else [*Config.model_fields]
        )
        same_section = [name for name in known if name.startswith(f"{path[0]}.")]
        near = difflib.get_close_matches(where, same_section, n=1, cutoff=0.5) or difflib.get_close_matches(
            where, known, n=1
        )
        return f"{where}: unknown setting" + (f"; did you mean {near[0]}?" if near else "")
    if issue["type"] == "value_error":
        return f"{where}: {issue['ctx']['error']}" if where else str(issue["ctx"]["error"])
    allowed = ""
    if len(path) > 1 and path[0] in Config.model_fields and path[1] in section_of(path[0]).model_fields:
        allowed = allowed_values(field_of(path[0], path[1]))
    return f"{where}={issue['input']}: {issue['msg']}" + (f" (allowed: {allowed})" if allowed else "")
