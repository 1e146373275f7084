"""The timeout of collectives follows recent times, kind by kind, within its bounds."""

import datetime

import pytest
import torch.distributed as dist

from neurostorm.train.health.collectives import set_collective_timeout
from neurostorm.train.health.timeouts import FACTOR, FIRST_STEPS, CollectiveTimeouts


class Clock:
    def __init__(self):
        self.now_s = 0.0

    def __call__(self):
        return self.now_s


class Timed:
    """Timeouts with a clock that stands still, and the timeout that each span of time had."""

    def __init__(self, least_s=10.0, most_s=1800.0, **options):
        self.clock = Clock()
        self.applied = []
        self.timeouts = CollectiveTimeouts(least_s, most_s, self.applied.append, clock_s=self.clock, **options)

    def spend(self, kind, seconds):
        with self.timeouts.during(kind):
            timeout_s = self.timeouts.timeout_s
            self.clock.now_s += seconds
        return timeout_s

    def start(self, seconds=40.0):
        for _ in range(FIRST_STEPS):
            assert self.spend("step", seconds) == 1800.0


def test_the_first_steps_may_take_the_upper_bound_and_do_not_count():
    timed = Timed(least_s=60.0)
    timed.start(40.0)
    timed.spend("step", 0.4)
    assert timed.spend("step", 0.4) == 60.0, "a hang at 0.4 s a step is found within a minute"


def test_one_slow_step_of_many_does_not_make_later_ones_patient():
    timed = Timed()
    timed.start()
    for _ in range(20):
        timed.spend("step", 1.0)
    timed.spend("step", 30.0)
    assert timed.spend("step", 1.0) == FACTOR * 1.0


def test_steps_that_stay_slow_raise_the_timeout_and_fast_ones_lower_it_again():
    timed = Timed()
    timed.start()
    for _ in range(20):
        timed.spend("step", 1.0)
    for _ in range(20):
        timed.spend("step", 4.0)
    assert timed.spend("step", 4.0) == FACTOR * 4.0
    for _ in range(80):
        timed.spend("step", 1.0)
    assert timed.spend("step", 1.0) == FACTOR * 1.0


def test_each_kind_has_a_timeout_of_its_own():
    timed = Timed()
    timed.start()
    for kind, seconds in (("validation", 5.0), ("checkpoint", 30.0), ("step", 1.0)):
        assert timed.spend(kind, seconds) == 1800.0, "not measured yet"
    kinds = ("step", "checkpoint", "validation")
    assert [timed.spend(kind, 1.0) for kind in kinds] == [FACTOR, FACTOR * 30, FACTOR * 5]


def test_a_kind_inside_another_leaves_the_outer_ones_timeout():
    timed = Timed()
    timed.spend("validation", 5.0)
    timed.spend("meet", 1.0)
    with timed.timeouts.during("validation"):
        assert timed.spend("meet", 1.0) == FACTOR
        assert timed.timeouts.timeout_s == FACTOR * 5


@pytest.mark.parametrize(("seconds", "expected"), [(0.01, 10.0), (3.0, 60.0), (1000.0, 1800.0)])
def test_bounds_hold(seconds, expected):
    timed = Timed()
    timed.spend("meet", seconds)
    assert timed.spend("meet", 0.0) == expected


def test_a_kind_may_have_a_higher_lower_bound():
    timed = Timed(at_least_s={"checkpoint": 360.0})
    for kind in ("checkpoint", "validation"):
        timed.spend(kind, 1.0)
    assert (timed.spend("checkpoint", 1.0), timed.spend("validation", 1.0)) == (360.0, FACTOR)


def test_a_small_change_is_not_made():
    timed = Timed()
    timed.spend("meet", 1.0)
    with timed.timeouts.during("meet"):
        timed.spend("step", 1.1)
        timed.applied.clear()
        with timed.timeouts.during("meet"):
            pass
    assert timed.applied == [1800.0], "the inner one left it, the outer one ended"


def test_least_above_most_is_most():
    timed = Timed(least_s=60.0, most_s=5.0)
    timed.spend("meet", 1.0)
    assert timed.spend("meet", 1.0) == 5.0 and timed.applied == []


def test_every_process_group_gets_it(tmp_path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'meet'}", rank=0, world_size=1)
    try:
        other = dist.new_group([0])
        set_collective_timeout(7.0)
        for group in (dist.group.WORLD, other):
            assert group._get_backend(dist.distributed_c10d.torch.device("cpu")).options._timeout == datetime.timedelta(
                seconds=7
            )
    finally:
        dist.destroy_process_group()
