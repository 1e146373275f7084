import math

import numpy as np
import pytest
import torch
from torch import nn

from neurostorm.model.heads.connectome import (
    BrainNetCNN,
    BrainNetTransformer,
    ClusterReadout,
    EdgeToEdge,
    NodeAttention,
    orthonormal,
)

REGIONS = 10


def small_cnn(**options):
    return BrainNetCNN(REGIONS, 3, edge_channels=(4, 5), node_channels=6, graph_channels=16, hidden=(8, 7), **options)


def small_transformer(regions=REGIONS, **options):
    return BrainNetTransformer(regions, 3, hidden=16, dense=(16, 8), **options)


def symmetric(count, regions=REGIONS, seed=0):
    x = torch.randn(count, regions, regions, generator=torch.Generator().manual_seed(seed))
    return (x + x.mT) / 2


def test_edge_to_edge_is_the_papers_sum_over_the_edges_of_both_nodes():
    torch.manual_seed(0)
    layer, edges = EdgeToEdge(5, 3, 2), torch.randn(2, 3, 5, 5)
    row, column = layer.row.weight[:, :, 0].tolist(), layer.column.weight[..., 0].tolist()  # [n][m][k]
    a, bias, found = edges.tolist(), layer.row.bias.tolist(), layer(edges)
    for b, n, i, j in np.ndindex(2, 2, 5, 5):
        terms = [row[n][m][k] * a[b][m][i][k] + column[n][m][k] * a[b][m][k][j] for m in range(3) for k in range(5)]
        assert found[b, n, i, j].item() == pytest.approx(bias[n] + sum(terms), abs=1e-5)


def test_brainnetcnn_is_its_three_steps_from_edges_to_the_graph():
    torch.manual_seed(0)
    model, x = small_cnn().eval(), symmetric(2)

    def bend(values):
        return torch.where(values > 0, values, values / 3)

    edges = x[:, None]
    for layer in model.edges:
        edges = bend(layer(edges))
    rows = torch.einsum("bmik,nmk->bni", edges, model.nodes.row.weight[:, :, 0])
    columns = torch.einsum("bmki,nmk->bni", edges, model.nodes.column.weight[..., 0])
    nodes = bend(rows + columns + model.nodes.row.bias[:, None])
    graph = bend(torch.einsum("bni,gni->bg", nodes, model.graph.weight[..., 0]) + model.graph.bias)
    for layer in (part for part in model.dense if isinstance(part, nn.Linear)):
        out = layer(graph)
        graph = bend(out)
    torch.testing.assert_close(model(x), out)


def test_brainnetcnn_of_renumbered_regions_is_that_of_renumbered_weights():
    torch.manual_seed(0)
    model, x, order = small_cnn().eval(), symmetric(2), torch.randperm(REGIONS)
    expected = model(x)
    assert not torch.allclose(model(x[:, order][:, :, order]), expected, atol=1e-4)
    with torch.no_grad():
        for layer in (*model.edges, model.nodes):
            layer.row.weight.copy_(layer.row.weight[..., order])
            layer.column.weight.copy_(layer.column.weight[:, :, order])
        model.graph.weight.copy_(model.graph.weight[:, :, order])
    torch.testing.assert_close(model(x[:, order][:, :, order]), expected)


def test_attention_is_torchs_transformer_layer():
    torch.manual_seed(0)
    ours, theirs = NodeAttention(12, 4, 20, 0.1).eval(), nn.TransformerEncoderLayer(12, 4, 20, batch_first=True).eval()
    pairs = {
        ours.qkv: (theirs.self_attn.in_proj_weight, theirs.self_attn.in_proj_bias),
        ours.out: (theirs.self_attn.out_proj.weight, theirs.self_attn.out_proj.bias),
        **{
            mine: (yours.weight, yours.bias)
            for mine, yours in (
                (ours.widen, theirs.linear1),
                (ours.narrow, theirs.linear2),
                (ours.norm1, theirs.norm1),
                (ours.norm2, theirs.norm2),
            )
        },
    }
    with torch.no_grad():
        for mine, (weight, bias) in pairs.items():
            mine.weight.copy_(torch.randn_like(weight))
            mine.bias.copy_(torch.randn_like(bias))
            weight.copy_(mine.weight)
            bias.copy_(mine.bias)
    nodes = torch.randn(3, 7, 12)
    torch.testing.assert_close(ours(nodes), theirs(nodes))


def test_attention_moves_with_the_nodes_and_the_readout_does_not_see_their_order():
    torch.manual_seed(0)
    nodes, order = symmetric(2), torch.randperm(REGIONS)
    layer, model = NodeAttention(REGIONS, 4, 16, 0.1).eval(), small_transformer().eval()
    torch.testing.assert_close(layer(nodes[:, order]), layer(nodes)[:, order])
    torch.testing.assert_close(model.from_nodes(nodes[:, order]), model(nodes))
    # Features have places, so regions that are renumbered in both rows and columns are another input.
    assert not torch.allclose(model(nodes[:, order][:, :, order]), model(nodes), atol=1e-4)


def test_the_readout_sums_nodes_by_their_share_in_each_cluster():
    torch.manual_seed(0)
    readout, nodes = ClusterReadout(6, 3), torch.randn(2, 5, 6)
    found = readout(nodes)
    for b, c in np.ndindex(2, 3):
        expected = torch.zeros(6)
        for node in nodes[b]:
            scores = [math.exp(node @ centre) for centre in readout.centres]
            expected += scores[c] / sum(scores) * node
        torch.testing.assert_close(found[b, c], expected)
    torch.testing.assert_close(found.sum(1), nodes.sum(1))  # each node is given out whole


@pytest.mark.parametrize(("count", "features"), [(1, 1), (3, 7), (40, 40), (25, 100)])
def test_centres_are_orthonormal(count, features):
    torch.manual_seed(count)
    centres = orthonormal(count, features)
    assert centres.shape == (count, features) and centres.dtype == torch.float32
    torch.testing.assert_close(centres @ centres.T, torch.eye(count), atol=1e-6, rtol=0)


def test_centres_are_what_gram_schmidt_makes_of_xaviers_numbers():
    torch.manual_seed(3)
    found = orthonormal(4, 6)
    torch.manual_seed(3)
    start = nn.init.xavier_uniform_(torch.empty(4, 6, dtype=torch.float64))
    done = []
    for vector in start:
        for other in done:
            vector = vector - (vector @ other) * other
        done.append(vector / vector.norm())
    torch.testing.assert_close(found, torch.stack(done).float())


def test_centres_are_kept_with_the_model_and_not_learnt():
    model, again = small_transformer(), small_transformer()
    assert not any("centres" in name for name, _ in model.named_parameters())
    again.load_state_dict(model.state_dict())
    assert torch.equal(again.eval()(symmetric(2)), model.eval()(symmetric(2)))


@pytest.mark.parametrize("make", [small_cnn, small_transformer])
def test_gradients_reach_every_parameter(make):
    torch.manual_seed(0)
    model = make()
    model.eval()(symmetric(8)).pow(2).sum().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().max() > 0, name


@pytest.mark.parametrize("regions", [1, 2, 7, 13])
def test_any_number_of_regions_will_do(regions):
    for model in (small_transformer(regions), BrainNetCNN(regions, 3, graph_channels=8)):
        assert model.eval()(symmetric(4, regions)).shape == (4, 3)


def test_default_sizes():
    cnn, transformer = BrainNetCNN(20, 2), BrainNetTransformer(360, 2)
    assert [tuple(layer.row.weight.shape) for layer in cnn.edges] == [(32, 1, 1, 20), (32, 32, 1, 20)]
    assert cnn.nodes.row.out_channels == 64 and cnn.graph.out_channels == 256
    assert [part.out_features for part in cnn.dense if isinstance(part, nn.Linear)] == [128, 30, 2]
    assert len(transformer.layers) == 2 and transformer.layers[0].widen.out_features == 1024
    assert [part.in_features for part in transformer.dense if isinstance(part, nn.Linear)] == [90 * 8, 256, 32]


@pytest.mark.parametrize("make", [small_cnn, small_transformer])
def test_dropout_is_for_training_alone(make):
    torch.manual_seed(0)
    model, x = make(), symmetric(2)
    assert not torch.equal(model(x), model(x))
    model.eval()
    assert torch.equal(model(x), model(x))


def planted(count, seed):
    """Noise in which one edge tells which of three classes it is."""
    x, label = symmetric(count, seed=seed) * 0.5, torch.arange(count) % 3
    x[:, 2, 7] += 2 * (label - 1.0)
    x[:, 7, 2] += 2 * (label - 1.0)
    return x, label


@pytest.mark.parametrize("make", [small_cnn, small_transformer])
def test_a_planted_edge_is_learnt(make):
    torch.manual_seed(0)
    (x, label), (fresh, truth) = planted(60, seed=0), planted(90, seed=1)
    model = make(dropout=0.0)
    optimiser = torch.optim.Adam(model.parameters(), 3e-3)
    losses = []
    for _ in range(60):
        loss = nn.functional.cross_entropy(model(x), label)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    assert losses[0] > 1 and losses[-1] < losses[0] / 2
    assert (model.eval()(fresh).argmax(1) == truth).float().mean() > 0.6  # chance is a third


@pytest.mark.parametrize("shape", [(REGIONS, REGIONS), (2, REGIONS, REGIONS + 1), (2, 1, REGIONS, REGIONS)])
def test_matrices_of_another_shape_are_refused(shape):
    for model in (small_cnn(), small_transformer()):
        with pytest.raises(ValueError, match=r"takes \(B, 10, 10\)"):
            model(torch.zeros(shape))


def test_more_clusters_than_regions_are_refused():
    with pytest.raises(ValueError, match="clusters = 11: 1 to 10"):
        small_transformer(clusters=11)
