"""The networks that methods train by gradient, and how a head on clips starts from a probe.

tokens    attention pool -> head                             attention
clips     encoder -> place head, started from a linear probe tpt, full, swift
matrices  BrainNetCNN | Brain Network Transformer            brainnetcnn, bnt
"""

from collections import OrderedDict

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.functional import normalize

from neurostorm.downstream.methods.objective import Objective
from neurostorm.downstream.methods.simple import Affine
from neurostorm.downstream.methods.vectors import Signals, signal_count
from neurostorm.model.encoder import SwinEncoder
from neurostorm.model.heads.adapt import AttentionPool
from neurostorm.model.heads.connectome import BrainNetCNN, BrainNetTransformer
from neurostorm.model.heads.places import PlaceHead, Pool


def attention_network(encoder: SwinEncoder, objective: Objective) -> nn.Module:
    """An attention pool and a head on frozen tokens of this encoder."""
    shape = encoder.config
    width = shape.width(shape.stages - 1)
    return nn.Sequential(OrderedDict(pool=AttentionPool(width, shape.heads[-1]), head=objective.head(width)))


def connectome_network(name: str, regions: int, objective: Objective) -> nn.Module:
    """ "brainnetcnn" or "bnt" on matrices of so many regions."""
    build = BrainNetCNN if name == "brainnetcnn" else BrainNetTransformer
    network: nn.Module = build(regions, objective.outputs)
    return nn.Sequential(network, _Unit()) if objective.kind == "identification" else network


def place_head(encoder: SwinEncoder, objective: Objective, pool: Pool, directions: int, clips: int) -> PlaceHead:
    """A new head on this encoder's tokens; `pool` is a value of adapt.pool but "auto", `clips` those it starts from."""
    shape = encoder.config
    width = shape.width(shape.stages - 1)
    places = len(encoder.geometry(shape.frames).levels[-1].order) // shape.frames
    signals = signal_count(pool, directions, clips, (places, width))
    return PlaceHead(width, objective.outputs, places, pool, signals)


def start_head(head: PlaceHead, found: Affine, signals: Signals | None) -> None:
    """Make the head compute what a linear probe of its features computes."""
    device = head.shift.device

    def tensor(values: NDArray) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(values)).to(device, torch.float32)

    learnt = {} if signals is None else {
        "centre": tensor(signals.centre), "directions": tensor(signals.directions)
    }  # fmt: skip
    head.start(tensor(found.shift), tensor(found.scale), tensor(found.weights.T), tensor(found.bias), **learnt)


class _Unit(nn.Module):
    """Vectors at unit length, as an identification's loss takes them."""

    def forward(self, x: Tensor) -> Tensor:
        return normalize(x, dim=1)
