"""Whether the cluster has what a job asks for: at once, after a bounded wait, or an error with what to type instead.

    Demand (processes x CPU, GPU) + Capacity (nodes)
      fits               -> the job starts
      fits, but in use   -> wait for free cores, at most scale.wait_for_nodes_s
      an autoscaler runs -> wait for nodes, at most scale.wait_for_nodes_s
      can never fit      -> ConfigError: what was asked for, what is there, options that fit

What fits, and what to type, is planned in `capacity.py`.
"""

import json
import logging
import os
import re
import time
from collections.abc import Sequence
from dataclasses import replace

import ray
from ray.util.placement_group import placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from neurostorm.config import ConfigError
from neurostorm.runtime.capacity import Capacity, Demand, Node, fits, in_use, refusal
from neurostorm.runtime.session import ensure_ray

logger = logging.getLogger(__name__)

DEFAULT_WAIT_S = 600  # for nodes of an autoscaler, and for cores that others use
JOIN_S = 12  # for nodes that are joining a cluster without an autoscaler, or for its first report of what it starts
SETTLE_S = 5  # a free cluster answers in less
SAY_EVERY_S = 30
TORCH_TIMEOUT_S = 120  # to start a process on a GPU node and import torch
_MONITORED_NODE = re.compile(r"node_[0-9a-f]{40,}")  # what the monitor of a static cluster calls a node's type


def cluster() -> Capacity:
    """What the Ray cluster of this process has now."""
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    free = ray.available_resources()
    return Capacity(
        tuple(Node(node.get("CPU", 0.0), node.get("GPU", 0.0)) for node in nodes),
        Node(free.get("CPU", 0.0), free.get("GPU", 0.0)),
    )


def current() -> Capacity:
    """What the next job will find: the cluster of this process, or this machine when it has none."""
    return replace(cluster(), grows=autoscales()) if ray.is_initialized() else this_machine()


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

    Ray has no public call for it. A head node without a configuration has a monitor that only watches, which calls each
    node's type `node_<its ID>`; an autoscaler reports the node types of its configuration, or none yet.
    """
    from ray._private.ray_constants import DEBUG_AUTOSCALING_STATUS
    from ray.autoscaler.v2.sdk import get_cluster_status
    from ray.autoscaler.v2.utils import is_autoscaler_v2
    from ray.experimental.internal_kv import _internal_kv_get

    if is_autoscaler_v2(fetch_from_server=True):
        status = get_cluster_status(ray.get_runtime_context().gcs_address)
        return _are_configured([node.ray_node_type_name for node in [*status.active_nodes, *status.idle_nodes]])
    return _are_configured(_reported_types(_internal_kv_get(DEBUG_AUTOSCALING_STATUS)))


def _reported_types(status: bytes | None) -> list[str] | None:
    """Node types in the report that Ray's autoscaler, or the monitor in its place, leaves every five seconds."""
    report = json.loads(status).get("autoscaler_report") if status else None
    return None if report is None else list(report.get("active_nodes") or {})


def _are_configured(types: Sequence[str] | None) -> bool:
    return types is not None and not any(_MONITORED_NODE.fullmatch(name) for name in types)


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
            growing = growing or autoscales()  # the first report of an autoscaler may still be to come
            enough = fits(demand, capacity)
            limit_s = wait_s if wait_s is not None else DEFAULT_WAIT_S if growing or enough else joining_s
            if waited_s >= say_at_s:
                why = in_use(capacity) if enough else "and its autoscaler may bring more" if growing else "so far"
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
