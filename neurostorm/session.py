"""The Ray cluster that this process works on: the one it was submitted to, or one of its own."""

import logging
import os

import ray


def ensure_ray() -> None:
    """Connects to the cluster that RAY_ADDRESS names, as inside `ray job submit`, or starts a local one; once.

    A cluster that merely happens to run on this machine is never joined: it may be somebody else's.
    """
    if ray.is_initialized():
        return
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    address = None if os.environ.get("RAY_ADDRESS") else "local"
    ray.init(address=address, logging_level=logging.WARNING)
    # Our progress bars say enough. Ray Data resets the level of "ray.data" at each execution, but not of its children.
    logging.getLogger("ray.data._internal").setLevel(logging.ERROR)
