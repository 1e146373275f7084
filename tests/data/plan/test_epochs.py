"""One dataset's stream: each clip once per pass, neighbours together, each subject's clips in turn."""

from collections import Counter
from dataclasses import replace

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from neurostorm.data.plan.epochs import Passes, Units
from neurostorm.data.plan.split import Segments, clip_counts

caps = st.integers(1, 12)


@st.composite
def streams(draw, cap):
    """A stream over up to six segments of up to three subjects, one of which has a clip at least."""
    clip = draw(st.integers(1, 12))
    runs = draw(st.lists(st.tuples(st.integers(0, 80), st.integers(0, 9), st.sampled_from([0, 1, 4])), max_size=5))
    frames, first, subject = (np.array(column, np.int32) for column in zip(*runs, (clip, 3, 1), strict=True))
    segments = Segments(np.arange(7, 7 + len(frames), dtype=np.int32), first, frames)
    return Passes(
        "made", draw(st.integers(0, 2**40)), segments, subject, clip, draw(st.integers(1, 15)),
        clips_per_read=draw(st.integers(1, 5)), cap=draw(cap),
    )  # fmt: skip


def places(stream, units):
    """(segment, place within it) of each clip: the shift within the slack is always less than a stride."""
    run, start = units.rows(stream.stride_frames)
    segment = run - 7
    nth = (start - stream.segments.first[segment]) // stream.stride_frames
    return list(zip(segment.tolist(), nth.tolist(), strict=True))


def clips_of(stream):
    counts = clip_counts(stream.segments.frames, stream.clip_frames, stream.stride_frames)
    return [(segment, nth) for segment, count in enumerate(counts) for nth in range(count)]


@settings(deadline=None, max_examples=150)
@given(streams(st.none()), st.integers(0, 5))
def test_a_pass_holds_each_clip_once_and_inside_its_segment(stream, number):
    units = stream.draw(number)
    assert sorted(places(stream, units)) == clips_of(stream)
    assert stream.size == len(clips_of(stream))
    run, start = units.rows(stream.stride_frames)
    first, frames = stream.segments.first[run - 7], stream.segments.frames[run - 7]
    assert (start >= first).all()
    assert (start + stream.clip_frames <= first + frames).all()


@settings(deadline=None, max_examples=150)
@given(streams(st.none() | caps), st.integers(0, 5))
def test_a_unit_is_neighbouring_clips_of_one_segment(stream, number):
    units = stream.draw(number)
    assert (units.clips >= 1).all() and (units.clips <= stream.clips_per_read).all()
    run, start = units.rows(stream.stride_frames)
    place = 0
    for unit in range(len(units)):
        mine = slice(place, place := place + int(units.clips[unit]))
        assert (run[mine] == units.run[unit]).all()
        assert (start[mine] == units.start[unit] + stream.stride_frames * np.arange(units.clips[unit])).all()
    if stream.cap is None:  # as few units as there can be
        counts = clip_counts(stream.segments.frames, stream.clip_frames, stream.stride_frames)
        assert len(units) == (-(-counts // stream.clips_per_read)).sum()


@settings(deadline=None, max_examples=150)
@given(streams(caps), st.integers(0, 30))
def test_a_cap_takes_each_subjects_clips_in_turn(stream, passes):
    available = Counter(int(stream.subject[segment]) for segment, _ in clips_of(stream))
    used = Counter(dict.fromkeys(clips_of(stream), 0))
    for number in range(passes):
        drawn = places(stream, stream.draw(number))
        assert len(drawn) == len(set(drawn)) == stream.size
        of_subject = Counter(int(stream.subject[segment]) for segment, _ in drawn)
        assert of_subject == {subject: min(count, stream.cap) for subject, count in available.items()}
        used.update(drawn)
    for subject in available:
        times = {count for (segment, _), count in used.items() if stream.subject[segment] == subject}
        assert max(times) - min(times) <= 1


@settings(deadline=None, max_examples=50)
@given(streams(st.none()), st.integers(0, 9))
def test_a_cap_that_nobody_reaches_changes_nothing(stream, number):
    plain, capped = stream.draw(number), replace(stream, cap=stream.size).draw(number)
    for name in ("run", "start", "clips"):
        assert (getattr(plain, name) == getattr(capped, name)).all()


def test_a_capped_subjects_clips_come_from_all_its_runs():
    segments = Segments(np.arange(4, dtype=np.int32), np.zeros(4, np.int32), np.full(4, 1000, np.int32))
    stream = Passes("made", 0, segments, np.zeros(4, np.int32), 20, 20, cap=20)
    run, start = stream.draw(0).rows(20)
    assert set(run) == {0, 1, 2, 3}
    assert start.max() - start.min() > 500


@settings(deadline=None, max_examples=150)
@given(streams(st.none() | caps), st.integers(0, 60), st.integers(1, 90))
def test_any_part_of_the_stream_is_that_part_of_its_passes(stream, first, count):
    numbers = range((first + count) // stream.size + 1)
    whole = Units.join([stream.draw(number) for number in numbers]).rows(stream.stride_frames)
    part = stream.take(first, count).rows(stream.stride_frames)
    for found, expected in zip(part, whole, strict=True):
        assert (found == expected[first : first + count]).all()


def test_passes_differ_in_order_and_move_the_clips_over_all_frames():
    def stream(frames, seed=1, name="made"):
        segments = Segments(*(np.array([n], np.int32) for n in (0, 0, frames)))
        return Passes(name, seed, segments, np.zeros(1, np.int32), 10, 10)

    assert {int(stream(15).draw(number).start[0]) for number in range(60)} == set(range(6))
    many = stream(1000).draw(0).start
    for other in (stream(1000).draw(1), stream(1000, seed=2).draw(0), stream(1000, name="other").draw(0)):
        assert (many != other.start).any()


def test_the_order_is_random():
    segments = Segments(*(np.array([n], np.int32) for n in (0, 0, 3000)))
    stream = Passes("made", 3, segments, np.zeros(1, np.int32), 1, 1)
    orders = np.array([stream.draw(number).start for number in range(40)])
    followers = np.diff(orders, axis=1) == 1
    assert followers.mean() < 0.002  # 1 in 3,000 by chance
    assert abs(np.corrcoef(orders[0], orders[1])[0, 1]) < 0.1
    middle = orders[:, :1500].mean(axis=1)  # of the first half: 1,500 with a standard error of 16
    assert np.abs(middle - 1499.5).max() < 80
