"""A job: what it is called, what it can be told, and how it starts and ends for the person who typed its command.

    defaults  <-  --preset NAME  <-  --config FILE.yaml  <-  --section.field VALUE  ->  Config or one clear error
    run: command line -> Config -> summary -> work -> exit status; an error is one line, its traceback a file

Exit status: 0 done; 1 it failed, or its input cannot be used; 2 the settings are wrong; 130 and 143 it was interrupted;
75 (pretrain) it was asked by SIGUSR1 to save and stop, and has.
"""

import argparse
import json
import logging
import os
import shlex
import sys
import tempfile
import textwrap
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

from neurostorm.commands import console_command
from neurostorm.commands.options import (
    Tree,
    argparse_options,
    build,
    descriptions,
    explain,
    field_of,
    is_path,
    overlay,
    preset,
    read_yaml,
    relative_paths,
    targets_of,
    value_of,
)
from neurostorm.commands.suggest import nearest_option
from neurostorm.config import Config, ConfigError
from neurostorm.config.base import SQLITE
from neurostorm.config.presets import PRESETS
from neurostorm.config.renamed import RENAMED, old_names, say_renamed, with_new_names
from neurostorm.io.errors import UserError, reason_of
from neurostorm.runtime import ray_output
from neurostorm.runtime.interrupts import interruptible

_WIDTH, _INDENT = 120, 11  # of the summary
ray_output.configure()  # before a job imports Ray
_JOB_CONFIG = "RAY_JOB_CONFIG_JSON_ENV_VAR"  # which Ray sets for a submitted job


@dataclass(frozen=True)
class Job:
    """One entry point.

    Attributes:
        name: of `neurostorm NAME` and `jobs/NAME.py`.
        purpose: one sentence for `--help`.
        settings: what it reads of the configuration: whole sections, or single `section.field`.
        aliases: short option -> `section.field`.
        presets: whether `--preset` is of use.
        defaults: settings with a different default in this job.
        facts: what its summary says beside paths and changed settings, name -> text.
        resume: what it says when it is interrupted: what is kept, and how to resume.
    """

    name: str
    purpose: str
    settings: tuple[str, ...]
    aliases: dict[str, str] = field(default_factory=dict)
    presets: bool = False
    defaults: Tree = field(default_factory=dict)
    facts: Callable[[Config], Mapping[str, str]] = lambda config: {}
    resume: Callable[[Config], str] = lambda config: "what is done is kept; start the same command again to resume"

    @property
    def targets(self) -> list[str]:
        """`section.field` of everything that the job can be told."""
        return targets_of(self.settings)

    def load(self, argv: Sequence[str]) -> Config:
        """The configuration of a command line; ConfigError with the reason when there is none."""
        return self._read(argv)[1]

    def run(self, work: Callable[[Config], int], argv: Sequence[str] | None = None) -> int:
        """Does the job of a command line, `work(config)`; returns the exit status.

        Args:
            work: does it and returns 0, or another status with the reason on stderr.
            argv: words of the command line; default: those of this process, which then ends its Ray as well.
        """
        try:
            options, config = self._read(sys.argv[1:] if argv is None else argv)
        except ConfigError as error:
            self._say(f"{error}\nSee: {self.command(self.name)} --help")
            return 2
        if options.print_config:
            print(self.as_yaml(config), end="")
            return 0
        logging.basicConfig(level=logging.INFO, format="%(message)s")
        print("\n".join(self.summary(config, options.preset)), "checking the input", sep="\n", flush=True)
        try:
            with interruptible(lambda: self.resume(config)):
                status = work(config)
                if argv is None and "ray" in sys.modules:
                    from neurostorm.runtime.session import stop_ray  # --help and wrong command lines do without Ray

                    stop_ray()
                return status
        except ConfigError as error:
            self._say(error)
            return 2
        except UserError as error:
            self._say(error)
            return 1
        except Exception as error:
            file = write_traceback(self.name, config.run.folder if "run.name" in self.targets else None)
            self._say(f"{reason_of(error)}\nThe traceback is in {file}")
            return 1

    @property
    def program(self) -> str:
        """What was started, for messages: `neurostorm pretrain` or `jobs/pretrain.py`."""
        return f"{console} {self.name}" if (console := console_command()) else f"jobs/{self.name}.py"

    def command(self, name: str) -> str:
        """How to start the job `name` from the directory in which this one was started, in the way that it was."""
        if console := console_command():
            return f"{console} {name}"
        script = Path(sys.argv[0]).with_name(f"{name}.py")
        return f"python {shlex.quote(str(script))}" if script.is_file() else f"python jobs/{name}.py"

    def as_yaml(self, config: Config) -> str:
        """Everything that the job reads of a configuration, as YAML that `--config` reads back."""
        return config.to_yaml(*dict.fromkeys(target.partition(".")[0] for target in self.targets))

    def summary(self, config: Config, preset_name: str | None = None) -> list[str]:
        """The words with which a job begins: where things lie, what is special, how to see the rest."""
        facts = {"preset": preset_name} if preset_name else {}
        now, usual = config.flat(), self._usual(preset_name).flat()
        if {"run.output", "run.name"} <= set(self.targets):
            facts["run"] = str(config.run.folder)
        facts |= {
            target.partition(".")[2]: now[target]
            for target in self.targets
            if is_path(target) and now[target] is not None and target != "run.output"
        }
        facts |= self.facts(config)
        changed = [f"{target} {now[target]}" for target in self.targets
                   if now[target] != usual[target] and not is_path(target) and target != "run.name"]  # fmt: skip
        facts |= {"changed": ", ".join(changed)} if changed else {}
        facts["settings"] = f"{self.command(self.name)} ... --print-config shows all, --help explains them"
        lines = [f"{self.name}: {self.purpose}"]
        for name, text in facts.items():
            lines += textwrap.wrap(
                text, _WIDTH, initial_indent=f"  {name:<{_INDENT - 2}}", subsequent_indent=" " * _INDENT,
                break_long_words=False, break_on_hyphens=False,
            )  # fmt: skip
        return lines

    def parser(self) -> argparse.ArgumentParser:
        """An argparse parser with one option per setting of the job, and the aliases."""
        parser = argparse.ArgumentParser(
            prog=f"{console_command()} {self.name}" if console_command() else f"python jobs/{self.name}.py",
            usage="%(prog)s [--help] [OPTION VALUE ...]",
            description=self.purpose,
            allow_abbrev=False,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        if self.presets:
            parser.add_argument("--preset", metavar="NAME", help=f"named settings to start from: {', '.join(PRESETS)}")
        parser.add_argument(
            "--config", metavar="FILE.yaml", type=Path, help="settings as YAML, `section: {field: value}`"
        )
        parser.add_argument("--print-config", action="store_true", help="print all settings as YAML, and end")
        for alias, target in self.aliases.items():
            parser.add_argument(alias, **argparse_options(target), help=f"the same as --{target}")
        groups: dict[str, Any] = {}
        for target in self.targets:
            section, name = target.split(".")
            if section not in groups:
                groups[section] = parser.add_argument_group(section, type(getattr(Config(), section)).__doc__)
            default = self.defaults.get(section, {}).get(name)
            default = field_of(target).get_default(call_default_factory=True) if default is None else default
            groups[section].add_argument(f"--{target}", **argparse_options(target), help=explain(target, default))
        for old, new in RENAMED.items():
            if new in self.targets:
                parser.add_argument(f"--{old}", **argparse_options(new) | {"dest": old}, help=argparse.SUPPRESS)
        return parser

    def _read(self, argv: Sequence[str]) -> tuple[argparse.Namespace, Config]:
        options, unknown = self.parser().parse_known_args(list(argv))
        for word in unknown:
            raise ConfigError(self._unknown(word))
        options.preset = getattr(options, "preset", None)
        tree = self._tree(options.preset)
        if options.config is not None:
            written = read_yaml(options.config)
            for old in old_names(written):
                say_renamed(old)
            overlay(tree, with_new_names(written))
        for target, text in vars(options).items():
            if text is not None and "." in target:
                if target in RENAMED:
                    say_renamed(target)
                    target = RENAMED[target]
                section, name = target.split(".")
                try:
                    value = value_of(text, field_of(target))
                except ValueError as error:
                    raise ConfigError(f"--{target}: {error}") from error
                overlay(tree, {section: {name: value}})
        if submitted():
            self._refuse_relative(tree)
        return options, build(tree)

    def _tree(self, preset_name: str | None) -> Tree:
        tree: Tree = {}
        overlay(tree, self.defaults)
        if preset_name is not None:
            overlay(tree, preset(preset_name))
        return tree

    def _usual(self, preset_name: str | None) -> Config:
        """The configuration without what was typed."""
        return build(self._tree(preset_name))

    def _unknown(self, word: str) -> str:
        """The message for an option that the job does not have."""
        plain = [*self.aliases, "--config", "--print-config", *(["--preset"] if self.presets else [])]
        known = dict.fromkeys(plain, "")
        near = nearest_option(word, known | descriptions(self.targets, "--"))
        return f"unknown option {word.partition('=')[0]}" + (f"; did you mean {near}?" if near else "")

    def _refuse_relative(self, tree: Tree) -> None:
        """ConfigError for paths that would lie in the copy of the working directory that Ray made for the job."""
        short = {target: alias for alias, target in self.aliases.items()}
        named, typed = [], []
        for target, path, given in relative_paths(tree, self.targets):
            option = short.get(target, f"--{target}")
            named.append(f"{option} {path}" if given else f"{option} (default {path})")
            scheme = SQLITE if path.startswith(SQLITE) else ""
            typed.append(f"{option} {scheme}/SHARED/{path.removeprefix(scheme)}")
        if named:
            raise ConfigError(
                f"{', '.join(named)}: relative paths have no meaning under `ray job submit`, which runs the job in a "
                f"temporary copy of the working directory. Give absolute paths that all nodes see, such as "
                f"{' '.join(typed)}, or s3:// or gs:// URIs"
            )

    def _say(self, text: object) -> None:
        print(f"{self.program}: {text}", file=sys.stderr, flush=True)


def submitted() -> bool:
    """Whether this process is the driver of a job that `ray job submit` started."""
    try:
        return "job_submission_id" in json.loads(os.environ.get(_JOB_CONFIG, "{}")).get("metadata", {})
    except (ValueError, AttributeError):
        return False


def write_traceback(job: str, folder: Any) -> Path:
    """Writes the traceback of the exception that is being handled; returns the file.

    It lies in the run's folder, if that is a local one that exists, else among the temporary files.
    """
    home = folder if isinstance(folder, Path) and folder.is_dir() else Path(tempfile.gettempdir())
    name = f"error-{job}-{datetime.now():%Y%m%d-%H%M%S}-{os.getpid()}.log"
    try:
        (home / name).write_text(traceback.format_exc())
    except OSError:  # such as a full disk, which may be what went wrong
        home = Path(tempfile.mkdtemp(prefix="neurostorm-"))
        (home / name).write_text(traceback.format_exc())
    return home / name
