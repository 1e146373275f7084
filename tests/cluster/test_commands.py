"""Every `python jobs/...` line that a user can copy is read by the real command line.

cluster/*, README.md, tools/*.sh  ->  command lines  ->  JOB.load of jobs/X.py  ->  a valid Config, or the test fails
"""

import contextlib
import importlib.util
import io
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from neurostorm.config import Config, ConfigError

ROOT = Path(__file__).resolve().parents[2]
SOURCES = [
    *sorted(path for path in (ROOT / "cluster").iterdir() if path.is_file()),
    *[path for path in (ROOT / "README.md",) if path.exists()],
    *sorted((ROOT / "tools").glob("*.sh")),
]
# `python` (or "$bin/python", with its closing quote), a job, and the rest of the line up to a quotation mark that
# encloses the command: ' in a script, ` in Markdown.
COMMAND = re.compile(r"python\"? (jobs/\w+\.py)\b([^\n`']*)")


def strings(node: Any) -> Iterator[str]:
    """All strings of a YAML document."""
    if isinstance(node, str):
        yield node
    elif isinstance(node, dict | list):
        for item in node.values() if isinstance(node, dict) else node:
            yield from strings(item)


def readable(path: Path) -> str:
    """A file's text with each command on one line: YAML strings unfolded, continuation lines joined."""
    text = path.read_text()
    if path.suffix == ".yaml":
        comments = [line for line in text.splitlines() if line.lstrip().startswith("#")]
        text = "\n".join([*comments, *(part for document in yaml.safe_load_all(text) for part in strings(document))])
    return re.sub(r"\\\n\s*", " ", text)


def expand(word: str, text: str) -> list[str]:
    """A word with the shell variables that `text` assigns; others become 1, a fit value for a number or a path.

    Arrays ("${extra[@]}") and the script's own arguments ("$@") stand for no word.
    """
    if re.search(r"\$@|\$\{\w+\[@\]", word):
        return []

    def value(match: re.Match[str]) -> str:
        assigned = re.search(rf"^(?:export )?{match[1]}=([\w./-]+)$", text, re.MULTILINE)
        return assigned[1] if assigned else (match[2] or "1")

    return [re.sub(r"\$\{?(\w+)(?::-([^}]*))?\}?", value, word)]


def commands(text: str) -> list[tuple[str, list[str]]]:
    """(job, arguments) of every command line in `text`, up to the first shell operator or comment."""
    found = []
    for job, rest in COMMAND.findall(text):
        if rest.count('"') % 2:  # the last one closes a quotation that began before the command
            rest = rest[: rest.rindex('"')]
        lexer = shlex.shlex(rest, posix=True, punctuation_chars=True)
        lexer.whitespace_split = True
        words = []
        for word in lexer:
            if set(word) <= set("();<>|&"):
                break
            words += expand(word, text)
        found.append((job, words))
    return found


def load(job: str, arguments: list[str]) -> Config | None:
    """The configuration of `python JOB ARGUMENTS`, None for --help; ConfigError when the job would refuse."""
    path = ROOT / job
    if not path.exists():
        raise ConfigError(f"{job}: no such job")
    specification = importlib.util.spec_from_file_location(path.stem, path)
    assert specification and specification.loader
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    if "--help" in arguments:
        with contextlib.redirect_stdout(io.StringIO()) as shown, pytest.raises(SystemExit):
            module.JOB.load(arguments)
        assert "usage" in shown.getvalue()
        return None
    config: Config = module.JOB.load(arguments)
    return config


LINES = [
    pytest.param(job, arguments, id=f"{path.relative_to(ROOT)}-{number}-{Path(job).stem}")
    for path in SOURCES
    for number, (job, arguments) in enumerate(commands(readable(path)))
]


@pytest.mark.parametrize(("job", "arguments"), LINES)
def test_a_written_command_is_one_that_the_job_takes(job: str, arguments: list[str]) -> None:
    load(job, arguments)


@pytest.mark.parametrize("name", ["README.md", "kuberay-rayjob.yaml", "slurm.sh"])
def test_there_is_a_training_command_on_a_shared_folder(name: str) -> None:
    path = ROOT / "cluster" / name
    configs = [load(job, words) for job, words in commands(readable(path)) if job == "jobs/pretrain.py" and words]
    shared = Path("/mnt/neurostorm")
    assert any(
        config and config.data.store.is_relative_to(shared) and config.run.output.is_relative_to(shared)
        for config in configs
    )


def test_command_lines_are_found_in_every_form(tmp_path: Path) -> None:
    script = """
        store=/data/store
        echo "next: ray job submit -- python jobs/pretrain.py --store $store"
        srun bash -c 'python jobs/pretrain.py --store "$store" \\
            --workers "$unknown" && touch done'
        "$bin/python" jobs/ingest.py --source "$store" "${extra[@]}" > log 2>&1 || exit 1
        `python jobs/pretrain.py --name "a b"` trains   # a sentence with code in it
    """.replace("        ", "")
    (tmp_path / "script.sh").write_text(script)
    assert commands(readable(tmp_path / "script.sh")) == [
        ("jobs/pretrain.py", ["--store", "/data/store"]),
        ("jobs/pretrain.py", ["--store", "/data/store", "--workers", "1"]),
        ("jobs/ingest.py", ["--source", "/data/store"]),
        ("jobs/pretrain.py", ["--name", "a b"]),
    ]
    (tmp_path / "job.yaml").write_text(
        "# python jobs/ingest.py --grid 4mm\nrun: >-\n  python jobs/pretrain.py\n  --name a\n"
    )
    assert commands(readable(tmp_path / "job.yaml")) == [
        ("jobs/ingest.py", ["--grid", "4mm"]),
        ("jobs/pretrain.py", ["--name", "a"]),
    ]


@pytest.mark.parametrize(
    "line",
    [
        "python jobs/pretrain.py --presets base",
        "python jobs/pretrain.py --preset bas",
        "python jobs/pretrain.py --preset base --workers none",
        "python jobs/pretrain.py --store /a /b",
        "python jobs/no_such_job.py --store /a",
    ],
)
def test_a_wrong_command_is_refused(line: str) -> None:
    ((job, arguments),) = commands(line)
    with pytest.raises(ConfigError):
        load(job, arguments)
