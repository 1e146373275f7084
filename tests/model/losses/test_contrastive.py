"""Contrastive losses against the released value, a twin in loops, and what each must not count."""

import math

import pytest
import torch
from torch import nn

from neurostorm.model.config import SwinConfig
from neurostorm.model.encoder import SwinEncoder
from neurostorm.model.losses.contrastive import ContrastiveModel, instance_loss, local_local_loss, nt_xent

# shared/golden/misc.json, "ntxent": the released NTXentLoss at temperature 0.1; rounded to six decimals
GOLDEN_Z1 = [
    [0.564641, -0.941987, 0.675441, -0.756038, -0.854958, -1.077748, -0.935289, 0.705237, 0.167063, -2.042945],
    [0.359764, 0.762208, 1.637292, 0.339801, 0.277118, 0.808708, 0.063744, -2.266235, -0.312444, 2.084459],
    [1.210741, -0.035354, 0.126801, -0.378846, 0.846945, -0.543282, -0.72779, -1.846717, 0.926414, 1.716335],
    [-0.17882, -0.657197, 0.137364, -0.124179, 0.041906, 0.220533, 0.561847, 1.127179, -0.602411, -1.265627],
    [0.15129, 0.623422, -0.125943, 0.368607, -1.004443, 0.076774, 2.022341, -0.009869, -0.918789, -0.218999],
    [-0.011576, -1.472642, -0.730372, -0.012952, -0.950649, -0.35416, -0.214648, -1.222951, -0.197209, 0.367101],
]  # fmt: skip
GOLDEN_Z2 = [
    [0.348853, -1.248285, -0.648664, -1.093835, 1.660044, -1.214987, 0.250443, 0.630653, 0.882989, 0.407688],
    [1.682908, -0.52233, -0.439732, -1.61973, 0.93285, 0.382583, -2.234076, 0.018467, -1.06955, -1.184173],
    [0.712549, 0.209493, -0.117079, -0.017162, 1.108941, -0.319363, -0.338751, -0.489505, -0.492793, -1.028181],
    [-2.156701, 0.233097, -0.995482, 1.39256, -0.118894, -1.114753, 0.150578, -0.094737, -1.756096, -0.737726],
    [0.960382, -0.398401, -0.131072, -1.149131, 2.339948, -0.946769, 0.470186, 0.98248, 1.258474, 0.706461],
    [0.18933, 0.924619, 0.877931, 1.762173, -1.717948, 0.24104, -0.387238, 1.02575, -0.809981, 0.615089],
]  # fmt: skip
GOLDEN_LOSS = 6.230484


def vectors(*shape, seed=0):
    return torch.randn(2, *shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def twin(z1, z2, temperature, subject=None):
    """Chen et al. 2020, eq. 1, one anchor after another in plain numbers."""
    both = [*z1, *z2]
    count = len(z1)
    losses = []
    for anchor in range(2 * count):
        partner = (anchor + count) % (2 * count)

        def likeness(other, anchor=anchor):
            cosine = torch.dot(both[anchor], both[other]) / (both[anchor].norm() * both[other].norm())
            return math.exp(cosine / temperature)

        candidates = [
            other
            for other in range(2 * count)
            if other == partner
            or (other != anchor and (subject is None or subject[other % count] != subject[anchor % count]))
        ]
        losses.append(-math.log(likeness(partner) / sum(map(likeness, candidates))))
    return sum(losses) / len(losses)


def test_nt_xent_equals_the_released_value():
    assert nt_xent(torch.tensor(GOLDEN_Z1), torch.tensor(GOLDEN_Z2)).item() == pytest.approx(GOLDEN_LOSS, rel=2e-6)


@pytest.mark.parametrize("temperature", [0.1, 0.5, 2.0])
@pytest.mark.parametrize("shape", [(1, 3), (2, 5), (7, 4)])
def test_nt_xent_equals_its_twin(shape, temperature):
    z1, z2 = vectors(*shape)
    loss = nt_xent(z1, z2, temperature)
    assert loss.shape == () and loss.item() == pytest.approx(twin(z1, z2, temperature), abs=1e-12)


def test_nt_xent_feels_neither_length_nor_order():
    z1, z2 = vectors(6, 8)
    order = torch.tensor([3, 0, 5, 1, 4, 2])
    loss = nt_xent(z1, z2)
    for same in (nt_xent(z2, z1), nt_xent(z1[order], z2[order]), nt_xent(7 * z1, 0.01 * z2)):
        torch.testing.assert_close(same, loss)
    assert nt_xent(z1, z2[order]) != loss


def test_the_loss_is_lowest_for_equal_pairs_that_differ_from_the_others():
    apart = torch.eye(4)
    assert nt_xent(apart, apart) < 1e-3 < 1 < nt_xent(apart, apart.roll(1, 0))
    same = torch.ones(4, 3)
    assert nt_xent(same, same).item() == pytest.approx(math.log(7)), "whoever is like all others is found by chance"


@pytest.mark.parametrize("temperature", [1e-3, 0.1, 100.0])
def test_extreme_values_give_finite_losses_and_gradients(temperature):
    z1, z2 = (z.float() for z in vectors(4, 3))
    z1[0], z1[1], z2[2] = 0.0, 1e18, 1e-30
    z1.requires_grad_()
    loss = nt_xent(z1, z2, temperature)
    loss.backward()
    assert loss.isfinite() and z1.grad.isfinite().all()


def test_half_precision_is_widened_even_under_autocast():
    z1, z2 = vectors(5, 16)
    exact = nt_xent(z1.bfloat16().double(), z2.bfloat16().double()).item()
    with torch.autocast("cpu", torch.bfloat16):
        loss = nt_xent(z1.bfloat16(), z2.bfloat16())
    assert loss.dtype == torch.float32 and loss.item() == pytest.approx(exact, rel=1e-5)


def test_gradients_are_those_of_the_formula():
    z1, z2 = (z.requires_grad_() for z in vectors(4, 3))
    subject = torch.tensor([0, 1, 0, 2])
    assert torch.autograd.gradcheck(lambda a, b: nt_xent(a, b, 0.5), (z1, z2))
    assert torch.autograd.gradcheck(lambda a, b: instance_loss(a, b, subject, 0.5), (z1, z2))


def test_different_subjects_are_nt_xents_pairs():
    a, b = vectors(5, 4)
    for subject in (None, torch.tensor([9, 4, 7, 1, 0])):
        assert torch.equal(instance_loss(a, b, subject, 0.2), nt_xent(a, b, 0.2))


@pytest.mark.parametrize("subject", [[0, 1, 0, 2, 3], [5, 5, 5, 5, 6], [1, 1, 2, 2, 2]])
def test_a_subject_that_is_there_twice_is_no_candidate_for_itself(subject):
    a, b = vectors(5, 4, seed=3)
    loss = instance_loss(a, b, torch.tensor(subject), 0.2)
    assert loss.item() == pytest.approx(twin(a, b, 0.2, subject), abs=1e-12)
    assert loss < instance_loss(a, b, None, 0.2)


def test_a_batch_of_one_subject_has_nothing_to_tell_apart():
    a, b = (z.requires_grad_() for z in vectors(3, 4))
    loss = instance_loss(a, b, torch.zeros(3, dtype=torch.long))
    loss.backward()
    assert loss.item() == 0.0 and a.grad.abs().max() == 0


@pytest.mark.parametrize("clips", [2, 3])
def test_local_local_is_the_mean_over_subjects_of_nt_xent_within_each(clips):
    first, second = vectors(4, clips, 6)
    expected = sum(twin(own, other, 0.3) for own, other in zip(first, second, strict=True)) / 4
    assert local_local_loss(first, second, 0.3).item() == pytest.approx(expected, abs=1e-12)


def test_local_local_compares_no_two_subjects_but_two_clips_of_one():
    clip = torch.eye(2)
    alike = torch.stack([clip, clip])  # two subjects whose clips are the same
    assert local_local_loss(alike, alike) < 1e-3, "the other subject's equal clip is no candidate"
    still = torch.ones(2, 2, 2)  # each subject's clips are like each other
    assert local_local_loss(still, still).item() == pytest.approx(math.log(3))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda z: nt_xent(z, z[:2]), r"\(4, 3\) and \(2, 3\)"),
        (lambda z: nt_xent(z[0], z[0]), r"z1 of shape \(3,\)"),
        (lambda z: nt_xent(z, z, 0.0), r"temperature = 0\.0"),
        (lambda z: nt_xent(z, z, math.nan), "temperature = nan"),
        (lambda z: instance_loss(z, z, torch.arange(3)), r"subject of shape \(3,\)"),
        (lambda z: local_local_loss(z, z), r"first of shape \(4, 3\)"),
        (lambda z: local_local_loss(z[:, None], z[:, None]), "two clips at least"),
    ],
)
def test_impossible_input_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call(torch.randn(4, 3))


@pytest.fixture
def encoder():
    """Two stages over 2 x 2 x 4 patches, of which the brain leaves some out."""
    brain = torch.zeros(12, 12, 24, dtype=torch.bool)
    brain[2:9, 3:10, 4:16] = True
    swin = SwinConfig((12, 12, 24, 3), embed_dim=4, depths=(1, 1), heads=(1, 2), window=(2, 2, 2, 2), tokens="brain")
    torch.manual_seed(0)
    return SwinEncoder(swin, brain=brain)


def test_the_model_projects_the_mean_of_the_tokens_that_exist(encoder):
    model = ContrastiveModel(encoder)
    patches = encoder.to_patches(torch.randn(3, 1, 12, 12, 24, 3))
    out = model(patches)
    assert out.shape == (3, 128) and torch.allclose(out.norm(dim=1), torch.ones(3))
    assert encoder.tokens_per_frame < encoder.config.space
    projected = encoder.feature_tokens(patches).mean(1) @ model.head.fc1.weight.T
    normed = (projected - projected.mean(0)) / (projected.var(0, correction=0) + model.head.bn1.eps).sqrt()
    torch.testing.assert_close(out, nn.functional.normalize(normed, dim=1), rtol=1e-4, atol=1e-5)


def test_another_projection_can_be_given_and_the_loss_reaches_the_encoder(encoder):
    model = ContrastiveModel(encoder, nn.Sequential(nn.Flatten(), nn.LazyLinear(5)))
    views = [model(encoder.to_patches(torch.randn(2, 1, 12, 12, 24, 3))) for _ in range(2)]
    assert views[0].shape == (2, 5)
    nt_xent(*views).backward()
    assert all(parameter.grad is not None for parameter in encoder.parameters())
    assert encoder.patch_embed.fc.weight.grad.abs().max() > 0
