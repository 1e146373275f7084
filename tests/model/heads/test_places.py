import numpy as np
import pytest
import torch
from einops import rearrange

from neurostorm.model.heads.places import PlaceHead

POOLS = ("mean", "places", "coupling", "covariance")
TOGETHER = ("coupling", "covariance")
WIDTH, PLACES, SIGNALS, OUTPUTS = 4, 5, 3, 2
CLIPS = (6, 3, 1, 9)  # of each unit


def drawn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def size_of(pool):
    return {"mean": WIDTH, "places": PLACES * WIDTH, "coupling": 3, "covariance": 6}[pool]


def map_of(pool, outputs=OUTPUTS):
    """What `start` takes."""
    size = size_of(pool)
    learnt = {"centre": drawn(PLACES * WIDTH, seed=5), "directions": drawn(SIGNALS, PLACES * WIDTH, seed=6)}
    return {
        "shift": drawn(size, seed=1), "scale": drawn(size, seed=2).abs() + 0.5, "weight": drawn(outputs, size, seed=3),
        "bias": drawn(outputs, seed=4), **(learnt if pool in TOGETHER else {}),
    }  # fmt: skip


def new(pool, outputs=OUTPUTS):
    return PlaceHead(WIDTH, outputs, PLACES, pool, SIGNALS if pool in TOGETHER else 0)


def started(pool):
    """A head with a map, and the map as arrays."""
    head, given = new(pool).double(), map_of(pool)
    head.start(**given)
    return head, {name: values.numpy() for name, values in given.items()}


def plain(pool):
    """A head that gives the vector itself."""
    size = size_of(pool)
    head, given = new(pool, size).double(), map_of(pool, size)
    same = {"shift": torch.zeros(size), "scale": torch.ones(size), "weight": torch.eye(size), "bias": torch.zeros(size)}
    head.start(**(given | same))
    return head, {name: values.numpy() for name, values in given.items()}


def concluded(head, units):
    """Outputs of units, each a list of clips with tokens, as training makes them."""
    return head.conclude(torch.stack([head(tokens).mean(0) for tokens in units]))


def twin(pool, given, tokens):
    """A unit's vector, of tokens (N, P', C') of its clips."""
    flat = tokens.reshape(len(tokens), -1)
    if pool == "mean":
        return np.mean([clip.mean(0) for clip in tokens], 0)
    if pool == "places":
        return np.mean(flat, 0)
    signals = np.array([[np.dot(clip - given["centre"], way) for way in given["directions"]] for clip in flat])
    if pool == "covariance":
        return np.cov(signals.T, bias=True)[np.triu_indices(SIGNALS)]
    return np.arctanh(np.corrcoef(signals.T)[np.triu_indices(SIGNALS, 1)])


@pytest.mark.parametrize("pool", POOLS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_features_averaged_over_clips_and_concluded_are_a_map_of_the_units_vector(pool, dtype):
    head, given = started(pool)
    units = [drawn(clips, PLACES, WIDTH, seed=10 + clips) for clips in CLIPS if clips > 1]
    vectors = np.array([twin(pool, given, unit.numpy()) for unit in units])
    expected = (vectors - given["shift"]) / given["scale"] @ given["weight"].T + given["bias"]
    found = concluded(head.to(dtype), [unit.to(dtype) for unit in units])
    rtol, atol = (1e-9, 1e-9) if dtype == torch.float64 else (1e-3, 1e-3)
    assert found.shape == (3, OUTPUTS) and found.dtype == dtype
    np.testing.assert_allclose(found.detach().numpy(), expected, rtol=rtol, atol=atol)


@pytest.mark.parametrize("pool", POOLS)
@pytest.mark.parametrize("frames", [1, 3])
def test_tokens_of_frames_are_averaged_place_by_place_the_frame_being_fastest(pool, frames):
    head, _ = started(pool)
    places = drawn(2, PLACES, frames, WIDTH)
    expected = head(torch.stack([places[:, :, frame] for frame in range(frames)]).mean(0))
    torch.testing.assert_close(head(rearrange(places, "b p t c -> b (p t) c")), expected)
    grid = rearrange(places, "b p t c -> b c p 1 1 t")
    torch.testing.assert_close(head(grid), expected)


@pytest.mark.parametrize("pool", POOLS)
def test_a_new_head_gives_zeros_and_is_told_what_it_was_by_its_state(pool):
    tokens = drawn(3, PLACES, WIDTH).float()
    assert not concluded(new(pool), [tokens]).any()
    head, _ = started(pool)
    again = new(pool).double()
    again.load_state_dict(head.state_dict())
    assert torch.equal(concluded(again, [tokens.double()]), concluded(head, [tokens.double()]))


@pytest.mark.parametrize("pool", TOGETHER)
def test_what_is_learnt_are_directions_and_the_linear_map(pool):
    assert {name for name, _ in new(pool).named_parameters()} == {"directions", "linear.weight", "linear.bias"}
    assert {name for name, _ in new("places").named_parameters()} == {"linear.weight", "linear.bias"}


def silent_units(what, dtype):
    """Units of which something does not vary: the second signal, clips of which there is one, or two that are equal."""
    units = [drawn(clips, PLACES, WIDTH, seed=20 + clips) for clips in (5, 7, 11, 25)]
    if what == "one clip":
        units = [unit[:1] for unit in units]
    if what == "equal clips":
        units = [unit[:1].repeat(len(unit), 1, 1) for unit in units]
    if what == "a place":
        for unit in units:
            unit[:, 1] = 0.7
    if what == "nothing":
        units = [torch.zeros_like(unit) for unit in units]
    return [unit.to(dtype).requires_grad_() for unit in units]


def of_one_place_each(head, centre):
    """Signal k looks at place k alone."""
    with torch.no_grad():
        head.centre.fill_(centre)
        for signal in range(SIGNALS):
            head.directions[signal, : signal * WIDTH] = 0
            head.directions[signal, (signal + 1) * WIDTH :] = 0


@pytest.mark.parametrize("pool", TOGETHER)
@pytest.mark.parametrize("centre", [0.0, 3.0, 10.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("what", ["a place", "one clip", "equal clips", "nothing"])
def test_without_variance_there_is_no_coupling_and_gradients_are_finite(pool, centre, dtype, what):
    head, given = plain(pool)
    of_one_place_each(head, centre)
    given |= {"centre": head.centre.numpy(), "directions": head.directions.detach().numpy()}
    units = silent_units(what, dtype)
    head.to(dtype)
    found = concluded(head, units)
    one, other = np.triu_indices(SIGNALS, pool == "coupling")
    silent = (one == 1) | (other == 1) if what == "a place" else np.full(len(one), True)
    np.testing.assert_allclose(found[:, silent].detach(), 0, atol=0 if pool == "coupling" else 1e-3)
    if what == "a place":
        with np.errstate(invalid="ignore"):
            brute = np.array([twin(pool, given, unit.detach().double().numpy()) for unit in units])
        np.testing.assert_allclose(found[:, ~silent].detach(), brute[:, ~silent], rtol=1e-3, atol=1e-3)
    found.square().sum().backward()
    for tensor in (*units, *head.parameters()):
        assert tensor.grad.isfinite().all()


@pytest.mark.parametrize("pool", POOLS)
def test_gradients_through_the_average_are_those_of_small_steps(pool):
    head, _ = started(pool)
    tokens = drawn(7, PLACES, WIDTH).requires_grad_()

    def outputs(tokens, *_):
        return concluded(head, [tokens[:4], tokens[4:]])

    assert torch.autograd.gradcheck(outputs, (tokens, *head.parameters()))


def test_signals_that_are_one_have_a_finite_coupling_and_gradient():
    head, _ = plain("coupling")
    with torch.no_grad():
        head.directions[1] = 2 * head.directions[0]
        head.directions[2] = -head.directions[0]
    most = np.arctanh(1 - 1e-6)
    for dtype in (torch.float64, torch.float32):
        for clips in range(2, 30):
            unit = drawn(clips, PLACES, WIDTH, seed=clips).to(dtype).requires_grad_()
            found = concluded(head.to(dtype), [unit])
            np.testing.assert_allclose(found[0].detach(), [most, -most, -most], rtol=0.02)
            found.sum().backward()
            assert unit.grad.isfinite().all()


@pytest.mark.parametrize("pool", TOGETHER)
def test_a_signals_offset_that_all_clips_share_is_not_seen(pool):
    head, _ = started(pool)
    unit = drawn(6, PLACES, WIDTH)
    torch.testing.assert_close(concluded(head, [unit + 2 * drawn(PLACES, WIDTH, seed=9)]), concluded(head, [unit]))


@pytest.mark.parametrize("pool", POOLS)
def test_a_map_of_another_shape_is_refused_with_both(pool):
    for name, values in map_of(pool).items():
        for wrong in (drawn(*values.shape[:-1], values.shape[-1] + 1), drawn(*values.shape, 1)):
            given, own = (rf"\({', '.join(map(str, tensor.shape))},?\)" for tensor in (wrong, values))
            with pytest.raises(ValueError, match=f"a map of shape {given}: this head takes {own}"):
                new(pool).start(**(map_of(pool) | {name: wrong}))


@pytest.mark.parametrize("pool", TOGETHER)
@pytest.mark.parametrize("missing", ["centre", "directions"])
def test_a_map_without_its_signals_is_refused(pool, missing):
    given = map_of(pool)
    del given[missing]
    with pytest.raises(ValueError, match=f"pool = '{pool}': centre and directions belong to the map"):
        new(pool).start(**given)


@pytest.mark.parametrize("pool", TOGETHER)
@pytest.mark.parametrize("signals", [0, -1])
def test_a_head_of_signals_needs_one(pool, signals):
    with pytest.raises(ValueError, match=f"signals = {signals}: pool = '{pool}' takes at least one"):
        PlaceHead(WIDTH, OUTPUTS, PLACES, pool, signals)


@pytest.mark.parametrize("pool", POOLS)
def test_tokens_of_other_places_or_width_are_refused(pool):
    for shape in ((2, PLACES + 1, WIDTH), (2, PLACES, WIDTH + 1), (2, 2 * PLACES - 1, WIDTH)):
        needed = rf"tokens of shape \({', '.join(map(str, shape))}\): 5 places of width 4 are needed"
        with pytest.raises(ValueError, match=needed):
            new(pool)(torch.zeros(shape))
    with pytest.raises(ValueError, match=r"features of shape \(2, 4\)"):
        new(pool)(torch.zeros(2, WIDTH))
