"""Autocast, for code that casts by itself: in which dtype products are taken, and how to be without it."""

import importlib.util
import os
from contextlib import AbstractContextManager, nullcontext
from functools import lru_cache

import torch
from torch import Tensor
from torch.amp.autocast_mode import is_autocast_available

SCAN, STRD = "NEUROSTORM_SCAN", "NEUROSTORM_STRD"


def autocast_for(x: Tensor) -> bool:
    """Whether it acts here on what is computed from ``x``; float64 it leaves alone."""
    device = x.device.type
    return is_autocast_available(device) and torch.is_autocast_enabled(device) and x.dtype != torch.float64


def product_dtype(x: Tensor) -> torch.dtype:
    """The dtype in which a linear layer takes ``x`` here."""
    return torch.get_autocast_dtype(x.device.type) if autocast_for(x) else x.dtype


def without_autocast(device: str) -> AbstractContextManager[object]:
    """Autocast off, on devices that know it."""
    return torch.autocast(device, enabled=False) if is_autocast_available(device) else nullcontext()


def on(switch: str) -> bool:
    """Whether the kernel has not been switched off."""
    return os.environ.get(switch) != "torch"


@lru_cache
def triton_may(switch: str) -> bool:
    """Whether the kernel is on and can be written in Triton, which comes with torch's builds for GPUs; asked once."""
    return on(switch) and importlib.util.find_spec("triton") is not None
