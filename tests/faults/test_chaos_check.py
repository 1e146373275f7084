"""`tools/chaos.py`: what it holds a run to, and its way to a loss that is not finite."""

import importlib.util
import itertools
import math
import random
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import pytest
import torch
from chaos import main as chaos
from chaos.check import Outcome, clip_problems, loss_error, loss_problems, replays, table
from chaos.faults import flip
from chaos.scene import EVERY, Scene

from neurostorm.data.clips import Read

TWIN = {step: (1.0 / (step + 1), [2 * step, 2 * step + 1]) for step in range(6)}
HOOK = Path(chaos.__file__).parent / "hook" / "sitecustomize.py"


@pytest.mark.parametrize(
    ("steps", "lost"),
    [
        ([], []),
        ([0, 1, 2, 3], []),
        ([0, 1, 2, 3, 2, 3, 4], [2]),
        ([0, 1, 2, 3, 0, 1, 2, 3, 4], [4]),
        ([0, 1, 2, 3, 2, 2, 3, 4], [2, 1]),  # the second restart came when step 2 was done
        ([0, 1, 2, 2], [1]),
        ([0, 1, 4, 5], []),  # that steps are missing is for the comparison to say
    ],
)
def test_what_a_restart_does_again_is_what_was_lost(steps, lost):
    assert replays(steps) == lost


def test_a_run_like_its_twin_has_no_problem():
    outcome = Outcome("worker", allowed_steps=2, recovery_s=[3.0])
    outcome.judge([0, 1, 2, 3, 2, 3, 4, 5], TWIN, {step: (loss, list(rows)) for step, (loss, rows) in TWIN.items()})
    assert (outcome.problems, outcome.status, outcome.once, outcome.loss_error) == ([], "ok", True, 0.0)


def test_more_steps_lost_than_allowed_is_a_problem():
    outcome = Outcome("worker", allowed_steps=1)
    outcome.judge([0, 1, 2, 3, 2, 3, 4, 5], TWIN, TWIN)
    assert outcome.problems == ["2 steps lost, at most 1 may be"] and outcome.status == "FAILED"


@pytest.mark.parametrize(("relative", "problems"), [(5e-7, 0), (2e-6, 1)])
def test_a_loss_may_differ_in_its_last_digits_alone(relative, problems):
    outcome = Outcome("elastic", 0)
    outcome.judge([0, 1, 2, 3], TWIN, TWIN | {3: (TWIN[3][0] * (1 + relative), TWIN[3][1])})
    assert len(outcome.problems) == problems


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({3: (0.25, [6, 6])}, ["1 clips were used more than once, the first is row 6", "1 clips were not used"]),
        ({3: (0.25, [7, 6])}, ["step 3: clips [7, 6], the twin's are [6, 7]"]),
        ({3: None}, ["1 steps are not in the ledger, the first is 3", "2 clips were not used, the first is row 6"]),
        ({6: (0.1, [12, 13])}, ["1 steps that the twin does not have, the first is 6"]),
        ({2: (1 / 3, [4, 7]), 3: (0.25, [6, 5])}, ["step 2: clips [4, 7], the twin's are [4, 5]"]),
    ],
)
def test_clips_are_used_once_and_where_the_twin_uses_them(change, named):
    found = {step: word for step, word in (TWIN | change).items() if word is not None}
    problems = clip_problems(TWIN, found)
    assert all(any(problem.startswith(name) for problem in problems) for name in named), problems
    outcome = Outcome("worker", 0)
    outcome.judge(sorted(found), TWIN, found)
    assert not outcome.once and outcome.status == "FAILED"


@pytest.mark.parametrize(("factor", "same"), [(1.0, True), (1 + 5e-7, True), (1 + 2e-6, False), (math.nan, False)])
def test_losses_are_equal_to_rounding(factor, same):
    found = TWIN | {4: (TWIN[4][0] * factor, TWIN[4][1])}
    assert (loss_problems(TWIN, found) == []) == same
    assert (loss_error(TWIN, found) <= 1e-6) == same


def test_the_table_has_a_line_for_each_fault_and_says_what_is_wrong():
    good = Outcome("worker", 20, [7, 12, 3], [9.0, 30.0, 11.0], 0.0, True)
    bad = Outcome("driver", 20, [21], [], 0.5, False, ["21 steps lost, at most 20 may be"])
    lines = table([good, bad, Outcome("disk", 20, skipped="takes root")]).splitlines()
    assert lines[1].split() == ["worker", "12", "20", "11.0", "0.0e+00", "yes", "ok"]
    assert lines[2].split() == ["driver", "21", "20", "never", "5.0e-01", "NO", "FAILED"]
    assert lines[3].split() == ["disk", "skipped:", "takes", "root"]
    assert lines[-1] == "driver: 21 steps lost, at most 20 may be"
    assert good.as_json()["median_recovery_s"] == 11.0 and bad.as_json()["status"] == "FAILED"


def test_faults_strike_between_checkpoints_and_never_before_the_second():
    for seed in range(50):
        steps = chaos.moments(3, random.Random(seed))
        assert steps[0] > 2 * EVERY and all(later - step > EVERY for step, later in itertools.pairwise(steps))
    assert len({step % EVERY for seed in range(200) for step in chaos.moments(1, random.Random(seed))}) == EVERY


@pytest.mark.parametrize(
    "words", [["--rounds", "0"], ["--steps", "100"], ["--steps", "120", "--rounds", "5"], ["--faults", "flood"]]
)
def test_what_cannot_be_run_is_refused(words):
    with pytest.raises(SystemExit) as ended:
        chaos.parse(words)
    assert ended.value.code == 2


def test_a_flipped_bit_leaves_the_size(tmp_path):
    file = tmp_path / "shard"
    file.write_bytes(bytes(range(9)))
    flip(file)
    changed = file.read_bytes()
    assert [index for index in range(9) if changed[index] != index] == [4] and len(changed) == 9


def load_hook():
    spec = importlib.util.spec_from_file_location("chaos_hook_under_test", HOOK)
    hook = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(hook)
    return hook


def test_one_training_step_is_poisoned_and_only_one(tmp_path, monkeypatch):
    monkeypatch.setenv("CHAOS_POISON", str(tmp_path / "flag"))
    monkeypatch.setattr(sys, "meta_path", list(sys.meta_path))
    hook = load_hook()
    assert sys.meta_path[0].find_spec("neurostorm.model.mask", None) is None

    class Out(NamedTuple):
        loss: torch.Tensor

    class Model(torch.nn.Module):
        def forward_patches(self, loss):
            return Out(loss)

    hook.poison(SimpleNamespace(MaskedAutoencoder=Model))
    model, one = Model(), torch.ones(())
    assert model.forward_patches(one).loss == 1
    (tmp_path / "flag").touch()
    assert model.eval().forward_patches(one).loss == 1
    assert model.train().forward_patches(one).loss.isnan()
    assert model.forward_patches(one).loss == 1


def test_rows_that_are_named_are_left_out_as_those_of_a_removed_participant(tmp_path, monkeypatch):
    (tmp_path / "rows.json").write_text("[5, 8]")
    monkeypatch.setenv("CHAOS_LEAVE_OUT", str(tmp_path / "rows.json"))
    monkeypatch.setattr(sys, "meta_path", list(sys.meta_path))
    hook = load_hook()
    marked = []

    class Reader:
        def _prepare(self, rows):
            reads = [Read(nth, 1, 0, 4, True) for nth in range(len(rows))]
            return {"row": rows}, reads, "paths"

    module = SimpleNamespace(ClipReader=Reader, _leave_out=lambda columns, read: marked.append(read.first))
    hook.leave_out(module)
    _, reads, others = Reader()._prepare([4, 5, 7, 8])
    assert marked == [1, 3] and [read.first for read in reads] == [0, 2] and others == "paths"


def test_the_way_back_is_timed_once_from_the_fault_to_a_step_that_was_not_done_before(monkeypatch):
    class Job:
        done = iter([[0, 1, 2], [0, 1, 2], [0, 1, 2, 1, 2], [0, 1, 2, 1, 2, 3]])

        def reached(self):
            return max(next(self.done)) + 1

        def wait_for(self, condition, what, timeout_s):
            while not condition():
                pass

    monkeypatch.setattr("chaos.scene.STILL_S", 0.0)
    scene = Scene(None, None, random.Random(0), jobs=[Job()])
    scene.struck(at_s=time.monotonic() - 5.0)
    assert scene.reached == 3
    first = scene.back()
    assert 5.0 <= first < 6.0 and scene.back() == first and next(Job.done, None) is None
