"""Checkpoints are read without running what is in them, whatever DeepSpeed asks of `torch.load`.

    with tensors_only(): DeepSpeed loads  -->  tensors, plain values, three classes of DeepSpeed's; else UnpicklingError

A pickle may name any function and have it called. DeepSpeed asks torch for all that a file holds, so a checkpoint
from elsewhere, or a folder that others may write, could run code as whoever resumes from it. torch takes the stricter
way from the environment, over what the caller says.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch

_FORCE, _ALLOW = "TORCH_FORCE_WEIGHTS_ONLY_LOAD", "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"


@contextmanager
def tensors_only() -> Iterator[None]:
    """Every `torch.load` of this process refuses what is neither a tensor, a plain value, nor DeepSpeed's own record.

    pickle.UnpicklingError comes from the load that meets anything else; nothing of that file has been executed then.
    """
    from deepspeed.runtime.fp16.loss_scaler import LossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum
    from deepspeed.utils.tensor_fragment import fragment_address

    # Records without code of their own: a number, an enumeration, a place in a flat tensor. ZeRO 1 to 3 write them.
    records = [LossScaler, ZeroStageEnum, fragment_address]
    before = {name: os.environ.pop(name, None) for name in (_FORCE, _ALLOW)}
    os.environ[_FORCE] = "1"
    try:
        with torch.serialization.safe_globals(records):
            yield
    finally:
        for name, value in before.items():
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value
