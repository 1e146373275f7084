"""tools/setup.sh and tools/quickstart.sh are run with stand-ins for python, pip, uv, nvidia-smi and ray.

a copy of the scripts  ->  bash, a PATH of stand-ins  ->  the calls that they recorded, the output
"""

import shlex
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PROGRAMS = [
    "bash",
    "cat",
    "cksum",
    "cut",
    "dirname",
    "env",
    "grep",
    "mkdir",
    "cp",
    "chmod",
    "rm",
    "sed",
    "tail",
    "touch",
    "uname",
]
VERSION = next(line for line in (ROOT / "tools" / "constraints.txt").read_text().splitlines() if line[:7] == "torch==")

# Every stand-in writes its arguments to $CALLS. A package source has what $SOURCES lists, one word for each.
PYTHON = """#!/usr/bin/env bash
echo "python $*" >> "$CALLS"
has() { case " $SOURCES " in *" $1 "*) return 0 ;; esac; echo "no source has $1" >&2; return 1; }
case "$*" in
    *version_info*) exit "${OLD_PYTHON:-0}" ;;
    --version) echo "Python 3.9.2" ;;
    "-m venv .venv")
        mkdir -p .venv/bin && cp "$0" .venv/bin/python
        [ -z "${NO_ENSUREPIP:-}" ] || { echo "ensurepip is not available"; exit 1; } ;;
    *" install "*" uv") has uv && printf '%s\\n' '#!/usr/bin/env bash' 'echo "uv $*" >> "$CALLS"' \\
        'case " $SOURCES " in *" pytorch "*) ;; *) echo "cannot reach the index" >&2; exit 2 ;; esac' > .venv/bin/uv \\
        && chmod +x .venv/bin/uv ;;
    *" torch=="*+cpu) has +cpu ;;
    *" torch=="*) has plain ;;
    *cuda.is_available*) exit "${NO_CUDA:-0}" ;;
esac
"""


@dataclass(frozen=True)
class Machine:
    """A folder with the files that setup.sh reads, and a PATH with stand-ins alone."""

    root: Path

    def run(self, sources: str, *arguments: str, **variables: str) -> tuple[int, str, list[str]]:
        """Runs setup.sh where the package sources have `sources`: exit status, output, installs that were tried."""
        calls = self.root / "calls"
        calls.write_text("")
        done = subprocess.run(
            ["bash", str(self.root / "tools" / "setup.sh"), *arguments],
            env={"PATH": str(self.root / "bin"), "CALLS": str(calls), "SOURCES": sources} | variables,
            cwd=self.root.parent,
            capture_output=True,
            text=True,
            timeout=60,
        )
        installs = [line for line in calls.read_text().splitlines() if " install " in line]
        return done.returncode, done.stdout + done.stderr, [line for line in installs if "torch==" in line]

    def write_program(self, name: str, text: str) -> None:
        """Puts an executable script on the PATH."""
        (self.root / "bin" / name).write_text(text)
        (self.root / "bin" / name).chmod(0o755)


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    """A Linux machine with Python and without a GPU."""
    made = Machine(tmp_path / "project")
    for name in ("pyproject.toml", "tools/constraints.txt", "tools/setup.sh"):
        (made.root / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, made.root / name)
    (made.root / "bin").mkdir()
    for name in PROGRAMS:
        (made.root / "bin" / name).symlink_to(shutil.which(name) or name)
    made.write_program("python3.11", PYTHON)
    made.write_program("uname", "#!/usr/bin/env bash\necho Linux\n")
    return made


def test_pips_own_cpu_build_is_taken_first(machine: Machine) -> None:
    status, output, tried = machine.run("+cpu plain uv pytorch")
    assert status == 0, output
    assert [line.split()[-1] for line in tried] == [f"{VERSION}+cpu"]


def test_uv_is_asked_for_the_cpu_build_when_pip_has_none(machine: Machine) -> None:
    status, output, tried = machine.run("plain uv pytorch")
    assert status == 0, output
    assert all("--torch-backend cpu" in line and VERSION in line.split() for line in tried[1:])
    assert [line.split()[0] for line in tried] == ["python", "uv", "uv"]  # a dry run tells whether its index is reached


@pytest.mark.parametrize("sources", ["plain", "plain uv"])
def test_without_any_other_index_the_plain_version_is_taken_and_its_size_is_said(
    sources: str, machine: Machine
) -> None:
    status, output, tried = machine.run(sources)
    assert status == 0, output
    assert tried[-1].startswith("python") and tried[-1].split()[-1] == VERSION
    assert "GB" in output and "PyPI" in output
    assert "cannot reach" not in output  # a failed attempt's own messages are in the log
    assert ("cannot reach the index" in (machine.root / ".venv" / "setup.log").read_text()) == ("uv" in sources)


def test_with_a_gpu_uv_chooses_the_build_by_its_driver(machine: Machine) -> None:
    machine.write_program("nvidia-smi", "#!/usr/bin/env bash\n")
    status, output, tried = machine.run("+cpu plain uv pytorch", "dev")
    assert status == 0, output
    assert tried and all(line.startswith("uv") and "--torch-backend auto" in line for line in tried)
    assert "--editable .[all,dev,gpu]" in (machine.root / "calls").read_text()
    assert "warning" not in output


def test_a_build_that_cannot_use_the_gpu_is_named(machine: Machine) -> None:
    machine.write_program("nvidia-smi", "#!/usr/bin/env bash\n")
    status, output, tried = machine.run("plain", NO_CUDA="1")
    assert status == 0, output
    assert tried[-1].split()[-1] == VERSION
    assert "warning: nvidia-smi shows a GPU" in output


def test_a_failure_shows_the_end_of_the_log_and_names_it(machine: Machine) -> None:
    status, output, tried = machine.run("uv")
    assert status == 1
    assert len(tried) == 3
    assert "no source has plain" in output
    assert str(machine.root / ".venv" / "setup.log") in output


def test_a_second_start_installs_nothing(machine: Machine) -> None:
    assert machine.run("+cpu", "dev")[0] == 0
    status, output, tried = machine.run("", "dev")
    assert (status, tried) == (0, [])
    assert "is ready" in output


@pytest.mark.parametrize(("variables", "words"), [({"OLD_PYTHON": "1"}, "Python 3.9.2"), ({}, "no Python at all")])
def test_a_missing_or_old_python_is_said_with_what_to_install(
    variables: dict[str, str], words: str, machine: Machine
) -> None:
    if not variables:
        (machine.root / "bin" / "python3.11").unlink()
    status, output, _ = machine.run("+cpu", **variables)
    assert status == 1
    assert output.count("set-up failed") == 1
    assert "Python 3.11 or newer is needed" in output and words in output and "apt install" in output


def test_a_missing_venv_module_leaves_no_half_made_environment(machine: Machine) -> None:
    status, output, _ = machine.run("+cpu", NO_ENSUREPIP="1")
    assert status == 1
    assert "apt install python3-venv" in output and "ensurepip is not available" in output
    assert not (machine.root / ".venv").exists()


def test_an_unknown_argument_is_refused(machine: Machine) -> None:
    status, output, _ = machine.run("+cpu", "develop")
    assert status == 2
    assert 'unknown argument "develop"' in output


def test_the_last_lines_of_the_quickstart_work_as_typed_in_any_folder(tmp_path: Path) -> None:
    project, elsewhere = tmp_path / "the project", tmp_path / "elsewhere"
    for name in ("quickstart.sh", "store.py"):
        (project / "tools").mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / "tools" / name, project / "tools" / name)
    elsewhere.mkdir()
    echo = "#!/usr/bin/env bash\necho "
    programs = {
        "tools/setup.sh": echo,
        ".venv/bin/python": f"{echo} 1 2 3",
        ".venv/bin/mlflow": echo,
        ".venv/bin/ray": '#!/usr/bin/env bash\n[ "$1" != start ] || exec sleep 60\n',
    }
    for name, text in programs.items():
        (project / name).parent.mkdir(parents=True, exist_ok=True)
        (project / name).write_text(text)
        (project / name).chmod(0o755)
    done = subprocess.run(
        ["bash", str(project / "tools" / "quickstart.sh"), "--output", "out"],
        cwd=elsewhere, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    printed = [line.partition(": ")[2] for line in done.stdout.splitlines() if line.startswith(("Look", "Inspect"))]
    assert len(printed) == 2
    for command in printed:
        subprocess.run(["bash", "-c", command], cwd=elsewhere, check=True)
    assert f"{elsewhere}/out/store" in shlex.split(printed[1])
