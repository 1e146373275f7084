"""Writes a checkpoint's parameters and moments into an engine of any ZeRO stage and number of ranks.

    SavedState --write_state--> stage 0: optimizer state per parameter
                                stages 1-2: this rank's piece of each flat group
                                stage 3: this rank's slice of every parameter

The optimizer's groups keep the settings that the engine was made with: learning rate, weight decay and betas.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from neurostorm.train.checkpoint.saved_state import MOMENTS, WEIGHT, SavedParameter, SavedState, slice_of


def write_state(engine: Any, stage: int, saved: SavedState) -> None:
    """Restore `saved` in a DeepSpeed engine of ZeRO stage `stage`; a collective call.

    Raises:
        RuntimeError: the checkpoint's parameters are not the model's.
    """
    names = dict(engine.module.named_parameters())
    if names.keys() != saved.parameters.keys():
        other = sorted(names.keys() ^ saved.parameters.keys())
        raise RuntimeError(f"the checkpoint is of another model: {', '.join(other[:5])} are in one of them alone")
    by_parameter = {parameter: saved.parameters[name] for name, parameter in names.items()}
    for name, buffer in engine.module.named_buffers():
        if name in saved.buffers:
            buffer.data.copy_(saved.buffers[name])
    if stage == 0:
        _write_whole(engine.optimizer, by_parameter)
    elif stage == 3:
        _write_slices(engine.optimizer, by_parameter)
    else:
        _write_pieces(engine.optimizer, by_parameter)
    for name, count in saved.counts.items():
        setattr(engine, name, count)


def _write_whole(optimizer: torch.optim.Optimizer, saved: dict[nn.Parameter, SavedParameter]) -> None:
    for parameter, source in saved.items():
        parameter.data.copy_(source.whole(WEIGHT, parameter.shape))
        if parameter.requires_grad and source.step:
            state = _state(optimizer, parameter, source.step)
            for key in MOMENTS:
                state[key].copy_(source.whole(key, parameter.shape))


def _write_pieces(optimizer: Any, saved: dict[nn.Parameter, SavedParameter]) -> None:
    """Weights are whole at stages 1 and 2; the fp32 copies that the optimizer steps, and the moments, are pieces."""
    for parameter, source in saved.items():
        parameter.data.copy_(source.whole(WEIGHT, parameter.shape))
    for flat, group in zip(optimizer.single_partition_of_fp32_groups, optimizer.bit16_groups, strict=True):
        state = _state(optimizer.optimizer, flat, max(saved[parameter].step for parameter in group))
        for parameter in group:
            place = parameter._hp_mapping  # None where no part of it lies in this rank's piece
            if place is None:
                continue
            within, there = place.lp_fragment_address, place.hp_fragment_address
            for key, target in ((WEIGHT, flat.data), *((key, state[key]) for key in MOMENTS)):
                part = saved[parameter].whole(key, parameter.shape).view(-1).narrow(0, within.start, within.numel)
                target.narrow(0, there.start, there.numel).copy_(part)


def _write_slices(optimizer: Any, saved: dict[nn.Parameter, SavedParameter]) -> None:
    """The calls before and after are those of DeepSpeed's own loading: every parameter is sliced meanwhile."""
    import deepspeed

    optimizer.checkpoint_event_prologue()
    rank, ranks = dist.get_rank(), dist.get_world_size()
    for number, group in enumerate(optimizer.fp16_groups):
        flat, start = optimizer.fp32_partitioned_groups_flat[number], 0
        state = _state(optimizer.optimizer, flat, max(saved[parameter].step for parameter in group))
        for parameter in group:
            length, kept = slice_of(parameter.ds_numel, rank, ranks)
            for key, target in ((WEIGHT, flat.data), *((key, state[key]) for key in MOMENTS)):
                part = saved[parameter].whole(key, parameter.ds_shape).view(-1)[rank * length :][:kept]
                target.narrow(0, start, kept).copy_(part)
            start += length
        sliced = optimizer.fp16_partitioned_groups_flat[number]
        sliced.data.copy_(flat.data)
        targets = optimizer.fp16_partitioned_groups[number]
        for target, part in zip(targets, optimizer.unflatten(sliced, targets), strict=True):
            target.data = part.data
    if optimizer.persistent_parameters:
        optimizer.persistent_parameters[0].partition(optimizer.persistent_parameters)
    optimizer.checkpoint_event_epilogue()
    for parameter, source in saved.items():
        if not parameter.requires_grad:
            with deepspeed.zero.GatheredParameters([parameter], modifier_rank=0):
                if rank == 0:
                    parameter.data.copy_(source.whole(WEIGHT, parameter.shape))


def _state(optimizer: torch.optim.Optimizer, parameter: Tensor, step: float) -> dict[str, Tensor]:
    """The optimizer's state of `parameter`, as AdamW with fused=True keeps it, after `step` steps; moments are zero."""
    state: dict[str, Tensor] = optimizer.state[parameter]
    state["step"] = torch.tensor(step, dtype=torch.float32, device=parameter.device)
    for key in MOMENTS:  # DeepSpeed may hold views of what is there
        state[key] = state[key].zero_() if key in state else torch.zeros_like(parameter.data)
    return state
