"""The timeout of collectives follows what was measured, kind by kind, within its bounds."""

import datetime

import pytest
import torch.distributed as dist

from neurostorm.train.patience import FACTOR, Patience
from neurostorm.train.ranks import set_collective_timeout


class Clock:
    def __init__(self):
        self.now_s = 0.0

    def __call__(self):
        return self.now_s


def patience(least_s=10.0, most_s=1800.0):
    clock, applied = Clock(), []
    return Patience(least_s, most_s, applied.append, clock), clock, applied


def spend(one, clock, kind, seconds):
    with one.during(kind):
        clock.now_s += seconds


def test_what_was_not_measured_may_take_as_long_as_it_likes():
    one, clock, applied = patience()
    for kind in ("step", "validation", "checkpoint"):
        spend(one, clock, kind, 1.0)
        assert one.timeout_s == 1800.0
    assert applied == []


def test_each_kind_has_a_timeout_of_its_own():
    one, clock, applied = patience()
    for _ in range(2):
        for kind, seconds in (("step", 2.0), ("checkpoint", 30.0), ("step", 1.0)):
            spend(one, clock, kind, seconds)
    assert applied == [FACTOR * 2.0, FACTOR * 30.0, FACTOR * 2.0]
    assert one.timeout_s == FACTOR * 2.0


@pytest.mark.parametrize(("seconds", "expected"), [(0.01, 10.0), (3.0, 60.0), (1000.0, 1800.0)])
def test_bounds_hold(seconds, expected):
    one, clock, _ = patience()
    spend(one, clock, "step", seconds)
    spend(one, clock, "step", 0.0)
    assert one.timeout_s == expected


def test_one_slow_step_makes_the_later_ones_patient():
    one, clock, _ = patience()
    for seconds in (1.0, 9.0, 1.0, 1.0):
        spend(one, clock, "step", seconds)
    assert one.timeout_s == FACTOR * 9.0


def test_a_small_change_is_not_made():
    one, clock, applied = patience()
    for seconds in (1.0, 1.1, 1.2, 1.2):
        spend(one, clock, "step", seconds)
    assert applied == [FACTOR * 1.0]


def test_least_above_most_is_most():
    one, clock, applied = patience(least_s=60.0, most_s=5.0)
    spend(one, clock, "step", 1.0)
    spend(one, clock, "step", 1.0)
    assert one.timeout_s == 5.0 and applied == []


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
