"""What a checkpoint of DeepSpeed's holds, parameter by parameter, whatever ZeRO stage and number of ranks saved it.

    stage 0     mp_rank_00_model_states.pt                    weights and optimizer state whole
    stages 1-2  mp_rank_00_model_states.pt                    weights whole
                zero_pp_rank_R_mp_rank_00_optim_states.pt     rank R's slice of each flat group, with names and places
    stage 3     zero_pp_rank_R_mp_rank_00_model_states.pt     shapes, slices of frozen parameters
                zero_pp_rank_R_mp_rank_00_optim_states.pt     rank R's slice of every parameter

Files are mapped, not read: only the tensors that are asked for come into memory. Nothing but tensors and plain values
is unpickled, if the caller holds `tensors_only`.
"""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

MOMENTS = ("exp_avg", "exp_avg_sq")
WEIGHT = "weight"
_RANK = re.compile(r"zero_pp_rank_(\d+)_")


@dataclass
class SavedParameter:
    """Slices of a parameter and of its moments, in order; of a frozen one the weight alone.

    Attributes:
        slices: "weight", "exp_avg" or "exp_avg_sq" -> fp32 tensors that follow one another when flattened.
        step: optimizer steps done, 0 when it has no moments.
    """

    slices: dict[str, list[Tensor]] = field(default_factory=dict)
    step: float = 0.0

    def add(self, weight: Tensor, moments: dict[str, Any]) -> None:
        """Appends a slice of the weight, and of the moments if there are any."""
        self.slices.setdefault(WEIGHT, []).append(weight)
        for key in MOMENTS:
            if key in moments:
                self.slices.setdefault(key, []).append(moments[key])
        self.step = max(self.step, float(moments.get("step", 0)))

    def whole(self, key: str, shape: torch.Size) -> Tensor:
        """The tensor of `key` in `shape`, fp32; zeros for moments that were not saved.

        Raises:
            RuntimeError: the slices do not make up that shape.
        """
        if key not in self.slices and key != WEIGHT:
            return torch.zeros(shape)
        flat = torch.cat([part.reshape(-1) for part in self.slices.get(key, [])] or [torch.zeros(0)])
        if flat.numel() != shape.numel():
            raise RuntimeError(f"{flat.numel()} numbers of {key} were saved, the model has {shape.numel()}")
        return flat.float().view(shape)


@dataclass(frozen=True)
class SavedState:
    """A checkpoint's parameters and buffers by name, and DeepSpeed's counts of steps.

    Attributes:
        parameters: by name, frozen ones too.
        buffers: whole tensors by name.
        counts: `global_steps`, `skipped_steps`, `global_samples`.
    """

    parameters: dict[str, SavedParameter]
    buffers: dict[str, Tensor]
    counts: dict[str, int]


def read_state(folder: Path, trained: Sequence[str]) -> SavedState:
    """Read the folder `state` of a checkpoint, with the files of all ranks.

    Args:
        folder: where DeepSpeed saved.
        trained: names of the model's trained parameters, in the optimizer's order; files of stage 0 have no names.

    Raises:
        RuntimeError: files of a rank are missing, or the checkpoint is of another model.
    """
    models, optimizers = _by_rank(folder, "model_states"), _by_rank(folder, "optim_states")
    if not models or (optimizers and len(optimizers) != int(models[0]["dp_world_size"])):
        raise RuntimeError(f"{folder}: files of some ranks are missing")
    first = models[0]
    if not optimizers:
        found = _of_stage_0(first, trained)
    elif "fp32_flat_groups" in optimizers[0]["optimizer_state_dict"]:
        found = _of_stage_3(models, optimizers)
    else:
        found = _of_stages_1_and_2(optimizers)
    module, buffers = first["module"], first["buffer_names"]
    for name in module.keys() - found.keys() - set(buffers):
        found[name] = SavedParameter()
        found[name].add(module[name], {})
    counts = {name: int(first[name]) for name in ("global_steps", "skipped_steps", "global_samples")}
    return SavedState(found, {name: module[name] for name in buffers}, counts)


def _by_rank(folder: Path, kind: str) -> list[dict[str, Any]]:
    """The content of every rank's file of that kind, in order of ranks."""
    files = folder.glob(f"*{kind}.pt")
    return [torch.load(file, map_location="cpu", weights_only=True, mmap=True) for file in sorted(files, key=_rank)]


def _rank(file: Path) -> int:
    match = _RANK.search(file.name)
    return int(match[1]) if match else 0


def _of_stage_0(content: dict[str, Any], trained: Sequence[str]) -> dict[str, SavedParameter]:
    """A parameter that never had a gradient has no optimizer state."""
    groups, states = content["optimizer"]["param_groups"], content["optimizer"]["state"]
    numbers = [number for group in groups for number in group["params"]]
    if len(numbers) != len(trained):
        raise RuntimeError(f"{len(numbers)} parameters were trained, the model has {len(trained)}")
    found: dict[str, SavedParameter] = {}
    for name, number in zip(trained, numbers, strict=True):
        found.setdefault(name, SavedParameter()).add(content["module"][name], states.get(number, {}))
    return found


def _of_stages_1_and_2(optimizers: Sequence[dict[str, Any]]) -> dict[str, SavedParameter]:
    """A rank has one piece of each flat group; a parameter may lie in the pieces of several ranks."""
    found: dict[str, SavedParameter] = {}
    for content in optimizers:
        saved = content["optimizer_state_dict"]
        states, flats = saved["base_optimizer_state"]["state"], saved["single_partition_of_fp32_groups"]
        for group, places in enumerate(saved["param_slice_mappings"]):
            for name, place in places.items():
                cut = slice(place.start, place.start + place.numel)
                found.setdefault(name, SavedParameter()).add(*_cut(flats[group], states.get(group, {}), cut))
    return found


def _of_stage_3(models: Sequence[dict[str, Any]], optimizers: Sequence[dict[str, Any]]) -> dict[str, SavedParameter]:
    """Every parameter is cut into as many slices of one length as there are ranks; the last ones are padded."""
    found: dict[str, SavedParameter] = {}
    ranks = len(optimizers)
    for rank, (model, content) in enumerate(zip(models, optimizers, strict=True)):
        saved = content["optimizer_state_dict"]
        states, flats = saved["optimizer_state_dict"]["state"], saved["fp32_flat_groups"]
        for group, shapes in enumerate(model["param_shapes"]):
            for name, start, kept in _slices(shapes, rank, ranks):
                cut = slice(start, start + kept)
                found.setdefault(name, SavedParameter()).add(*_cut(flats[group], states.get(group, {}), cut))
        for name, shape in (model.get("frozen_param_shapes") or {}).items():
            _, kept = slice_of(shape.numel(), rank, ranks)
            part = model["frozen_param_fragments"][name].reshape(-1)[:kept]
            found.setdefault(name, SavedParameter()).add(part, {})
    return found


def _slices(shapes: dict[str, torch.Size], rank: int, ranks: int) -> Iterator[tuple[str, int, int]]:
    """Name, place in the rank's flat group and length without padding of each parameter's slice."""
    start = 0
    for name, shape in shapes.items():
        length, kept = slice_of(shape.numel(), rank, ranks)
        yield name, start, kept
        start += length


def slice_of(numel: int, rank: int, ranks: int) -> tuple[int, int]:
    """How long a slice of a parameter is at stage 3, and how much of it is no padding on `rank`."""
    length = -(-numel // ranks)
    return length, max(0, min(length, numel - rank * length))


def _cut(flat: Tensor, state: dict[str, Any], cut: slice) -> tuple[Tensor, dict[str, Any]]:
    """A piece of a flat group and of its moments."""
    return flat[cut], {key: value[cut] if key in MOMENTS else value for key, value in state.items()}
