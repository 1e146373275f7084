"""The events in a run's attributes: written as JSON, read back checked."""

import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from neurostorm.store import StoreError
from neurostorm.store.events import Event, events_attribute, run_events

SECONDS = st.floats(-1e6, 1e6, allow_subnormal=False)
EVENTS = st.lists(st.builds(Event, SECONDS, SECONDS.map(abs), st.text(min_size=1)))


@given(EVENTS)
def test_events_survive_the_attributes(events: list[Event]) -> None:
    attributes = json.loads(json.dumps({"events": events_attribute(events), "source": "x.nii"}))
    assert run_events(attributes) == tuple(sorted(events))


def test_a_run_without_events_has_none() -> None:
    assert run_events({}) == run_events({"events": []}) == ()
    assert run_events({"events": [[1, 0, "go"]]}) == (Event(1.0, 0.0, "go"),)


@pytest.mark.parametrize(
    ("stated", "words"),
    [
        ("go", "is 'go', not a list"),
        (None, "is None, not a list"),
        ([[0.0, 1.0, "go"], [1.0, 2.0]], r"\[1.0, 2.0\] as entry 1"),
        ([7], "7 as entry 0"),
        ([["0", 1.0, "go"]], "two numbers and a text"),
        ([[True, 1.0, "go"]], "two numbers and a text"),
        ([[0.0, 1.0, 3]], "two numbers and a text"),
        ([[None, 1.0, "go"]], "two numbers and a text"),
        ([[0.0, -1.0, "go"]], "lasts -1.0 s is impossible"),
        ([[math.inf, 1.0, "go"]], "impossible"),
        ([[0.0, 1.0, ""]], "no trial_type"),
    ],
)
def test_what_is_no_event_is_named(stated: object, words: str) -> None:
    with pytest.raises(StoreError, match=f"sub-1.nii: the attribute `events` .*{words}.*ingest it anew"):
        run_events({"events": stated, "source": "sub-1.nii"})
