"""What a mixer is: the part of a block in which the tokens of a window meet."""

from torch import Tensor, nn

from neurostorm.model.geometry.windows import Bucket
from neurostorm.model.strd.dropout import StageDropout


class Mixer(nn.Module):
    """Base of the mixers; built with (width, heads, qkv_bias)."""

    def project_in(self, rows: Tensor) -> Tensor:
        """What is done to each token before windows are formed: (..., C) -> (..., C')."""
        return rows

    def forward(self, x: Tensor, bucket: Bucket, strd: StageDropout | None = None) -> Tensor:
        """(windows, N, C') -> (windows, N, C); what absent slots get is dropped."""
        raise TypeError(f"{type(self).__name__} does not say how tokens meet")

    def project_out(self, rows: Tensor) -> Tensor:
        """What is done to each token after windows are dissolved: (..., C) -> (..., C)."""
        return rows
