"""What a number of nodes can feed: the slowest of their cores, their network, their storage and the store they share.

    rates of one node, bytes of a clip -> limits at N nodes -> clips/s and what binds -> nodes that a demand takes

A clip is read by a task on any node and goes to the node of its training worker, so it comes in over a node's network
once from the store and, for all but one in N, once more from its reader. Disks inside the nodes are no faster than
`storage_gb_s` each; an object store or a parallel file system may have a ceiling for all nodes together as well.
"""

import json
import os
from dataclasses import dataclass
from pathlib import Path

GB = 1e9
NODES = (1, 2, 4, 8, 16, 32, 64, 128)
MOST_NODES = 4096


@dataclass(frozen=True)
class Feed:
    """What one node has, and what a clip costs.

    clip_bytes            int8 bytes of one clip, frames x voxels of the mask
    clips_per_s_per_core  clips that one core takes from the store to a training worker
    cores                 cores of a node that read
    network_gb_s          incoming GB/s of a node
    storage_gb_s          GB/s that one node reads from the store
    shared_gb_s           GB/s that all nodes together read from the store, None: grows with the nodes
    """

    clip_bytes: int
    clips_per_s_per_core: float
    cores: int
    network_gb_s: float
    storage_gb_s: float
    shared_gb_s: float | None = None

    def limits(self, nodes: int) -> dict[str, float]:
        """Clips/s that each part of `nodes` nodes allows."""
        arrivals = 1 + (nodes - 1) / nodes
        limits = {
            "cores": nodes * self.cores * self.clips_per_s_per_core,
            "network": nodes * self.network_gb_s * GB / (self.clip_bytes * arrivals),
            "storage": nodes * self.storage_gb_s * GB / self.clip_bytes,
        }
        if self.shared_gb_s is not None:
            limits["shared store"] = self.shared_gb_s * GB / self.clip_bytes
        return limits

    def rate(self, nodes: int) -> tuple[float, str]:
        """Clips/s of `nodes` nodes, and the part that binds."""
        limits = self.limits(nodes)
        binds = min(limits, key=lambda name: limits[name])
        return limits[binds], binds

    def nodes_for(self, clips_per_s: float) -> int | None:
        """The fewest nodes that feed `clips_per_s`; None when no number of them does."""
        return next((nodes for nodes in range(1, MOST_NODES + 1) if self.rate(nodes)[0] >= clips_per_s), None)


def rate_per_core(file: Path) -> float:
    """Clips/s of one core through the whole path, from the JSON of `bench/feed.py`.

    Raises ValueError for a file without that figure.
    """
    try:
        figures = json.loads(file.read_text())
        return float(figures["pipeline_clips_per_s"]) / int(figures.get("cores", os.cpu_count()))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{file}: no `pipeline_clips_per_s` to be had ({error!r}); give what feed.py wrote") from error


def lines(feed: Feed, *, gpus: int, clips_per_s_per_gpu: float) -> list[str]:
    """The model as a table, and the nodes that a demand takes."""
    table = ["nodes      clips/s     GB/s   limit"]
    for nodes in NODES:
        rate, binds = feed.rate(nodes)
        table.append(f"{nodes:5d} {rate:12,.0f} {rate * feed.clip_bytes / GB:8.1f}   {binds}")
    demand = gpus * clips_per_s_per_gpu
    enough = feed.nodes_for(demand)
    answer = (
        f"{enough} node{'s' * (enough > 1)} feed that" if enough else f"no number of nodes: {feed.rate(MOST_NODES)[1]}"
    )
    return [*table, f"{gpus} GPUs at {clips_per_s_per_gpu:,.0f} clips/s each need {demand:,.0f} clips/s: {answer}"]
