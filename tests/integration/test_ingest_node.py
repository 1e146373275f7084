"""A node of the cluster is lost in the middle of an ingest: its runs are done elsewhere, none is lost or written twice.

A Ray of two nodes on this machine, one core each; the second one's processes are killed while they work.
"""

import logging
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import ray
from ray.cluster_utils import Cluster

from neurostorm.ingest.convert import RunOutcome
from neurostorm.ingest.layouts.discover import Source
from neurostorm.ingest.map_runs import map_runs

pytestmark = pytest.mark.integration
RUNS = 5


@pytest.fixture
def cluster() -> Iterator[Cluster]:
    ray.shutdown()  # that of other modules
    made = Cluster(initialize_head=True, head_node_args={"num_cpus": 1})
    try:
        ray.init(address=made.address, logging_level=logging.ERROR, log_to_driver=False)
        yield made
    finally:
        ray.shutdown()
        made.shutdown()


def test_a_lost_node_costs_no_run(cluster: Cluster, tmp_path: Path) -> None:
    far = cluster.add_node(num_cpus=1)
    cluster.wait_for_nodes()
    sources = [Source(tmp_path / f"{n}.nii", "test", f"sub-{n}", "", "", "", "run", "plain") for n in range(RUNS)]

    def work(source: Source) -> RunOutcome:
        node = ray.get_runtime_context().get_node_id()
        (tmp_path / f"begin_{source.subject}_{node}").touch()
        time.sleep(1.0)
        (tmp_path / f"end_{source.subject}_{node}").touch()
        return RunOutcome(str(source.path), source.run, "ingested")

    def lose() -> None:
        while not list(tmp_path.glob(f"begin_*_{far.node_id}")):
            time.sleep(0.02)
        cluster.remove_node(far, allow_graceful=False)

    thread = threading.Thread(target=lose, daemon=True)
    thread.start()
    outcomes = list(map_runs(sources, work, 1.0))
    thread.join(30)
    assert sorted(outcome.run for outcome in outcomes) == [source.run for source in sources]
    assert {outcome.status for outcome in outcomes} == {"ingested"}
    begun, ended = ([path.name.split("_")[1:] for path in tmp_path.glob(f"{word}_*")] for word in ("begin", "end"))
    lost = {subject for subject, node in begun if node == far.node_id}
    assert lost, "no run was in the lost node's hands"
    assert {subject for subject, node in ended if node != far.node_id} >= lost
    assert len({subject for subject, _ in ended}) == RUNS
