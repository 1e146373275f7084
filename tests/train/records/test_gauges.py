"""What Prometheus reads of a run: our gauges, set at log lines, scraped from a Ray as Prometheus would."""

import socket
import time
import urllib.error
import urllib.request

import pytest

from neurostorm.tracking.tracker import Tracker
from neurostorm.train.records import gauges
from neurostorm.train.records.gauges import LOGGED_AT, OWN, SHOWN, STEP, Gauges

VALUES = {shown.metric: 0.125 + number for number, shown in enumerate(SHOWN.values())}


@pytest.fixture
def recorded(monkeypatch):
    """(gauge, run) -> its value, of a stand-in for Ray's gauges."""
    values = {}

    class Recorder:
        def __init__(self, name, description, tag_keys):
            assert description and tag_keys == ("run",)
            self.name = name

        def set_default_tags(self, tags):
            self.run = tags["run"]
            return self

        def set(self, value):
            values[self.name, self.run] = value

    monkeypatch.setattr(gauges, "Gauge", Recorder)
    return values


def test_every_gauge_shows_its_metric_and_bears_the_runs_name(recorded):
    Gauges("base")(VALUES | {"optim/lr": 1.0}, 120)
    assert recorded.pop((LOGGED_AT, "base")) > 1.7e9
    assert recorded.pop((STEP, "base")) == 120
    assert recorded == {(name, "base"): VALUES[shown.metric] for name, shown in SHOWN.items()}


def test_what_was_not_logged_keeps_its_gauge(recorded):
    show = Gauges("base")
    show({"loss/train": 0.5, "loss/validation": 0.75}, 1)
    show({"loss/validation": 0.25}, 2)
    assert recorded["neurostorm_loss", "base"] == 0.5 and recorded["neurostorm_validation_loss", "base"] == 0.25
    assert ("neurostorm_goodput", "base") not in recorded


@pytest.fixture
def scrape():
    """Starts a Ray and gives the function that reads its metrics, as Prometheus does."""
    import ray

    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    ray.shutdown()  # that of other modules
    ray.init(
        address="local", num_cpus=1, log_to_driver=False, logging_level="ERROR", _metrics_export_port=port,
        _system_config={"metrics_report_interval_ms": 500},
    )  # fmt: skip
    node = ray.util.get_node_ip_address()

    def read():
        try:
            with urllib.request.urlopen(f"http://{node}:{port}/metrics", timeout=10) as answer:
                return answer.read().decode()
        except (urllib.error.URLError, ConnectionError):
            return ""  # Ray's agent is not up yet

    yield read
    ray.shutdown()


def test_prometheus_finds_every_gauge_of_a_worker_at_rays_address(scrape):
    import ray

    @ray.remote(num_cpus=1)
    class Worker:
        def log(self):
            tracker = Tracker()
            tracker.observe(Gauges("base"))
            tracker.metrics(VALUES, 120)

    worker = Worker.remote()
    ray.get(worker.log.remote())
    expected = {f"ray_{name}" for name in (*OWN, *SHOWN)}
    end_s = time.monotonic() + 60
    while True:
        lines = [line for line in scrape().splitlines() if line.startswith("ray_neurostorm_") and 'run="base"' in line]
        found = {line.partition("{")[0]: float(line.rpartition(" ")[2]) for line in lines}
        if expected <= set(found):
            break
        assert time.monotonic() < end_s, f"not there after a minute: {sorted(expected - set(found))}"
        time.sleep(0.2)
    assert found["ray_neurostorm_step"] == 120
    assert found["ray_neurostorm_goodput"] == VALUES["time/goodput"]
