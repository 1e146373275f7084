"""The attention mixer: multi-head self-attention among the tokens of each window.

A mixer is a module ``mixer(x (windows, N, C), bucket, strd) -> (windows, N, C)``. It sees whole windows and nothing of
the grid: ``bucket`` says which slots are keys and where they lie to each other, ``strd`` is this stage's redundancy
dropout, or None outside training. A mixer registers under the name that its parameters have in the released models.
"""

from einops import rearrange, repeat
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from neurostorm.model.strd import StageDropout
from neurostorm.model.windows import Bucket


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
        if strd is not None:
            mixed = strd.attend(q, k, v, bucket)
        elif bucket.present is None:
            mixed = scaled_dot_product_attention(q, k, v)
        else:
            keys = repeat(bucket.present, "w n -> (b w) 1 1 n", b=len(x) // len(bucket.present))
            mixed = scaled_dot_product_attention(q, k, v, keys)
        return self.proj(rearrange(mixed, "w h n c -> w n (h c)"))
