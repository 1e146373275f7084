"""What a job asks for against what a cluster has: whether it fits, and if not, what to type instead. Pure.

    Demand (processes x CPU, GPU) + Capacity (nodes) --room--> how many fit --suggestions--> options that fit
                                                            --pretrain_suggestion--> the command after an ingest

A process lives on one node; a fraction of a GPU lies on one GPU. `resources.py` asks Ray for the capacity, and waits.
"""

import math
from dataclasses import dataclass, field, replace

from neurostorm.config import Config
from neurostorm.config.presets import PRESETS

FIRST_LOOK_S = 16  # for a step of --preset tiny on a 2 mm store, two cores


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
        grows: whether an autoscaler may bring more nodes.
    """

    nodes: tuple[Node, ...]
    free: Node | None = None
    grows: bool = False

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


def training_demand(config: Config) -> Demand:
    """What a pretraining run asks of the cluster; with scale.min_workers it starts with as few as these."""
    scale, batch, micro = config.scale, config.train.global_batch, config.train.micro_batch
    per_worker = {name: f"--scale.{name}_per_worker" for name in ("cpus", "gpus")}
    return Demand(
        scale.workers, scale.cpus_per_worker, scale.gpus_per_worker, least=scale.min_workers,
        counts=tuple(count for count in range(1, scale.workers + 1) if batch % (count * micro) == 0),
        task_cpus=1.0 if config.data.read_in == "tasks" else 0.0,
        options=per_worker | {"workers": "--workers", "least": "--scale.min_workers"}, small_preset=True,
    )  # fmt: skip


def pretrain_suggestion(grid: str, capacity: Capacity, store: object, program: str = "python jobs/pretrain.py") -> str:
    """The command that pretrains on a new store with what the cluster has; where that is too slow, a first look.

    The first line is a command; a second one explains a first look.

    Args:
        grid: of the store, `ingest.grid`: 2mm, 4mm or reference.
        capacity: of the cluster, see `current`.
        store: where the store is.
        program: how pretraining is started.
    """
    preset = "paper" if grid == "reference" else "base"
    command = f"{program} --preset {{}} --store {store}"
    if capacity.grows and not capacity.total.gpus:
        return command.format(preset)  # what its nodes will have is not known
    options = _gpu_options(preset, capacity)
    if options:
        return f"{command.format(preset)} {options}"
    single = room(Demand(1, 1), capacity) < PRESETS["tiny"]["scale"]["workers"]
    tiny = command.format("tiny") + (" --workers 1" if single else "")
    if grid == "4mm":
        return tiny
    return (
        f"{tiny} --train.max_steps 5\n"
        f"  That is a first look, at about {FIRST_LOOK_S} s a step on two cores: a 2 mm store needs a GPU and --preset "
        f"{preset}. Without a GPU, ingest again with --grid 4mm into another store."
    )


def _gpu_options(preset: str, capacity: Capacity) -> str:
    """Workers that the cluster's GPUs hold, a power of two that divides the preset's batch; empty when it holds none.

    Where the nodes have fewer cores for a GPU than the preset reserves, the workers get fewer.
    """
    config = Config.model_validate(PRESETS[preset])
    asked, batch, micro = training_demand(config), config.train.global_batch, config.train.micro_batch
    cores = [cpus for cpus in (asked.cpus, 4.0, 2.0, 1.0) if cpus <= asked.cpus]
    held, cpus = max((room(replace(asked, cpus=cpus), capacity), cpus) for cpus in cores)
    if not held:
        return ""
    workers = 1
    while workers * 2 <= held and batch % (workers * 2) == 0:
        workers *= 2
    cpus = max(cpus for cpus in cores if room(replace(asked, cpus=cpus), capacity) >= workers)
    words = [f"--workers {workers}"]
    words += [f"--scale.cpus_per_worker {cpus:g}"] if cpus != asked.cpus else []
    words += [f"--train.micro_batch {batch // workers}"] if batch // workers < micro else []
    return " ".join(words)


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
        tiny = min(PRESETS["tiny"]["scale"]["workers"], room(Demand(1, 1), capacity))
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
            f"{has}, {in_use(capacity)}{waited}: start again when those jobs have ended (`ray status` shows what is "
            "in use), or wait longer with --scale.wait_for_nodes_s SECONDS"
        )
    found = suggestions(demand, capacity)
    fix = f"use {', or '.join(found)}" if found else "no setting fits, use a larger machine or cluster"
    return f"{has}{waited}: {fix}"


def in_use(capacity: Capacity) -> str:
    """What is reserved now, in words."""
    total, free = capacity.total, capacity.free or capacity.total
    used = [f"{total.gpus - free.gpus:g} of {total.gpus:g} GPU"] if total.gpus else []
    used.append(f"{total.cpus - free.cpus:g} of {total.cpus:g} CPU")
    return f"where {' and '.join(used)} are in use by other jobs"
