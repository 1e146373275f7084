"""Who has no token neither submits a job nor joins a real Ray; the token of a local Ray is private from the first.

`ray start --head --block`, own ports, home and temporary folder  <-  submissions by HTTP, a driver
`session.start_local` in a process of its own, started at the same time
"""

import json
import os
import shutil
import socket
import stat
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

pytestmark = pytest.mark.integration
ROOT = Path(__file__).resolve().parents[2]
RAY = Path(sys.executable).with_name("ray")
TOKEN, OTHER = "a" * 64, "b" * 64
_KEPT = ("PATH", "LANG", "LD_LIBRARY_PATH")


def free_ports(count: int) -> list[str]:
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [str(opened.getsockname()[1]) for opened in sockets]
    for opened in sockets:
        opened.close()
    return ports


QUICK_END = {"RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S": "0"}  # else `ray start` takes 30 s to end


def environment(home: Path, **variables: str) -> dict[str, str]:
    """What a process of the cluster's user gets, and nothing of this test run's own Ray."""
    kept = {name: os.environ[name] for name in _KEPT if name in os.environ}
    return kept | {"HOME": str(home), "PYTHONPATH": str(ROOT), "RAY_USAGE_STATS_ENABLED": "0", **QUICK_END} | variables


@dataclass(frozen=True)
class Head:
    """A running head: its folder, its dashboard and its GCS."""

    folder: Path
    dashboard: str
    gcs: str

    def submit(self, token: str | None, name: str) -> int:
        """HTTP status of submitting a job that makes the file `name`."""
        request = urllib.request.Request(
            f"{self.dashboard}/api/jobs/",
            data=json.dumps({"entrypoint": f"touch {self.folder / name}"}).encode(),
            headers={"Content-Type": "application/json"} | ({"Authorization": f"Bearer {token}"} if token else {}),
        )
        try:
            with urllib.request.urlopen(request, timeout=30) as answer:
                return int(answer.status)
        except urllib.error.HTTPError as error:
            return error.code


@dataclass(frozen=True)
class Local:
    """A process that starts a local Ray and says whether it asks for a token, and how a task of it would."""

    home: Path
    process: subprocess.Popen[str]


@pytest.fixture(scope="module")
def local() -> Iterator[Local]:
    home = Path(tempfile.mkdtemp(prefix="ns-", dir="/tmp"))
    program = (
        "from neurostorm.runtime.session import start_local, asks_for_token\n"
        f"start_local(num_cpus=1, include_dashboard=False, _temp_dir='{home / 'ray'}', log_to_driver=False)\n"
        "import ray, os\n"
        "print(asks_for_token(), ray.get(ray.remote(num_cpus=1)(lambda: os.environ['RAY_AUTH_MODE']).remote()))\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", program], env=environment(home), text=True, cwd=home,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    try:
        yield Local(home, process)
    finally:
        process.terminate()
        process.wait(60)
        shutil.rmtree(home, ignore_errors=True)


@pytest.fixture(scope="module")
def head(local: Local) -> Iterator[Head]:  # the local Ray starts meanwhile
    folder = Path(tempfile.mkdtemp(prefix="ns-", dir="/tmp"))  # short: Ray's sockets lie below it
    (folder / "token").write_text(TOKEN)
    names = ("port", "dashboard-port", "dashboard-agent-listen-port", "dashboard-agent-grpc-port",
             "ray-client-server-port", "metrics-export-port")  # fmt: skip
    ports = dict(zip(names, free_ports(len(names)), strict=True))
    variables = environment(folder, RAY_AUTH_MODE="token", RAY_AUTH_TOKEN_PATH=str(folder / "token"))
    command = [
        str(RAY), "start", "--head", "--block", "--num-cpus", "1", "--node-ip-address", "127.0.0.1",
        "--dashboard-host", "127.0.0.1", "--temp-dir", str(folder / "ray"),
        *(word for name, port in ports.items() for word in (f"--{name}", port)),
    ]  # fmt: skip
    with (folder / "log").open("w") as log:
        process = subprocess.Popen(command, env=variables, stdout=log, stderr=subprocess.STDOUT)
        try:
            made = Head(folder, f"http://127.0.0.1:{ports['dashboard-port']}", f"127.0.0.1:{ports['port']}")
            until(lambda: answers(made), folder / "log")
            yield made
        finally:
            process.terminate()
            process.wait(60)
            shutil.rmtree(folder, ignore_errors=True)


def answers(head: Head) -> bool:
    request = urllib.request.Request(f"{head.dashboard}/api/jobs/", headers={"Authorization": f"Bearer {TOKEN}"})
    try:
        with urllib.request.urlopen(request, timeout=5) as answer:
            return bool(answer.status == 200)
    except OSError:
        return False


def until(condition, log: Path) -> None:
    for _ in range(240):
        if condition():
            return
        time.sleep(0.5)
    pytest.fail(log.read_text()[-2000:])


def test_a_job_is_refused_without_the_token_and_accepted_with_it(head: Head) -> None:
    assert [head.submit(token, f"owned-{token}") for token in (None, "", OTHER)] == [401, 401, 403]
    answer = 500
    for _ in range(60):  # a dashboard answers with 500 as long as no agent of a node has come up to run jobs
        if (answer := head.submit(TOKEN, "accepted")) != 500:
            break
        time.sleep(1)
    assert answer == 200
    until((head.folder / "accepted").exists, head.folder / "log")
    assert not list(head.folder.glob("owned-*"))


def test_the_dashboard_listens_on_loopback_alone(head: Head) -> None:
    port = int(head.dashboard.rpartition(":")[2])
    listening = [line.split()[1] for line in Path("/proc/net/tcp").read_text().splitlines()[1:] if " 0A " in line]
    assert [address for address in listening if int(address.split(":")[1], 16) == port] == [f"0100007F:{port:04X}"]


def test_a_driver_with_another_token_does_not_get_in(head: Head) -> None:
    join = f"import ray; ray.init(address='{head.gcs}', logging_level='ERROR'); print('in')"
    variables = environment(head.folder, RAY_AUTH_MODE="token", RAY_AUTH_TOKEN=OTHER)
    tried = subprocess.run(
        [sys.executable, "-c", join], env=variables, capture_output=True, text=True, timeout=120, cwd=head.folder
    )
    assert tried.returncode != 0 and "in" not in tried.stdout.split()
    assert "authentication" in tried.stderr.lower() or "token" in tried.stderr.lower(), tried.stderr[-2000:]


def test_a_real_local_ray_asks_for_a_token_that_only_its_user_can_read(local: Local) -> None:
    output = local.process.communicate(timeout=120)[0]
    assert output.split()[-2:] == ["True", "token"], output[-2000:]
    assert stat.S_IMODE((local.home / ".ray" / "auth_token").stat().st_mode) == 0o600
