"""What a run's attributes say of the person in the scanner: events, what they did or saw; motion of the head.

    attribute `events`: [[onset_s, duration_s, trial_type], ...]  --run_events-->  (Event, Event, ...)

Ingest puts them there from BIDS `_events.tsv` files (ingest/annotations.py). Seconds count from the run's first frame,
so they hold for the stored frames whatever the source's TR was.
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from neurostorm.store.layout import StoreError

Float64 = NDArray[np.float64]
PARAMETERS = ("trans_x", "trans_y", "trans_z", "rot_x", "rot_y", "rot_z")  # as fMRIPrep calls them; mm and radians
HEAD_RADIUS_MM = 50.0  # turns rotations into displacements (Power et al. 2012, doi:10.1016/j.neuroimage.2011.10.018)
SPIKE_MM = 0.5  # more than this is a spike (Power et al. 2012)
DIGITS = 6  # kept after the point, so that machines which round sums differently store the same bytes

EVENTS = "events"


@dataclass(frozen=True, order=True)
class Event:
    """Something that began `onset_s` seconds after the first frame and lasted `duration_s`; 0 is an instant.

    The onset may be negative: the stimulation began before the recording. `trial_type` names the condition. ValueError
    for times that are not finite, a negative duration or an empty name.
    """

    onset_s: float
    duration_s: float
    trial_type: str

    def __post_init__(self) -> None:
        if not (math.isfinite(self.onset_s) and math.isfinite(self.duration_s) and self.duration_s >= 0):
            raise ValueError(f"an event at {self.onset_s} s that lasts {self.duration_s} s is impossible")
        if not self.trial_type:
            raise ValueError(f"the event at {self.onset_s} s has no trial_type")


def events_attribute(events: Iterable[Event]) -> list[list[float | str]]:
    """Events as they lie in a run's attributes: JSON values, in their order."""
    return [[event.onset_s, event.duration_s, event.trial_type] for event in events]


def run_events(attributes: Mapping[str, Any]) -> tuple[Event, ...]:
    """The events of a run by its attributes (`FrameStore.run_attributes`), in the order of their onsets; () for none.

    StoreError naming the entry that is no event.
    """
    stated = attributes.get(EVENTS, [])
    if not isinstance(stated, list):
        raise _wrong(attributes, f"is {stated!r}, not a list")
    events = []
    for position, entry in enumerate(stated):
        try:
            onset_s, duration_s, trial_type = entry
            if not (_is_number(onset_s) and _is_number(duration_s) and isinstance(trial_type, str)):
                raise ValueError("they are two numbers and a text")
            events.append(Event(float(onset_s), float(duration_s), trial_type))
        except (TypeError, ValueError) as error:
            raise _wrong(
                attributes, f"has {entry!r} as entry {position}, not [onset_s, duration_s, trial_type]: {error}"
            ) from error
    return tuple(sorted(events))


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _wrong(attributes: Mapping[str, Any], what: str) -> StoreError:
    run = attributes.get("source", "a run")
    return StoreError(f"{run}: the attribute `{EVENTS}` {what}; delete the run's folder and ingest it anew")


def framewise_displacement(motion: Float64) -> Float64:
    """Framewise displacement (T) in mm of rigid motion (6, T), nan for the first frame (Power et al. 2012).

    Sum over the six parameters of the change since the previous frame, rotations as arcs on a 50 mm sphere.
    """
    arcs_mm = np.concatenate([motion[:3], HEAD_RADIUS_MM * motion[3:]])
    return np.concatenate([[np.nan], np.abs(np.diff(arcs_mm, axis=1)).sum(axis=0)])


def motion_facts(displacement_mm: Float64) -> dict[str, float]:
    """What a run's attributes say of its framewise displacement (T) in mm; frames that are nan do not count.

    Returns:
        `fd_mean_mm`, `fd_max_mm`, and `fd_spike_fraction`, the share of the frames that moved more than SPIKE_MM.

    Raises:
        ValueError: a negative or infinite displacement, or none at all.
    """
    known = displacement_mm[~np.isnan(displacement_mm)]
    if not len(known) or not np.isfinite(known).all() or (known < 0).any():
        raise ValueError("no framewise displacement, or an impossible one")
    return {
        "fd_mean_mm": round(math.fsum(known) / len(known), DIGITS),
        "fd_max_mm": round(float(known.max()), DIGITS),
        "fd_spike_fraction": round(float((known > SPIKE_MM).mean()), DIGITS),
    }
