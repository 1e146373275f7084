"""Which of our kernels may run: each has a variable in the environment that switches it off, `NAME=torch`."""

import importlib.util
import os
from functools import lru_cache

SCAN, STRD = "NEUROSTORM_SCAN", "NEUROSTORM_STRD"


def on(switch: str) -> bool:
    """Whether the kernel has not been switched off."""
    return os.environ.get(switch) != "torch"


@lru_cache
def triton_may(switch: str) -> bool:
    """Whether the kernel is on and can be written in Triton, which comes with torch's builds for GPUs; asked once."""
    return on(switch) and importlib.util.find_spec("triton") is not None
