"""Gives the notice that a node of a Ray cluster will be taken away, as a cloud does: `drain.py HOST:PORT`.

    loaded --> "ready" --> a line "IP SECONDS" on stdin --> the node with this address is drained --> "done"

A process that is loaded beforehand, as `ray drain-node` takes seconds to start. RAY_AUTH_TOKEN opens the cluster.
"""

import sys
import time

from ray._raylet import GcsClient
from ray.core.generated import autoscaler_pb2, gcs_pb2


def main() -> None:
    client = GcsClient(address=sys.argv[1])
    print("ready", flush=True)
    for line in sys.stdin:
        address, seconds = line.split()
        (node,) = [
            node_id
            for node_id, info in client.get_all_node_info().items()
            if info.node_manager_address == address and info.state == gcs_pb2.GcsNodeInfo.ALIVE
        ]
        accepted, why = client.drain_node(
            node.hex(),
            autoscaler_pb2.DrainNodeReason.Value("DRAIN_NODE_REASON_PREEMPTION"),
            "chaos.py",
            int((time.time() + float(seconds)) * 1000),
        )
        print("done" if accepted else f"refused: {why}", flush=True)


if __name__ == "__main__":
    main()
