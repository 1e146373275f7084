"""Packed int8 clips to float patches, on the device that trains: one gather and one multiply-add.

    frames int8 (B, L, V) --gather--> int8 (B, P, K) --/steps, scale, shift--> float32 (B, P, K)

P counts tokens in the model's packed order, K the voxels of a patch. int8 crosses the bus; nothing is ever unpacked to
a dense volume on the CPU.
"""

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

from neurostorm.data.clips import ClipBatch
from neurostorm.model.geometry.tokens import Geometry, patch_table
from neurostorm.store import INT8_16, FrameStore


@dataclass(frozen=True)
class Patches:
    """What the model takes; B clips, P tokens, K voxels per patch, S patches of one frame.

    values  float32 (B, P, K), token order of the model's geometry
    centre  float32 (B, P, K) or None: each voxel's own mean in the same units (None means zero: voxel z)
    inside  bool (B, S, K): the voxel is in the brain mask and in this run's field of view
    """

    values: torch.Tensor
    centre: torch.Tensor | None
    inside: torch.Tensor


class ClipUnpacker(nn.Module):
    """Turns a ClipBatch on any device into Patches.

    patch_table  int64 (S, K): index of each patch voxel among the V packed mask voxels, V for voxels outside the mask
    token_space  int64 (P,): patch index of each token; token_time int64 (P,): its frame
    voxels       V
    steps        steps of a stored byte to one standard deviation: the scale of the store's codec
    """

    def __init__(
        self,
        patch_table: torch.Tensor,
        token_space: torch.Tensor,
        token_time: torch.Tensor,
        voxels: int,
        steps: int = INT8_16.scale,
    ) -> None:
        super().__init__()
        self.steps = float(steps)
        self.table: torch.Tensor
        self.index: torch.Tensor
        self.space: torch.Tensor
        self.time: torch.Tensor
        self.register_buffer("table", patch_table, persistent=False)
        self.register_buffer("space", token_space, persistent=False)
        self.register_buffer("time", token_time, persistent=False)
        index = token_time[:, None] * (voxels + 1) + patch_table[token_space]  # the column V stands for "outside"
        # Half the bytes of an int64 index, which are most of what the gather reads; a clip has fewer values than 2^31.
        self.register_buffer("index", index.to(torch.int32), persistent=False)

    def forward(self, batch: ClipBatch) -> Patches:
        """Patches of `batch`, wherever it lies, on this module's device."""
        batch = batch.to(self.table.device)
        frames = nn.functional.pad(batch.frames, (0, 1))  # (B, L, V + 1)
        stored = frames.new_empty((len(frames), *self.index.shape))  # (B, P, K)
        for clip, patches in zip(frames.flatten(1), stored.flatten(1), strict=True):  # 1-D gathers are the fast ones
            torch.index_select(clip, 0, self.index.flatten(), out=patches)
        values = stored.float().div_(self.steps)
        # Over several frames a voxel stays zero only outside the run's field of view (or, by simulation, 2 of a million
        # live voxels over 8 frames: those drop out of the loss).
        seen = functools.reduce(torch.bitwise_or, frames.unbind(dim=1))  # (B, V + 1)
        inside = (seen != 0)[:, self.table]  # (B, S, K)
        if batch.scale is None or batch.shift is None or batch.fill is None:
            return Patches(values, None, inside)
        voxels = self.table[self.space]  # (P, K)
        scale = nn.functional.pad(batch.scale, (0, 1))[:, voxels]
        centre = torch.cat([batch.shift, batch.fill[:, None]], dim=1)[:, voxels]
        return Patches(torch.addcmul(centre, values, scale), centre, inside)


def unpacker_for(
    store: FrameStore, geometry: Geometry, patch: Sequence[int], device: torch.device | str = "cpu"
) -> ClipUnpacker:
    """What turns packed clips of `store` into a model's patches, on `device`.

    Args:
        store: whose mask and codec tell what the bytes are.
        geometry: the model's, for clips of one length.
        patch: voxels x voxels x voxels x frames of a token.
        device: where it works.
    """
    finest = geometry.levels[0]
    table = patch_table(torch.from_numpy(store.mask), patch)
    unpacker = ClipUnpacker(table, finest.space_of_token, finest.time_of_token, store.voxel_count, store.codec.scale)
    return unpacker.to(device)
