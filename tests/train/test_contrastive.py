"""Contrastive pretraining: the plan of pairs by exhaustion, the losses that a step adds up, and a short training."""

import shutil
from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from neurostorm.data.augment import Augment, AugmentConfig
from neurostorm.data.clips import ClipReader
from neurostorm.model.config import SwinConfig
from neurostorm.model.encoder import SwinEncoder
from neurostorm.model.hub.pretrained import load_pretrained, save_pretrained
from neurostorm.model.losses.contrastive import ContrastiveModel, instance_loss, local_local_loss
from neurostorm.store import FrameStore, read_manifest
from neurostorm.store.shard import SHARD_FILE
from neurostorm.train import contrastive
from neurostorm.train.contrastive import (
    ContrastiveRecipe,
    ContrastiveRuns,
    DenseUnpacker,
    PairPlan,
    contrastive_loss,
    pretrain_contrastive,
)
from neurostorm.train.health.limits import NonFiniteError, UnreadableClipsError

SWIN = SwinConfig((24, 24, 24, 4), embed_dim=8, depths=(1, 1), heads=(1, 2), window=(2, 2, 2, 2))
STILL = AugmentConfig(rotate_rad=0, scale=0, noise_probability=0, smooth_probability=0)


@pytest.fixture(scope="module")
def ball(ball_store):
    """The open store and its runs."""
    manifest = read_manifest(ball_store)
    subjects = [f"{row['dataset']}/{row['subject']}" for row in manifest.select(["dataset", "subject"]).to_pylist()]
    runs = ContrastiveRuns(tuple(manifest["run"].to_pylist()), tuple(subjects), tuple(manifest["frames"].to_pylist()))
    return FrameStore.open(ball_store), runs


@pytest.fixture
def ball_store_copy(ball, tmp_path):
    """A copy of the store in which one run has lost its frames; the store, its runs, the run."""
    store, runs = ball
    path = tmp_path / "copy.zarr"
    shutil.copytree(str(store.path), path)
    (path / runs.paths[2] / SHARD_FILE).unlink()
    return FrameStore.open(path), runs, runs.paths[2]


def pretrain(ball, recipe, swin=SWIN, normalise="voxel", runs=None):
    """The encoder and the loss of each step."""
    losses = []
    encoder = pretrain_contrastive(
        recipe, ball[0], runs or ball[1], swin, normalise, "cpu", on_step=lambda step, loss: losses.append((step, loss))
    )
    assert [step for step, _ in losses] == list(range(recipe.steps))
    return encoder, [loss for _, loss in losses]


# --- the plan


@st.composite
def people(draw):
    """Subjects and frames of runs, each subject with two clips at least, and the clips' length."""
    length = draw(st.integers(1, 6))
    subjects, frames = [], []
    for person in range(draw(st.integers(1, 5))):
        lengths = draw(st.lists(st.integers(0, 4 * length), min_size=0, max_size=3))
        fits = [run for run in lengths if run >= length]
        if len(fits) < 2 and not any(run >= 2 * length for run in fits):
            lengths.append(draw(st.integers(2 * length, 4 * length)))
        subjects += [f"made/sub-{person}"] * len(lengths)
        frames += lengths
    order = draw(st.permutations(range(len(frames))))
    return [subjects[run] for run in order], [frames[run] for run in order], length


@settings(deadline=None, max_examples=60)
@given(people(), st.integers(1, 12), st.integers(0, 2**40), st.integers(0, 10**6))
def test_pairs_are_two_clips_of_one_subject_that_do_not_overlap(made, batch, seed, step):
    subjects, frames, length = made
    plan = PairPlan(subjects, frames, length, batch, seed)
    rows = plan.rows(step)
    assert rows.shape == (batch, 2)
    assert rows["row"].ravel().tolist() == list(range(step * 2 * batch, (step + 1) * 2 * batch))
    met = Counter()
    for (run, start), (other, beside) in zip(
        *[rows[:, clip][["run", "start"]].tolist() for clip in (0, 1)], strict=True
    ):
        assert subjects[run] == subjects[other]
        assert run != other or abs(start - beside) >= length
        for clip_run, first in ((run, start), (other, beside)):
            assert 0 <= first <= frames[clip_run] - length
        met[subjects[run]] += 1
    counts = [met[name] for name in set(subjects)]
    assert max(counts) - min(counts) <= 1, "different subjects as long as there are enough"
    assert np.array_equal(PairPlan(subjects, frames, length, batch, seed).rows(step), rows)


def places(subjects, frames, length, steps=1200):
    """How often each pair of (run, start) was drawn, whatever its order; one subject per step."""
    plan = PairPlan(subjects, frames, length, 1, 3)
    return Counter(tuple(sorted(plan.rows(step)[0][["run", "start"]].tolist())) for step in range(steps))


def test_every_pair_within_a_run_is_as_likely_as_any_other():
    drawn = places(["a"], [9], 3)
    possible = {((0, i), (0, j)) for i in range(7) for j in range(i + 3, 7)}
    assert drawn.keys() == possible and len(possible) == 10
    assert min(drawn.values()) > 75 and max(drawn.values()) < 165  # 120 +- 4.3 standard deviations of 10.4


def test_a_run_without_room_for_two_clips_takes_its_second_clip_elsewhere():
    runs = Counter()
    for ((run, _), (other, _)), count in places(["a", "a"], [4, 8], 3, 800).items():
        runs[run, other] += count
    assert runs.keys() == {(0, 1), (1, 1)}
    assert runs[1, 1] == pytest.approx(200, abs=52), "half the first clips, half of the second ones"
    assert {(run, other) for (run, _), (other, _) in places(["a", "a"], [3, 5], 3, 50)} == {(0, 1)}


def test_steps_and_seeds_draw_differently_and_all_subjects_come():
    subjects, frames = [f"s{n}" for n in range(20)], [50] * 20
    plan = PairPlan(subjects, frames, 5, 4, 0)
    draws = [plan.rows(step)[["run", "start"]].tobytes() for step in range(50)]
    assert len(set(draws)) == 50
    assert PairPlan(subjects, frames, 5, 4, 1).rows(0)[["run", "start"]].tobytes() not in draws
    assert {run for step in range(50) for run in plan.rows(step)["run"].ravel().tolist()} == set(range(20))


def test_subjects_are_numbered_alike_for_all_their_runs():
    plan = PairPlan(["b", "a", "b", "c"], [9, 9, 9, 9], 3, 2, 0)
    assert plan.subject_of_run.tolist() == [1, 0, 1, 2]
    assert plan.runs_of == {"a": [1], "b": [0, 2], "c": [3]}


def test_subjects_without_a_pair_are_refused_by_name():
    with pytest.raises(ValueError, match=r"2 of 3 subject\(s\).*of 4 frames.*\(x/sub-1, x/sub-3\).*shorter clips"):
        PairPlan(["x/sub-1", "x/sub-2", "x/sub-3", "x/sub-3"], [7, 8, 4, 3], 4, 2, 0)
    with pytest.raises(ValueError, match="there is no run"):
        PairPlan([], [], 4, 2, 0)


# --- a step


@pytest.mark.parametrize("normalise", ["voxel", "global"])
def test_the_dense_volume_is_that_of_the_store(ball, normalise):
    store, runs = ball
    rows = PairPlan(runs.subjects, runs.frames, 4, 2, 0).rows(0).ravel()
    batch = ClipReader(store, runs.paths, 4, normalise).batch(rows)
    volume = DenseUnpacker(store, 4)(batch)
    assert volume.shape == (4, 1, 24, 24, 24, 4)
    for clip, row in enumerate(rows):
        run = runs.paths[row["run"]]
        values, fill = store.frames(run, int(row["start"]), 4).astype(np.float64) / 16, 0.0
        if normalise == "global":
            (mean, std), known = store.moments(run), store.run_attributes(run)
            values = (values * std + mean - known["global_mean"]) / known["global_std"]
            fill = -known["global_mean"] / known["global_std"]
        twin = np.moveaxis(store.unpack(values, fill), 0, -1)
        np.testing.assert_allclose(volume[clip, 0].numpy(), twin, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", contrastive.KINDS)
def test_a_step_is_the_loss_of_its_kind_on_the_views_one_by_one(kind):
    torch.manual_seed(0)
    model = ContrastiveModel(SwinEncoder(SWIN)).eval()  # fixed statistics, so that views can be taken alone
    volume, subject = torch.randn(6, 1, 24, 24, 24, 4), torch.tensor([4, 7, 4])
    augment = Augment(AugmentConfig())
    recipe = ContrastiveRecipe(kind, temperature=0.3)
    with torch.no_grad():
        loss = contrastive_loss(model, recipe, volume, subject, augment, torch.Generator().manual_seed(5))
        generator = torch.Generator().manual_seed(5)
        views = [augment(volume, generator) for _ in range(2)]
        first, second = (torch.cat([model(model.encoder.to_patches(clip[None])) for clip in view]) for view in views)
    instance = instance_loss(first[[0, 2, 4]], first[[1, 3, 5]], subject, 0.3)
    local = local_local_loss(first.view(3, 2, -1), second.view(3, 2, -1), 0.3)
    expected = {"instance": instance, "local-local": local, "both": instance + local}[kind]
    torch.testing.assert_close(loss, expected, rtol=1e-4, atol=1e-4)


# --- the training


@pytest.mark.parametrize("kind", contrastive.KINDS)
def test_the_loss_falls(ball, kind):
    paths, subjects, _ = vars(ball[1]).values()
    runs = ContrastiveRuns(paths, subjects, (8,) * 6)  # the signal is noise: one pair of clips each can be learnt
    _, losses = pretrain(ball, ContrastiveRecipe(kind, steps=10, batch=4, lr=3e-3, seed=2), runs=runs)
    assert np.mean(losses[-4:]) < 0.3 * losses[0]


def test_one_seed_gives_one_encoder_and_another_seed_another(ball):
    first, again, other = (
        pretrain(ball, ContrastiveRecipe("both", steps=3, batch=2, lr=1e-3, seed=seed))[0].state_dict()
        for seed in (1, 1, 2)
    )
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not any(torch.equal(first[name], other[name]) for name in first if name.endswith("fc1.weight"))


def test_the_encoder_is_trained_and_is_saved_as_one(ball, tmp_path):
    encoder, _ = pretrain(ball, ContrastiveRecipe(steps=2, batch=2, lr=1e-3, weight_decay=0.0))
    torch.manual_seed(0)
    started = SwinEncoder(SWIN, brain=torch.from_numpy(ball[0].mask)).state_dict()
    moved = [name for name, value in encoder.state_dict().items() if not torch.equal(value, started[name])]
    assert {"patch_embed.fc.weight", "layers.1.blocks.0.attn.qkv.weight", "pos_embeds.0.time_embed"} <= set(moved)
    assert not encoder.training
    save_pretrained(encoder, tmp_path, {"normalise": "global"})
    volume = torch.randn(1, 1, 24, 24, 24, 4)
    assert torch.equal(load_pretrained(tmp_path)(volume), encoder(volume))


@pytest.fixture
def optimised(monkeypatch):
    """What AdamW is given at each step: its groups' rates, their weight decay, the gradient's norm."""
    steps = []
    plain = torch.optim.AdamW.step

    def noting(optimizer, *arguments):
        groups = optimizer.param_groups
        norm = torch.nn.utils.get_total_norm([p.grad for group in groups for p in group["params"]])
        steps.append(([group["lr"] for group in groups], [group["weight_decay"] for group in groups], norm.item()))
        return plain(optimizer, *arguments)

    monkeypatch.setattr(torch.optim.AdamW, "step", noting)
    return steps


def test_the_rate_warms_up_and_decays(ball, optimised):
    pretrain(ball, ContrastiveRecipe(steps=4, batch=2, lr=1e-3, warmup_fraction=0.5, min_lr_fraction=0.0))
    expected = [0.5e-3, 1e-3, 1e-3, 0.5e-3]
    assert np.allclose([rates for rates, _, _ in optimised], np.array(expected)[:, None])
    assert optimised[0][1] == [0.01, 0.0], "matrices decay, the rest does not"


def test_gradients_are_of_one_step_only_and_are_clipped(ball, optimised):
    two = ContrastiveRuns(ball[1].paths[:2], ball[1].subjects[:2], (8, 8))  # one pair each: every step has the same
    for clip_norm in (1e9, 1e-4):
        pretrain(ball, ContrastiveRecipe("instance", 3, 2, lr=1e-12, clip_norm=clip_norm, augment=STILL), runs=two)
    norms = [norm for _, _, norm in optimised]
    assert norms[0] > 1e-3 and norms[1:3] == pytest.approx([norms[0]] * 2, rel=1e-2)
    assert norms[3:] == pytest.approx([1e-4] * 3, rel=1e-2)


def test_a_loss_that_is_not_finite_stops_with_the_clips_named(ball, monkeypatch):
    monkeypatch.setattr(contrastive, "instance_loss", lambda a, *_: a.sum() * torch.nan)
    with pytest.raises(NonFiniteError, match=r"step 0: the loss is nan.*lower lr = 5e-05.*runs/balls/sub-\d/.*\[\d+\]"):
        pretrain(ball, ContrastiveRecipe(steps=2, batch=2))


def test_a_clip_that_cannot_be_read_stops_with_its_name(ball_store_copy):
    store, runs, broken = ball_store_copy
    with pytest.raises(UnreadableClipsError, match=rf"step 0: {broken}\[\d+\].*could not be read.*verify"):
        pretrain((store, runs), ContrastiveRecipe(steps=1, batch=6))


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"kind": "type 1"}, r"kind = 'type 1': one of instance, local-local, both"),
        ({"batch": 1}, r"batch = 1: for instance at least 2"),
        ({"kind": "local-local", "batch": 0}, r"batch = 0: for local-local at least 1"),
        ({"steps": 0}, "steps = 0"),
        ({"seed": -1}, "seed = -1"),
        ({"lr": 0.0}, r"lr = 0\.0: above 0"),
        ({"clip_norm": float("nan")}, "clip_norm = nan"),
        ({"temperature": -1.0}, r"temperature = -1\.0"),
        ({"warmup_fraction": 1.0}, r"warmup_fraction = 1\.0"),
        ({"min_lr_fraction": 1.5}, r"min_lr_fraction = 1\.5"),
        ({"weight_decay": -0.1}, r"weight_decay = -0\.1"),
        ({"augment": AugmentConfig(noise_std=-1)}, "noise_std = -1"),
    ],
)
def test_impossible_recipes_are_refused_by_field(changed, message):
    with pytest.raises(ValueError, match=message):
        ContrastiveRecipe(**changed).validate()


def test_what_does_not_fit_is_refused(ball):
    store, runs = ball
    recipe, one = ContrastiveRecipe(steps=1, batch=2), ContrastiveRuns(runs.paths[:1], runs.subjects[:1], (48,))
    for swin, these, message in (
        (SwinConfig((24, 24, 24, 4), mixer="mamba"), runs, "mixer = 'mamba': SwiFT"),
        (SwinConfig((48, 24, 24, 4)), runs, r"img_size = \(48, 24, 24, 4\).*\(24, 24, 24\)"),
        (SWIN, ContrastiveRuns(runs.paths, runs.subjects[:2], runs.frames), "6 paths, 2 subjects, 6 frames"),
        (SWIN, one, "tells subjects apart, and there is one only: balls/sub-0"),
    ):
        with pytest.raises(ValueError, match=message):
            pretrain_contrastive(recipe, store, these, swin, "voxel", "cpu")


def test_one_subject_is_enough_for_local_local(ball):
    store, runs = ball
    one = ContrastiveRuns(runs.paths[:1], runs.subjects[:1], runs.frames[:1])
    _, losses = pretrain((store, one), ContrastiveRecipe("local-local", steps=2, batch=1))
    assert all(loss > 0 for loss in losses)
