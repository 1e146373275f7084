"""Whether the cluster has what a job asks for: at once, after a bounded wait, or an error with what to type instead.

    Demand (processes x CPU, GPU) + Capacity (nodes)
      fits               -> the job starts
      fits, but in use   -> wait for free cores, at most scale.wait_for_nodes_s
      an autoscaler runs -> wait for nodes, at most scale.wait_for_nodes_s
      can never fit      -> ConfigError: what was asked for, what is there, options that fit

The planner is pure; `this_machine`, `cluster`, `autoscales` and `require` ask Ray.
"""

import json
import logging
import math
import os
import re
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import ray
from ray.util.placement_group import placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from neurostorm.config import ConfigError
from neurostorm.session import ensure_ray

logger = logging.getLogger(__name__)

DEFAULT_WAIT_S = 600  # for nodes of an autoscaler, and for cores that others use
JOIN_S = 10  # for nodes that are just joining a cluster without an autoscaler
SETTLE_S = 5  # a free cluster answers in less
SAY_EVERY_S = 30
TORCH_TIMEOUT_S = 120  # to start a process on a GPU node and import torch
_MONITORED_NODE = re.compile(r"node_[0-9a-f]{40,}")  # what the monitor of a static cluster calls a node's type


@dataclass(frozen=True)
class Node:
    """CPU cores and GPUs of one node."""

    cpus: float
    gpus: float = 0.0


@dataclass(frozen=True)
class Capacity:
    """What a cluster has, and what of it is free now.

    Attributes:
        nodes: the nodes that are alive.
        free: CPU cores and GPUs of all nodes together that no job has reserved; None: all.
    """

    nodes: tuple[Node, ...]
    free: Node | None = None

    @property
    def total(self) -> Node:
        return Node(sum(node.cpus for node in self.nodes), sum(node.gpus for node in self.nodes))

    def __str__(self) -> str:
        """`0 GPU and 2 CPU on 1 node`, with the most on one node when there are several."""
        total, count = self.total, len(self.nodes)
        words = f"{total.gpus:g} GPU and {total.cpus:g} CPU on {count} node{'' if count == 1 else 's'}"
        if count < 2:
            return words
        gpus, cpus = max(node.gpus for node in self.nodes), max(node.cpus for node in self.nodes)
        return f"{words} (at most {gpus:g} GPU and {cpus:g} CPU on one)"


@dataclass(frozen=True)
class Demand:
    """What a job asks of the cluster: `workers` processes, each on one node.

    Attributes:
        workers: processes that are asked for.
        cpus: CPU cores that Ray reserves for one of them.
        gpus: GPUs of one of them, a fraction of one or whole ones.
        what: name of such a process in messages: worker, trial, run.
        least: the fewest with which the job can start; None: all.
        counts: numbers of processes that the job can use, for suggestions; empty: any up to `workers`.
        task_cpus: cores of the tasks that read clips beside the workers (data.read_in=tasks).
        options: command-line options that set `workers`, `least`, `cpus`, `gpus`, by these names; others are fixed.
        small_preset: whether --preset tiny (2 or 1 workers of one core) can take the place of a job that needs GPUs.
    """

    workers: int
    cpus: float
    gpus: float = 0.0
    what: str = "worker"
    least: int | None = None
    counts: tuple[int, ...] = ()
    task_cpus: float = 0.0
    options: dict[str, str] = field(default_factory=dict)
    small_preset: bool = False

    @property
    def fewest(self) -> int:
        """Processes with which the job can start."""
        return self.workers if self.least is None else self.least

    @property
    def bundles(self) -> list[dict[str, float]]:
        """The demand of a start as bundles of a Ray placement group."""
        process = {"CPU": self.cpus} | ({"GPU": self.gpus} if self.gpus else {})
        return [process] * self.fewest + ([{"CPU": self.task_cpus}] if self.task_cpus else [])

    def __str__(self) -> str:
        """`4 workers x (1 GPU, 8 CPU)`."""
        count = f"{self.workers}" if self.fewest == self.workers else f"{self.fewest} to {self.workers}"
        words = f"{count} {self.what}{'' if self.workers == 1 else 's'} x ({self.gpus:g} GPU, {self.cpus:g} CPU)"
        return words + (f" and {self.task_cpus:g} CPU for reading tasks" if self.task_cpus else "")


def room(demand: Demand, capacity: Capacity) -> int:
    """How many of the demand's processes the nodes hold at once when nothing else runs, with its reading tasks."""
    nodes = [_on(node, demand.cpus, demand.gpus) for node in capacity.nodes]
    if not demand.task_cpus:
        return sum(nodes)
    beside = []  # the reading tasks on each node in turn
    for index, node in enumerate(capacity.nodes):
        if node.cpus + 1e-6 >= demand.task_cpus:
            left = replace(node, cpus=node.cpus - demand.task_cpus)
            beside.append(sum(nodes) - nodes[index] + _on(left, demand.cpus, demand.gpus))
    return max(beside, default=0)


def _on(node: Node, cpus: float, gpus: float) -> int:
    """How many processes one node holds; a fraction of a GPU lies on one GPU."""
    by_cpu = math.floor(node.cpus / cpus + 1e-6)
    if not gpus:
        return by_cpu
    by_gpu = int(node.gpus) * math.floor(1 / gpus + 1e-6) if gpus <= 1 else math.floor(node.gpus / gpus + 1e-6)
    return min(by_cpu, by_gpu)


def fits(demand: Demand, capacity: Capacity) -> bool:
    """Whether the nodes can hold the demand's fewest processes at once, when nothing else runs."""
    return room(demand, capacity) >= demand.fewest


def suggestions(demand: Demand, capacity: Capacity) -> list[str]:
    """Options that make the demand fit the nodes, the best first; empty when none do."""
    found: list[str] = []
    if demand.task_cpus and fits(replace(demand, task_cpus=0.0), capacity):
        found.append("--data.read_in worker")
    if demand.small_preset and demand.gpus and not capacity.total.gpus:
        tiny = min(2, room(Demand(1, 1), capacity))
        found += [f"--preset tiny --workers {tiny}"] if tiny else []
    same = _changed(demand, capacity, demand.cpus, demand.gpus)
    if same:
        found.append(same)
    if "cpus" in demand.options:
        for cpus in range(math.ceil(demand.cpus) - 1, 0, -1):
            if fits(replace(demand, cpus=cpus), capacity):
                found.append(f"{demand.options['cpus']} {cpus}")
                break
    if not same and len(found) < 2:
        found += _smaller(demand, capacity)
    return list(dict.fromkeys(found))


def _smaller(demand: Demand, capacity: Capacity) -> list[str]:
    """Fewer cores for each process, then no GPU either, with as many processes as then fit; the first that does."""
    cores = [demand.cpus]
    if "cpus" in demand.options:
        largest = max((node.cpus for node in capacity.nodes), default=0.0)
        cores += range(min(math.ceil(demand.cpus) - 1, math.floor(largest)), 0, -1)
    for gpus in [demand.gpus, 0.0] if demand.gpus and "gpus" in demand.options else [demand.gpus]:
        for cpus in cores:
            if changed := _changed(demand, capacity, cpus, gpus):
                return [changed]
    return []


def _changed(demand: Demand, capacity: Capacity, cpus: float, gpus: float) -> str:
    """The options for as many processes of this size as fit, empty when none do."""
    held = room(replace(demand, cpus=cpus, gpus=gpus), capacity)
    allowed = demand.counts or tuple(range(1, demand.workers + 1))
    count = max((number for number in allowed if number <= min(held, demand.workers)), default=0)
    if not count or ("workers" not in demand.options and held < demand.fewest):
        return ""
    words = []
    if "workers" in demand.options and count < demand.workers:
        words.append(f"{demand.options['workers']} {count}")
        if "least" in demand.options and demand.fewest > count and demand.least is not None:
            words.append(f"{demand.options['least']} {count}")
    words += [f"{demand.options['gpus']} {gpus:g}"] if gpus != demand.gpus else []
    words += [f"{demand.options['cpus']} {cpus:g}"] if cpus != demand.cpus else []
    return " ".join(words)


def refusal(demand: Demand, capacity: Capacity, waited_s: float = 0.0) -> str:
    """The message for a demand that does not fit: what was asked for, what is there, what to type."""
    has = f"asked for {demand}; this cluster has {capacity}"
    waited = f"; waited {waited_s:.0f} s" if waited_s >= 1 else ""
    if fits(demand, capacity):
        return (
            f"{has}, {_in_use(capacity)}{waited}: start again when those jobs have ended (`ray status` shows what is "
            "in use), or wait longer with --scale.wait_for_nodes_s SECONDS"
        )
    found = suggestions(demand, capacity)
    fix = f"use {', or '.join(found)}" if found else "no setting fits, use a larger machine or cluster"
    return f"{has}{waited}: {fix}"


def _in_use(capacity: Capacity) -> str:
    """What is reserved now, in words."""
    total, free = capacity.total, capacity.free or capacity.total
    used = [f"{total.gpus - free.gpus:g} of {total.gpus:g} GPU"] if total.gpus else []
    used.append(f"{total.cpus - free.cpus:g} of {total.cpus:g} CPU")
    return f"where {' and '.join(used)} are in use by other jobs"


def cluster() -> Capacity:
    """What the Ray cluster of this process has now."""
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    free = ray.available_resources()
    return Capacity(
        tuple(Node(node.get("CPU", 0.0), node.get("GPU", 0.0)) for node in nodes),
        Node(free.get("CPU", 0.0), free.get("GPU", 0.0)),
    )


def this_machine() -> Capacity:
    """What a local Ray will have, as Ray itself counts it, before it is started."""
    from ray._private.accelerators import get_accelerator_manager_for_resource
    from ray._private.utils import get_num_cpus

    manager = get_accelerator_manager_for_resource("GPU")
    gpus, visible = manager.get_current_node_num_accelerators(), manager.get_current_process_visible_accelerator_ids()
    return Capacity(
        (Node(get_num_cpus(override_docker_cpu_warning=True), gpus if visible is None else min(gpus, len(visible))),)
    )


def autoscales() -> bool:
    """Whether an autoscaler runs that may bring nodes to this cluster.

    Ray has no public call for it. `ray start --head` and `ray.init` start a monitor that only watches, which calls each
    node's type `node_<its ID>`; an autoscaler reports the node types of its configuration.
    """
    from ray._private.ray_constants import DEBUG_AUTOSCALING_STATUS
    from ray.autoscaler.v2.sdk import get_cluster_status
    from ray.autoscaler.v2.utils import is_autoscaler_v2
    from ray.experimental.internal_kv import _internal_kv_get

    if is_autoscaler_v2(fetch_from_server=True):
        status = get_cluster_status(ray.get_runtime_context().gcs_address)
        nodes = [*status.active_nodes, *status.idle_nodes, *status.pending_nodes]
        return _are_configured([node.ray_node_type_name for node in nodes])
    return _are_configured(_reported_types(_internal_kv_get(DEBUG_AUTOSCALING_STATUS)))


def _reported_types(status: bytes | None) -> list[str]:
    """Node types in the report that Ray's autoscaler, or the monitor in its place, leaves every five seconds."""
    report = (json.loads(status) if status else {}).get("autoscaler_report") or {}
    pending = [node[1] for node in report.get("pending_nodes") or []]
    return [*(report.get("active_nodes") or {}), *(report.get("pending_launches") or {}), *pending]


def _are_configured(types: Sequence[str]) -> bool:
    return any(not _MONITORED_NODE.fullmatch(name) for name in types)


def require(demand: Demand, wait_s: int | None) -> Capacity:
    """Connects to Ray; returns when the demand's fewest processes fit beside what runs, and what the cluster has then.

    A machine that is too small is refused before a local Ray is started. A placement group stands for the demand
    meanwhile: Ray decides what fits beside other jobs, and an autoscaler sees what is missing. It is given back before
    this returns.

    Args:
        demand: what the job asks for.
        wait_s: scale.wait_for_nodes_s; None: 600 s where an autoscaler runs or cores are in use, else no wait.

    Raises:
        ConfigError: the demand does not fit, now or within that time; or GPUs are asked for and PyTorch has no CUDA.
    """
    joining_s = JOIN_S if os.environ.get("RAY_ADDRESS") else 0
    if not wait_s and not joining_s and not ray.is_initialized() and not fits(demand, here := this_machine()):
        raise ConfigError(refusal(demand, here))
    ensure_ray()
    began, growing, say_at_s = time.monotonic(), autoscales(), 0.0
    capacity = cluster()
    if wait_s is None and not growing and not joining_s and not fits(demand, capacity):
        raise ConfigError(refusal(demand, capacity))
    group = placement_group(demand.bundles, strategy="PACK")
    try:
        while not group.wait(timeout_seconds=1):
            capacity, waited_s = cluster(), time.monotonic() - began
            enough = fits(demand, capacity)
            limit_s = wait_s if wait_s is not None else DEFAULT_WAIT_S if growing or enough else joining_s
            if waited_s >= say_at_s:
                why = _in_use(capacity) if enough else "and its autoscaler may bring more" if growing else "so far"
                left_s = max(0.0, limit_s - waited_s)
                logger.warning("waiting for %s: this cluster has %s, %s; %.0f s left", demand, capacity, why, left_s)
                say_at_s = waited_s + SAY_EVERY_S
            if waited_s >= max(limit_s, SETTLE_S if enough else 0):
                raise ConfigError(refusal(demand, capacity, waited_s))
        if demand.gpus:
            _check_torch(demand, group)
    finally:
        remove_placement_group(group)
    return cluster()


def _check_torch(demand: Demand, group: object) -> None:
    """ConfigError when PyTorch cannot use the GPU where the first process would be."""
    there = PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=0)
    look = ray.remote(num_cpus=0, num_gpus=demand.gpus, max_retries=0, scheduling_strategy=there)(_look_at_torch)
    try:
        version, cuda, usable, node = ray.get(look.remote(), timeout=TORCH_TIMEOUT_S)
    except ray.exceptions.GetTimeoutError:
        logger.warning("no answer in %d s whether PyTorch sees the GPUs; going on", TORCH_TIMEOUT_S)
        return
    problem = torch_problem(demand, version, cuda, usable, node)
    if problem:
        raise ConfigError(problem)


def _look_at_torch() -> tuple[str, str | None, bool, str]:
    """PyTorch's version and CUDA version, whether it can use a GPU, and the node's address."""
    import torch

    return torch.__version__, torch.version.cuda, torch.cuda.is_available(), ray.util.get_node_ip_address()


def torch_problem(demand: Demand, version: str, cuda: str | None, usable: bool, node: str) -> str:
    """Why PyTorch on a node cannot use the GPUs that are asked for, and what to do; empty when it can."""
    if usable:
        return ""
    option = demand.options.get("gpus", "")
    asked = f"asked for {demand}"
    without = f", or use {option} 0 to work on the CPU" if option else ""
    if cuda is None:
        return (
            f"{asked}, but PyTorch {version} on node {node} is a build without CUDA: remove .venv and run "
            f"./tools/setup.sh on a machine with a GPU, or install torch=={version.split('+')[0]} from PyTorch's index "
            f"of CUDA builds{without}"
        )
    return (
        f"{asked}, but PyTorch {version} (CUDA {cuda}) on node {node} cannot use the GPU that Ray gave it: run "
        f"nvidia-smi there, its driver may be too old for CUDA {cuda}{without}"
    )
