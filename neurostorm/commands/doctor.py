"""What this machine has, and what each command lacks here: `neurostorm doctor [COMMAND] [--json FILE]`.

    look() -> Facts: versions, cores, memory, disk, GPUs, compiler --findings(facts)--> what is missing, and a fix

Exit status 1 when the asked command cannot run here; without a command, when `embed` cannot, which needs least.
"""

import argparse
import importlib.metadata
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from neurostorm import __version__
from neurostorm.commands import program

CORE = (
    "torch", "numpy", "scipy", "nibabel", "zarr", "numcodecs", "einops", "safetensors", "obstore", "pyarrow",
    "pydantic",
)  # fmt: skip
RAY, TRACKING, TABLES = ("ray",), ("mlflow",), ("pandas", "scikit-learn")
NEEDS: dict[str, tuple[str, ...]] = {
    "embed": (*CORE, *RAY, *TABLES),
    "ingest": (*CORE, *RAY, "nilearn"),
    "pretrain": (*CORE, *RAY, *TRACKING, "deepspeed", "ninja"),
    "finetune": (*CORE, *RAY, *TRACKING, *TABLES, "nilearn"),
    "sweep": (*CORE, *RAY, *TRACKING, *TABLES, "nilearn", "matplotlib", "jinja2"),
    "report": (*CORE, *TRACKING, "pandas", "matplotlib", "jinja2"),
    "store": (*CORE, "tqdm", "matplotlib"),
}
EXTRA = {"embed": "eval", "ingest": "train", "pretrain": "train", "finetune": "eval", "sweep": "eval", "report": "eval",
         "store": "train"}  # fmt: skip
PYTHON = (3, 11)
MEMORY_GB, DISK_GB = 4.0, 5.0  # below which the smallest preset is in trouble
CUDA_DRIVER = {12: 525, 13: 580}  # oldest NVIDIA driver, by CUDA's major version (NVIDIA's compatibility table)


@dataclass(frozen=True)
class Facts:
    """What was found on a machine.

    Attributes:
        python: version.
        system: of the operating system, in words.
        versions: of packages that are installed, by name.
        cores: that this process may use.
        memory_gb: of the machine, None if it is not known.
        temporary: folder for temporary files, and its free gigabytes.
        gpus: names of NVIDIA GPUs as the driver shows them.
        driver: version of NVIDIA's driver, "" without one.
        torch_cuda: version of CUDA that torch was built for, "" for a CPU build or without torch.
        torch_sees: GPUs that torch can use.
        compiler: path of gcc or cc, "" without one.
    """

    python: tuple[int, int, int]
    system: str
    versions: dict[str, str]
    cores: int
    memory_gb: float | None
    temporary: tuple[str, float]
    gpus: list[str] = field(default_factory=list)
    driver: str = ""
    torch_cuda: str = ""
    torch_sees: int = 0
    compiler: str = ""


@dataclass(frozen=True)
class Finding:
    """One thing that is missing or in the way.

    Attributes:
        command: what it keeps from running, "" for a warning.
        text: what is wrong.
        fix: what to type.
    """

    command: str
    text: str
    fix: str


def main(argv: Sequence[str] | None = None) -> int:
    """Prints what was found; returns the exit status."""
    options = _parse(argv)
    facts = look()
    found = findings(facts)
    asked = options.command or "embed"
    blocked = [finding for finding in found if finding.command == asked]
    if options.json:
        content = {"facts": asdict(facts), "findings": [asdict(finding) for finding in found], "can_run": not blocked}
        options.json.write_text(json.dumps(content, indent=2) + "\n")
    print("\n".join([*_facts_in_words(facts), "", *_findings_in_words(found, options.command)]))
    return int(bool(blocked))


def findings(facts: Facts) -> list[Finding]:
    """What is missing for each command, then warnings. Pure."""
    found = []
    if facts.python < PYTHON:
        old = ".".join(map(str, facts.python))
        found += [Finding(name, f"Python {old} is too old", "install Python 3.11 or newer") for name in NEEDS]
    for name, packages in NEEDS.items():
        missing = [package for package in packages if package not in facts.versions]
        if missing:
            found.append(Finding(name, f"missing: {', '.join(missing)}", f"pip install 'neurostorm[{EXTRA[name]}]'"))
    if not facts.compiler:
        found.append(Finding("", "no C compiler: the mamba mixer runs at a tenth of its speed on a CPU", "install gcc"))
    if facts.gpus and not facts.torch_sees:
        found.append(Finding("", _unused_gpu(facts), "tools/setup.sh installs the build of torch for the driver"))
    if facts.memory_gb is not None and facts.memory_gb < MEMORY_GB:
        found.append(
            Finding("", f"{facts.memory_gb:.1f} GB of memory; preset tiny takes {MEMORY_GB:g}", "use another machine")
        )
    folder, free_gb = facts.temporary
    if free_gb < DISK_GB:
        found.append(Finding("", f"{free_gb:.1f} GB are free in {folder}", "set TMPDIR to a folder with more room"))
    return found


def look() -> Facts:
    """Looks at this machine. What cannot be found out is left out; nothing raises."""
    packages = {package for packages in NEEDS.values() for package in packages} | {"nvidia-ml-py", "triton"}
    versions = {}
    for package in sorted(packages):
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    gpus, driver = _nvidia()
    cuda, sees = _torch_cuda() if "torch" in versions else ("", 0)
    folder = tempfile.gettempdir()
    return Facts(
        python=sys.version_info[:3],
        system=f"{platform.system()} {platform.release()}, {platform.machine()}",
        versions=versions,
        cores=len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1,
        memory_gb=_memory_gb(),
        temporary=(folder, shutil.disk_usage(folder).free / 1e9),
        gpus=gpus,
        driver=driver,
        torch_cuda=cuda,
        torch_sees=sees,
        compiler=shutil.which("gcc") or shutil.which("cc") or "",
    )


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog=program("doctor", "neurostorm doctor"),
        description="What this machine has, and what each command lacks here.",
        allow_abbrev=False,
    )
    parser.add_argument("command", nargs="?", choices=NEEDS, metavar="COMMAND", help=f"of {', '.join(NEEDS)}")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write what was found here, too")
    return parser.parse_args(argv)


def _nvidia() -> tuple[list[str], str]:
    """Names of GPUs and the driver's version, as nvidia-smi shows them."""
    command = ["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"]
    try:
        shown = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return [], ""
    rows = [line.split(", ") for line in shown.splitlines() if line.strip()]
    return [row[0] for row in rows], rows[0][-1] if rows else ""


def _torch_cuda() -> tuple[str, int]:
    try:
        import torch
    except Exception:  # a broken installation: an error of its libraries may be of any kind
        return "", 0
    return torch.version.cuda or "", torch.cuda.device_count()


def _memory_gb() -> float | None:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9
    except (AttributeError, ValueError, OSError):
        return None


def _unused_gpu(facts: Facts) -> str:
    if not facts.torch_cuda:
        return f"{len(facts.gpus)} GPU(s), but torch is a build for CPUs"
    needed = CUDA_DRIVER.get(int(facts.torch_cuda.partition(".")[0]), 0)
    torch = f"torch for CUDA {facts.torch_cuda} needs driver {needed}"
    return f"{len(facts.gpus)} GPU(s), but {torch}, there is {facts.driver}"


def _facts_in_words(facts: Facts) -> list[str]:
    memory = f"{facts.memory_gb:.0f} GB" if facts.memory_gb is not None else "of unknown size"
    gpus = ", ".join(facts.gpus) or "none"
    driver = f"; driver {facts.driver}" if facts.driver else ""
    build = f"CUDA {facts.torch_cuda}" if facts.torch_cuda else "a CPU build"
    shown: dict[str, Any] = {
        "neurostorm": __version__,
        "python": f"{'.'.join(map(str, facts.python))} on {facts.system}",
        "machine": f"{facts.cores} core(s), memory {memory}; {facts.temporary[1]:.0f} GB free in {facts.temporary[0]}",
        "GPUs": f"{gpus}{driver}; torch is {build} and sees {facts.torch_sees}",
        "compiler": facts.compiler or "none",
        "packages": ", ".join(f"{name} {version}" for name, version in facts.versions.items()),
    }
    return [f"{name:<12}{text}" for name, text in shown.items()]


def _findings_in_words(found: Sequence[Finding], asked: str | None) -> list[str]:
    lines = []
    for name in [asked] if asked else NEEDS:
        wrong = [finding for finding in found if finding.command == name]
        lines += [f"{name:<12}ready"] if not wrong else [f"{name:<12}{each.text}: {each.fix}" for each in wrong]
    return [*lines, *(f"warning     {each.text}: {each.fix}" for each in found if not each.command)]
