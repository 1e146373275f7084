"""The attention mixer: multi-head self-attention among the tokens of each window."""

from einops import rearrange, repeat
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from neurostorm.model.geometry.windows import Bucket
from neurostorm.model.mixers.mixer import Mixer
from neurostorm.model.strd.dropout import StageDropout


class WindowAttention(Mixer):
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

    def project_in(self, rows: Tensor) -> Tensor:
        """Tokens (..., C) -> queries, keys and values (..., 3C)."""
        return self.qkv(rows)

    def forward(self, qkv: Tensor, bucket: Bucket, strd: StageDropout | None = None) -> Tensor:
        """(windows, N, 3C) -> what each token takes from its window, heads side by side (windows, N, C)."""
        q, k, v = (rearrange(part, "w n (h c) -> w h n c", h=self.heads) for part in qkv.chunk(3, -1))
        if strd is not None:
            mixed = strd.attend(q, k, v, bucket)
        elif (keys := bucket.keys) is None:
            mixed = scaled_dot_product_attention(q, k, v)
        else:
            keys = repeat(keys, "w n -> (b w) 1 1 n", b=len(qkv) // len(keys))
            mixed = scaled_dot_product_attention(q, k, v, keys)
        return rearrange(mixed, "w h n c -> w n (h c)")

    def project_out(self, rows: Tensor) -> Tensor:
        """(..., C) -> (..., C)."""
        return self.proj(rows)
