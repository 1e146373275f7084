"""A Ray cluster of several nodes on this machine, started as its operators start it: `ray start`, a token, addresses.

    with RayNodes(folder) as nodes:  head on 127.0.0.1  --nodes.add()--> 127.0.0.2, 127.0.0.3, ...
                                     nodes.submit("python", ...) --ray job submit--> its output

Every node is a process group of its own, with its own address on the loopback interface and its own folder of Ray's
files. Nothing else on this machine is joined, stopped or seen: no `ray stop`, another HOME, another token.
"""

import os
import secrets
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
NO_AGENT = "No available agent to submit job"  # Ray's answer while a new cluster starts
RAY = str(Path(sys.executable).with_name("ray"))


def free_port() -> int:
    """A TCP port that nothing listens on."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])


class RayNodes:
    """The cluster; nodes end with the `with`."""

    def __init__(self, folder: Path, head_cpus: int = 1) -> None:
        self.folder, self._head_cpus = folder, head_cpus
        self.port, self.dashboard_port = free_port(), free_port()
        self.nodes: list[subprocess.Popen[bytes]] = []
        (folder / "home").mkdir(parents=True)
        token = folder / "token"
        token.write_text(secrets.token_hex(32))
        token.chmod(0o600)
        self.environment = {
            **{name: value for name, value in os.environ.items() if not name.startswith("RAY_")},
            "HOME": str(folder / "home"), "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(token),
            "RAY_USAGE_STATS_ENABLED": "0", "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.2", "OMP_WAIT_POLICY": "PASSIVE",
            "MLFLOW_DISABLE_TELEMETRY": "true", "PYTHONPATH": str(ROOT), "GLOO_SOCKET_IFNAME": "lo",
        }  # fmt: skip

    def __enter__(self) -> "RayNodes":
        dashboard = ["--dashboard-host", "127.0.0.1", "--dashboard-port", str(self.dashboard_port)]
        self._start("--head", "--port", str(self.port), "--num-cpus", str(self._head_cpus), *dashboard)
        self._wait_for_jobs()
        return self

    def __exit__(self, *_: object) -> None:
        for node in reversed(self.nodes):
            self.kill(node)

    def add(self, cpus: int) -> subprocess.Popen[bytes]:
        """One more node."""
        return self._start("--address", f"127.0.0.1:{self.port}", "--num-cpus", str(cpus))

    def kill(self, node: subprocess.Popen[bytes]) -> None:
        """All of a node's processes at once, as when its power fails."""
        try:
            os.killpg(node.pid, signal.SIGKILL)
        except ProcessLookupError:
            return
        node.wait(30)

    def submit(self, *command: Any, timeout_s: float = 300, **environment: str) -> subprocess.CompletedProcess[str]:
        """`ray job submit`, waiting for the job's end; its output has all that the job printed.

        Again, when no node had its agent up to take the job.
        """
        address, end_s = f"http://127.0.0.1:{self.dashboard_port}", time.monotonic() + 120
        while True:
            done = subprocess.run(
                [RAY, "job", "submit", "--address", address, "--", *map(str, command)],
                env={**self.environment, **environment}, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                timeout=timeout_s,
            )  # fmt: skip
            if NO_AGENT not in done.stdout or time.monotonic() > end_s:
                return done
            time.sleep(1)

    def _start(self, *options: str) -> subprocess.Popen[bytes]:
        number = len(self.nodes) + 1
        # Ray's sockets lie there, whose paths must be short.
        folder = self.folder / f"r{number}"
        folder.mkdir()
        command = [
            RAY,
            "start",
            "--block",
            "--node-ip-address",
            f"127.0.0.{number}",
            "--temp-dir",
            str(folder),
            "--dashboard-agent-listen-port",  # the default is taken where another Ray runs: no job would be accepted
            str(free_port()),
            *options,
        ]
        log = (self.folder / f"node-{number}.log").open("wb")
        self.nodes.append(
            subprocess.Popen(command, env=self.environment, stdout=log, stderr=log, start_new_session=True)
        )
        return self.nodes[-1]

    def _wait_for_jobs(self) -> None:
        """Until the dashboard answers, be it that it wants a token."""
        end_s = time.monotonic() + 90
        while time.monotonic() < end_s and self.nodes[0].poll() is None:
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{self.dashboard_port}/api/jobs/", timeout=5)
            except urllib.error.HTTPError:
                return
            except (urllib.error.URLError, OSError):
                time.sleep(0.2)
        raise RuntimeError(f"Ray's head did not start:\n{(self.folder / 'node-1.log').read_text()[-3000:]}")
