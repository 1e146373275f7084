import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import pad

from neurostorm.model.geometry.tokens import geometry_of
from neurostorm.model.geometry.windows import (
    Layout,
    effective_window,
    join_windows,
    raster_coords,
    split_windows,
    window_table,
)

CPU = torch.device("cpu")
CLEAN, PADDED, WRAPPED = Layout(), Layout(pad=True), Layout(pad=True, wrap=True)
axes = st.tuples(st.integers(1, 7), st.integers(1, 5), st.integers(1, 5), st.integers(1, 7))
windows = st.tuples(*[st.integers(1, 4)] * 4)
layouts = st.builds(Layout, pad=st.booleans(), wrap=st.booleans(), round_to=st.sampled_from([1, 3, 8]))


def level_of(grid, window, layout=CLEAN):
    return geometry_of(grid, (window,), CPU, layout).levels[0]


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
def test_padded_windows_are_the_groups_that_attend_to_each_other_in_the_released_code(grid, window, shifted):
    level = level_of(grid, window, PADDED)
    table = level.windows(window, shifted)
    ours = []
    for bucket in table.buckets:
        ours += [tuple(map(tuple, cells)) for cells in bucket.cells.tolist()]
        index = bucket.index.numpy()
        assert np.array_equal(bucket.cells[index < len(level)], level.coords[index[index < len(level)]])
        assert np.array_equal(index < len(level), (bucket.cells < np.array(grid)).all(-1))
    assert sorted(ours) == sorted(released_windows(grid, window, shifted))


@settings(deadline=None, max_examples=60)
@given(axes, windows, st.booleans(), layouts)
def test_every_token_lies_in_exactly_one_window_and_comes_back(grid, window, shifted, layout):
    level = level_of(grid, window, layout)
    table = level.windows(window, shifted)
    index = torch.cat([bucket.index.flatten() for bucket in table.buckets])
    assert sorted(index[index < len(level)].tolist()) == list(range(len(level)))
    assert torch.equal(index[table.maps(1)[1].long()], torch.arange(len(level)))
    x = torch.arange(1.0, 2 * len(level) * 3 + 1).view(2, len(level), 3)
    groups = split_windows(x, table)
    assert torch.equal(join_windows(groups, table), x)
    for group, bucket in zip(groups, table.buckets, strict=True):
        assert not group[bucket.index.repeat(2, 1) == len(level)].any()  # padding and absent slots


@settings(deadline=None, max_examples=30)
@given(axes, windows, st.booleans(), layouts)
def test_gradients_of_grouping_equal_those_of_plain_indexing(grid, window, shifted, layout):
    level = level_of(grid, window, layout)
    table = level.windows(window, shifted)
    x = torch.randn(2, len(level), 2, dtype=torch.float64, requires_grad=True)
    twin = x.detach().clone().requires_grad_()
    groups = split_windows(x, table)
    plain = [pad(twin, (0, 0, 0, 1))[:, bucket.index].flatten(0, 1) for bucket in table.buckets]
    weights = [torch.randn_like(g) for g in groups]
    weight = torch.randn_like(x)
    joined = (join_windows([g.square() * w for g, w in zip(groups, weights, strict=True)], table) * weight).sum()
    flat = torch.cat([(g.square() * w).view(2, -1, 2) for g, w in zip(plain, weights, strict=True)], 1)
    (flat[:, table.maps(1)[1].long()] * weight).sum().backward()
    joined.backward()
    assert torch.allclose(x.grad, twin.grad, rtol=1e-12)


@settings(deadline=None, max_examples=60)
@given(axes, windows)
def test_wrapped_windows_are_the_rolled_windows_of_the_released_scan_in_its_order(grid, window):
    size, shift = effective_window(grid, window, True)
    padded = [-(-g // w) * w for g, w in zip(grid, size, strict=True)]
    cells = np.stack(np.meshgrid(*[np.arange(p) for p in padded], indexing="ij"), -1)
    rolled = np.roll(cells, [-s for s in shift], (0, 1, 2, 3))
    level = level_of(grid, window, WRAPPED)
    (bucket,) = level.windows(window, True).buckets
    corners = itertools.product(*[range(0, p, w) for p, w in zip(padded, size, strict=True)])
    boxes = [rolled[tuple(slice(c, c + w) for c, w in zip(corner, size, strict=True))] for corner in corners]
    expected = [box.reshape(-1, 4) for box in boxes]
    assert len(expected) == len(bucket.index) and bucket.present is None
    place = {tuple(c): number for number, c in enumerate(level.coords.tolist())}
    for row, tokens in zip(bucket.index.tolist(), expected, strict=True):
        assert row == [place.get(tuple(c), len(level)) for c in tokens.tolist()]


@settings(deadline=None, max_examples=60)
@given(axes, windows, st.booleans())
def test_clean_windows_are_cut_at_the_edges_and_keep_raster_order(grid, window, shifted):
    size, shift = effective_window(grid, window, shifted)
    level = level_of(grid, window)
    groups = {}
    for cell in raster_coords(grid).tolist():
        number = tuple((c - s) // w for c, s, w in zip(cell, shift, size, strict=True))
        groups.setdefault(number, []).append(cell)
    ours = [level.coords[row].tolist() for b in level.windows(window, shifted).buckets for row in b.index.numpy()]
    assert sorted(ours) == sorted(groups.values())


@settings(deadline=None, max_examples=40)
@given(axes, windows, st.booleans(), st.integers(2, 9))
def test_rounded_sizes_put_absent_slots_last_and_change_no_window(grid, window, shifted, round_to):
    level = level_of(grid, window)
    exact = level.windows(window, shifted)
    size, shift = effective_window(grid, window, shifted)
    coarse = window_table(level.cells, (1, *grid), size, shift, Layout(round_to=round_to), CPU)
    assert len(coarse.buckets) <= len(exact.buckets)
    rows = []
    for bucket in coarse.buckets:
        slots = bucket.index.shape[1]
        assert slots % round_to == 0 or slots == exact.buckets[0].index.shape[1]
        assert torch.equal(bucket.index < len(level), torch.ones_like(bucket.index, dtype=torch.bool)) == (
            bucket.present is None
        )
        for row in bucket.index.tolist():
            real = [token for token in row if token < len(level)]
            assert row == real + [len(level)] * (slots - len(real)) and slots - len(real) < round_to
            rows.append(real)
        if bucket.present is not None:
            assert torch.equal(bucket.present, bucket.index < len(level))
    assert sorted(rows) == sorted(row for bucket in exact.buckets for row in bucket.index.tolist())


@settings(deadline=None, max_examples=40)
@given(axes, windows, st.integers(0, 99))
def test_unshifted_windows_follow_each_other_in_packed_order_whatever_tokens_exist(grid, window, seed):
    patches = np.random.default_rng(seed).random(int(np.prod(grid[:3]))) < 0.6
    patches[seed % len(patches)] = True
    for present in (None, patches):
        level = geometry_of(grid, (window,), CPU, CLEAN, present).levels[0]
        assert level.windows(window, False).contiguous


def test_absent_slots_are_no_neighbours():
    level = level_of((3, 1, 1, 2), (2, 2, 2, 2))
    table = window_table(level.cells, (1, 3, 1, 1, 2), (2, 1, 1, 2), (0, 0, 0, 0), Layout(round_to=3), CPU)
    bucket = table.buckets[-1]
    assert bucket.present.tolist() == [[True, True, False]]
    near = bucket.neighbours(5, 5)
    assert not near.space.any() and near.time[0, :2, :2].tolist() == [[False, True], [True, False]]
    assert not near.time[0, 2].any() and not near.time[0, :, 2].any()


def test_prompts_are_keys_before_the_tokens():
    level = level_of((3, 1, 1, 2), (2, 2, 2, 2))
    table = window_table(level.cells, (1, 3, 1, 1, 2), (2, 1, 1, 2), (0, 0, 0, 0), Layout(round_to=3), CPU)
    whole, cut = table.buckets
    assert whole.after_prompts(2).present is None
    assert cut.after_prompts(2).present.tolist() == [[True, True, True, True, False]]
    with pytest.raises(ValueError, match="with prompts"):
        cut.after_prompts(2).neighbours(3, 3)


def test_a_window_as_long_as_an_axis_does_not_shift_it():
    assert effective_window((8, 4, 2, 5), (4, 4, 4, 4), True) == ((4, 4, 2, 4), (2, 0, 0, 2))
    level = level_of((4, 4, 2, 3), (4, 4, 4, 4))
    assert level.windows((4, 4, 4, 4), True) is level.windows((4, 4, 4, 4), False)


@settings(deadline=None, max_examples=30)
@given(axes, windows, st.booleans(), st.integers(1, 5), st.integers(1, 5), layouts)
def test_neighbourhoods_follow_the_cells_of_each_window(grid, window, shifted, space, time, layout):
    for bucket in level_of(grid, window, layout).windows(window, shifted).buckets:
        near = bucket.neighbours(space, time)
        delta = np.abs(bucket.cells[:, :, None].astype(int) - bucket.cells[:, None])
        far, late = delta[..., :3].max(-1), delta[..., 3]
        assert np.array_equal(near.space[near.pattern].numpy(), (late == 0) & (far > 0) & (far <= space // 2))
        assert np.array_equal(near.time[near.pattern].numpy(), (far == 0) & (late > 0) & (late <= time // 2))


def test_only_windows_have_neighbourhoods():
    (merge,) = geometry_of((4, 4, 4, 2), ((2, 2, 2, 2),) * 2, CPU).merges
    with pytest.raises(ValueError, match="no window"):
        merge.buckets[0].neighbours(5, 5)


def test_unshifted_windows_hold_what_the_released_partition_holds(golden):
    case = golden("modules")
    level = level_of((4, 4, 6, 4), (2, 2, 2, 2))
    packed = level.from_raster(case.tensors["pm_in"].flatten(1, 4))
    (windows,) = split_windows(packed, level.windows((2, 2, 2, 2), False))
    assert torch.equal(windows, case.tensors["wp_out"])


def test_shifted_windows_pair_the_tokens_that_the_released_mask_lets_pair(golden):
    mask = golden("modules").tensors["attn_mask"]  # 0 or -100, of the windows of the rolled grid
    rolled = level_of((4, 4, 6, 4), (2, 2, 2, 2), WRAPPED)
    (bucket,) = rolled.windows((2, 2, 2, 2), True).buckets
    released = torch.zeros(384, 384, dtype=torch.bool)
    for tokens, allowed in zip(rolled.order[bucket.index], mask == 0, strict=True):
        released[tokens[:, None], tokens] = allowed
    ours, level = torch.zeros_like(released), level_of((4, 4, 6, 4), (2, 2, 2, 2))
    for bucket in level.windows((2, 2, 2, 2), True).buckets:
        for tokens in level.order[bucket.index]:
            ours[tokens[:, None], tokens] = True
    assert torch.equal(ours, released)
