"""One line for a failure, whatever Ray wrapped it in; Ray's classes are real ones, no Ray is started."""

import pickle

import pytest
from ray.exceptions import ActorDiedError, OutOfMemoryError, RayError, RayTaskError, UserCodeException
from ray.train import WorkerGroupError
from ray.train.v2._internal.exceptions import UserExceptionWithTraceback
from ray.train.v2.api.exceptions import ControllerError

from neurostorm.config import ConfigError
from neurostorm.io.errors import LONGEST, reason_of
from neurostorm.store import StoreError

STORE = "StoreError: there is no store at /data/mine: make it with jobs/ingest.py"


def store_error() -> StoreError:
    return StoreError(STORE.removeprefix("StoreError: "))


def from_workers(*errors: BaseException) -> WorkerGroupError:
    """What `fit` raises when workers 0, 1, ... raised these; a tuple as pickled on its way to the driver."""
    wrapped = [error if isinstance(error, RayError) else UserExceptionWithTraceback(error, "Traceback\n" * 40)
               for error in errors]  # fmt: skip
    made = WorkerGroupError("[Rank 0] Traceback\n" * 40, dict(enumerate(wrapped)))
    sent: WorkerGroupError = pickle.loads(pickle.dumps(made))
    return sent


def task_error(cause: Exception, text: str = "Traceback (most recent call last):\n") -> RayTaskError:
    return RayTaskError("trial", text, cause, proctitle="ray::trial", pid=1, ip="127.0.0.1").as_instanceof_cause()


@pytest.mark.parametrize(
    "error",
    [
        store_error(), from_workers(store_error()), from_workers(store_error(), store_error()),
        ControllerError(task_error(store_error())), task_error(task_error(store_error())),
    ],
)  # fmt: skip
def test_the_users_exception_is_found_below_rays_and_told_once(error: BaseException) -> None:
    assert reason_of(error) == STORE


def test_what_other_workers_saw_of_it_is_left_out() -> None:
    gloo = RuntimeError("[gloo/transport/tcp/pair.cc:537] Connection closed by peer [127.0.0.1]:3")
    assert reason_of(from_workers(gloo, store_error(), ActorDiedError())) == STORE
    assert reason_of(from_workers(gloo, ValueError("bad"))) == "ValueError: bad"
    assert reason_of(from_workers(KeyError("a"), ConfigError("train.lr=-1"))) == "ConfigError: train.lr=-1"
    assert reason_of(from_workers(gloo)).startswith("RuntimeError: [gloo"), "if there is nothing else"


def test_different_reasons_are_both_given() -> None:
    assert reason_of(from_workers(ValueError("a"), ValueError("b"), ValueError("a"))) == "ValueError: a | ValueError: b"


def test_a_worker_that_was_killed_is_said_in_one_line_of_bounded_length() -> None:
    killed = OutOfMemoryError("The worker died.\n" + "\tRoot cause: the process was killed by SIGKILL\n" * 50)
    reason = reason_of(from_workers(killed))
    assert reason.startswith("OutOfMemoryError: The worker died. Root cause") and "\n" not in reason
    assert len(reason) < LONGEST + 30 and reason.endswith(" ...")


def test_an_exception_that_survives_as_text_only_is_read_from_the_traceback() -> None:
    text = (
        "ray::map() (pid=1, ip=127.0.0.1)\n  File x, line 3, in read\nneurostorm.store.layout.StoreError: no such run\n"
        "\nThe above exception was the direct cause of the following exception:\n\n"
        "ray.exceptions.UserCodeException: UDF failed to process a data block.\n"
    )
    assert reason_of(task_error(UserCodeException("UDF failed"), text)) == "StoreError: no such run"
    assert reason_of(task_error(UserCodeException("UDF failed"))) == "UserCodeException: UDF failed"


def test_a_message_of_ours_is_never_cut_and_an_exception_without_one_is_its_name() -> None:
    assert reason_of(StoreError("x" * 2000)) == "StoreError: " + "x" * 2000
    assert reason_of(AssertionError()) == "AssertionError"
