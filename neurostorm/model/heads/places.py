"""A head that keeps places apart: each place by itself, or which of them go together, and not their mean alone.

    tokens (B, P' T, C') --mean over frames--> each place (B, P', C') --forward--> features (B, F)
        mean        mean over places                                F = C'
        places      one place after the other                       F = P' C'
        coupling    K signals, linear in the places, and the        F = K + K (K + 1) / 2
        covariance  products of all pairs of them
    features --mean over the clips of a unit--> (U, F) --conclude--> outputs (U, O)
        coupling    Fisher's z of the signals' correlation over these clips -->  .
        covariance  their covariance over these clips                        --> (x - shift) / scale --> linear
        others      as they are                                              -->

A masked autoencoder's tokens follow the signal, and a z-scored signal averages to nothing over a run: at rest people
differ in which places vary together, which no single clip can tell. So clips are pooled before the head concludes.
"""

from typing import Literal

import torch
from einops import rearrange, reduce
from torch import Tensor, nn

from neurostorm.model.heads.pooled import as_tokens

Pool = Literal["mean", "places", "coupling", "covariance"]
_CLOSE = 1 - 1e-6  # arctanh of 1 is infinite
_NO_VARIANCE = 1e-5  # of the second moment: below it is float32 rounding


class PlaceHead(nn.Module):
    """See the module. New, it gives zeros: it is made to `start` from a probe, and to learn from there.

    Args:
        width: C'.
        outputs: O.
        places: P', tokens of one frame; they come in raster order, the frame fastest.
        pool: which features.
        signals: K; "coupling" and "covariance" only, which need it.
    """

    centre: Tensor
    shift: Tensor
    scale: Tensor

    def __init__(self, width: int, outputs: int, places: int, pool: Pool, signals: int = 0) -> None:
        super().__init__()
        if pool in ("coupling", "covariance") and signals < 1:
            raise ValueError(f"signals = {signals}: pool = {pool!r} takes at least one")
        self.width, self.places, self.pool = width, places, pool
        pairs = {"coupling": signals * (signals - 1) // 2, "covariance": signals * (signals + 1) // 2}
        size = {"mean": width, "places": places * width, **pairs}[pool]
        self.directions = nn.Parameter(torch.zeros(signals, places * width)) if pool in pairs else None
        self.register_buffer("centre", torch.zeros(places * width))
        self.register_buffer("shift", torch.zeros(size))
        self.register_buffer("scale", torch.ones(size))
        self.linear = nn.Linear(size, outputs)
        nn.init.zeros_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Tokens (B, P' T, C') of any number of frames T -> features (B, F), to be averaged over a unit's clips."""
        x = as_tokens(x)
        if x.shape[1] % self.places or x.shape[2] != self.width:
            raise ValueError(f"tokens of shape {tuple(x.shape)}: {self.places} places of width {self.width} are needed")
        if self.pool == "mean":
            return x.mean(1)
        flat = rearrange(reduce(x, "b (p t) c -> b p c", "mean", p=self.places), "b p c -> b (p c)")
        if self.directions is None:
            return flat
        signals = (flat - self.centre) @ self.directions.T  # (B, K)
        one, other = self._pairs(signals.device)
        return torch.cat([signals, signals[:, one] * signals[:, other]], 1)

    def conclude(self, features: Tensor) -> Tensor:
        """Features (U, F), each the mean over the clips of a unit -> outputs (U, O)."""
        return self.linear((self._vector(features) - self.shift) / self.scale)

    def _vector(self, features: Tensor) -> Tensor:
        if self.directions is None:
            return features
        mean, moments = features.split([len(self.directions), features.shape[1] - len(self.directions)], 1)
        one, other = self._pairs(features.device)
        covariance = moments - mean[:, one] * mean[:, other]
        if self.pool == "covariance":
            return covariance
        same, moment = one == other, moments[:, one == other]
        variance = covariance[:, same]
        varies = variance > _NO_VARIANCE * moment
        inverse = torch.where(varies, torch.where(varies, variance, 1).rsqrt(), 0)  # 0: a correlation of nothing
        correlation = covariance * inverse[:, one] * inverse[:, other]
        return torch.atanh(correlation[:, ~same].clamp(-_CLOSE, _CLOSE))

    def _pairs(self, device: torch.device) -> tuple[Tensor, Tensor]:
        assert self.directions is not None
        one, other = torch.triu_indices(len(self.directions), len(self.directions), device=device)
        return one, other

    @torch.no_grad()
    def start(
        self, shift: Tensor, scale: Tensor, weight: Tensor, bias: Tensor, centre: Tensor | None = None,
        directions: Tensor | None = None,
    ) -> None:  # fmt: skip
        """Take a map fitted elsewhere to the same vectors.

        Args:
            shift, scale: (D), as many as the vector that is concluded from has numbers.
            weight, bias: (O, D), (O).
            centre, directions: (P' C') and (K, P' C'), of "coupling" and "covariance".

        Raises:
            ValueError: a shape is another than the head's.
        """
        pairs = [(self.shift, shift), (self.scale, scale), (self.linear.weight, weight), (self.linear.bias, bias)]
        if self.directions is not None:
            if centre is None or directions is None:
                raise ValueError(f"pool = {self.pool!r}: centre and directions belong to the map")
            pairs += [(self.centre, centre), (self.directions, directions)]
        for own, given in pairs:
            if own.shape != given.shape:
                raise ValueError(f"a map of shape {tuple(given.shape)}: this head takes {tuple(own.shape)}")
        for own, given in pairs:
            own.copy_(given)
