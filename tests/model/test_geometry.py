import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import pad

from neurostorm.model.geometry import (
    Geometry,
    dense_geometry,
    effective_window,
    join_windows,
    patch_table,
    raster_coords,
    split_windows,
)

CPU = torch.device("cpu")
axes = st.tuples(st.integers(1, 7), st.integers(1, 5), st.integers(1, 5), st.integers(1, 7))
windows = st.tuples(*[st.integers(1, 4)] * 4)


def level_of(grid, window):
    return dense_geometry(grid, (window,), CPU).levels[0]


def released_windows(grid, window, shifted):
    """Groups of cells that attend to each other in the released code: pad, roll, partition, mask of region numbers."""
    size = [min(g, w) for g, w in zip(grid, window, strict=True)]
    shift = [w // 2 if shifted and g > w else 0 for g, w in zip(grid, window, strict=True)]
    padded = [-(-g // w) * w for g, w in zip(grid, size, strict=True)]
    cells = np.arange(np.prod(padded)).reshape(padded)
    region = np.zeros(padded, int)
    for axis, (length, w, s) in enumerate(zip(padded, size, shift, strict=True)):
        number = np.zeros(length, int)
        if s:
            number[length - w : length - s], number[length - s :] = 1, 2
        region = region * 3 + number.reshape([-1 if a == axis else 1 for a in range(4)])
    rolled = np.roll(cells, [-s for s in shift], (0, 1, 2, 3))
    groups = []
    for corner in itertools.product(*[range(0, p, w) for p, w in zip(padded, size, strict=True)]):
        box = tuple(slice(c, c + w) for c, w in zip(corner, size, strict=True))
        for number in np.unique(region[box]):
            members = np.stack(np.unravel_index(rolled[box][region[box] == number], padded), -1)
            if (members < grid).all(1).any():
                groups.append(tuple(map(tuple, members.tolist())))
    return groups


@settings(deadline=None, max_examples=60)
@given(axes, windows, st.booleans())
def test_windows_are_the_groups_that_attend_to_each_other_in_the_released_code(grid, window, shifted):
    level = level_of(grid, window)
    table = level.windows(window, shifted)
    ours = []
    for bucket in table.buckets:
        ours += [tuple(map(tuple, cells)) for cells in bucket.cells.tolist()]
        index = bucket.index.numpy()
        assert np.array_equal(bucket.cells[index < len(level)], level.coords[index[index < len(level)]])
        assert np.array_equal(index < len(level), (bucket.cells < np.array(grid)).all(-1))
    assert sorted(ours) == sorted(released_windows(grid, window, shifted))


@settings(deadline=None, max_examples=60)
@given(axes, windows, st.booleans())
def test_every_token_lies_in_exactly_one_window_and_comes_back(grid, window, shifted):
    level = level_of(grid, window)
    table = level.windows(window, shifted)
    index = torch.cat([bucket.index.flatten() for bucket in table.buckets])
    assert sorted(index[index < len(level)].tolist()) == list(range(len(level)))
    assert torch.equal(index[table.inverse], torch.arange(len(level)))
    x = torch.arange(1.0, 2 * len(level) * 3 + 1).view(2, len(level), 3)
    groups = split_windows(x, table)
    assert torch.equal(join_windows(groups, table), x)
    for group, bucket in zip(groups, table.buckets, strict=True):
        assert not group[bucket.index.repeat(2, 1) == len(level)].any()  # padding


@settings(deadline=None, max_examples=30)
@given(axes, windows, st.booleans())
def test_gradients_of_grouping_equal_those_of_plain_indexing(grid, window, shifted):
    level = level_of(grid, window)
    table = level.windows(window, shifted)
    x = torch.randn(2, len(level), 2, dtype=torch.float64, requires_grad=True)
    twin = x.detach().clone().requires_grad_()
    groups = split_windows(x, table)
    plain = [pad(twin, (0, 0, 0, 1))[:, bucket.index].flatten(0, 1) for bucket in table.buckets]
    weights = [torch.randn_like(g) for g in groups]
    weight = torch.randn_like(x)
    joined = (join_windows([g.square() * w for g, w in zip(groups, weights, strict=True)], table) * weight).sum()
    flat = torch.cat([(g.square() * w).view(2, -1, 2) for g, w in zip(plain, weights, strict=True)], 1)
    (flat[:, table.inverse] * weight).sum().backward()
    joined.backward()
    assert torch.allclose(x.grad, twin.grad, rtol=1e-12)


@settings(deadline=None, max_examples=30)
@given(axes, windows)
def test_packed_order_keeps_even_windows_together(grid, window):
    level = level_of(grid, window)
    size, _ = effective_window(grid, window, False)
    number = [tuple(c) for c in (level.coords // np.array(size)).tolist()]
    assert len([key for key, _ in itertools.groupby(number)]) == len(set(number))
    divides = all(g % w == 0 for g, w in zip(grid, size, strict=True))
    assert level.windows(window, False).contiguous == divides


@settings(deadline=None, max_examples=30)
@given(st.tuples(*[st.integers(1, 3)] * 3, st.integers(1, 5)), windows, windows)
def test_merges_list_the_eight_children_of_each_parent_in_product_order(half, fine, coarse):
    grid = (2 * half[0], 2 * half[1], 2 * half[2], half[3])
    geometry = dense_geometry(grid, (fine, coarse), CPU)
    child, parent = geometry.levels
    assert parent.grid == half and len(parent) == np.prod(half)
    (bucket,) = geometry.merges[0].buckets
    children = child.coords[bucket.index.numpy()]
    octants = np.array(list(itertools.product((0, 1), repeat=3)))
    assert np.array_equal(children[..., :3], parent.coords[:, None, :3] * 2 + octants)
    assert np.array_equal(children[..., 3], np.broadcast_to(parent.coords[:, None, 3], children.shape[:2]))


@settings(deadline=None, max_examples=30)
@given(axes, windows)
def test_raster_and_packed_order_convert_into_each_other(grid, window):
    level = level_of(grid, window)
    cells = torch.from_numpy(raster_coords(grid)).double()[None]
    packed = level.from_raster(cells)
    assert np.array_equal(packed[0].numpy(), level.coords)
    assert torch.equal(level.to_raster(packed), cells)
    d, h, w, t = grid
    assert torch.equal(level.to_grid(packed)[0, 3], torch.arange(t).double().expand(d, h, w, t))
    assert torch.equal(level.order, level.space_of_token * t + level.time_of_token)
    assert np.array_equal(level.time_of_token.numpy(), level.coords[:, 3])
    assert np.array_equal(np.ravel_multi_index(tuple(level.coords[:, :3].T), (d, h, w)), level.space_of_token.numpy())


@settings(deadline=None, max_examples=30)
@given(axes, windows)
def test_blocks_partition_the_grid(grid, block):
    level = level_of(grid, (4, 4, 4, 4))
    blocks = level.blocks(block)
    corner = level.coords - np.stack(np.unravel_index(blocks.position_in_block.numpy(), block), -1)
    assert not (corner % np.array(block)).any()  # each token sits at its place in a block on the block grid
    assert blocks.total == np.prod([-(-g // b) for g, b in zip(grid, block, strict=True)])
    by_number = {}
    for number, at in zip(blocks.block_of_token.tolist(), map(tuple, corner.tolist()), strict=True):
        assert by_number.setdefault(number, at) == at
    assert sorted(by_number) == list(range(blocks.total))


@settings(deadline=None, max_examples=30)
@given(st.tuples(*[st.sampled_from([2, 4])] * 3, st.integers(1, 4)), st.integers(0, 100))
def test_a_level_may_lack_tokens(grid, seed):
    present = np.random.default_rng(seed).random(np.prod(grid)) < 0.4
    present[seed % len(present)] = True
    geometry = Geometry(raster_coords(grid)[present], grid, ((2, 2, 2, 2),) * 2, CPU)
    child, parent = geometry.levels
    assert torch.equal(child.order.sort().values, torch.from_numpy(np.flatnonzero(present)))
    x = torch.rand(2, len(child), 3) + 1
    raster = child.to_raster(x)
    assert not raster[:, ~present].any() and torch.equal(child.from_raster(raster), x)
    for shifted in (False, True):
        table = child.windows((2, 2, 2, 2), shifted)
        assert torch.equal(join_windows(split_windows(x, table), table), x)
    dense = child.to_grid(x).unfold(2, 2, 2).unfold(3, 2, 2).unfold(4, 2, 2).flatten(-3)  # (2, 3, d, h, w, T, 8)
    (children,) = split_windows(x, geometry.merges[0])
    expected = parent.from_raster(dense.movedim(1, -1).flatten(1, 4).flatten(-2))  # absent children are zeros
    assert torch.equal(children.reshape(2, len(parent), -1), expected)


def test_a_window_as_long_as_an_axis_does_not_shift_it():
    assert effective_window((8, 4, 2, 5), (4, 4, 4, 4), True) == ((4, 4, 2, 4), (2, 0, 0, 2))
    level = level_of((4, 4, 2, 3), (4, 4, 4, 4))
    assert level.windows((4, 4, 4, 4), True) is level.windows((4, 4, 4, 4), False)


def test_tables_are_built_once():
    first = dense_geometry((4, 4, 4, 6), ((2, 2, 2, 4), (2, 2, 2, 4)), CPU)
    assert dense_geometry((4, 4, 4, 6), ((2, 2, 2, 4), (2, 2, 2, 4)), CPU) is first
    assert first.levels[0].windows((2, 2, 2, 4), True) is first.levels[0].windows((2, 2, 2, 4), True)


def test_patch_table_finds_packed_voxels_and_marks_the_outside():
    generator = np.random.default_rng(0)
    brain = generator.random((6, 4, 8)) < 0.4
    volume = generator.standard_normal(brain.shape)
    packed = np.append(volume[brain], np.nan)  # position V is outside
    table = patch_table(torch.from_numpy(brain), (3, 2, 4, 1))
    assert table.shape == (8, 24)
    for s, (x, y, z) in enumerate(itertools.product(range(2), range(2), range(2))):
        box = (slice(3 * x, 3 * x + 3), slice(2 * y, 2 * y + 2), slice(4 * z, 4 * z + 4))
        expected = np.where(brain[box], volume[box], np.nan).ravel()
        assert np.array_equal(packed[table[s].numpy()], expected, equal_nan=True)


@settings(deadline=None, max_examples=30)
@given(axes, windows, st.booleans(), st.integers(1, 5), st.integers(1, 5))
def test_neighbourhoods_follow_the_cells_of_each_window(grid, window, shifted, space, time):
    for bucket in level_of(grid, window).windows(window, shifted).buckets:
        near = bucket.neighbours(space, time)
        delta = np.abs(bucket.cells[:, :, None].astype(int) - bucket.cells[:, None])
        far, late = delta[..., :3].max(-1), delta[..., 3]
        assert np.array_equal(near.space[near.pattern].numpy(), (late == 0) & (far > 0) & (far <= space // 2))
        assert np.array_equal(near.time[near.pattern].numpy(), (far == 0) & (late > 0) & (late <= time // 2))


def test_only_windows_have_neighbourhoods():
    (merge,) = dense_geometry((4, 4, 4, 2), ((2, 2, 2, 2),) * 2, CPU).merges
    with pytest.raises(ValueError, match="no window"):
        merge.buckets[0].neighbours(5, 5)
