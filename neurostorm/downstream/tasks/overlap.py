"""Events that overlap in time: what a person did then is ambiguous, so a rule says which frames count.

    events of a run --merged: equal types--> --settle(rule)--> each event with the times that are its own

    refuse   an error that names the first pair and how many there are
    first    the earlier event keeps its time, the later one begins when that ends (of two that begin together, the
             shorter one is the earlier); what nothing is left of is left out
    drop     times of more than one type belong to no event

Events without duration are instants and overlap nothing.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from neurostorm.store.events import Event

REFUSE, FIRST, DROP = "refuse", "first", "drop"
Span = tuple[float, float]  # from, to, in seconds after the first frame
_SAME_S = 1e-6  # events that meet do not overlap


@dataclass(frozen=True)
class Overlap:
    """Two events of different types at one time."""

    earlier: Event
    later: Event

    @property
    def span(self) -> Span:
        """The time that they share."""
        return self.later.onset_s, min(_end(self.earlier), _end(self.later))

    def __str__(self) -> str:
        one, other = self.earlier, self.later
        return (
            f"{one.trial_type} at {one.onset_s:g} s for {one.duration_s:g} s and {other.trial_type} at "
            f"{other.onset_s:g} s for {other.duration_s:g} s"
        )


@dataclass(frozen=True)
class Settled:
    """An event, the times at which it counts, and those at which its clips may not be: several types share them."""

    event: Event
    spans: tuple[Span, ...]
    forbidden: tuple[Span, ...] = ()


def merged(events: Iterable[Event]) -> list[Event]:
    """Events in order of their onsets; those of one type that overlap are one, from the first onset to the last end."""
    whole: dict[str, list[Event]] = {}
    for event in sorted(events):
        same = whole.setdefault(event.trial_type, [])
        before = same[-1] if same else None
        if before is not None and event.duration_s and event.onset_s < _end(before) - _SAME_S:
            end = max(_end(before), _end(event))
            same[-1] = Event(before.onset_s, end - before.onset_s, event.trial_type)
        elif before is None or event != before:
            same.append(event)
    return sorted(event for same in whole.values() for event in same)


def overlaps(events: Sequence[Event]) -> list[Overlap]:
    """Every pair of different types that shares some time; `events` as from `merged`."""
    found, lasting = [], [event for event in events if event.duration_s]
    for nth, later in enumerate(lasting):
        for earlier in lasting[:nth]:
            if earlier.trial_type != later.trial_type and later.onset_s < _end(earlier) - _SAME_S:
                found.append(Overlap(earlier, later))
    return found


def settle(events: Sequence[Event], rule: str) -> list[Settled]:
    """The times at which each event counts, by `rule` FIRST or DROP; `events` as from `merged`."""
    shared = [overlap.span for overlap in overlaps(events)]
    settled, taken_s = [], float("-inf")
    for event in events:
        spans: tuple[Span, ...] = ((event.onset_s, _end(event)),)
        if event.duration_s and rule == FIRST:
            begins_s = max(event.onset_s, taken_s)
            spans = ((begins_s, _end(event)),) if begins_s < _end(event) - _SAME_S else ()
            taken_s = max(taken_s, _end(event))
        elif event.duration_s and rule == DROP:
            spans = tuple(_without(spans[0], shared))
        if spans:
            settled.append(Settled(event, spans, tuple(shared) if event.duration_s and rule == DROP else ()))
    return settled


def _without(span: Span, shared: Iterable[Span]) -> list[Span]:
    """What is left of a span without the spans `shared`."""
    left = [span]
    for begin_s, end_s in shared:
        pieces = [piece for one in left for piece in ((one[0], min(one[1], begin_s)), (max(one[0], end_s), one[1]))]
        left = [piece for piece in pieces if piece[1] - piece[0] > _SAME_S]
    return sorted(set(left))


def _end(event: Event) -> float:
    return event.onset_s + event.duration_s
