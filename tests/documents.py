"""Code blocks of Markdown documents, and a folder in which they run as a reader types them.

    README.md  ->  read_blocks  ->  Block(language, text, marks)  ->  Project.run  ->  output, or AssertionError

A comment in the line before a block, which no reader sees, says how the block differs from others:

    <!-- not run: REASON -->                  it is only checked: its syntax, its command lines
    <!-- not run in this section: REASON -->  the same for all blocks up to the next heading of that level
    <!-- runs until stopped -->               a server: it is stopped as soon as its --port answers
    <!-- file: NAME -->                       it is written to NAME, then run
"""

import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import textwrap
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

NO_AGENT, AGENT_S = "No available agent to submit job", 120  # what Ray answers then, and for how long it may
ROOT = Path(__file__).resolve().parents[1]
_FENCE = re.compile(r"\s*```\s*([\w+-]*)\s*$")
_MARK = re.compile(r"\s*<!--\s*(.*?)\s*-->\s*$")
_HEADING = re.compile(r"(#+) ")
_SECTION = "not run in this section:"


@dataclass(frozen=True)
class Block:
    """One fenced block.

    Attributes:
        document: name of the document.
        line: number of the block's first line, from 1.
        language: the word behind the fence, empty if there is none.
        text: the lines between the fences, without their common indentation.
        mark: the comment that applies to the block, empty if there is none.
    """

    document: str
    line: int
    language: str
    text: str
    mark: str = ""

    @property
    def not_run(self) -> str:
        """Why the block is only checked; empty for one that is run."""
        return self.mark.partition(":")[2].strip() if self.mark.startswith("not run") else ""

    @property
    def serves(self) -> bool:
        """Whether the block is a server that runs until it is stopped."""
        return self.mark == "runs until stopped"

    @property
    def file(self) -> str:
        """Name of the file that the block is; empty for one that is none."""
        return self.mark.partition(":")[2].strip() if self.mark.startswith("file:") else ""

    def __str__(self) -> str:
        return f"{self.document}:{self.line}"


def read_blocks(text: str, document: str) -> list[Block]:
    """All fenced blocks of a Markdown text, in order.

    Raises:
        ValueError: a fence that is not closed, or a `not run` without a reason; names document and line.
    """
    blocks: list[Block] = []
    mark, section, level, depth = "", "", 0, 0
    opened: tuple[int, str] | None = None
    lines: list[str] = []
    for number, line in enumerate(text.splitlines(), 1):
        fence = _FENCE.match(line)
        if opened is None and fence:
            opened, lines = (number + 1, fence[1]), []
        elif opened is not None and fence and not fence[1]:
            block = Block(document, *opened, textwrap.dedent("\n".join(lines)) + "\n", mark or section)
            if block.mark.startswith("not run") and not block.not_run:
                raise ValueError(f"{block}: `not run` has no reason: write `<!-- not run: REASON -->`")
            blocks.append(block)
            opened, mark = None, ""
        elif opened is not None:
            lines.append(line)
        elif found := _MARK.match(line):
            if found[1].startswith(_SECTION):
                section, level = found[1], depth
            else:
                mark = found[1]
        elif line.strip():
            mark = ""
            if heading := _HEADING.match(line):
                depth = len(heading[1])
                section = section if depth > level else ""
    if opened is not None:
        raise ValueError(f"{document}:{opened[0]}: the block is not closed")
    return blocks


def simple_commands(text: str) -> Iterator[list[str]]:
    """The commands of a shell text as lists of words, without operators, assignments, redirections and comments."""
    for line in text.replace("\\\n", " ").splitlines():
        lexer = shlex.shlex(line, posix=True, punctuation_chars="();<>|&")
        lexer.whitespace_split = True
        words: list[str] = []
        redirected = False
        for word in [*lexer, ";"]:
            if set(word) <= set("<>"):
                redirected = True
            elif set(word) <= set("();|&"):
                if words:
                    yield words
                words = []
            elif redirected:
                redirected = False
            elif words or not re.match(r"\w+=", word):
                words.append(word)


@dataclass
class Project:
    """A copy of the project in a fresh folder, with a home folder and an environment of its own.

    Blocks run as they stand. Two things make them small: `words` puts a real path, port or name where the document has
    an example, and `options` adds options to a script's own, because the last one given counts.

    Attributes:
        folder: the project's root; its parent also gets `home`.
        words: text of the documents -> what stands there instead.
        options: how a command begins, such as `jobs/pretrain.py` -> options behind those of the block.
        environment: variables for all blocks.
    """

    folder: Path
    words: dict[str, str] = field(default_factory=dict)
    options: Mapping[str, str] = field(default_factory=dict)
    environment: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.folder.mkdir(parents=True)
        for name in ("jobs", "tools", "neurostorm", "cluster"):
            shutil.copytree(ROOT / name, self.folder / name, ignore=shutil.ignore_patterns("__pycache__"))
        for name in ("README.md", "pyproject.toml", ".gitignore", ".rayignore"):
            shutil.copy(ROOT / name, self.folder / name)
        self._make_environment()
        home, state = self.folder.parent / "home", self._state
        home.mkdir()
        state.mkdir()
        (state / "directory").write_text(str(self.folder))
        path = f"{self.folder / '.venv' / 'bin'}:/usr/local/bin:/usr/bin:/bin"
        self.environment = {
            "HOME": str(home), "PATH": path, "PYTHONPATH": str(self.folder), "LANG": "C.UTF-8", "OMP_NUM_THREADS": "1",
            "OMP_WAIT_POLICY": "PASSIVE", "RAY_USAGE_STATS_ENABLED": "0", "MLFLOW_DISABLE_TELEMETRY": "true",
            "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
        } | self.environment  # fmt: skip

    @property
    def _state(self) -> Path:
        """Holds what a terminal would keep from block to block: directory and exported variables."""
        return self.folder.parent / "state"

    def _make_environment(self) -> None:
        """A .venv with this process's programs, whose `python` adds the options."""
        programs = self.folder / ".venv" / "bin"
        programs.mkdir(parents=True)
        for program in (Path(sys.prefix) / "bin").iterdir():
            if not program.name.startswith(("python", "activate")):
                (programs / program.name).symlink_to(program)
        cases = "".join(f'    "{words} "*) set -- "$@" {extra} ;;\n' for words, extra in self.options.items())
        (programs / "python").write_text(
            f'#!/usr/bin/env bash\ncase "$* " in\n{cases}esac\nexec {shlex.quote(sys.executable)} "$@"\n'
        )
        (programs / "python").chmod(0o755)
        (programs / "activate").write_text(f'export PATH={shlex.quote(str(programs))}:"$PATH"\n')

    def typed(self, text: str) -> str:
        """`text` with the project's own words in it."""
        for word, real in self.words.items():
            text = text.replace(word, real)
        return text

    def run(self, block: Block, timeout_s: float = 900) -> str:
        """Runs a block where the one before left off; its output, stdout and stderr together.

        Raises:
            AssertionError: it failed or took longer than `timeout_s`; the message has its end.
        """
        text = self.typed(block.text)
        if block.file:
            (self.folder / block.file).write_text(text)
        if block.language == "python":
            name = block.file or "block.py"
            (self.folder / name).write_text(text)
            text = f"python {name}"
        return self.shell(text, str(block), timeout_s)

    def shell(self, text: str, name: str, timeout_s: float = 900) -> str:
        """As `run`, for lines of shell; again when a cluster that is starting or busy had no agent to take a job."""
        end_s = time.monotonic() + AGENT_S
        while True:
            status, output = self._finished(text, name, timeout_s)
            if status == 0:
                return output
            if NO_AGENT not in output or time.monotonic() > end_s:
                raise AssertionError(f"{name} ended with status {status}:\n{text}\n{output[-6000:]}")
            time.sleep(2)

    def _finished(self, text: str, name: str, timeout_s: float) -> tuple[int, str]:
        process = self._start(text)
        try:
            output, _ = process.communicate(timeout=timeout_s)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            output, _ = process.communicate()
            raise AssertionError(f"{name} took longer than {timeout_s:g} s:\n{text}\n{output[-6000:]}") from None
        return process.returncode, output

    def serve(self, block: Block) -> None:
        """Starts a server block, waits until its --port answers HTTP, and stops it.

        Raises:
            AssertionError: it has no --port, ended by itself, or did not answer in time.
        """
        text = self.typed(block.text)
        port = re.search(r"--port[ =](\d+)", text)
        assert port, f"{block}: no --port to wait for"
        with self.running(text, str(block), f"http://127.0.0.1:{port[1]}/"):
            pass

    @contextmanager
    def running(self, text: str, name: str, url: str, timeout_s: float = 300) -> Iterator[None]:
        """Lines of shell that serve `url`, from when it answers to the end of the context.

        Raises:
            AssertionError: they ended by themselves, or did not answer in time.
        """
        process = self._start(text)
        deadline = time.monotonic() + timeout_s
        try:
            while not answers(url):
                late = time.monotonic() > deadline
                if late or process.poll() is not None:
                    if late:
                        os.killpg(process.pid, signal.SIGKILL)
                    output, _ = process.communicate()
                    raise AssertionError(f"{name} does not answer at {url}:\n{text}\n{output[-6000:]}")
                time.sleep(0.3)
            yield
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGTERM)
                process.communicate(timeout=60)

    def _start(self, text: str) -> subprocess.Popen[str]:
        """bash with `text`, in a process group of its own."""
        state = shlex.quote(str(self._state))
        script = f"""set -e -o pipefail
[ ! -e {state}/variables ] || source {state}/variables
cd "$(cat {state}/directory)"
{text}
export -p > {state}/variables
pwd > {state}/directory
"""
        return subprocess.Popen(
            ["bash", "-c", script], env=self.environment, cwd=self.folder, stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True,
        )  # fmt: skip


def answers(url: str) -> bool:
    """Whether an HTTP server answers there, whatever it says."""
    try:
        urllib.request.urlopen(url, timeout=5).close()
    except urllib.error.HTTPError:
        return True
    except OSError:
        return False
    return True
