"""Clips seen a little turned, stretched and noisy, straight from the packed bytes: `ClipUnpacker` with a view.

    frames int8 (B, L, V) + one linear map per clip --eight neighbours of each place, weighted--> (B, L, N)
        --/16, scale, shift; noise in some clips--> float32 patches (B, P, K)

No dense volume is made: N counts the voxels of the patches that are tokens, and only those are worked out. The result
is that of unpacking a volume, `augment.resample` and cutting it into patches. What is drawn for a clip follows from its
generator; the noise itself comes from the global one.
"""

from collections.abc import Sequence

import torch
from einops import rearrange
from torch import Tensor, nn

from neurostorm.data.augment import View
from neurostorm.data.clips import ClipBatch
from neurostorm.data.unpack import ClipUnpacker, Patches

_MEASURED = 1 - 1e-3  # weight of measured voxels from which a place counts as measured


class ViewUnpacker(nn.Module):
    """Turns a ClipBatch and its views into Patches.

    Args:
        unpack: of the same clips as they are.
        brain: bool (X, Y, Z) with V true voxels; two along each axis at least.
        patch: voxels per patch along X, Y, Z (further entries are ignored).
    """

    places: Tensor
    number: Tensor
    space: Tensor
    row: Tensor
    brain: Tensor

    def __init__(self, unpack: ClipUnpacker, brain: Tensor, patch: Sequence[int]) -> None:
        super().__init__()
        self.steps = unpack.steps
        self.voxels, self.shape, self.patches = int(brain.sum()), tuple(brain.shape), len(unpack.table)
        number = torch.where(brain.flatten(), brain.flatten().cumsum(0) - 1, self.voxels)
        space = torch.unique(unpack.space)  # sorted: the patches that are tokens
        axes = torch.meshgrid(*(torch.arange(n, dtype=torch.float32) for n in brain.shape), indexing="ij")
        cut = "(x p) (y q) (z r) -> (x y z) (p q r)"
        places = [rearrange(axis, cut, p=patch[0], q=patch[1], r=patch[2]) for axis in axes]
        tables = {
            "places": torch.stack(places)[:, space.cpu()].flatten(1),  # (3, N), where each voxel of these patches is
            "number": number,  # long (X Y Z,), of each voxel among the V, V for one outside
            "space": space,
            "row": unpack.time * len(space) + torch.searchsorted(space, unpack.space),  # of each token in (L, S')
            "brain": unpack.table[space] < self.voxels,  # (S', K)
        }
        for name, table in tables.items():
            self.register_buffer(name, table.to(unpack.table.device), persistent=False)

    def forward(self, batch: ClipBatch, views: Sequence[View]) -> Patches:
        """Patches of each clip through its view."""
        device = self.number.device
        batch = batch.to(device)
        affine = torch.stack([view.affine for view in views]).to(device, non_blocking=True)
        noise_std = torch.tensor([view.noise_std for view in views]).to(device, non_blocking=True)
        frames = nn.functional.pad(batch.frames, (0, 1))  # (B, L, V + 1): the last stands for "outside"
        seen = (frames != 0).any(1).float()
        scale, centres = None, None  # (B, V + 1)
        if batch.scale is not None and batch.shift is not None and batch.fill is not None:
            scale = nn.functional.pad(batch.scale, (0, 1))
            centres = torch.cat([batch.shift, batch.fill[:, None]], 1)
        values = frames.new_zeros(*frames.shape[:2], self.brain.numel(), dtype=torch.float32)
        measured, centre = torch.zeros_like(values[:, 0]), torch.zeros_like(values[:, 0])
        for voxel, weight in self._neighbours(affine):
            measured.addcmul_(weight, seen.gather(1, voxel))
            if centres is not None:
                centre.addcmul_(weight, centres.gather(1, voxel))
            if scale is not None:
                weight = weight * scale.gather(1, voxel)
            values.addcmul_(frames.gather(2, voxel[:, None].expand_as(values)), (weight / self.steps)[:, None])
        if centres is not None:
            values += centre[:, None]
        inside = (measured > _MEASURED).view(len(views), *self.brain.shape) & self.brain
        values.addcmul_(torch.randn_like(values), noise_std[:, None, None] * self.brain.flatten())
        return Patches(
            self._tokens(values),
            None if centres is None else self._tokens(centre[:, None].expand_as(values)),
            inside.new_zeros(len(views), self.patches, inside.shape[2]).index_copy_(1, self.space, inside),
        )

    def _neighbours(self, affine: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Of the eight voxels round each place: packed number, long (B, N), and weight (B, N). As `resample` has it."""
        sizes = torch.tensor(self.shape, dtype=torch.float32)[:, None].to(affine.device, non_blocking=True)
        middle = (sizes - 1) / 2
        x, y, z = self.places - middle  # written out, as a GPU may multiply matrices in TF32
        where = affine[..., :1] * x + affine[..., 1:2] * y + affine[..., 2:] * z + middle  # (B, 3, N)
        where = torch.minimum(where.clamp(min=0.0), sizes - 1)
        low = torch.minimum(where.floor(), sizes - 2)
        share = where - low
        found = []
        for corner in range(8):
            step = [corner >> 2 & 1, corner >> 1 & 1, corner & 1]
            x, y, z = (low[:, axis].long() + step[axis] for axis in range(3))
            parts = [share[:, axis] if step[axis] else 1 - share[:, axis] for axis in range(3)]
            voxel = self.number[(x * self.shape[1] + y) * self.shape[2] + z]
            found.append((voxel, parts[0] * parts[1] * parts[2]))
        return found

    def _tokens(self, values: Tensor) -> Tensor:
        """(B, L, N) -> (B, P, K)."""
        return rearrange(values, "b l (s k) -> b (l s) k", k=self.brain.shape[1]).index_select(1, self.row)
