"""Three nodes, as a cluster has them: a submitted job trains on two of them from one store, and learns the same.

The nodes are three `ray start` on 127.0.0.1, .2 and .3, behind a token; on the last two there is room for one training
worker each. The run on one node is two ranks without Ray.
"""

import json
import re
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from ray_nodes import ROOT, RayNodes

from neurostorm.config import Config
from tests.train.conftest import run_together

pytestmark = pytest.mark.integration

PRETRAIN, RANK = ROOT / "jobs" / "pretrain.py", ROOT / "tests" / "train" / "rank_program.py"


@pytest.fixture
def nodes() -> Iterator[RayNodes]:
    folder = Path(tempfile.mkdtemp(prefix="rn-"))  # short: sockets lie below it
    try:
        with RayNodes(folder) as cluster:
            yield cluster
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def losses(config: Config) -> dict[int, float]:
    """step -> mean loss over all workers."""
    lines = (config.run.folder / "ledger" / "rank-0.jsonl").read_text().splitlines()
    return {entry["step"]: entry["loss"] for entry in map(json.loads, lines)}


def test_a_submitted_job_trains_on_two_nodes_as_on_one(ball_config, nodes: RayNodes) -> None:
    settings = {
        "train": {"global_batch": 4, "micro_batch": 2, "max_steps": 4}, "scale": {"workers": 2, "cpus_per_worker": 1.5},
        "tracking": {"clip_ledger": True, "pictures": False},
    }  # fmt: skip
    configs = {name: ball_config(run={"name": name}, **settings) for name in ("three", "one")}
    for name, config in configs.items():
        (nodes.folder / f"{name}.yaml").write_text(config.to_yaml())
    for _ in range(2):
        nodes.add(cpus=2)

    refused = nodes.submit("echo", "let in", RAY_AUTH_TOKEN="0" * 64, RAY_AUTH_TOKEN_PATH="")
    assert refused.returncode and "let in" not in refused.stdout, refused.stdout

    done = nodes.submit(sys.executable, PRETRAIN, "--config", nodes.folder / "three.yaml")
    assert done.returncode == 0, done.stdout[-4000:]
    places = re.findall(r"ip=([\d.]+), pid=\d+\) world_rank", done.stdout)
    assert sorted(places) == ["127.0.0.2", "127.0.0.3"], done.stdout[-4000:]

    single = run_together(RANK, [[nodes.folder / "one.yaml", rank, 2, None, -1] for rank in range(2)])
    assert [status for status, _ in single] == [0, 0], single[0][1][-3000:]
    expected, found = losses(configs["one"]), losses(configs["three"])
    assert sorted(found) == sorted(expected) == list(range(4))
    assert found == pytest.approx(expected, rel=1e-6)
