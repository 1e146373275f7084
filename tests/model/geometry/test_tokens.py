import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from neurostorm.model.geometry.tokens import Geometry, geometry_of, patch_table, subset_geometry
from neurostorm.model.geometry.windows import Layout, join_windows, raster_coords, split_windows

CPU = torch.device("cpu")
axes = st.tuples(st.integers(1, 7), st.integers(1, 5), st.integers(1, 5), st.integers(1, 7))
windows = st.tuples(*[st.integers(1, 4)] * 4)


@settings(deadline=None, max_examples=30)
@given(st.tuples(*[st.integers(1, 3)] * 3, st.integers(1, 5)), windows, windows)
def test_merges_list_the_eight_children_of_each_parent_in_product_order(half, fine, coarse):
    grid = (2 * half[0], 2 * half[1], 2 * half[2], half[3])
    geometry = geometry_of(grid, (fine, coarse), CPU)
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
    level = geometry_of(grid, (window,), CPU).levels[0]
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
@given(st.tuples(*[st.sampled_from([2, 4])] * 3, st.integers(1, 4)), st.integers(0, 100))
def test_a_level_may_lack_tokens(grid, seed):
    present = np.random.default_rng(seed).random(np.prod(grid)) < 0.4
    present[seed % len(present)] = True
    geometry = Geometry(raster_coords((1, *grid))[present], 1, grid, ((2, 2, 2, 2),) * 2, Layout(), CPU)
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


def test_tables_are_built_once():
    shape = ((4, 4, 4, 6), ((2, 2, 2, 4), (2, 2, 2, 4)), CPU, Layout())
    patches = np.arange(64) % 3 == 0
    dense, brain = geometry_of(*shape), geometry_of(*shape, patches)
    assert geometry_of(*shape) is dense and geometry_of(*shape, patches.copy()) is brain is not dense
    assert dense.levels[0].windows((2, 2, 2, 4), True) is dense.levels[0].windows((2, 2, 2, 4), True)


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


def test_brain_patches_are_tokens_in_every_frame():
    patches = np.zeros(12, bool)
    patches[[1, 7, 8]] = True
    level = geometry_of((3, 2, 2, 5), ((2, 2, 2, 2),), CPU, Layout(), patches).levels[0]
    space, time = torch.randn(12, 3), torch.randn(5, 3)
    assert torch.equal(level.positions(space, time)[0], space[level.space_of_token] + time[level.time_of_token])
    assert sorted(level.order.tolist()) == [s * 5 + t for s in (1, 7, 8) for t in range(5)]
    with pytest.raises(ValueError, match="no patch is a token"):
        geometry_of((3, 2, 2, 5), ((2, 2, 2, 2),), CPU, Layout(), np.zeros(12, bool))


@settings(deadline=None, max_examples=30)
@given(st.tuples(*[st.sampled_from([2, 4])] * 3, st.integers(1, 4)), windows, st.integers(1, 3), st.integers(0, 99))
def test_samples_with_tokens_of_their_own_never_meet(grid, window, samples, seed):
    cells = int(np.prod(grid))
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.stack([torch.randperm(cells, generator=generator)[: 1 + cells // 3] for _ in range(samples)])
    geometry = subset_geometry(grid, (window, window), tokens)
    fine, coarse = geometry.levels
    for level in geometry.levels:
        for shifted in (False, True):
            for bucket in level.windows(window, shifted).buckets:
                owner = level.cells[bucket.index.numpy(), 0]
                assert (owner == owner[:, :1]).all()
    raster = torch.randn(samples, cells, 3)
    back = fine.to_raster(fine.from_raster(raster))
    present = torch.zeros(samples, cells, dtype=torch.bool).scatter_(1, tokens, True)
    assert torch.equal(back, torch.where(present[..., None], raster, 0.0))
    space, time = torch.randn(cells // grid[3], 2), torch.randn(grid[3], 2)
    assert torch.equal(fine.positions(space, time)[0], space[fine.space_of_token] + time[fine.time_of_token])
    assert set(map(tuple, coarse.cells)) == {(b, x // 2, y // 2, z // 2, t) for b, x, y, z, t in fine.cells.tolist()}
