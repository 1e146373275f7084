"""The Ray cluster that this process works on: the one it was submitted to, or one of its own.

    RAY_ADDRESS set -> that cluster, with the token that its nodes have
    else            -> a local one: token authentication, a token that only this user can read, dashboard on loopback

Ray runs what anyone who reaches its ports submits, and the ports of a local cluster listen on the network as well: the
token is what keeps others out. Only RAY_AUTH_MODE=disabled turns it off, and is said aloud.
"""

import logging
import os
import secrets
import stat
import tempfile
from pathlib import Path
from typing import Any

import ray

from neurostorm.io.errors import UserError
from neurostorm.runtime import interrupts, ray_output
from neurostorm.runtime.progress import waiting

LOOPBACK = "127.0.0.1"
_MODE, _GIVEN = "RAY_AUTH_MODE", ("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH")
logger = logging.getLogger(__name__)


class RayError(UserError, RuntimeError):
    """Ray cannot be started here; the message says what to do."""


def ensure_ray() -> None:
    """Connects to the cluster that RAY_ADDRESS names, as inside `ray job submit`, or starts a local one; once.

    A cluster that merely happens to run on this machine is never joined: it may be somebody else's.
    """
    if ray.is_initialized():
        return
    ray_output.filter_stderr()
    if address := os.environ.get("RAY_ADDRESS"):
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        with waiting(f"connecting to the Ray cluster at {address}"):
            ray.init(logging_level=logging.WARNING)
        if not asks_for_token():
            logger.warning(
                "the Ray cluster at %s is used without a token: whoever reaches its ports can run code there; start it "
                "with %s=token, and set that here as well", address, _MODE,
            )  # fmt: skip
    else:
        with waiting("starting Ray on this machine"):
            start_local(logging_level=logging.ERROR)
    interrupts.reinstall()  # Ray has set a handler of its own for SIGTERM
    # Our progress bars say enough. Ray Data resets the level of "ray.data" at each execution, but not of its children.
    logging.getLogger("ray.data._internal").setLevel(logging.ERROR)


def stop_ray() -> None:
    """Leaves the cluster, or ends the local one, and says so; does nothing without one.

    At a process's end Ray does this by itself, in silence, for several seconds.
    """
    if ray.is_initialized():
        if not os.environ.get("RAY_ADDRESS"):  # else it only leaves
            logger.info("stopping Ray")
        ray.shutdown()


def start_local(**options: Any) -> None:
    """Starts a local cluster of this process, with token authentication unless RAY_AUTH_MODE=disabled.

    options  of `ray.init`; the dashboard is on loopback if they do not say otherwise

    OSError when no token can be written to the home folder, RuntimeError when Ray started without asking for one.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    disabled = os.environ.get(_MODE, "").lower() == "disabled"
    if disabled:
        logger.warning("%s=disabled: whoever reaches the ports of this Ray can run code as you", _MODE)
    elif not any(os.environ.get(name) for name in _GIVEN):
        keep_token(Path.home() / ".ray" / "auth_token")
    try:
        ray.init(**{"address": "local", "dashboard_host": LOOPBACK, **options})
    except Exception as error:  # Ray raises a plain Exception when one of its processes does not answer in time
        if "timed out" not in str(error):
            raise
        raise RayError(
            "Ray did not start on this machine in time: it is busy, or has too little memory. Start the same command "
            f"again when less runs here ({str(error).splitlines()[0]})"
        ) from error
    if not disabled and not asks_for_token():
        ray.shutdown()
        raise RuntimeError(
            f"Ray started without token authentication: {_MODE}={os.environ.get(_MODE)!r} was set after Ray was "
            "loaded, or is no mode of it; set it to `token` before this process starts"
        )


def asks_for_token() -> bool:
    """Whether this process's Ray has token authentication on."""
    from ray import _raylet  # Ray has no public name for it

    raylet: Any = _raylet

    return bool(raylet.get_authentication_mode() == raylet.AuthenticationMode.TOKEN)


def keep_token(path: Path) -> None:
    """Writes a new token to `path`, for this user alone to read, unless there is one; OSError when it cannot.

    Ray makes one by itself, but readable for everybody on the machine. One of that kind is reported.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    if not path.exists():
        handle, partial = tempfile.mkstemp(dir=path.parent)  # mode 600
        try:
            with os.fdopen(handle, "w") as file:
                file.write(secrets.token_hex(32))
            if not path.exists():
                os.link(partial, path)  # whole or not there: another start may look for it now
        except FileExistsError:
            pass
        finally:
            os.unlink(partial)
    if stat.S_IMODE(path.stat().st_mode) & 0o077:
        logger.warning(
            "%s can be read by others on this machine, who can then run code in your Ray: delete it, the next start "
            "makes a private one; or chmod 600 it if nobody else was there", path,
        )  # fmt: skip
