"""What a run says of its time: the first step of a start on a line of its own, rates and time left from warm steps."""

import logging
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from neurostorm.train import loop as loop_module
from neurostorm.train.engine import StepOutcome
from neurostorm.train.health.barrier import StepClips
from neurostorm.train.health.timeouts import CollectiveTimeouts
from neurostorm.train.loop import Loop, Window
from neurostorm.train.records import log_lines
from neurostorm.train.records.log_lines import TimeLeft
from neurostorm.train.records.time_account import TimeAccount

S = 10**9


class Clock:
    """Seconds that pass only when a test says so, for all that reads the time here."""

    now_s = 0.0

    def __call__(self) -> float:
        return self.now_s

    def turn(self, by_s: float) -> None:
        self.now_s += by_s


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    for module in (loop_module, log_lines):
        monkeypatch.setattr(module.time, "perf_counter", clock)
    return clock


@pytest.fixture
def run(clock: Clock, monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> Callable[..., tuple[TimeAccount, list[dict]]]:
    """Runs `Loop.run` on steps that take given seconds, without model or engine; its account and logged metrics."""
    monkeypatch.setattr(loop_module, "mean_over_ranks", lambda values: values.tolist())
    monkeypatch.setattr(loop_module, "clip_names", lambda batch, runs: [])
    monkeypatch.setattr(loop_module.checkpoints, "save", lambda *place, **what: clock.turn(0.5))

    def build(waits_s: list[float], steps_s: list[float], log_every: int) -> tuple[TimeAccount, list[dict]]:
        total, logged = len(steps_s), []

        def batches() -> Iterator[Any]:
            for wait_s in waits_s:
                clock.turn(wait_s)
                yield SimpleNamespace()

        class Quick(Loop):
            def __post_init__(self) -> None:
                self.folder, self.device = tmp_path, torch.device("cpu")
                self.guard = SimpleNamespace(check=lambda applied, **where: None, total=0)
                self.damaged = SimpleNamespace(note=lambda *clips: None, keep=lambda done: None, total=0)
                self.left_out = SimpleNamespace(note=lambda *clips: None, keep=lambda done: None)
                self.ledger = SimpleNamespace(keep=lambda done: None)
                self.window, self.peak_flops_per_s = Window(1, self.device), 1.0
                self.time_left = TimeLeft(total, {"validation": total, "checkpoint": total})

            def step(self, batch: Any, step: int, clips: Any) -> Any:
                clock.turn(steps_s[step])
                return torch.full((4,), float(step), dtype=torch.float64), 1, StepOutcome(True, 1.0)

            def learning_rate(self, step: int) -> float:
                return 1.0

        def validate(done: int) -> dict[str, float]:
            clock.turn(2)
            return {"loss/validation": 1.0, "loss/validation_predicting_mean": 1.0}

        config = SimpleNamespace(
            train=SimpleNamespace(log_every=log_every, validate_every=total, global_batch=8),
            checkpoint=SimpleNamespace(every=total, preemption_check_every=100, keep=1),
            tracking=SimpleNamespace(clip_ledger=False),
        )
        account = TimeAccount(clock_ns=lambda: round(clock() * S))
        Quick(
            config=config,
            engine=SimpleNamespace(save=None),
            model=None,
            unpack=None,
            unpack_view=None,
            batches=batches(),
            barrier=SimpleNamespace(next_batch=lambda stream: (next(stream), StepClips(8, 0, 0.0))),
            timeouts=CollectiveTimeouts(1, 1, lambda timeout_s: None),
            validation=SimpleNamespace(run=validate),
            account=account,
            notice=lambda: False,
            tracker=SimpleNamespace(metrics=lambda values, step: logged.append(values)),
            runs=(),
            trainer={},
            rank=0,
            first_step=0,
            total_steps=total,
            clips_per_epoch=8,
            clip_flops=1,
        ).run()  # type: ignore[arg-type]
        return account, logged

    return build


def lines(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records]


def test_the_first_step_has_a_line_of_its_own_and_is_not_in_the_first_windows_times(run, caplog) -> None:
    caplog.set_level(logging.INFO)
    _, logged = run([30, 0, 0, 1], [10, 2, 2, 1], log_every=2)
    assert lines(caplog)[0] == "first_step wait_s=30 step_s=10"
    assert "clips_per_s=4 wait=0.0%" in lines(caplog)[1] and lines(caplog)[1].endswith("left_s=4")
    first, second = logged
    assert first["loss/train"] == 0.5, "the mean loss is that of both steps"
    assert (first["speed/step_s"], first["data/wait_fraction"], first["data/slowest_wait_s"]) == (2, 0, 0)
    assert (second["speed/step_s"], second["data/wait_fraction"]) == (2, 0.25)


def test_the_first_steps_time_is_start_up_in_the_account(run) -> None:
    account, _ = run([30, 0, 0, 1], [10, 2, 2, 1], log_every=2)
    spent_s = {part: spent_ns / S for part, spent_ns in account.spent_ns.items() if spent_ns}
    assert spent_s == {"startup": 40, "wait": 1, "step": 5, "validation": 2, "checkpoint": 0.5}
    assert account.reached == 4


def test_a_line_after_the_first_step_alone_gives_no_rate_and_no_time_left(run, caplog) -> None:
    caplog.set_level(logging.INFO)
    _, logged = run([30, 0], [10, 2], log_every=1)
    assert lines(caplog)[1] == ("step 1/2 loss=0 predicting_mean=0 gradient_norm=1 skipped_steps=0 goodput=0.0%")
    assert not {"speed/clips_per_s", "speed/mfu", "data/wait_fraction"} & set(logged[0])
    assert "clips_per_s=4 wait=0.0%" in lines(caplog)[2] and lines(caplog)[2].endswith("left_s=0")


def test_time_left_counts_steps_validations_and_checkpoints_at_their_median() -> None:
    left = TimeLeft(100, {"validation": 40, "checkpoint": 30})
    assert left.values(1) == {}, "no step was timed yet"
    for step_s in (2, 2, 2, 60):
        left.took("step", step_s)
    assert left.values(10) == {"left_s": 180}
    left.took("validation", 5)
    assert left.values(10) == {"left_s": 180 + 3 * 5}, "after steps 40, 80 and 100"
    left.took("checkpoint", 1)
    assert left.values(40) == {"left_s": 120 + 3 * 5 + 3 * 1}, "40, 80, 100; 60, 90, 100"
    assert left.values(100) == {"left_s": 5 + 1}


def test_time_left_follows_recent_steps() -> None:
    left = TimeLeft(1000, {})
    for _ in range(log_lines.RECENT):
        left.took("step", 9)
    for _ in range(log_lines.RECENT):
        left.took("step", 1)
    assert left.values(900) == {"left_s": 100}
