"""The account of a run's time under a clock that the tests turn: sums, kills, clocks that are set back."""

import json
import threading

import pytest
from hypothesis import given
from hypothesis import strategies as st

from neurostorm.io.paths import to_path
from neurostorm.train.records import time_account
from neurostorm.train.records.time_account import ACCOUNT, PARTS, LatestFile, TimeAccount, in_words, now_ns

S = 10**9


class Clock:
    """A clock that stands until it is turned."""

    def __init__(self, at_ns=1_000 * S):
        self.at_ns = at_ns

    def __call__(self):
        return self.at_ns

    def turn(self, by_s):
        self.at_ns += by_s * S
        return self


@pytest.fixture
def clock():
    return Clock()


def spent_s(account):
    """The parts that are not empty, in whole seconds."""
    assert all(spent_ns % S == 0 for spent_ns in account.spent_ns.values())
    return {part: spent_ns // S for part, spent_ns in account.spent_ns.items() if spent_ns}


def train(account, clock, steps, step_s=10, wait_s=1):
    """Lets the steps whose numbers of done steps are given pass."""
    for done in steps:
        clock.turn(wait_s)
        account.charge("wait")
        clock.turn(step_s)
        account.stepped(done)


def test_each_second_of_a_start_stands_in_its_part(tmp_path, clock):
    account = TimeAccount(tmp_path, clock() - 7 * S, clock)
    clock.turn(5)
    account.charge("startup")
    train(account, clock, [1, 2])
    clock.turn(2)
    account.keep("log")
    clock.turn(3)
    account.charge("validation")
    clock.turn(4)
    account.saved()
    expected = {"startup": 12, "wait": 2, "step": 20, "log": 2, "validation": 3, "checkpoint": 4}
    assert spent_s(account) == expected
    metrics = account.metrics()
    assert metrics["time/wall_s"] == 43 == sum(metrics[f"time/{part}_s"] for part in PARTS)
    assert metrics["time/step_s"] == 20 and metrics["time/goodput"] == 20 / 43
    assert metrics["checkpoint/age_s"] == 0
    train(account, clock, [3])
    assert account.metrics()["checkpoint/age_s"] == 11


def test_a_killed_run_counts_down_time_and_the_steps_it_repeats(tmp_path, clock):
    """Checkpoint after step 2, account kept after step 4, killed in step 6; the next driver starts 100 s later."""
    account = TimeAccount(tmp_path, clock(), clock)
    train(account, clock, [1, 2])
    account.saved()
    train(account, clock, [3, 4])
    account.keep("log")
    train(account, clock, [5])
    clock.turn(100)
    again = TimeAccount(tmp_path, clock(), clock.turn(8))
    assert spent_s(again) == {"wait": 4, "step": 40, "down": 11 + 100, "startup": 8}
    assert again.metrics()["checkpoint/age_s"] == 22 + 111 + 8, "as old as it was, and the time that passed"
    train(again, clock, range(3, 8))
    assert spent_s(again) == {"wait": 9, "repeated": 20, "step": 40 + 30, "down": 111, "startup": 8}
    assert again.metrics()["time/wall_s"] == (clock() - 1_000 * S) / S
    assert again.reached == 7


def test_a_third_start_knows_what_the_second_repeated(tmp_path, clock):
    for first in (1, 3):
        account = TimeAccount(tmp_path, clock(), clock)
        train(account, clock, range(first, 5))
        account.keep("log")
    last = TimeAccount(tmp_path, clock(), clock)
    train(last, clock, [4, 5])
    assert spent_s(last) == {"wait": 8, "step": 50, "repeated": 30}


def test_workers_that_the_same_driver_starts_again_were_down_since_the_last_sign_of_life(tmp_path, clock):
    started_ns = clock()
    account = TimeAccount(tmp_path, started_ns, clock.turn(6))
    train(account, clock, [1])
    account.keep("log")
    again = TimeAccount(tmp_path, started_ns, clock.turn(9))
    clock.turn(2)
    again.charge("startup")
    assert spent_s(again) == {"startup": 8, "wait": 1, "step": 10, "down": 9}


def test_a_start_that_died_before_its_first_log_line_counts_too(tmp_path, clock):
    TimeAccount(tmp_path, clock(), clock.turn(5))
    again = TimeAccount(tmp_path, clock.turn(30)(), clock)
    assert spent_s(again) == {"startup": 5, "down": 30}


def test_ranks_without_a_folder_write_nothing(tmp_path, clock, monkeypatch):
    monkeypatch.chdir(tmp_path)
    account = TimeAccount(clock_ns=clock)
    account.keep("log")
    account.saved()
    assert not list(tmp_path.iterdir())


def test_the_account_of_a_run_in_an_object_store_goes_on(make_bucket, clock):
    folder = to_path(make_bucket()) / "runs" / "one"
    train(account := TimeAccount(folder, clock(), clock), clock, [1])
    account.keep("log")
    account.flush()
    assert spent_s(TimeAccount(folder, clock.turn(5)(), clock)) == {"wait": 1, "step": 10, "down": 5}


@pytest.mark.parametrize("content", ["", "[]", '{"spent_ns": {}}'])
def test_a_file_that_is_no_account_is_named_with_what_to_do(content, tmp_path, clock):
    (tmp_path / ACCOUNT).write_text(content)
    with pytest.raises(ValueError, match=rf"{tmp_path}/{ACCOUNT} is no account.*delete it"):
        TimeAccount(tmp_path, clock(), clock)


EVENT = st.one_of(
    st.sampled_from(["wait", "validation", "checkpoint", "startup", "log"]),
    st.sampled_from(["stepped", "kept", "saved", "killed", "worker killed"]),
)


def happen(events, folder, clock):
    """Lets (event, seconds before it) pass on a run that is killed and resumes; gives the account after each."""
    started_ns, done = clock(), 0
    account = TimeAccount(folder, started_ns, clock)
    for event, by_s in events:
        clock.turn(by_s)
        if event == "stepped":
            account.stepped(done := done + 1)
        elif event == "kept":
            account.keep("log")
        elif event == "saved":
            account.saved()
        elif event.endswith("killed"):
            started_ns, done = started_ns if event.startswith("worker") else clock() - S, max(0, done - 2)
            account = TimeAccount(folder, started_ns, clock)
        else:
            account.charge(event)
        yield account


@given(events=st.lists(st.tuples(EVENT, st.integers(1, 1_000))))
def test_the_parts_add_up_to_the_time_since_the_first_start_whatever_happens(events, tmp_path_factory):
    clock = Clock()
    begun_ns = clock()
    for account in happen(events, tmp_path_factory.mktemp("run"), clock):
        assert account.wall_ns == sum(account.spent_ns.values()) == clock() - begun_ns


@given(events=st.lists(st.tuples(EVENT, st.integers(-1_000, 1_000))))
def test_no_part_ever_shrinks_when_clocks_step_back(events, tmp_path_factory):
    """Of one start after the other, and against what the one before had kept."""
    folder = tmp_path_factory.mktemp("run")
    known = dict.fromkeys(PARTS, 0)
    for account in happen(events, folder, Clock()):
        kept = json.loads((folder / ACCOUNT).read_text())["spent_ns"]
        assert all(account.spent_ns[part] >= kept[part] >= known[part] >= 0 for part in PARTS)
        assert 0 <= account.metrics()["time/goodput"] <= 1 and account.metrics()["checkpoint/age_s"] >= 0
        known = kept


def test_a_clock_that_was_set_back_is_counted_on_from_where_it_is(tmp_path, clock):
    account = TimeAccount(tmp_path, clock(), clock)
    clock.turn(-3600)
    account.charge("wait")
    train(account, clock, [1])
    assert spent_s(account) == {"wait": 1, "step": 10}


def test_a_driver_whose_clock_is_behind_the_workers_takes_no_time_back(tmp_path, clock):
    account = TimeAccount(tmp_path, clock(), clock)
    train(account, clock, [1])
    account.keep("log")
    again = TimeAccount(tmp_path, clock() - 50 * S, clock.turn(4))
    assert spent_s(again) == {"wait": 1, "step": 10, "startup": 4}


def test_time_is_unix_time_and_goes_forward():
    times_ns = [now_ns() for _ in range(100)]
    assert times_ns == sorted(times_ns) and times_ns[0] > 1_700_000_000 * S


def test_the_line_for_people_begins_with_the_largest_part(clock):
    account = TimeAccount(clock_ns=clock)
    train(account, clock, [1, 2, 3])
    shown = in_words(account.metrics())
    assert shown.startswith("33 s, goodput 91%: step 30 s, wait 3 s, ")
    assert all(part in shown for part in PARTS)


def test_a_summary_from_before_there_were_accounts_can_be_told():
    assert in_words({"loss/validation": 0.5}) == "not known, no account was kept"


@pytest.fixture
def writes(monkeypatch):
    made = []
    plain = time_account.atomic_write

    def write(file, content):
        made.append(content)
        plain(file, content)

    monkeypatch.setattr(time_account, "atomic_write", write)
    return made


def test_the_newest_content_is_written_and_older_content_is_passed_over(tmp_path, writes, monkeypatch):
    free, begun = threading.Event(), threading.Event()
    plain = time_account.atomic_write

    def slow(file, content):
        begun.set()
        free.wait(60)
        plain(file, content)

    monkeypatch.setattr(time_account, "atomic_write", slow)
    file = LatestFile(tmp_path / "account.json")
    file.put(b"0")
    begun.wait(60)
    for number in range(1, 100):
        file.put(str(number).encode())
    free.set()
    assert file.flush(60)
    assert writes == [b"0", b"99"] and (tmp_path / "account.json").read_bytes() == b"99"


def test_a_failure_is_said_once_and_ends_nothing(tmp_path, caplog, writes):
    file = LatestFile(tmp_path / "no folder" / "account.json", every_s=0.0)
    for number in range(5):
        file.put(str(number).encode())
        assert file.flush(60)
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    (tmp_path / "no folder").mkdir()
    file.put(b"now")
    assert file.flush(60) and (tmp_path / "no folder" / "account.json").read_bytes() == b"now"


def test_a_store_that_hangs_does_not_hold_up_the_end(tmp_path, monkeypatch):
    free = threading.Event()
    monkeypatch.setattr(time_account, "atomic_write", lambda file, content: free.wait(60))
    file = LatestFile(tmp_path / "account.json")
    file.put(b"0")
    assert not file.flush(0.05)
    free.set()


def test_a_file_that_has_nothing_new_is_flushed(tmp_path):
    assert LatestFile(tmp_path / "account.json").flush(1)
