import pytest
import torch

from neurostorm.model.geometry.tokens import geometry_of
from neurostorm.model.geometry.windows import Bucket
from neurostorm.model.mixers.attention import WindowAttention
from neurostorm.model.strd.dropout import StageDropout, StrdConfig

WINDOW = (2, 2, 2, 2)
BUCKET = geometry_of((2, 2, 2, 4), (WINDOW,), torch.device("cpu")).levels[0].windows(WINDOW, False).buckets[0]


def run(mixer, x, bucket, strd=None):
    return mixer.project_out(mixer(mixer.project_in(x), bucket, strd))


@pytest.mark.parametrize("heads", [1, 3])
def test_equals_softmax_attention_written_out(heads):
    mixer = WindowAttention(12, heads, qkv_bias=True).double()
    x = torch.randn(4, 16, 12, dtype=torch.float64)
    q, k, v = mixer.qkv(x).view(4, 16, 3, heads, 12 // heads).permute(2, 0, 3, 1, 4)
    weights = (q @ k.transpose(-1, -2) / (12 // heads) ** 0.5).softmax(-1)
    expected = mixer.proj((weights @ v).transpose(1, 2).reshape(4, 16, 12))
    assert torch.allclose(run(mixer, x, BUCKET), expected, atol=1e-12)


def test_windows_do_not_see_each_other():
    mixer = WindowAttention(8, 2, qkv_bias=False)
    x = torch.randn(2, 16, 8)
    changed = x.clone()
    changed[1] += 1
    assert torch.equal(run(mixer, x, BUCKET)[0], run(mixer, changed, BUCKET)[0])


def test_strd_without_neighbours_is_plain_attention():
    mixer = WindowAttention(8, 2, qkv_bias=True)
    strd = StageDropout(StrdConfig(True, space=1, time=1))
    x = torch.randn(4, 16, 8)
    assert torch.allclose(run(mixer, x, BUCKET, strd), run(mixer, x, BUCKET), atol=1e-6)
    assert strd.rate() == 0


def test_strd_counts_the_elements_it_drops():
    mixer = WindowAttention(8, 2, qkv_bias=True)
    strd = StageDropout(StrdConfig(True))
    x = torch.randn(64, 16, 8)
    torch.manual_seed(0)
    assert not torch.allclose(run(mixer, x, BUCKET, strd), run(mixer, x, BUCKET), atol=1e-4)
    assert 0 < strd.rate() < 0.5


def test_absent_slots_are_no_keys():
    mixer, x = WindowAttention(8, 2, qkv_bias=True), torch.randn(4, 6, 8)
    present = torch.tensor([[True] * 6, [True] * 4 + [False] * 2])
    bucket = Bucket(torch.zeros(2, 6, dtype=torch.long), None, present)  # two windows, a batch of two
    out = run(mixer, x, bucket)
    whole = Bucket(torch.zeros(1, 6, dtype=torch.long))
    assert torch.allclose(out[::2], run(mixer, x[::2], whole), atol=1e-6)
    assert torch.allclose(out[1::2, :4], run(mixer, x[1::2, :4], whole), atol=1e-6)
