"""Tables of visible tokens made on the device equal those made from coordinates, in shapes that stay."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from neurostorm.model.encoder import compile_blocks
from neurostorm.model.geometry.static import Room, Whole, drawn_geometry, rounded_up
from neurostorm.model.geometry.tokens import geometry_of, numbers_of, subset_geometry
from neurostorm.model.masking.masks import KINDS
from neurostorm.model.strd.dropout import StrdConfig
from tests.model.decoders.test_light import FRAMES, MIXERS, build, mask_of_a_corner, patches_of

GRID, WINDOWS = (8, 4, 8, 5), ((4, 4, 4, 4), (3, 2, 2, 2), (2, 1, 2, 4))


def both(seed: int, samples: int, share: float):
    """The same random tokens of random patches by either way, and the set that they are drawn from."""
    generator = np.random.default_rng(seed)
    patches = generator.random(8 * 4 * 8) < 0.6
    patches[0] = True
    shared = geometry_of(GRID, WINDOWS, torch.device("cpu"), patches=patches)
    tokens = len(shared.levels[0])
    count = max(1, int(tokens * share))
    numbers = np.stack([np.sort(generator.choice(tokens, count, replace=False)) for _ in range(samples)])
    whole = Whole(shared, WINDOWS)
    drawn = drawn_geometry(whole, torch.from_numpy(numbers), whole.count(numbers))
    subset = subset_geometry(GRID, WINDOWS, shared.levels[0].order[torch.from_numpy(numbers)])
    return shared, subset, drawn


def names_of(level, shared):
    """Each token's number in the shared set; -1 for a dead one and for none."""
    number = level.numbers_in(shared).clone()
    number[number == level.samples * len(shared)] = -1
    return torch.cat([number, torch.tensor([-1])]).numpy()


def windows_of(level, shared, window, shifted):
    """The windows, each the numbers of its tokens in order, with what is near what in it."""
    names, found = names_of(level, shared), {}
    for bucket in level.windows(window, shifted).buckets:
        near = bucket.neighbours(3, 5)
        present = torch.ones_like(bucket.index).bool() if bucket.present is None else bucket.present
        assert torch.equal(bucket.index < len(level), present)
        for row, (index, there) in enumerate(zip(bucket.index, present, strict=True)):
            size, pattern = int(there.sum()), int(near.pattern[row])
            assert bool(there[:size].all()), "absent slots come last"
            if size:
                pairs = [near.space[pattern, :size, :size], near.time[pattern, :size, :size]]
                found[tuple(names[index[:size].numpy()])] = torch.stack(pairs).numpy().tobytes()
    return found


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 3), st.sampled_from([0.0, 0.05, 0.5, 0.9, 1.0]))
def test_levels_windows_and_merges_are_those_made_from_coordinates(seed, samples, share):
    shared, subset, drawn = both(seed, samples, share)
    for number, (one, other, of) in enumerate(zip(subset.levels, drawn.levels, shared.levels, strict=True)):
        ours, theirs = names_of(other, of), names_of(one, of)
        assert sorted(ours[ours >= 0]) == sorted(theirs[theirs >= 0])
        place = other.places_in(of)
        assert np.array_equal(
            ours[place.numpy()], np.where(place < len(other), np.arange(place.numel()).reshape(place.shape), -1)
        )
        for shifted in (False, True):
            windows = [windows_of(level, of, WINDOWS[number], shifted) for level in (one, other)]
            assert windows[0] == windows[1]
        values = (
            torch.arange(256.0).view(-1, 1)[: of.grid[0] * of.grid[1] * of.grid[2]],
            torch.arange(5.0).view(-1, 1) / 8,
        )
        at = dict(zip(theirs[:-1], one.positions(*values)[0, :, 0].tolist(), strict=True))
        where = other.positions(*values)[0, :, 0].tolist()
        assert all(at[name] == value for name, value in zip(ours[:-1], where, strict=True) if name >= 0)
    for number, merges in enumerate(zip(subset.merges, drawn.merges, strict=True)):
        families = []
        for geometry, merge in zip((subset, drawn), merges, strict=True):
            children, parents = (names_of(geometry.levels[i], shared.levels[i]) for i in (number, number + 1))
            table = children[merge.buckets[0].index.numpy()]
            families.append(
                {parent: tuple(row) for parent, row in zip(parents[:-1], table, strict=True) if parent >= 0}
            )
            assert not (table[parents[:-1] < 0] >= 0).any(), "a dead parent has no children"
        assert families[0] == families[1]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("mixer", MIXERS)
def test_the_autoencoder_computes_the_same_with_either(mixer, kind):
    model = build(mixer, kind).double()
    patches = patches_of(model, 3)
    masks = [model.draw_mask(3, FRAMES, torch.Generator().manual_seed(seed)) for seed in range(3)]
    for mask in [*masks, mask_of_a_corner(model)]:
        found = []
        for model.visible.on_device in (False, True):
            model.zero_grad()
            out = model.train()(patches[: len(mask)], mask)
            out.loss.backward()
            seen = model.eval()(patches[: len(mask)], mask)
            gradients = [p.grad.clone() for p in model.parameters()]
            found.append([out.loss, out.clip_baseline, seen.prediction, seen.latent, *gradients])
        for one, other in zip(*found, strict=True):
            torch.testing.assert_close(one, other)


@pytest.mark.parametrize("mixer", MIXERS)
def test_redundancy_dropout_counts_the_same_elements(mixer):
    """Of dead tokens and empty windows nothing is dropped and nothing counted: at a rate of 1 - 1e-6 what has a score
    drops, however the numbers are drawn."""
    model = build(mixer, strd=StrdConfig(True, 3, 3, rate=1 - 1e-6)).train()
    patches, mask, rates = patches_of(model), mask_of_a_corner(model), []
    for model.visible.on_device in (False, True):
        torch.manual_seed(0)
        out = model(patches, mask)
        out.loss.backward()
        assert all(p.grad.isfinite().all() for p in model.parameters())
        rates.append(out.strd_rates)
    assert rates[0][0] > 0.1
    torch.testing.assert_close(rates[0], rates[1], rtol=0.02, atol=1e-3)


class Waits(TorchDispatchMode):
    """Notes the operations for which the host would wait for a device."""

    NAMES = ("_local_scalar_dense", "nonzero", "unique", "equal", "is_nonzero", "masked_select", "repeat_interleave")

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        name, values = function.__name__, [x for x in arguments if isinstance(x, torch.Tensor)]
        of_mask = values and values[0].dtype == torch.bool and name.startswith("nonzero")
        if any(name.lstrip("_").startswith(known.lstrip("_")) for known in self.NAMES) and not of_mask:
            self.seen.append(name)
        return function(*arguments, **(keywords or {}))


@pytest.mark.parametrize("mixer", MIXERS)
@pytest.mark.parametrize("strd", [False, True])
def test_a_step_waits_for_nothing_but_the_mask_which_is_the_hosts(mixer, strd):
    model = build(mixer, strd=StrdConfig(strd, 3, 3, rate=0.1)).train()
    patches = patches_of(model)
    first, mask = (model.draw_mask(2, FRAMES, torch.Generator().manual_seed(seed)) for seed in (0, 1))
    model.visible.on_device = True
    model(patches, first)  # makes what is kept
    with Waits() as waits:
        model(patches, mask).loss.backward()
    # `numbers_of` twice, of the mask on the CPU: are there equally many, and where.
    assert waits.seen == ["_local_scalar_dense.default"] * 2 * 2


def test_what_would_wait_is_seen():
    values = torch.arange(3.0)
    with Waits() as waits:
        values[values > 1], values.unique(), values.sum().item()
    assert len(waits.seen) >= 2


def test_shapes_stay_and_blocks_are_compiled_once():
    model = build()
    model.visible.on_device = True
    graphs = []

    def backend(graph, _inputs):
        graphs.append(graph)
        return graph.forward

    compile_blocks(model, backend=backend)
    rooms, compiled = set(), []
    for seed in range(12):
        mask = model.draw_mask(2, FRAMES, torch.Generator().manual_seed(seed))
        geometry = model.visible_geometry(mask, model.geometry(FRAMES))
        rooms.add(tuple(len(level) for level in geometry.levels))
        model(patches_of(model), mask).loss.backward()
        compiled.append(len(graphs))
    assert len(rooms) == 1
    assert compiled[0] > 0 and len(set(compiled[2:])) == 1, "a block is not compiled again for another mask"


def test_room_for_both_is_enough_for_either():
    one = Room((8, 3), (((4, 0), (1, 2)), ((2, 2), (0, 9))))
    other = Room((5, 6), (((1, 3), (7, 2)), ((3, 1), (0, 4))))
    assert one.at_least(other) == Room((8, 6), (((4, 3), (7, 2)), ((3, 2), (0, 9)))) == other.at_least(one)
    shared, _, _ = both(3, 1, 0.5)
    whole = Whole(shared, WINDOWS)
    numbers = np.arange(0, len(shared.levels[0]), 3)[None]
    exact, wide = whole.count(numbers), whole.count(np.arange(len(shared.levels[0]))[None])
    level = drawn_geometry(whole, torch.from_numpy(numbers), exact.at_least(wide)).levels[1]
    alive = drawn_geometry(whole, torch.from_numpy(numbers), exact).levels[1]
    assert windows_of(level, shared.levels[1], WINDOWS[1], True) == windows_of(
        alive, shared.levels[1], WINDOWS[1], True
    )


@given(st.integers(0, 10**6))
def test_rounding_up_takes_few_values_and_an_eighth_at_most(count):
    assert count <= rounded_up(count) <= count + count / 8
    assert rounded_up(rounded_up(count)) == rounded_up(count)


def test_tokens_of_a_model_are_numbered_in_the_order_of_the_mask():
    model = build()
    mask, whole = model.draw_mask(2, FRAMES), model.geometry(FRAMES)
    model.visible.on_device = True
    numbers = model.visible_geometry(mask, whole).levels[0].numbers_in(whole.levels[0]).view(2, -1)
    assert torch.equal(numbers - torch.arange(2)[:, None] * len(whole.levels[0]), numbers_of(~mask))
