"""The attention mixer: multi-head self-attention among the tokens of each window."""

from einops import rearrange, repeat
from torch import Tensor, nn
from torch.nn.functional import linear, pad, scaled_dot_product_attention

from neurostorm.model.mixer import Mixer
from neurostorm.model.strd import StageDropout
from neurostorm.model.windows import Bucket


class WindowAttention(Mixer):
    """softmax(q k^T / sqrt(d)) v per head, projected; no position bias. Scores are only formed where STRD needs them.

    Args:
        width: channels C.
        heads: attention heads; ``width`` is a multiple of it.
        qkv_bias: whether query, key and value have a bias.
    """

    def __init__(self, width: int, heads: int, qkv_bias: bool) -> None:
        super().__init__()
        self.heads, self.head_width = heads, width // heads
        self._padded_width = padded_head_width(self.head_width)
        self.qkv = nn.Linear(width, 3 * width, bias=qkv_bias)
        self.proj = nn.Linear(width, width)

    def project_in(self, rows: Tensor) -> Tensor:
        """Tokens (..., C) -> queries, keys and values (..., 3 * heads * padded head width), the padding zero."""
        if self._padded_width == self.head_width:
            return self.qkv(rows)
        weight, bias = self.qkv.weight, self.qkv.bias
        return linear(rows, self._padded(weight), None if bias is None else self._padded(bias[:, None])[:, 0])

    def forward(self, qkv: Tensor, bucket: Bucket, strd: StageDropout | None = None) -> Tensor:
        """What `project_in` made of the windows -> what each token takes from its window, heads side by side."""
        q, k, v = (rearrange(part, "w n (h c) -> w h n c", h=self.heads) for part in qkv.chunk(3, -1))
        if strd is not None:
            q, k, v = (part[..., : self.head_width] for part in (q, k, v))
            mixed = strd.attend(q, k, v, bucket)
        else:
            keys = None
            if bucket.present is not None:
                keys = repeat(bucket.present, "w n -> (b w) 1 1 n", b=len(qkv) // len(bucket.present))
            mixed = scaled_dot_product_attention(q, k, v, keys, scale=self.head_width**-0.5)
        return rearrange(mixed, "w h n c -> w n (h c)")

    def project_out(self, rows: Tensor) -> Tensor:
        """What the heads took, side by side and with or without their padding, -> (..., C)."""
        if rows.shape[-1] == self.proj.in_features:
            return self.proj(rows)
        return linear(rows, self._padded(self.proj.weight.mT).mT, self.proj.bias)

    def _padded(self, weight: Tensor) -> Tensor:
        """(3C, X) -> (3 * heads * padded head width, X) with zeros for the channels that do not exist."""
        each = rearrange(weight, "(s c) x -> s c x", c=self.head_width)
        return pad(each, (0, 0, 0, self._padded_width - self.head_width)).flatten(0, 1)


def padded_head_width(width: int) -> int:
    """Channels per head that attention is computed with: fused kernels work in sixteens, twelve take longer than that.

    The channels that are added have zero weights, so they cost no copy and change nothing.
    """
    return width if width <= 8 else -(-width // 16) * 16
