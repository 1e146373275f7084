"""The start commands and the Slurm script are run, with stand-ins for `ray`, `srun`, `scontrol` and `python`.

commands of a launcher file  ->  bash, a home folder as the launcher fills it  ->  what `ray` was called with
slurm.sh  ->  bash, a fake allocation of two nodes with four GPUs  ->  what `python` got, exit status, requeue
"""

import importlib.util
import os
import re
import shutil
import signal
import stat
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

from neurostorm.config.presets import PRESETS

ROOT = Path(__file__).resolve().parents[2]
CLUSTER = ROOT / "cluster"
# A stand-in writes its arguments, one a line, and its environment to $CALLS/NAME.arguments and .environment.
RECORD = 'printf "%s\\n" "$@" > "$CALLS/$name.arguments"; env > "$CALLS/$name.environment"'


def write_program(path: Path, body: str) -> None:
    """An executable bash script."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/bash\n{body}\n")
    path.chmod(0o755)


def environment(text: str) -> dict[str, str]:
    """Variables as `env` prints them."""
    return dict(line.split("=", 1) for line in text.splitlines() if "=" in line)


def exported() -> dict[str, str]:
    """What cluster/env.sh promises every Ray process."""
    return dict(re.findall(r"^export (\w+)=(\S+)", (CLUSTER / "env.sh").read_text(), re.MULTILINE))


# Launcher files


def start(config: dict[str, Any], role: str, tmp: Path) -> tuple[list[str], dict[str, str]]:
    """Runs the start commands of `role` as the launcher would: the arguments and the environment of `ray start`."""
    home, calls = tmp / "home", tmp / "calls"
    calls.mkdir(parents=True)
    for remote, local in config["file_mounts"].items():
        target = home / remote.removeprefix("~/")
        target.parent.mkdir(parents=True, exist_ok=True)
        if local == "~/.ray/auth_token":
            target.write_text("a-token")
        elif (ROOT / local).exists():
            shutil.copy(ROOT / local, target)
    for folder in (tmp / "bin", home / "neurostorm-env" / "bin"):
        write_program(folder / "ray", f"name=$1; {RECORD}")
    variables = {
        "HOME": str(home), "PATH": f"{tmp / 'bin'}:/usr/bin:/bin", "CALLS": str(calls), "RAY_HEAD_IP": "10.0.0.10",
        "RAY_CLOUD_INSTANCE_ID": "10.0.0.10", "SSH_CONNECTION": "10.0.0.10 50000 10.0.0.11 22",
    }  # fmt: skip
    for command in config[f"{role}_start_ray_commands"]:
        subprocess.run(["bash", "-c", command], env=variables, check=True, cwd=home)
    return (calls / "start.arguments").read_text().split(), environment((calls / "start.environment").read_text())


def start_problems(arguments: list[str], variables: dict[str, str], role: str) -> list[str]:
    """What is wrong with how a node started: environment, token, dashboard, address of the head."""
    problems = [f"{name} is not {value}" for name, value in exported().items() if variables.get(name) != value]
    if not (Path(variables["HOME"]) / ".ray" / "auth_token").exists():
        problems.append("no token on the node")
    if role == "head" and "--dashboard-host=127.0.0.1" not in arguments:
        problems.append("the dashboard is not on loopback")
    wanted = "--head" if role == "head" else "--address=10.0.0.10:6379"
    return problems + [f"no {wanted}"] * (wanted not in arguments)


@pytest.mark.parametrize("role", ["head", "worker"])
@pytest.mark.parametrize("name", ["aws.yaml", "gcp.yaml", "onprem.yaml"])
def test_a_node_starts_with_a_token_and_its_dashboard_on_loopback(name: str, role: str, tmp_path: Path) -> None:
    arguments, variables = start(yaml.safe_load((CLUSTER / name).read_text()), role, tmp_path)
    assert start_problems(arguments, variables, role) == []


def test_an_on_prem_node_joins_under_the_address_that_the_file_lists(tmp_path: Path) -> None:
    config = yaml.safe_load((CLUSTER / "onprem.yaml").read_text())
    head, variables = start(config, "head", tmp_path / "head")
    worker, _ = start(config, "worker", tmp_path / "worker")
    assert "--node-ip-address=10.0.0.10" in head
    assert "--node-ip-address=10.0.0.11" in worker
    assert variables["PATH"].startswith(f"{tmp_path / 'head' / 'home'}/neurostorm-env/bin:")  # `python` of the jobs


@pytest.mark.parametrize("name", ["aws.yaml", "gcp.yaml"])
@pytest.mark.parametrize(
    ("text", "spoilt"),
    [
        ("source ~/neurostorm/env.sh;", "true;"),
        ("--dashboard-host=127.0.0.1", "--dashboard-host=0.0.0.0"),
        ("~/.ray/auth_token: ~/.ray/auth_token", ""),
    ],
)
def test_a_spoilt_start_is_noticed(text: str, spoilt: str, name: str, tmp_path: Path) -> None:
    original = (CLUSTER / name).read_text()
    assert text in original
    changed = original.replace(text, spoilt)
    arguments, variables = start(yaml.safe_load(changed), "head", tmp_path)
    assert start_problems(arguments, variables, "head")


# Slurm


@dataclass(frozen=True)
class Allocation:
    """A fake Slurm allocation of two nodes with four GPUs, and where its stand-ins write."""

    tmp: Path

    @property
    def calls(self) -> Path:
        return self.tmp / "calls"

    def popen(self, **variables: str) -> subprocess.Popen[str]:
        """Starts slurm.sh, its shared folder moved below `tmp`."""
        script = (CLUSTER / "slurm.sh").read_text().replace("/mnt/neurostorm", str(self.tmp / "shared"))
        (self.tmp / "spooled.sh").write_text(script)
        slurm = {
            "HOME": str(self.tmp / "home"), "PATH": f"{self.tmp / 'bin'}:/usr/bin:/bin", "CALLS": str(self.calls),
            "SLURM_SUBMIT_DIR": str(self.tmp / "project"), "SLURM_JOB_ID": "77", "SLURM_JOB_NUM_NODES": "2",
            "SLURM_GPUS_ON_NODE": "4", "SLURM_CPUS_PER_TASK": "48",
        }  # fmt: skip
        environment = {name: value for name, value in (slurm | variables).items() if value}
        return subprocess.Popen(
            ["bash", str(self.tmp / "spooled.sh")],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def run(self, **variables: str) -> tuple[int, str]:
        """(exit status, output) of slurm.sh; an empty variable is one that Slurm did not set."""
        process = self.popen(**variables)
        output, _ = process.communicate(timeout=30)
        return process.returncode, output

    def arguments(self, name: str) -> list[str]:
        return (self.calls / f"{name}.arguments").read_text().splitlines()

    @property
    def marker(self) -> Path:
        return self.tmp / "shared" / "outputs" / "base.finished"


@pytest.fixture
def allocation(tmp_path: Path) -> Allocation:
    """`ray symmetric-run` ends like the real one: with the command's status, or 0 when Ray itself did not start."""
    for folder in ("calls", "home", "project/cluster", "project/.venv/bin"):
        (tmp_path / folder).mkdir(parents=True)
    shutil.copy(CLUSTER / "env.sh", tmp_path / "project" / "cluster")
    (tmp_path / "project" / ".venv" / "bin" / "activate").write_text("")
    programs = {
        "hostname": 'if [ "$1" = -I ]; then echo "10.0.0.10 192.168.0.10"; else echo node-1; fi',
        "scontrol": f"name=scontrol; {RECORD}",
        "srun": 'while [[ $1 == --* ]]; do shift; done; "$@"',
        "python": f'name=python; {RECORD}; rm -f "$OUTPUT/$NAME/stop-requested"; touch "$CALLS/ready"\n'
        'for _ in $(seq "${PYTHON_TENTHS:-0}"); do\n'
        '    [ ! -e "$OUTPUT/$NAME/stop-requested" ] || exit "${STOPPED_STATUS:-75}"; sleep 0.1\n'
        "done\n"
        'exit "${PYTHON_STATUS:-0}"',
        "ray": f"name=$1; {RECORD}\n"
        'if [ "$1" = get-auth-token ]; then mkdir -p ~/.ray; echo a-token > ~/.ray/auth_token; exit; fi\n'
        '[ -z "$RAY_DOES_NOT_START" ] || exit 0\n'
        'while [ "$1" != -- ]; do shift; done; shift; "$@"',
    }
    for name, body in programs.items():
        write_program(tmp_path / "bin" / name, body)
    return Allocation(tmp_path)


def test_slurm_trains_with_one_worker_per_gpu_and_leaves_its_marker(allocation: Allocation) -> None:
    status, output = allocation.run()
    assert status == 0, output
    assert allocation.marker.exists()
    job, *arguments = allocation.arguments("python")
    assert job == "jobs/pretrain.py"
    specification = importlib.util.spec_from_file_location("pretrain", ROOT / job)
    assert specification and specification.loader
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    config = module.JOB.load(arguments)
    assert (config.scale.workers, config.run.name) == (8, "base")
    assert config.run.output == allocation.tmp / "shared" / "outputs"


def test_slurm_starts_ray_with_a_private_token_and_the_dashboard_on_loopback(allocation: Allocation) -> None:
    allocation.run()
    arguments = allocation.arguments("symmetric-run")
    options = dict(zip(arguments[1::2], arguments[2::2], strict=False))
    assert options["--address"] == "10.0.0.10:6379"
    assert options["--min-nodes"] == "2"
    assert options["--dashboard-host"] == "127.0.0.1"
    variables = environment((allocation.calls / "symmetric-run.environment").read_text())
    assert exported().items() <= variables.items()
    assert "RAY_AUTH_TOKEN" not in variables
    token = allocation.tmp / "home" / ".ray" / "auth_token"
    assert stat.S_IMODE(token.stat().st_mode) == 0o600
    assert len(variables["RAY_TMPDIR"]) < 40  # a socket's path below it may have 107 bytes


def test_slurm_takes_a_token_that_is_given(allocation: Allocation) -> None:
    allocation.run(RAY_AUTH_TOKEN_PATH="/shared/token")
    assert not (allocation.calls / "get-auth-token.arguments").exists()


@pytest.mark.parametrize("failure", [{"PYTHON_STATUS": "3"}, {"RAY_DOES_NOT_START": "1"}], ids=["job", "ray"])
def test_slurm_fails_when_the_run_is_not_finished_whatever_ray_says(
    allocation: Allocation, failure: dict[str, str]
) -> None:
    assert allocation.run()[0] == 0  # an earlier run has left its marker
    status, output = allocation.run(**failure)
    assert status != 0
    assert "not finished" in output
    assert not allocation.marker.exists()


def test_slurm_says_that_it_needs_gpus(allocation: Allocation) -> None:
    status, output = allocation.run(SLURM_GPUS_ON_NODE="")
    assert status != 0
    assert "no GPU" in output


def signaled(allocation: Allocation, *, times: int = 1, **variables: str) -> tuple[int, str]:
    """(exit status, output) of slurm.sh that gets USR1 while it trains."""
    process = allocation.popen(**variables)
    for _ in range(400):
        if (allocation.calls / "ready").exists():
            break
        time.sleep(0.05)
    for _ in range(times):
        os.kill(process.pid, signal.SIGUSR1)
        time.sleep(0.1)
    output, _ = process.communicate(timeout=30)
    return process.returncode, output


@pytest.mark.parametrize("times", [1, 2])
def test_slurm_saves_and_goes_back_to_the_queue_before_the_time_limit(allocation: Allocation, times: int) -> None:
    status, output = signaled(allocation, times=times, PYTHON_TENTHS="200")
    assert allocation.arguments("scontrol") == ["requeue", "77"], output
    assert status == 0 and "the run has saved and stopped: back to the queue" in output
    assert output.count("the run saves and stops") == 1
    assert not allocation.marker.exists()


def test_slurm_goes_back_to_the_queue_when_no_checkpoint_comes(allocation: Allocation) -> None:
    """The run does not hear of it, or takes too long: what it has must not end at the time limit."""
    _, output = signaled(allocation, PYTHON_TENTHS="20", STOPPED_STATUS="1", SAVE_WITHIN_S="0.1", PATH=deaf(allocation))
    assert allocation.arguments("scontrol") == ["requeue", "77"], output
    assert "no checkpoint came within 0.1 s: back to the queue" in output


def deaf(allocation: Allocation) -> str:
    """A PATH with a `python` that looks for no request."""
    folder = allocation.tmp / "deaf"
    folder.mkdir()
    write_program(folder / "python", 'touch "$CALLS/ready"; sleep 2; exit 3')
    return f"{folder}:{allocation.tmp / 'bin'}:/usr/bin:/bin"


@pytest.mark.parametrize("variables", [{"PYTHON_STATUS": "0", "PYTHON_TENTHS": "0"}, {"STOPPED_STATUS": "0"}])
def test_slurm_does_not_requeue_a_finished_run(allocation: Allocation, variables: dict[str, str]) -> None:
    """One that had ended when it was asked, and one whose last step was the one under way."""
    if "STOPPED_STATUS" in variables:
        status, output = signaled(allocation, PYTHON_TENTHS="200", **variables)
    else:
        status, output = allocation.run(**variables)
    assert status == 0 and "finished: " in output
    assert not (allocation.calls / "scontrol.arguments").exists()


def test_slurm_does_not_requeue_a_run_that_fails_when_it_saves(allocation: Allocation) -> None:
    status, output = signaled(allocation, PYTHON_TENTHS="200", STOPPED_STATUS="1")
    assert status == 1 and "not finished" in output
    assert not (allocation.calls / "scontrol.arguments").exists()


def test_slurm_resumes_by_the_same_command_and_forgets_the_stop_before(allocation: Allocation) -> None:
    signaled(allocation, PYTHON_TENTHS="200")
    (allocation.calls / "ready").unlink()
    (allocation.calls / "scontrol.arguments").unlink()
    status, output = allocation.run(SLURM_RESTART_COUNT="1")
    assert status == 0 and allocation.marker.exists(), output
    assert not (allocation.calls / "scontrol.arguments").exists()


def test_slurm_reads_its_directives_before_the_first_command() -> None:
    lines = (CLUSTER / "slurm.sh").read_text().splitlines()
    first_command = next(n for n, line in enumerate(lines) if line.strip() and not line.startswith("#"))
    directives = [line.removeprefix("#SBATCH ") for line in lines[:first_command] if line.startswith("#SBATCH ")]
    assert not any(line.startswith("#SBATCH") for line in lines[first_command:])
    assert {"--exclusive", "--requeue", "--ntasks-per-node=1", "--signal=B:USR1@180"} <= set(directives)
    assert not any("#" in directive for directive in directives)
    given = dict(directive.lstrip("-").split("=", 1) for directive in directives if "=" in directive)
    cores_per_worker = PRESETS["base"]["scale"]["cpus_per_worker"]
    assert int(given["cpus-per-task"]) > int(given["gpus-per-node"]) * cores_per_worker
