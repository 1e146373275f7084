"""What Prometheus sees of a run: rank 0's metrics as gauges of Ray, set whenever they are logged.

    Tracker.metrics("speed/clips_per_s", ...) --observer--> Gauge neurostorm_clips_per_s{run="base"}
                   --Ray's agent on the node--> Prometheus: ray_neurostorm_clips_per_s --> cluster/grafana.json

A gauge stays at its last value while nothing is logged: `time() - ray_neurostorm_logged_at_s` shows a run that hangs.
"""

import time
from dataclasses import dataclass

from ray.util.metrics import Gauge


@dataclass(frozen=True)
class Shown:
    """A gauge: the logged metric that it shows, and what that means."""

    metric: str
    means: str


STEP, LOGGED_AT = "neurostorm_step", "neurostorm_logged_at_s"
SHOWN = {
    "neurostorm_clips_per_s": Shown("speed/clips_per_s", "clips per second over all workers"),
    "neurostorm_wait_fraction": Shown("data/wait_fraction", "share of the time that rank 0 waited for clips"),
    "neurostorm_data_lag_s": Shown("data/slowest_wait_s", "longest wait for one step's clips since the last log line"),
    "neurostorm_checkpoint_age_s": Shown("checkpoint/age_s", "what a crash would cost: time since the last checkpoint"),
    "neurostorm_loss": Shown("loss/train", "squared error per masked brain voxel, in units of z"),
    "neurostorm_validation_loss": Shown("loss/validation", "the same on held-out clips"),
    "neurostorm_skipped_steps": Shown("health/skipped_steps", "steps of this start with gradients not finite"),
    "neurostorm_goodput": Shown("time/goodput", "share of the run's wall time in useful steps, over all its starts"),
}
OWN = {STEP: "steps done", LOGGED_AT: "Unix time of the last logged metrics"}


class Gauges:
    """The gauges of one run, as an observer of its Tracker; needs a Ray that runs."""

    def __init__(self, run: str) -> None:
        meanings = OWN | {name: shown.means for name, shown in SHOWN.items()}
        self._gauges = {
            name: Gauge(name, description=means, tag_keys=("run",)).set_default_tags({"run": run})
            for name, means in meanings.items()
        }

    def __call__(self, values: dict[str, float], step: int) -> None:
        """Sets the gauges of those metrics that were logged."""
        self._gauges[STEP].set(step)
        self._gauges[LOGGED_AT].set(time.time())
        for name, shown in SHOWN.items():
            if shown.metric in values:
                self._gauges[name].set(float(values[shown.metric]))
