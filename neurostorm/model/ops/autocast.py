"""Autocast, for code that casts by itself: in which dtype products are taken, and how to be without it."""

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor
from torch.amp.autocast_mode import is_autocast_available


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
