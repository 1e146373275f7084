"""From encoded tokens to predicted patches: one module for each decoder, found by name in DECODERS.

A new decoder is a class like `Decoder` in a module of its own, its line here, and its name among the values of
`model.decoder` in the configuration.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

from neurostorm.model.decoders.light import Light
from neurostorm.model.decoders.paper import Paper

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from neurostorm.model.autoencoder import MaeOutput, MaskedAutoencoder
    from neurostorm.model.config import SwinConfig
    from neurostorm.model.cost import Count
    from neurostorm.model.geometry.tokens import Geometry


class Decoder(Protocol):
    """What an autoencoder asks of its decoder, which keeps its parameters in the autoencoder, under their own names.

    Attributes:
        name: key in `DECODERS`.
        visible_alone: the encoder sees visible tokens alone; masks are then drawn on the CPU, where they are counted.
    """

    name: str
    visible_alone: bool

    def check(self, swin: SwinConfig, predicted: float) -> None:
        """ValueError for a shape, or a share of predicted tokens, that it does not go with."""

    def attach(self, model: MaskedAutoencoder, depth: int) -> None:
        """Adds its modules and parameters to the model, initialized; `depth` is `model.decoder_depth`."""

    def reconstruct(
        self,
        model: MaskedAutoencoder,
        patches: Tensor,
        mask: Tensor,
        generator: torch.Generator | None,
        inside: Tensor | None,
        centre: Tensor | None,
    ) -> MaeOutput:
        """Encodes, predicts and scores; arguments as those of `MaskedAutoencoder.forward_patches`, `mask` bool."""

    def count(self, count: Count, model: MaskedAutoencoder, geometry: Geometry, hidden: int) -> None:
        """Adds the decoder's operations for one clip, of which so many tokens are hidden; see `cost.py`."""


DECODERS: dict[str, Decoder] = {decoder.name: decoder for decoder in (Paper(), Light())}
