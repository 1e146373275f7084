import dataclasses

import numpy as np
import pytest
import torch

from neurostorm.model.geometry.tokens import geometry_of
from neurostorm.model.geometry.windows import Layout
from neurostorm.model.strd import dropout
from neurostorm.model.strd.dropout import (
    StageDropout,
    StrdConfig,
    calibrate,
    drop_probability,
    neighbourhood_score,
    redundancy_attention,
    token_drop_probability,
    token_scores,
)

CPU = torch.device("cpu")
CASES = {"strd__w2224_d24": 1202, "strd__w4444_d12_l3": 1203, "strd__w3331_emptyT": 1204}  # and the seed of the draw
BRAIN = np.random.default_rng(0).random(64) < 0.6


def bucket_of(window):
    """The one bucket of a grid that is a single window."""
    return geometry_of(tuple(window), (tuple(window),), CPU).levels[0].windows(tuple(window), False).buckets[0]


def ragged_bucket():
    """Windows (2, 2, 2, 2) of brain tokens in a grid (4, 4, 4, 2), the smaller ones filled with absent slots."""
    window = (2, 2, 2, 2)
    geometry = geometry_of((4, 4, 4, 2), (window,), CPU, Layout(round_to=16), BRAIN)
    (bucket,) = geometry.levels[0].windows(window, False).buckets
    assert bucket.present is not None and len(set(bucket.present.sum(1).tolist())) > 2
    return bucket


def holed_bucket():
    """A whole window whose last slots are said to be absent, whatever their coordinates."""
    bucket = bucket_of((2, 2, 2, 2))
    return dataclasses.replace(bucket, present=torch.arange(16)[None] < 11, _derived={})


def one_window(bucket, number):
    """A bucket of one window, of its present slots alone."""
    slots = slice(0, int(bucket.present[number].sum()))
    return dataclasses.replace(
        bucket, index=bucket.index[number, None, slots], cells=bucket.cells[number, None, slots],
        present=None, _derived={},
    )  # fmt: skip


def tokens_of(bucket, batch, width, seed=0):
    """(batch * W, N, width) with zero rows in absent slots."""
    torch.manual_seed(seed)
    h = torch.randn(batch * len(bucket.index), bucket.index.shape[1], width)
    return h if bucket.present is None else h * bucket.present.repeat(batch, 1).unsqueeze(-1)


def attention_reference(q, k, v, keep):
    """Dropped attention as autograd would do it, scores and all."""
    affinity = (q @ k.mT / q.shape[-1] ** 0.5).softmax(-1)
    return (affinity * keep) @ v


@pytest.mark.parametrize("name", CASES)
def test_scores_equal_the_released_ones(golden, name):
    case = golden(name)
    near = bucket_of(case.config["window"]).neighbours(case.config["l_spat"], case.config["l_temp"])
    affinity = dropout._affinity(case.tensors["h"], case.tensors["h"])
    case.close(affinity, "A_hat")
    assert torch.equal(near.space[0], case.tensors["mask_s"].bool())
    assert torch.equal(near.time[0], case.tensors["mask_t"].bool())
    for mask, largest, total in ((near.space, "f_spat", "sum_s"), (near.time, "f_temp", "sum_t")):
        peak, row = neighbourhood_score(affinity, mask)
        case.close(peak, largest)
        case.close(row, case.tensors[total].squeeze(-1))
    case.close(drop_probability(affinity, near.space, near.time), "W")
    case.close(token_drop_probability(affinity, near.space, near.time), "score")
    case.close(token_scores(case.tensors["h"], near), "score")


@pytest.mark.parametrize("name", CASES)
def test_tokens_dropped_equal_the_released_ones(golden, name):
    case = golden(name)
    stage = StageDropout(StrdConfig(True, case.config["l_spat"], case.config["l_temp"]))
    torch.manual_seed(CASES[name])
    out = stage.drop_tokens(case.tensors["h"], bucket_of(case.config["window"]))
    keep = case.tensors["keep"]
    assert torch.equal(out, case.tensors["out"])
    assert torch.equal(out.any(-1).float(), keep)
    assert stage.rate() == (1 - keep).mean()


def test_neighbourhoods_equal_the_released_masks(golden):
    case = golden("strd_masks")
    for window, space, time in case.config["specs"]:
        near = bucket_of(window).neighbours(space, time)
        tokens = int(np.prod(window))
        for mask, kind in ((near.space, "s"), (near.time, "t")):
            packed = case.tensors[f"w{'x'.join(map(str, window))}_ls{space}_lt{time}_{kind}"].numpy()
            expected = np.unpackbits(packed)[: tokens**2].reshape(tokens, tokens).astype(bool)
            assert np.array_equal(mask[0].numpy(), expected), (window, space, time, kind)


def test_a_stage_smaller_than_its_window_has_the_neighbourhoods_of_what_it_has():
    nominal = (4, 4, 4, 4)
    small = geometry_of((2, 1, 2, 3), (nominal,), CPU).levels[0].windows(nominal, True).buckets[0]
    near, exact = small.neighbours(5, 5), bucket_of((2, 1, 2, 3)).neighbours(5, 5)
    assert torch.equal(near.space, exact.space) and torch.equal(near.time, exact.time)
    h = torch.randn(2, 12, 6)
    stage = StageDropout(StrdConfig(True))
    assert stage.drop_tokens(h, small).shape == h.shape
    assert stage.attend(*h.view(3, 2, 1, 12, 2), small).shape == (2, 1, 12, 2)


def test_a_window_of_one_patch_has_no_spatial_redundancy_to_drop():
    near = bucket_of((1, 1, 1, 8)).neighbours(5, 5)
    h = torch.randn(3, 8, 4)
    assert near.time.any() and not drop_probability(dropout._affinity(h, h), near.space, near.time).any()


@pytest.mark.parametrize("rate", [None, 0.3])
@pytest.mark.parametrize("shifted", [False, True])
def test_gradients_equal_those_of_autograd_with_the_same_drops(shifted, rate):
    table = geometry_of((4, 2, 4, 4), ((2, 2, 2, 2),), CPU).levels[0].windows((2, 2, 2, 2), shifted)
    for bucket in table.buckets:
        near = bucket.neighbours(3, 3)
        windows, tokens = bucket.index.shape
        q, k, v = (torch.randn(2 * windows, 2, tokens, 3, dtype=torch.float64, requires_grad=True) for _ in range(3))
        torch.manual_seed(1)
        out, dropped = redundancy_attention(q, k, v, near, rate=rate)
        weight = torch.randn_like(out)
        grads = torch.autograd.grad((out * weight).sum(), (q, k, v))

        pattern = near.pattern.repeat(2)
        affinity = dropout._affinity(q, k)
        chance = drop_probability(affinity, near.space[pattern][:, None], near.time[pattern][:, None])
        if rate is not None:
            chance = calibrate(chance, rate, tokens**2, (-2, -1))
        torch.manual_seed(1)
        keep = torch.rand_like(chance) >= chance
        expected = attention_reference(q, k, v, keep)
        assert torch.allclose(out, expected, atol=1e-12)
        assert dropped == (~keep).sum()
        for ours, plain in zip(grads, torch.autograd.grad((expected * weight).sum(), (q, k, v)), strict=True):
            assert torch.allclose(ours, plain, atol=1e-12)


@pytest.mark.parametrize("rate", [None, 0.4])
@pytest.mark.parametrize("shifted", [False, True])
def test_token_gradients_equal_those_of_autograd_with_the_same_drops(shifted, rate):
    table = geometry_of((4, 2, 4, 4), ((2, 2, 2, 2),), CPU).levels[0].windows((2, 2, 2, 2), shifted)
    stage = StageDropout(StrdConfig(True, 3, 3, rate))
    for bucket in table.buckets:
        h = torch.randn(2 * len(bucket.index), bucket.index.shape[1], 3, requires_grad=True)
        weight = torch.randn_like(h)
        torch.manual_seed(1)
        out = stage.drop_tokens(h, bucket)
        torch.manual_seed(1)
        expected = h * (1 - torch.bernoulli(token_scores(h, stage.neighbours(bucket), rate=rate))).unsqueeze(-1)
        assert torch.equal(out, expected)
        grads = [torch.autograd.grad((y.square() * weight).sum(), h)[0] for y in (out, expected)]
        assert torch.equal(*grads)
    assert rate is None or stage.rate() > 0.2


def test_parts_of_the_windows_give_what_all_windows_together_give(monkeypatch):
    bucket = ragged_bucket()
    q, k, v = (tokens_of(bucket, 2, 8, seed).unflatten(-1, (2, 4)).transpose(1, 2) for seed in range(3))
    near, nobody = bucket.neighbours(5, 5), bucket.neighbours(1, 1)  # without neighbours nothing is drawn

    def results():
        inputs = [x.double().requires_grad_() for x in (q, k, v)]
        out, _ = redundancy_attention(*inputs, nobody, bucket.present)
        return out, *torch.autograd.grad(out.square().sum(), inputs), token_scores(v[:, 0], near, bucket.present, 0.3)

    whole = results()
    monkeypatch.setattr(dropout, "_parts", lambda windows, *_: [slice(i, i + 3) for i in range(0, windows, 3)])
    for a, b in zip(results(), whole, strict=True):
        assert torch.allclose(a, b, atol=1e-7 if a.dtype == torch.float32 else 1e-13)


def test_elements_are_dropped_as_often_as_their_probability_says():
    near = bucket_of((2, 2, 2, 2)).neighbours(5, 5)
    q = torch.randn(1, 1, 16, 8).expand(4000, 1, 16, 8)
    chance = drop_probability(dropout._affinity(q[:1], q[:1]), near.space, near.time)
    torch.manual_seed(0)
    _, dropped = redundancy_attention(q, q, q, near)
    assert dropped / (4000 * 256) == pytest.approx(chance.mean().item(), rel=0.05)


@pytest.mark.parametrize("width", [4, 32])
@pytest.mark.parametrize("rate", [0.02, 0.1, 0.3, 0.6, 0.9])
@pytest.mark.parametrize("bucket", [bucket_of((2, 2, 2, 4)), ragged_bucket()], ids=["full", "ragged"])
def test_a_rate_is_the_mean_probability_of_every_window(bucket, rate, width):
    h = tokens_of(bucket, 3, width)
    scores = token_scores(h, bucket.neighbours(5, 5), bucket.present, rate)
    released = token_scores(h, bucket.neighbours(5, 5), bucket.present)
    present = torch.ones(scores.shape) if bucket.present is None else bucket.present.repeat(3, 1)
    possible = (released > 0).sum(1) / present.sum(1)  # a lone patch or frame has no redundancy
    assert torch.allclose(scores.sum(1) / present.sum(1), possible.clamp(max=rate), atol=0.01)
    assert ((scores > 0) <= (released > 0)).all() and (scores <= 1).all()


@pytest.mark.parametrize("rate", [0.02, 0.1, 0.3, 0.7])
def test_the_realised_rate_is_the_one_asked_for_in_both_forms(rate):
    torch.manual_seed(0)
    bucket = bucket_of((2, 2, 2, 4))
    tokens, elements = (StageDropout(StrdConfig(True, 5, 5, rate)) for _ in range(2))
    for scale in (0.5, 1.0, 2.0):
        h = scale * torch.randn(500, 32, 16)
        tokens.drop_tokens(h, bucket)
        q, k, v = h.view(500, 32, 2, 8).transpose(1, 2).expand(3, -1, -1, -1, -1)
        elements.attend(q, k, v, bucket)
    assert tokens.rate() == pytest.approx(rate, abs=0.01)
    assert elements.rate() == pytest.approx(rate, abs=0.01)


def test_calibration_of_a_window_does_not_depend_on_the_others():
    bucket = bucket_of((2, 2, 2, 4))
    h = tokens_of(bucket, 6, 8) * torch.arange(1, 7).view(6, 1, 1)
    near = bucket.neighbours(5, 5)
    together = token_scores(h, near, rate=0.4)
    alone = torch.cat([token_scores(window[None], near, rate=0.4) for window in h])
    assert torch.allclose(together, alone, atol=1e-6)


def test_where_too_few_elements_have_a_score_all_of_them_drop():
    score = torch.tensor([[0.5, 0.01, 0.0, 0.0], [0.0, 0.0, 0.0, 0.0]])
    assert torch.equal(calibrate(score, 0.9, 4, (-1,)), torch.tensor([[1.0, 1.0, 0.0, 0.0], [0.0] * 4]))


@pytest.mark.parametrize("bucket", [ragged_bucket(), holed_bucket()], ids=["ragged", "holed"])
def test_absent_slots_change_no_score_of_the_tokens_there_are(bucket):
    h = tokens_of(bucket, 2, 6)
    for rate in (None, 0.3):
        scores = token_scores(h, bucket.neighbours(3, 3), bucket.present, rate)
        for window in range(len(h)):
            alone = one_window(bucket, window % len(bucket.index))
            count = alone.index.shape[1]
            expected = token_scores(h[window : window + 1, :count], alone.neighbours(3, 3), rate=rate)
            assert torch.allclose(scores[window, :count], expected[0], atol=1e-6)
            assert not scores[window, count:].any()
    assert scores.any()


def test_absent_slots_are_no_keys_and_change_no_attention():
    bucket = ragged_bucket()
    q, k, v = (tokens_of(bucket, 2, 6, seed).unsqueeze(1).requires_grad_() for seed in range(3))
    near = bucket.neighbours(1, 1)  # no neighbours, no drops
    out, dropped = redundancy_attention(q, k, v, near, bucket.present)
    absent = ~bucket.present.repeat(2, 1)
    out.masked_fill(absent[:, None, :, None], 0.0).square().sum().backward()
    assert dropped == 0 and out.isfinite().all()
    for window in range(len(q)):
        count = int((~absent[window]).sum())
        inputs = [x[window : window + 1, :, :count].detach().requires_grad_() for x in (q, k, v)]
        alone = attention_reference(*inputs, torch.ones(1))
        assert torch.allclose(out[window, :, :count], alone[0], atol=1e-6)
        alone.square().sum().backward()
        for ours, plain in zip((q, k, v), inputs, strict=True):
            assert torch.allclose(ours.grad[window, :, :count], plain.grad[0], atol=1e-5)
            assert not ours.grad[window, :, count:].any()


@pytest.mark.parametrize("bucket", [ragged_bucket(), holed_bucket()], ids=["ragged", "holed"])
def test_elements_of_absent_slots_are_never_dropped_nor_counted(monkeypatch, bucket):
    q, k, v = (tokens_of(bucket, 2, 6, seed).unsqueeze(1) for seed in range(3))
    asked = []
    monkeypatch.setattr(torch, "rand_like", lambda p: asked.append(p) or torch.zeros_like(p))  # drops where p > 0
    stage = StageDropout(StrdConfig(True, 3, 3))
    assert stage.attend(q, k, v, bucket).isfinite().all()
    (chance,) = asked
    for window in range(len(q)):
        alone = one_window(bucket, window % len(bucket.index))
        count = alone.index.shape[1]
        near = alone.neighbours(3, 3)
        expected = drop_probability(
            dropout._affinity(q[window, :, :count], k[window, :, :count]), near.space, near.time
        )
        assert torch.allclose(chance[window, :, :count, :count], expected, atol=1e-6)
        assert not chance[window, :, count:].any() and not chance[window, :, :, count:].any()
    elements = int(bucket.present.sum(1).square().sum()) * 2
    assert stage.rate() == pytest.approx(int((chance > 0).sum()) / elements)


def test_a_rate_counts_present_elements_alone():
    bucket = ragged_bucket()
    torch.manual_seed(0)
    stage = StageDropout(StrdConfig(True, 5, 5, 0.2))
    for seed in range(20):
        q = tokens_of(bucket, 4, 8, seed).unsqueeze(1)
        stage.attend(q, q, q, bucket)
    near = bucket.neighbours(5, 5)
    redundant = (near.space.any(-1) & near.time.any(-1))[near.pattern]  # a row without either has all of W at 0
    count = bucket.present.sum(1)
    reachable = ((redundant.sum(1) / count).clamp(max=0.2) * count**2).sum() / (count**2).sum()
    assert stage.rate() == pytest.approx(float(reachable), abs=0.01)


def test_a_window_without_any_token_stays_finite():
    bucket = bucket_of((1, 1, 2, 2))
    empty = dataclasses.replace(bucket, present=torch.zeros(1, 4, dtype=torch.bool), _derived={})
    q = torch.randn(1, 1, 4, 2)
    assert StageDropout(StrdConfig(True, rate=0.5)).attend(q, q, q, empty).isfinite().all()
    assert StageDropout(StrdConfig(True, rate=0.5)).drop_tokens(q[0], empty).isfinite().all()


def test_diverged_tokens_pass_through_for_the_loss_to_show():
    h = torch.full((1, 4, 2), float("nan"))
    assert StageDropout(StrdConfig(True)).drop_tokens(h, bucket_of((1, 1, 2, 2))).isnan().all()


def test_under_autocast_the_scores_are_those_of_float32():
    bucket = bucket_of((2, 2, 2, 2))
    h = tokens_of(bucket, 3, 8)
    expected = token_scores(h, bucket.neighbours(5, 5))
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(token_scores(h, bucket.neighbours(5, 5)), expected)
    half = StageDropout(StrdConfig(True, rate=0.5)).drop_tokens(h.bfloat16(), bucket)
    assert half.dtype == torch.bfloat16 and 0 < (half == 0).all(-1).sum() < 48


def test_between_forward_and_backward_only_booleans_are_kept():
    bucket = bucket_of((2, 2, 2, 4))
    q, k, v = (torch.randn(6, 2, 32, 4, requires_grad=True) for _ in range(3))
    h = torch.randn(6, 32, 4, requires_grad=True)
    stage = StageDropout(StrdConfig(True, rate=0.3))
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        stage.attend(q, k, v, bucket)
        assert [t.dtype for t in saved if t.numel() >= 6 * 2 * 32 * 32] == [torch.bool]
        assert sum(t.numel() for t in saved if t.dtype != torch.bool) <= q.numel() * 3
        saved.clear()
        stage.drop_tokens(h, bucket)
        assert [(t.dtype, t.numel()) for t in saved] == [(torch.bool, 6 * 32)]


@pytest.mark.parametrize(
    ("field", "value"),
    [("space", 0), ("time", 0), ("rate", 0.0), ("rate", 1.0), ("rate", -0.1), ("rate", float("nan"))],
)
def test_impossible_values_are_refused_by_name(field, value):
    with pytest.raises(ValueError, match=f"strd.{field}"):
        StrdConfig(True, **{field: value}).validate()
