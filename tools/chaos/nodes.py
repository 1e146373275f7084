"""Faults of a cluster: three nodes of Ray on this machine, two of them with a training worker each.

    node         the power of a node with a worker fails             another node comes, the run goes on there
    preemption   a notice that it will be taken away, then it is     saved upon the notice; another node comes
    elastic      the power of a node fails, no other comes           goes on with one worker; with two when one comes

The nodes are those of ray_nodes.py, the job is submitted to them as on any cluster.
"""

import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil

from chaos.faults import Fault
from chaos.job import JobError, entries, kill_all, training_workers
from chaos.ray_nodes import RAY, RayNodes
from chaos.scene import EVERY, Scene

CPUS, WORKER_CPUS = 2, 1.5  # of a node and of a worker: one worker on each node but the head
NOTICE_S = 60


@dataclass
class NodesScene(Scene):
    """A run on a cluster of its own."""

    nodes: RayNodes | None = None
    notifier: subprocess.Popen[str] | None = None

    @property
    def cluster(self) -> RayNodes:
        """The cluster, which `prepare` started."""
        assert self.nodes is not None
        return self.nodes

    def command(self) -> Sequence[str]:
        """`ray job submit`, waiting for the end."""
        address = f"http://127.0.0.1:{self.cluster.dashboard_port}"
        return (RAY, "job", "submit", "--address", address, "--", sys.executable)

    def workers(self) -> list[psutil.Process]:
        """The training workers of all nodes."""
        return training_workers([process for node in self.cluster.nodes for process in family(node)])

    def node_with_worker(self) -> subprocess.Popen[bytes]:
        """A node that is not the head and has a training worker."""
        for node in self.random.sample(self.cluster.nodes[1:], len(self.cluster.nodes) - 1):
            if training_workers(family(node)):
                return node
        raise JobError("no node has a training worker")

    def address(self, node: subprocess.Popen[bytes]) -> str:
        """Where it listens."""
        return f"127.0.0.{self.cluster.nodes.index(node) + 1}"

    def power_off(self, node: subprocess.Popen[bytes]) -> None:
        """All processes of a node, wherever they have gone."""
        lost = family(node)
        self.cluster.kill(node)
        kill_all(lost)

    def close(self) -> None:
        """Ends the job; `prepare` ends the cluster."""
        if self.notifier is not None:
            self.notifier.kill()
        super().close()


def family(node: subprocess.Popen[bytes]) -> list[psutil.Process]:
    """A node's processes; none of one that has ended."""
    return psutil.Process(node.pid).children(recursive=True) if node.poll() is None else []


def with_nodes(scene: Scene) -> Callable[[], None]:
    """Starts them."""
    assert isinstance(scene, NodesScene)
    scene.nodes = RayNodes(scene.setting.folder / f"n{len(list(scene.setting.folder.iterdir()))}")
    token = (scene.nodes.folder / "token").read_text()
    scene.nodes.environment |= scene.environment
    scene.environment |= {"RAY_AUTH_TOKEN": token, "RAY_ADDRESS": ""}
    scene.nodes.environment["RAY_TRAIN_PREEMPTION_POLL_INTERVAL_S"] = "1"
    scene.nodes.__enter__()
    for _ in range(2):
        scene.nodes.add(CPUS)
    scene.nodes.submit("true")  # it comes back when jobs can be run
    return lambda: scene.cluster.__exit__()


def with_notice(scene: Scene) -> Callable[[], None]:
    """Three nodes, and who gives the notice."""
    undo = with_nodes(scene)
    assert isinstance(scene, NodesScene)
    scene.notifier = subprocess.Popen(
        [sys.executable, Path(__file__).with_name("drain.py"), f"127.0.0.1:{scene.cluster.port}"],
        env=scene.cluster.environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    return undo


def lose_node(scene: Scene) -> None:
    assert isinstance(scene, NodesScene)
    scene.power_off(scene.node_with_worker())
    scene.struck()
    scene.cluster.add(CPUS)


def take_node(scene: Scene) -> None:
    """The notice, and the node's end as soon as the run has saved; no other checkpoint is in sight."""
    assert isinstance(scene, NodesScene)
    assert scene.notifier is not None and scene.notifier.stdin is not None and scene.notifier.stdout is not None
    node, before = scene.node_with_worker(), len(scene.committed())
    if scene.notifier.stdout.readline() != "ready\n":
        raise JobError("nobody can give the notice")
    scene.notifier.stdin.write(f"{scene.address(node)} {NOTICE_S}\n")
    scene.notifier.stdin.flush()
    told_s, told_at = time.monotonic(), scene.job.reached()
    if (answer := scene.notifier.stdout.readline()) != "done\n":
        raise JobError(f"the notice was not given: {answer}")
    scene.job.wait_for(lambda: len(scene.committed()) > before, "a checkpoint upon the notice", timeout_s=60)
    print(
        f"chaos: saved {time.monotonic() - told_s:.1f} s and {scene.job.reached() - told_at} steps after the notice",
        file=sys.stderr,
    )
    scene.power_off(node)
    scene.struck()
    scene.cluster.add(CPUS)


def shrink_and_grow(scene: Scene) -> None:
    """The node that comes later makes the group start again, by itself."""
    assert isinstance(scene, NodesScene)
    scene.power_off(scene.node_with_worker())
    scene.struck()
    scene.back()
    scene.note(workers_now(scene) == 1, f"went on with {workers_now(scene)} workers when a node was lost")
    scene.cluster.add(CPUS)
    scene.job.wait_for(lambda: workers_now(scene) == 2, "a step of two workers again", timeout_s=400)


def workers_now(scene: Scene) -> int:
    """Of the latest step."""
    return int(entries(scene.job.folder / "ledger" / "rank-0.jsonl")[-1]["workers"])


PLACES = {"cpus_per_worker": WORKER_CPUS}
ON_NODES: dict[str, Fault] = {
    "node": Fault(lose_node, {"scale": PLACES}, fresh=True, scene=NodesScene, prepare=with_nodes),
    "preemption": Fault(
        take_node, {"scale": PLACES, "checkpoint": {"every": 10**6}}, allowed=EVERY, fresh=True, scene=NodesScene,
        prepare=with_notice,
    ),
    "elastic": Fault(
        shrink_and_grow, {"scale": PLACES | {"min_workers": 1, "resize_every_s": 5}}, fresh=True, scene=NodesScene,
        prepare=with_nodes,
        alters={"train": {"epochs": 10}},  # there must be steps left when the node has come
    ),
}  # fmt: skip
