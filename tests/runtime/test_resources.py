"""What a job asks for against what a cluster has: what fits, what is said when it does not, how long it waits."""

import json
from collections.abc import Callable
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from neurostorm.commands.command import Job, build
from neurostorm.config import ConfigError
from neurostorm.config.presets import PRESETS
from neurostorm.runtime import resources
from neurostorm.runtime.capacity import (
    Capacity,
    Demand,
    Node,
    fits,
    pretrain_suggestion,
    refusal,
    room,
    suggestions,
    training_demand,
)
from neurostorm.runtime.resources import require, torch_problem

TWO_CORES = Capacity((Node(2),))
OPTIONS = {"workers": "--workers", "least": "--scale.min_workers"} | {
    name: f"--scale.{name}_per_worker" for name in ("cpus", "gpus")
}


@pytest.mark.parametrize(
    ("nodes", "cpus", "gpus", "task_cpus", "count"),
    [
        ([Node(2)], 1, 0, 0, 2),
        ([Node(2)], 2, 0, 0, 1),
        ([Node(2), Node(2)], 3, 0, 0, 0),  # four cores in all, but a process lives on one node
        ([Node(0.3)], 0.1, 0, 0, 3),  # whatever 0.3 / 0.1 is in floating point
        ([Node(64, 8)], 8, 1, 0, 8),
        ([Node(32, 8)], 8, 1, 0, 4),
        ([Node(64), Node(64, 2)], 8, 1, 0, 2),
        ([Node(64, 2)], 1, 0.4, 0, 4),  # two on each GPU, none across
        ([Node(64, 3)], 1, 2, 0, 1),
        ([Node(2)], 1, 0, 1, 1),
        ([Node(2)], 2, 0, 1, 0),
        ([Node(2), Node(1)], 2, 0, 1, 1),  # the reading tasks go where they cost no worker
        ([], 1, 0, 0, 0),
    ],
)
def test_room_counts_processes_node_by_node(nodes, cpus, gpus, task_cpus, count):
    assert room(Demand(99, cpus, gpus, task_cpus=task_cpus), Capacity(tuple(nodes))) == count


def test_base_without_a_gpu_names_what_is_there_and_what_to_type():
    words = refusal(training_demand(build(PRESETS["base"])), TWO_CORES)
    assert words == (
        "asked for 4 workers x (1 GPU, 8 CPU); this cluster has 0 GPU and 2 CPU on 1 node: use "
        "--preset tiny --workers 2, or --workers 1 --scale.gpus_per_worker 0 --scale.cpus_per_worker 2"
    )


def test_too_many_workers_are_told_the_most_that_fit_and_divide_the_batch():
    many = training_demand(build({"train": {"global_batch": 64, "micro_batch": 1}, "scale": {"workers": 64}}))
    assert suggestions(many, TWO_CORES) == ["--workers 2"]
    assert suggestions(many, Capacity((Node(7),))) == ["--workers 4"]
    large = training_demand(build({"train": {"global_batch": 8, "micro_batch": 8}}))
    assert suggestions(large, Capacity((Node(0.5),))) == []
    assert "no setting fits" in refusal(large, Capacity((Node(0.5),)))


def test_workers_with_too_many_cores_may_have_fewer():
    base = training_demand(build(PRESETS["base"]))
    assert suggestions(base, Capacity((Node(16, 4),))) == ["--workers 2", "--scale.cpus_per_worker 4"]
    assert suggestions(base, Capacity((Node(6, 1),))) == ["--workers 1 --scale.cpus_per_worker 6"]


def test_reading_tasks_need_a_core_beside_the_workers():
    tasks = training_demand(build(PRESETS["tiny"] | {"data": {"clip_frames": 8, "read_in": "tasks"}}))
    assert not fits(tasks, TWO_CORES)
    words = refusal(tasks, TWO_CORES)
    assert "2 workers x (0 GPU, 1 CPU) and 1 CPU for reading tasks" in words
    assert "use --data.read_in worker, or --workers 1" in words


def test_with_min_workers_the_least_must_fit():
    elastic = training_demand(build({"train": {"global_batch": 24}, "scale": {"workers": 3, "min_workers": 2}}))
    assert fits(elastic, TWO_CORES) and not fits(elastic, Capacity((Node(1),)))
    assert "2 to 3 workers x (0 GPU, 1 CPU)" in refusal(elastic, Capacity((Node(1),)))
    assert suggestions(elastic, Capacity((Node(1),))) == ["--workers 1 --scale.min_workers 1"]


def test_a_trial_can_only_change_its_size():
    trial = Demand(1, 1, 1, what="trial", options={"cpus": "--adapt.cpus", "gpus": "--adapt.gpus"})
    assert refusal(trial, TWO_CORES) == (
        "asked for 1 trial x (1 GPU, 1 CPU); this cluster has 0 GPU and 2 CPU on 1 node: use --adapt.gpus 0"
    )
    task = Demand(1, 64, what="task", options={"cpus": "--ingest.cpus_per_run"})
    assert suggestions(task, TWO_CORES) == ["--ingest.cpus_per_run 2"]


NODES = st.lists(st.builds(Node, st.integers(0, 9).map(float), st.integers(0, 4).map(float)), max_size=3)


@given(
    nodes=NODES, workers=st.integers(1, 12), cpus=st.sampled_from([0.5, 1, 2, 3, 8]), gpus=st.sampled_from([0, 0.5, 1]),
    task_cpus=st.sampled_from([0, 1]), counts=st.sampled_from([(), (1, 2, 4, 8), (4, 8)]), share=st.integers(0, 3),
    small=st.booleans(),
)  # fmt: skip
def test_every_suggestion_fits(nodes, workers, cpus, gpus, task_cpus, counts, share, small):
    capacity = Capacity(tuple(nodes))
    least = max(1, workers - share) if share else None
    asked = Demand(
        workers, cpus, gpus, least=least, counts=counts, task_cpus=task_cpus, options=OPTIONS, small_preset=small
    )
    if fits(asked, capacity):
        return
    for words in suggestions(asked, capacity):
        values = dict(zip(words.split()[::2], words.split()[1::2], strict=True))
        if values.pop("--preset", None):
            assert int(values["--workers"]) <= room(Demand(1, 1), capacity)
            continue
        count = int(values.pop("--workers", workers))
        fewest = int(values.pop("--scale.min_workers", least or count))
        changed = replace(
            asked, workers=count, least=fewest, cpus=float(values.pop("--scale.cpus_per_worker", cpus)),
            gpus=float(values.pop("--scale.gpus_per_worker", gpus)),
            task_cpus=0 if values.pop("--data.read_in", None) else task_cpus,
        )  # fmt: skip
        assert not values and fewest <= count <= workers
        assert fits(changed, capacity), words
        assert count == workers or not counts or count in counts


@pytest.mark.parametrize(
    ("grid", "nodes", "words"),
    [
        ("4mm", [Node(2)], "--preset tiny --store /s"),
        ("4mm", [Node(1)], "--preset tiny --store /s --workers 1"),
        ("4mm", [Node(16, 1)], "--preset base --store /s --workers 1"),
        ("2mm", [Node(64, 7)], "--preset base --store /s --workers 4"),
        ("2mm", [Node(8, 4)], "--preset base --store /s --workers 4 --scale.cpus_per_worker 2"),
        ("2mm", [Node(64, 8)] * 4, "--preset base --store /s --workers 32 --train.micro_batch 4"),
        ("2mm", [Node(64, 8)] * 32, "--preset base --store /s --workers 128 --train.micro_batch 1"),
        ("reference", [Node(64, 8)], "--preset paper --store /s --workers 8 --train.micro_batch 4"),
    ],
)
def test_the_command_after_ingest_fits_the_machine(grid, nodes, words):
    capacity = Capacity(tuple(nodes))
    assert pretrain_suggestion(grid, capacity, "/s") == f"python jobs/pretrain.py {words}"
    sections = ("data", "train", "scale")
    options = Job("pretrain", "", sections, {"--store": "data.store", "--workers": "scale.workers"}, True).load(
        words.split()
    )
    assert fits(training_demand(options), capacity)


@pytest.mark.parametrize("grid", ["2mm", "reference"])
def test_a_2_mm_store_without_a_gpu_gets_a_first_look_and_the_way_on(grid):
    words = pretrain_suggestion(grid, TWO_CORES, "/s")
    command, hint = words.split("\n")
    assert command == "python jobs/pretrain.py --preset tiny --store /s --train.max_steps 5"
    assert "a 2 mm store needs a GPU" in hint and "--grid 4mm" in hint
    grows = Capacity((Node(2),), grows=True)
    preset = "paper" if grid == "reference" else "base"
    assert pretrain_suggestion(grid, grows, "/s") == f"python jobs/pretrain.py --preset {preset} --store /s"


def test_several_nodes_are_named_with_the_most_on_one():
    assert str(Capacity((Node(64, 4), Node(8)))) == "4 GPU and 72 CPU on 2 nodes (at most 4 GPU and 64 CPU on one)"


def test_a_monitor_that_only_watches_is_no_autoscaler():
    watched = f"node_{'7df9f600' * 7}"  # of `ray start --head`, Ray 2.60
    for nodes, runs in (({watched: 1}, False), ({"head": 1}, True), ({"head": 1, "gpu": 2}, True), ({}, True)):
        report = {"active_nodes": nodes, "pending_nodes": [], "pending_launches": {}, "failed_nodes": []}
        types = resources._reported_types(json.dumps({"autoscaler_report": report}).encode())
        assert resources._are_configured(types) is runs
    for nothing in (None, b"{}", b'{"autoscaler_report": null}'):
        assert not resources._are_configured(resources._reported_types(nothing))


class FakeCluster:
    """Two cores, of which other jobs use some; a clock that only `wait` moves."""

    def __init__(self, used: float = 0.0, *, growing: bool = False) -> None:
        self.nodes, self.used, self.growing, self.now = [Node(2.0)], used, growing, 0.0
        self.reserved = self.asked = 0
        self.later: dict[float, Callable[[], None]] = {}

    def capacity(self) -> Capacity:
        return Capacity(tuple(self.nodes), Node(sum(node.cpus for node in self.nodes) - self.used))

    def placement_group(self, bundles: list[dict[str, float]], strategy: str) -> "FakeCluster":
        self.need, self.reserved, self.asked = sum(bundle["CPU"] for bundle in bundles), 1, self.asked + 1
        return self

    def wait(self, timeout_seconds: float) -> bool:
        free = self.capacity().free
        if free is not None and self.need <= free.cpus:
            return True
        self.now += timeout_seconds
        self.later.pop(self.now, lambda: None)()
        return False

    def remove(self, group: "FakeCluster") -> None:
        self.reserved = 0


@pytest.fixture
def fake(monkeypatch):
    """Puts a FakeCluster in Ray's place."""

    def put(cluster: FakeCluster) -> FakeCluster:
        monkeypatch.delenv("RAY_ADDRESS", raising=False)
        monkeypatch.setattr(resources, "ensure_ray", lambda: None)
        monkeypatch.setattr(resources.ray, "is_initialized", lambda: True)
        monkeypatch.setattr(resources, "cluster", cluster.capacity)
        monkeypatch.setattr(resources, "autoscales", lambda: cluster.growing)
        monkeypatch.setattr(resources, "placement_group", cluster.placement_group)
        monkeypatch.setattr(resources, "remove_placement_group", cluster.remove)
        monkeypatch.setattr(resources.time, "monotonic", lambda: cluster.now)
        return cluster

    return put


def lines(caplog) -> list[str]:
    return [record.getMessage() for record in caplog.records]


def test_a_demand_that_fits_starts_without_a_word_and_reserves_nothing(fake, caplog):
    cluster = fake(FakeCluster())
    assert require(Demand(2, 1), None).nodes == (Node(2.0),)
    assert cluster.now == 0 and not cluster.reserved and not caplog.records


def test_a_cluster_that_can_never_hold_the_demand_is_refused_at_once(fake):
    cluster = fake(FakeCluster())
    with pytest.raises(ConfigError, match=r"asked for 64 workers x .*this cluster has 0 GPU and 2 CPU on 1 node: use"):
        require(Demand(64, 1, options=OPTIONS), None)
    assert cluster.asked == cluster.now == 0


def test_nodes_that_are_still_joining_a_static_cluster_get_a_few_seconds(fake, monkeypatch):
    cluster = fake(FakeCluster())
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.7:6379")
    with pytest.raises(ConfigError, match="use --workers 2"):
        require(Demand(4, 1, options=OPTIONS), None)
    assert 5 < cluster.now < 20 and not cluster.reserved
    cluster.later[cluster.now + 3] = lambda: cluster.nodes.append(Node(2.0))
    assert len(require(Demand(4, 1), None).nodes) == 2


def test_an_autoscaler_has_ten_minutes_and_what_is_waited_for_is_said_every_30_s(fake, caplog):
    cluster = fake(FakeCluster(growing=True))
    with pytest.raises(ConfigError, match=r"2 CPU on 1 node; waited 600 s: use --workers 2"):
        require(Demand(64, 1, options=OPTIONS), None)
    said = lines(caplog)
    assert said[0] == (
        "waiting for 64 workers x (0 GPU, 1 CPU): this cluster has 0 GPU and 2 CPU on 1 node, and its autoscaler may "
        "bring more; 599 s left"
    )
    assert said[1].endswith("569 s left") and 18 <= len(said) <= 21
    assert not cluster.reserved


def test_an_autoscaler_that_reports_late_is_waited_for(fake, monkeypatch):
    cluster = fake(FakeCluster())
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.7:6379")
    cluster.later = {8.0: lambda: setattr(cluster, "growing", True), 90.0: lambda: cluster.nodes.append(Node(4.0))}
    assert len(require(Demand(1, 4), None).nodes) == 2


def test_scale_wait_for_nodes_s_bounds_every_wait(fake, caplog):
    for cluster in (FakeCluster(), FakeCluster(growing=True), FakeCluster(used=2)):
        fake(cluster)
        with pytest.raises(ConfigError, match=r"waited 45 s"):
            require(Demand(1, 2) if cluster.used else Demand(64, 1), 45)
        assert len(lines(caplog)) == 2
        caplog.clear()
    with pytest.raises(ConfigError):
        require(Demand(64, 1), 0)


def test_cores_in_use_are_waited_for_and_named(fake, caplog):
    cluster = fake(FakeCluster(used=2))
    cluster.later[40.0] = lambda: setattr(cluster, "used", 1)
    require(Demand(1, 1), None)
    assert cluster.now == 40 and not cluster.reserved
    assert lines(caplog)[0] == (
        "waiting for 1 worker x (0 GPU, 1 CPU): this cluster has 0 GPU and 2 CPU on 1 node, where 2 of 2 CPU are in "
        "use by other jobs; 599 s left"
    )
    with pytest.raises(ConfigError, match=r"where 1 of 2 CPU are in use by other jobs; waited \d+ s: start again"):
        require(Demand(2, 1), 60)


def test_gpus_need_a_build_of_pytorch_with_cuda():
    asked = Demand(4, 8, 1, options=OPTIONS)
    assert torch_problem(asked, "2.13.0+cu130", "13.0", True, "10.0.0.7") == ""
    words = torch_problem(asked, "2.13.0+cpu", None, False, "10.0.0.7")
    for part in ("4 workers x (1 GPU, 8 CPU)", "2.13.0+cpu on node 10.0.0.7", "remove .venv", "torch==2.13.0 from"):
        assert part in words
    assert words.endswith("or use --scale.gpus_per_worker 0 to work on the CPU")
    assert "nvidia-smi" in torch_problem(asked, "2.13.0+cu130", "13.0", False, "10.0.0.7")
