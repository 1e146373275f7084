"""What the synthetic brains do over time: every course is a function of seconds, sampled at any site's TR.

    Subject, session, task
        |-> network_courses    (K, T)  coupled .01-.1 Hz fluctuations + responses to task states
        |      '-> region_courses (R, T)  a network's course shared by its regions, plus each region's own
        |-> nuisance_courses           global signal, breathing, heartbeat, drift
        '-> head_motion        (6, T)  slow wandering and sudden spikes, and the signal lost in a spike

Band-limited noise is a sum of cosines with random frequencies and phases, which is defined at every instant: two
scanners with different TRs watch the same person doing the same thing. All draws come first and do not depend on
how long the run is, so a longer run begins with the shorter one (the block design alone scales with the run).
"""

from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from neurostorm.store.events import HEAD_RADIUS_MM
from neurostorm.synthetic.people import NAMES, NETWORK_OF_REGION, Subject, amplitude, coupling, stream

Float64 = NDArray[np.float64]

NETWORK_BAND_HZ = (0.01, 0.1)
BREATHING_BAND_HZ = (0.25, 0.33)  # above the Nyquist frequency of TR 2 s: aliases there, as in life
HEARTBEAT_BAND_HZ = (1.0, 1.2)
DRIFT_BAND_HZ = (0.002, 0.008)
WANDER_BAND_HZ = (0.002, 0.02)  # slow head movement
LINES = 96  # cosines per band: one per mHz of the network band
DRIFT_MODES = 4  # everywhere alike, and along x, y, z

NETWORK_SHARE = 0.75  # share of a region's variance that is its network's; the rest is the region's own
WANDER_MM = 0.06  # SD of slow translation; rotations turn a point 50 mm away as far
SPIKES_PER_MINUTE = 0.5  # for restlessness 1
SPIKE_MM = 0.4  # median displacement of a spike, log SD .5
SPIKE_DECAY_S = 1.5
LONGEST_RUN_S = 7200.0

# The five states of the task runs: how strongly each drives a network, in SDs of its resting fluctuation.
STATES: dict[str, dict[str, float]] = {
    "motor": {"somatomotor": 1.8, "cerebellar": 0.9, "default": -0.6},
    "vision": {"visual": 1.8, "attention": 0.9, "default": -0.6},
    "listening": {"auditory": 1.8, "salience": 0.6, "visual": -0.6},
    "memory": {"control": 1.8, "attention": 0.6, "default": -0.9},
    "reward": {"subcortical": 1.8, "limbic": 1.2, "somatomotor": -0.6},
}
CYCLE_S = 100.0  # the five states follow one another about this often
REST_SHARE = 0.3  # of each state's slot is rest


@dataclass(frozen=True)
class Oscillations:
    """Band-limited noise in continuous time: N courses, each a sum of cosines of unit variance in all.

    Attributes:
        frequencies_hz, phases: float64 (N, LINES).
    """

    frequencies_hz: Float64
    phases: Float64

    @classmethod
    def draw(cls, rng: np.random.Generator, count: int, band_hz: tuple[float, float]) -> "Oscillations":
        """`count` independent courses in a band: one random frequency per equal slice of it, random phases."""
        low, high = band_hz
        edges = np.linspace(low, high, LINES + 1)
        frequencies_hz = rng.uniform(edges[:-1], edges[1:], size=(count, LINES))
        return cls(frequencies_hz, rng.uniform(0, 2 * np.pi, size=(count, LINES)))

    def at(self, times_s: Float64) -> Float64:
        """The courses at `times_s` (T) -> (N, T); power falls as 1/sqrt(f), between white and 1/f."""
        weights = self.frequencies_hz**-0.25
        weights *= np.sqrt(2 / np.sum(weights**2, axis=1, keepdims=True))
        courses = np.empty((len(weights), len(times_s)))
        rows = zip(courses, self.frequencies_hz, self.phases, weights, strict=True)
        for course, frequencies_hz, phases, weight in rows:
            waves = np.cos(2 * np.pi * np.outer(times_s, frequencies_hz) + phases)  # (T, LINES)
            course[:] = np.einsum("tl,l->t", waves, weight)  # not BLAS, whose sums depend on its threads
        return courses


@dataclass(frozen=True)
class TaskEvent:
    """One line of an `_events.tsv`: seconds from the first frame."""

    onset_s: float
    duration_s: float
    state: str


@dataclass(frozen=True)
class Recording:
    """One run of one subject before any scanner sees it; equal keys, equal courses.

    Attributes:
        subject: who.
        session: from 1.
        task: "rest" or "states".
        duration_s: length of the run; only the block design depends on it.
    """

    subject: Subject
    session: int
    task: str
    duration_s: float

    def stream(self, what: str) -> np.random.Generator:
        """This recording's own generator for one purpose."""
        return stream(self.subject.seed, what, self.subject.index, self.session, self.task)

    @cached_property
    def events(self) -> tuple[TaskEvent, ...]:
        """The block design: all five states in every cycle, in random order, each followed by rest; () at rest."""
        if self.task == "rest":
            return ()
        rng = self.stream("design")
        cycles = max(1, int(self.duration_s // CYCLE_S))
        slot_s = self.duration_s / (cycles * len(STATES))
        order = [state for _ in range(cycles) for state in rng.permutation(list(STATES))]
        length_s = round(slot_s * (1 - REST_SHARE), 2)
        return tuple(TaskEvent(round(i * slot_s, 2), length_s, str(state)) for i, state in enumerate(order))

    def network_courses(self, times_s: Float64) -> Float64:
        """Time courses (K, T) of the networks, unit variance at rest times each network's amplitude."""
        independent = Oscillations.draw(self.stream("networks"), len(NAMES), NETWORK_BAND_HZ).at(times_s)
        mixing = np.linalg.cholesky(coupling(self.subject, self.session))
        courses = np.einsum("ki,it->kt", mixing, independent)
        for state, drive in STATES.items():
            response = task_response([event for event in self.events if event.state == state], times_s)
            for network, strength in drive.items():
                courses[NAMES.index(network)] += strength * response
        return amplitude(self.subject)[:, None] * courses

    def region_courses(self, times_s: Float64) -> Float64:
        """Time courses (R, T) of the regions: NETWORK_SHARE of the variance from the network, the rest their own."""
        own = Oscillations.draw(self.stream("regions"), len(NETWORK_OF_REGION), NETWORK_BAND_HZ).at(times_s)
        own *= amplitude(self.subject)[NETWORK_OF_REGION, None]
        shared = self.network_courses(times_s)[NETWORK_OF_REGION]
        return np.sqrt(NETWORK_SHARE) * shared + np.sqrt(1 - NETWORK_SHARE) * own

    def nuisance_courses(self, times_s: Float64) -> dict[str, Float64]:
        """Courses of unit variance: "global" (1, T), "breathing" (1, T), "heartbeat" (1, T), "drift" (4, T)."""
        bands = {
            "global": (1, NETWORK_BAND_HZ),
            "breathing": (1, BREATHING_BAND_HZ),
            "heartbeat": (1, HEARTBEAT_BAND_HZ),
        }
        bands["drift"] = (DRIFT_MODES, DRIFT_BAND_HZ)
        return {name: Oscillations.draw(self.stream(name), n, band).at(times_s) for name, (n, band) in bands.items()}

    def head_motion(self, times_s: Float64) -> tuple[Float64, Float64]:
        """Rigid motion (6, T): x, y, z in mm then rotations in radians; and the spikes' size (T) in mm."""
        rng = self.stream("motion")
        motion_mm = WANDER_MM * self.subject.restlessness * Oscillations.draw(rng, 6, WANDER_BAND_HZ).at(times_s)
        gaps_s = rng.exponential(60 / SPIKES_PER_MINUTE, size=int(4 * LONGEST_RUN_S / 60 * SPIKES_PER_MINUTE))
        starts_s = np.cumsum(gaps_s) / self.subject.restlessness
        sizes_mm = SPIKE_MM * self.subject.restlessness * np.exp(0.5 * rng.standard_normal(len(starts_s)))
        directions = rng.standard_normal((6, len(starts_s)))
        directions /= np.linalg.norm(directions, axis=0)
        since_s = times_s[None] - starts_s[:, None]  # (spikes, T)
        pulses_mm = sizes_mm[:, None] * np.where(since_s >= 0, np.exp(-np.maximum(since_s, 0) / SPIKE_DECAY_S), 0)
        motion = motion_mm + np.einsum("cs,st->ct", directions, pulses_mm)
        motion[3:] /= HEAD_RADIUS_MM
        return motion, pulses_mm.sum(axis=0)


def task_response(events: list[TaskEvent], times_s: Float64) -> Float64:
    """Blood-oxygen response (T) to blocks of activity: boxcars convolved with the double-gamma response, exactly.

    The response function is SPM's canonical one (spm_hrf.m, Friston et al. 1998): a gamma density of shape 6 minus
    a sixth of one of shape 16, in seconds. Its integral is known, so a block is the difference of two of them and
    a block that lasts for ever ends at 1.
    """
    from scipy.special import gammainc

    def step_response(since_s: Float64) -> Float64:
        lag_s = np.maximum(since_s, 0)
        return (gammainc(6, lag_s) - gammainc(16, lag_s) / 6) / (1 - 1 / 6)

    response = np.zeros_like(times_s)
    for event in events:
        response += step_response(times_s - event.onset_s) - step_response(times_s - event.onset_s - event.duration_s)
    return response
