"""Which failures Ray Train tries again: those since the last new checkpoint count, what would only repeat does not."""

import pickle

import pytest
import ray.train
from ray import cloudpickle
from ray.exceptions import ActorDiedError, RayTaskError, UserCodeException
from ray.train import WorkerGroupError
from ray.train.v2._internal.exceptions import UserExceptionWithTraceback
from ray.train.v2._internal.execution.failure_handling import FailureDecision

from neurostorm.config import ConfigError
from neurostorm.data.corpus import open_corpus
from neurostorm.data.storage_wait import StorageAwayError
from neurostorm.io.object_store import UnavailableError
from neurostorm.store import StoreError
from neurostorm.train.checkpoint.checkpoints import MARKER, CheckpointError
from neurostorm.train.controller.failure_policy import FailuresSinceCheckpoint
from neurostorm.train.controller.trainer import trainer_of
from neurostorm.train.health.limits import NonFiniteError, UnreadableClipsError

RETRY, RAISE = FailureDecision.RETRY, FailureDecision.RAISE


def group_error(*errors: Exception) -> WorkerGroupError:
    wrapped = [UserExceptionWithTraceback(error, "Traceback ...") for error in errors]
    return cloudpickle.loads(cloudpickle.dumps(WorkerGroupError("failed", dict(enumerate(wrapped)))))


@pytest.fixture
def policy(tmp_path):
    made = FailuresSinceCheckpoint(ray.train.FailureConfig(max_failures=2), tmp_path / "checkpoints")
    return pickle.loads(pickle.dumps(made))  # as it reaches the controller


def commit(folder, step):
    path = folder / "checkpoints" / f"step-{step:08d}"
    path.mkdir(parents=True)
    (path / MARKER).write_text("{}")


def decide(policy, *errors, times=1):
    return [policy.make_decision(group_error(*errors)) for _ in range(times)]


def test_failures_without_a_new_checkpoint_use_up_the_budget(policy):
    assert decide(policy, RuntimeError("killed"), times=3) == [RETRY, RETRY, RAISE]


def test_a_new_checkpoint_fills_the_budget_up_again(policy, tmp_path):
    for step in range(1, 20):
        assert decide(policy, RuntimeError("killed"), times=2) == [RETRY, RETRY], f"before step {step}"
        commit(tmp_path, step)
    assert decide(policy, RuntimeError("killed"), times=3) == [RETRY, RETRY, RAISE]


def test_a_checkpoint_of_an_earlier_start_does_not_fill_it_up(tmp_path):
    commit(tmp_path, 5)
    policy = FailuresSinceCheckpoint(ray.train.FailureConfig(max_failures=1), tmp_path / "checkpoints")
    assert decide(policy, RuntimeError("killed"), times=2) == [RETRY, RAISE]


def test_checkpoints_that_cannot_be_listed_do_not_end_the_run(policy, monkeypatch):
    def away(folder):
        raise UnavailableError("s3://bucket: 503")

    monkeypatch.setattr("neurostorm.train.controller.failure_policy.newest_committed", away)
    assert decide(policy, RuntimeError("killed"), times=3) == [RETRY, RETRY, RAISE]


@pytest.mark.parametrize(
    "error",
    [
        NonFiniteError("step 3"),
        UnreadableClipsError("step 3"),
        StorageAwayError("away"),
        ConfigError("mask.atlas"),
        StoreError("no manifest"),
    ],
)
def test_what_would_only_repeat_itself_ends_at_once_whatever_the_other_ranks_saw(policy, error):
    others = [RuntimeError("[gloo] Connection closed by peer"), ActorDiedError()]
    assert decide(policy, others[0], error, others[1]) == [RAISE]


@pytest.mark.parametrize(
    "error", [CheckpointError("damaged"), UnavailableError("503"), RuntimeError("NCCL"), OSError()]
)
def test_what_may_pass_is_tried_again(policy, error):
    assert decide(policy, error) == [RETRY]


def test_an_error_of_a_reading_task_is_known_by_the_text_that_is_left_of_it(policy):
    def of_task(last_line):
        text = f"Traceback (most recent call last):\n{last_line}\n\nray.exceptions.UserCodeException: UDF failed\n"
        error = RayTaskError("read", text, UserCodeException("UDF failed"), proctitle="ray::read", pid=1, ip="1.2.3.4")
        return error.as_instanceof_cause()

    assert decide(policy, of_task("neurostorm.data.storage_wait.StorageAwayError: 503 for 600 s")) == [RAISE]
    assert decide(policy, of_task("neurostorm.no_module.GoneError: 1")) == [RETRY]


def test_minus_one_is_without_end(tmp_path):
    policy = FailuresSinceCheckpoint(ray.train.FailureConfig(max_failures=-1), tmp_path)
    assert set(decide(policy, RuntimeError("killed"), times=50)) == {RETRY}
    assert decide(policy, NonFiniteError("step 3")) == [RAISE]


def test_the_trainer_uses_it(ball_config, monkeypatch):
    config = ball_config(scale={"max_failures": 5})
    trainer = trainer_of(config, open_corpus(config), "/scratch/of-ray", started_ns=12)
    given = {}
    base = type(trainer).__mro__[1]
    monkeypatch.setattr(base, "_initialize_and_run_controller", lambda self, **named: given.update(named))
    trainer._initialize_and_run_controller(failure_policy="Ray's own", scaling_policy="kept")
    assert isinstance(given["failure_policy"], FailuresSinceCheckpoint) and given["scaling_policy"] == "kept"
    assert given["failure_policy"].failure_config.max_failures == 5
