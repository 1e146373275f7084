"""The attention mixer: multi-head self-attention among the tokens of each window.

A mixer is a module ``mixer(x (windows, N, C), bucket, strd) -> (windows, N, C)``. It sees whole windows and nothing of
the grid: ``bucket`` says where the tokens of those windows lie to each other and ``strd`` is this stage's redundancy
dropout, or None outside training. A mixer registers under the name that its parameters have in the released models.
"""

from einops import rearrange
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from neurostorm.model.geometry import Bucket
from neurostorm.model.strd import StageDropout, redundancy_attention


class WindowAttention(nn.Module):
    """softmax(q k^T / sqrt(d)) v per head, projected; no position bias. Scores are only formed where STRD needs them.

    Args:
        width: channels C.
        heads: attention heads; ``width`` is a multiple of it.
        qkv_bias: whether query, key and value have a bias.
    """

    def __init__(self, width: int, heads: int, qkv_bias: bool) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width, bias=qkv_bias)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor, bucket: Bucket, strd: StageDropout | None = None) -> Tensor:
        q, k, v = rearrange(self.qkv(x), "w n (three h c) -> three w h n c", three=3, h=self.heads).unbind(0)
        if strd is None:
            mixed = scaled_dot_product_attention(q, k, v)
        else:
            mixed, dropped = redundancy_attention(q, k, v, strd.neighbours(bucket))
            strd.count(dropped, mixed.shape[0] * self.heads * x.shape[1] ** 2)
        return self.proj(rearrange(mixed, "w h n c -> w n (h c)"))
