"""Events of different types that overlap in time: named, and handled by `task.overlap`."""

import logging
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from neurostorm.config import Config, ConfigError
from neurostorm.downstream.cohort import Cohort, CohortRun
from neurostorm.downstream.tasks.find import find_task
from neurostorm.downstream.tasks.overlap import DROP, FIRST, merged, overlaps, settle
from neurostorm.downstream.tasks.task import Cut
from neurostorm.store.events import Event

BLOCKS = [[0.0, 20.0, "tap"], [12.0, 20.0, "rest"], [40.0, 8.0, "tap"]]  # 12 to 20 s are both
TR_S = 1.0


def events_of(*rows: list[Any]) -> list[Event]:
    return [Event(*row) for row in rows]


def spans_of(rows: list[list[Any]], rule: str) -> list[tuple[str, tuple[tuple[float, float], ...]]]:
    return [(each.event.trial_type, each.spans) for each in settle(merged(events_of(*rows)), rule)]


def starts_of(
    events: dict[str, list[list[Any]]], rule: str, clip: int = 4, delay_s: float = 0.0
) -> dict[str, list[int]]:
    """First frames by unit, without the run's name."""
    runs = tuple(CohortRun(path, "d/a", "", "motor", 60, "sha") for path in events)
    store = SimpleNamespace(path="stores/made", tr_s=TR_S, run_attributes=lambda path: {"events": events[path]})
    examples = find_task("state").examples(Cohort(store, runs), {}, Cut(clip, clip, delay_s, overlap=rule))
    parts = zip(examples.units, examples.clips_by_unit(), strict=True)
    return {unit.partition("#")[2]: examples.start[part].tolist() for unit, part in parts}


def test_refuse_names_the_run_the_events_the_counts_and_the_options() -> None:
    assert Config().task.overlap == "refuse" and Cut(4, 4).overlap == "refuse"
    events = {"d/one": [[0.0, 5.0, "tap"], [5.0, 5.0, "rest"]], "d/two": BLOCKS, "d/three": BLOCKS}
    with pytest.raises(ConfigError) as refused:
        starts_of(events, "refuse")
    said = str(refused.value)
    assert "2 pair(s) of events overlap in 2 of 3 run(s) of stores/made, first in d/two" in said
    assert "tap at 0 s for 20 s and rest at 12 s for 20 s" in said
    assert "--task.overlap first" in said and "--task.overlap drop" in said and "--task.states" in said


def test_first_keeps_the_earlier_event_and_cuts_the_later_one(caplog: pytest.LogCaptureFixture) -> None:
    assert spans_of(BLOCKS, FIRST) == [("tap", ((0.0, 20.0),)), ("rest", ((20.0, 32.0),)), ("tap", ((40.0, 48.0),))]
    with caplog.at_level(logging.WARNING):
        found = starts_of({"d/a": BLOCKS}, FIRST)
    assert found == {"0.0:tap": [0, 4, 8, 12, 16], "12.0:rest": [20, 24, 28], "40.0:tap": [40, 44]}
    assert "task.overlap=first: 1 pair(s) of events overlap" in caplog.text


def test_first_leaves_out_what_lies_within_an_earlier_event() -> None:
    rows = [[0.0, 20.0, "tap"], [5.0, 5.0, "rest"], [10.0, 30.0, "cue"]]
    assert spans_of(rows, FIRST) == [("tap", ((0.0, 20.0),)), ("cue", ((20.0, 40.0),))]
    together = [[3.0, 20.0, "tap"], [3.0, 4.0, "cue"]]
    assert spans_of(together, FIRST) == [("cue", ((3.0, 7.0),)), ("tap", ((7.0, 23.0),))]


def test_drop_leaves_out_frames_of_more_than_one_event() -> None:
    assert spans_of(BLOCKS, DROP) == [("tap", ((0.0, 12.0),)), ("rest", ((20.0, 32.0),)), ("tap", ((40.0, 48.0),))]
    assert starts_of({"d/a": BLOCKS}, DROP) == {"0.0:tap": [0, 4, 8], "12.0:rest": [20, 24, 28], "40.0:tap": [40, 44]}
    inside = [[0.0, 20.0, "tap"], [8.0, 4.0, "rest"], [30.0, 8.0, "rest"]]
    assert spans_of(inside, DROP) == [("tap", ((0.0, 8.0), (12.0, 20.0))), ("rest", ((30.0, 38.0),))]
    assert starts_of({"d/a": inside}, DROP) == {"0.0:tap": [0, 4, 12, 16], "30.0:rest": [30, 34]}


def test_drop_takes_no_clip_that_reaches_into_the_shared_time() -> None:
    """A clip of 6 frames at 8 s would reach to 14 s, and one of an event shorter than a clip would as well."""
    assert starts_of({"d/a": BLOCKS}, DROP, clip=6)["0.0:tap"] == [0, 6]
    short = [[9.0, 4.0, "tap"], [12.0, 8.0, "rest"], [40.0, 8.0, "tap"]]
    assert starts_of({"d/a": short}, DROP) == {"12.0:rest": [13], "40.0:tap": [40, 44]}
    assert starts_of({"d/a": BLOCKS}, DROP, delay_s=5.0)["0.0:tap"] == [5, 9, 13], "the response comes later, for both"


@pytest.mark.parametrize("rule", ["refuse", FIRST, DROP])
def test_one_type_that_overlaps_itself_is_merged(rule: str) -> None:
    rows = [[0.0, 8.0, "tap"], [4.0, 8.0, "tap"], [12.0, 4.0, "tap"], [20.0, 8.0, "rest"], [21.0, 2.0, "rest"]]
    assert merged(events_of(*rows)) == events_of([0.0, 12.0, "tap"], [12.0, 4.0, "tap"], [20.0, 8.0, "rest"])
    assert starts_of({"d/a": rows}, rule) == {"0.0:tap": [0, 4, 8], "12.0:tap": [12], "20.0:rest": [20, 24]}


@pytest.mark.parametrize("rule", ["refuse", FIRST, DROP])
def test_instants_and_events_that_meet_overlap_nothing(rule: str) -> None:
    rows = [[0.0, 8.0, "tap"], [4.0, 0.0, "press"], [4.0, 0.0, "cue"], [8.0, 8.0, "rest"]]
    assert overlaps(merged(events_of(*rows))) == []
    assert starts_of({"d/a": rows}, rule) == {
        "0.0:tap": [0, 4], "4.0:press": [4], "4.0:cue": [4], "8.0:rest": [8, 12],
    }  # fmt: skip


def test_types_that_do_not_count_overlap_nothing() -> None:
    run = CohortRun("d/one", "d/a", "", "motor", 60, "sha")
    rows = [[0.0, 8.0, "tap"], [0.0, 40.0, "instruction"], [8.0, 8.0, "rest"]]
    store = SimpleNamespace(path="made", tr_s=TR_S, run_attributes=lambda path: {"events": rows})
    examples = find_task("state").examples(Cohort(store, (run,)), {}, Cut(4, 4, 0.0, states=("tap", "rest")))
    assert examples.classes == ("rest", "tap")


EVENTS = st.lists(
    st.builds(Event, st.integers(-5, 30).map(float), st.integers(0, 12).map(float), st.sampled_from("abc")), max_size=9
)


@given(EVENTS, st.sampled_from([FIRST, DROP]))
def test_after_any_rule_no_time_belongs_to_two_types(events: list[Event], rule: str) -> None:
    """Checked second by second against the events as they were; all times are whole seconds."""
    settled = settle(merged(events), rule)
    for second in range(-5, 45):
        types = {e.trial_type for e in events if e.onset_s <= second < e.onset_s + e.duration_s}
        kept = {each.event.trial_type for each in settled if any(a <= second < b for a, b in each.spans)}
        assert len(kept) <= 1 and kept <= types
        if len(types) == 1 and rule == DROP:
            assert kept == types, "what is of one type alone stays"
        if types and rule == FIRST:
            assert kept, "somebody has every time"
