"""Networks on connectivity matrices, the baselines of the field: BrainNetCNN and the Brain Network Transformer.

    (B, R, R) --edge to edge--> (B, C, R, R) --edge to node--> (B, C', R) --node to graph--> (B, C'') --dense--> (B, K)
    (B, R, R) = R nodes of R features --attention among nodes--> (B, R, R) --C cluster means--> (B, C, R) --> (B, K)

Both read any symmetric measure; a region's row of connections is all that they know of it. Written from the papers'
equations. R regions, K outputs.
"""

import math
from collections.abc import Sequence
from itertools import pairwise

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

_LEAK = 1 / 3  # Kawahara et al.: "very leaky" rectifiers


class EdgeToEdge(nn.Module):
    """Each edge from all edges of its two nodes: (B, C, R, R) -> (B, C', R, R).

    out[n, i, j] = bias[n] + sum over m, k of row[n, m, k] A[m, i, k] + column[n, m, k] A[m, k, j]
    (Kawahara et al. 2017). One bias serves both terms.
    """

    def __init__(self, regions: int, channels: int, out_channels: int) -> None:
        super().__init__()
        self.row = nn.Conv2d(channels, out_channels, (1, regions))
        self.column = nn.Conv2d(channels, out_channels, (regions, 1), bias=False)

    def forward(self, edges: Tensor) -> Tensor:
        return self.row(edges) + self.column(edges)  # (B, C', R, 1) + (B, C', 1, R)


class EdgeToNode(nn.Module):
    """Each node from all its edges: (B, C, R, R) -> (B, C', R, 1).

    out[n, i] = bias[n] + sum over m, k of row[n, m, k] A[m, i, k] + column[n, m, k] A[m, k, i]
    (Kawahara et al. 2017). Both terms, for edge-to-edge layers leave no matrix symmetric.
    """

    def __init__(self, regions: int, channels: int, out_channels: int) -> None:
        super().__init__()
        self.row = nn.Conv2d(channels, out_channels, (1, regions))
        self.column = nn.Conv2d(channels, out_channels, (regions, 1), bias=False)

    def forward(self, edges: Tensor) -> Tensor:
        return self.row(edges) + self.column(edges).mT


class BrainNetCNN(nn.Module):
    """Convolutions over the connections of nodes (Kawahara et al. 2017, NeuroImage 146).

    Two edge-to-edge layers, edge to node, node to graph, two dense layers, each with a leak of 1/3, then the outputs;
    dropout behind node-to-graph and the first dense layer. The widths follow the paper's E2Enet.

    Args:
        regions: R.
        outputs: K.
        edge_channels: of the edge-to-edge layers, one each.
        node_channels, graph_channels: of edge-to-node and node-to-graph.
        hidden: widths of the dense layers before the last.
        dropout: probability.
    """

    def __init__(
        self,
        regions: int,
        outputs: int,
        *,
        edge_channels: Sequence[int] = (32, 32),
        node_channels: int = 64,
        graph_channels: int = 256,
        hidden: tuple[int, int] = (128, 30),
        dropout: float = 0.5,
    ) -> None:
        super().__init__()
        self.regions = regions
        widths = (1, *edge_channels)
        self.edges = nn.ModuleList(EdgeToEdge(regions, width, wider) for width, wider in pairwise(widths))
        self.nodes = EdgeToNode(regions, widths[-1], node_channels)
        self.graph = nn.Conv2d(node_channels, graph_channels, (regions, 1))
        self.bend = nn.LeakyReLU(_LEAK)
        self.dense = nn.Sequential(
            nn.Dropout(dropout), nn.Linear(graph_channels, hidden[0]), self.bend,
            nn.Dropout(dropout), nn.Linear(hidden[0], hidden[1]), self.bend,
            nn.Linear(hidden[1], outputs),
        )  # fmt: skip

    def forward(self, matrices: Tensor) -> Tensor:
        """Float32 (B, R, R) -> (B, K). ValueError for another shape."""
        _check(matrices, self.regions)
        x = rearrange(matrices, "b i j -> b 1 i j")
        for layer in self.edges:
            x = self.bend(layer(x))
        x = self.bend(self.nodes(x))  # (B, C', R, 1)
        x = self.bend(self.graph(x))  # (B, C'', 1, 1)
        return self.dense(rearrange(x, "b c 1 1 -> b c"))


class NodeAttention(nn.Module):
    """A transformer layer among nodes, (B, R, F) -> (B, R, F): attention, then a ReLU layer, each added and normalised.

    softmax(q k^T / sqrt(d)) v per head (Kan et al. 2022; Vaswani et al. 2017), which knows no order of the
    nodes. Where the heads do not divide F, as many regions do not, a head is as wide as F / heads rounded up.
    """

    def __init__(self, features: int, heads: int, hidden: int, dropout: float) -> None:
        super().__init__()
        self.heads = heads
        inner = heads * math.ceil(features / heads)
        self.qkv = nn.Linear(features, 3 * inner)
        self.out = nn.Linear(inner, features)
        self.norm1, self.norm2 = nn.LayerNorm(features), nn.LayerNorm(features)
        self.widen, self.narrow = nn.Linear(features, hidden), nn.Linear(hidden, features)
        self.dropout = nn.Dropout(dropout)

    def forward(self, nodes: Tensor) -> Tensor:
        q, k, v = rearrange(self.qkv(nodes), "b r (three h d) -> three b h r d", three=3, h=self.heads)
        dropped = self.dropout.p if self.training else 0.0
        mixed = rearrange(scaled_dot_product_attention(q, k, v, dropout_p=dropped), "b h r d -> b r (h d)")
        nodes = self.norm1(nodes + self.dropout(self.out(mixed)))
        return self.norm2(nodes + self.dropout(self.narrow(self.dropout(torch.relu(self.widen(nodes))))))


class ClusterReadout(nn.Module):
    """Nodes (B, R, F) -> sums over soft clusters (B, C, F): OCRead of Kan et al. 2022.

    p[i, c] = softmax over c of <node i, centre c>;  out[c] = sum over i of p[i, c] node i.
    The centres are orthonormal and are not learnt, as released: so no two clusters become the same.
    """

    centres: Tensor

    def __init__(self, features: int, clusters: int) -> None:
        super().__init__()
        self.register_buffer("centres", orthonormal(clusters, features))

    def forward(self, nodes: Tensor) -> Tensor:
        share = (nodes @ self.centres.mT).softmax(-1)  # (B, R, C)
        return share.mT @ nodes


class BrainNetTransformer(nn.Module):
    """Attention among regions and a readout by clusters (Kan et al. 2022, NeurIPS, "Brain Network Transformer").

    A node's features are its row of connections. What differs from the released code: the nodes go into the readout as
    they are, without dense layers over all of them before it (with these, the order of nodes would matter), and the
    clusters are assigned by the paper's inner product, not by its square.

    Args:
        regions: R.
        outputs: K.
        layers, heads: of the transformer.
        hidden: width of a layer's ReLU; by default in proportion to R, 1024 at 360 as released.
        clusters: C, at most R; a quarter of R by default (released: 100, of 360 regions or 200).
        narrow: numbers that a cluster's sum is brought to before they are laid side by side.
        dense: widths of the last layers before K.
        dropout: probability, in the transformer.
    """

    def __init__(
        self,
        regions: int,
        outputs: int,
        *,
        layers: int = 2,
        heads: int = 4,
        hidden: int | None = None,
        clusters: int | None = None,
        narrow: int = 8,
        dense: tuple[int, int] = (256, 32),
        dropout: float = 0.1,
    ) -> None:
        super().__init__()
        self.regions = regions
        hidden = math.ceil(regions * 1024 / 360) if hidden is None else hidden
        clusters = max(1, regions // 4) if clusters is None else clusters
        self.layers = nn.ModuleList(NodeAttention(regions, heads, hidden, dropout) for _ in range(layers))
        self.readout = ClusterReadout(regions, clusters)
        self.narrow = nn.Sequential(nn.Linear(regions, narrow), nn.LeakyReLU())
        self.dense = nn.Sequential(
            nn.Linear(clusters * narrow, dense[0]), nn.LeakyReLU(),
            nn.Linear(dense[0], dense[1]), nn.LeakyReLU(),
            nn.Linear(dense[1], outputs),
        )  # fmt: skip

    def forward(self, matrices: Tensor) -> Tensor:
        """Float32 (B, R, R) -> (B, K). ValueError for another shape."""
        _check(matrices, self.regions)
        return self.from_nodes(matrices)

    def from_nodes(self, nodes: Tensor) -> Tensor:
        """Rows (B, R', R) of any number of nodes in any order -> (B, K); the order makes no difference."""
        for layer in self.layers:
            nodes = layer(nodes)
        return self.dense(rearrange(self.narrow(self.readout(nodes)), "b c n -> b (c n)"))


def orthonormal(count: int, features: int) -> Tensor:
    """Float32 (count, features): rows of unit length, square to each other, by Gram-Schmidt on Xavier's random numbers.

    ValueError when there are more rows than features.
    """
    if not 1 <= count <= features:
        raise ValueError(f"clusters = {count}: 1 to {features}, as more centres cannot be square to each other")
    start = nn.init.xavier_uniform_(torch.empty(count, features, dtype=torch.float64))
    q, r = torch.linalg.qr(start.mT)  # Gram-Schmidt up to the signs, and without its loss of digits
    return (q * r.diagonal().sign()).mT.float().contiguous()


def _check(matrices: Tensor, regions: int) -> None:
    if matrices.ndim != 3 or matrices.shape[1:] != (regions, regions):
        raise ValueError(f"matrices of shape {tuple(matrices.shape)}: this network takes (B, {regions}, {regions})")
