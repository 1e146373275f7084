"""Heads: from the encoder's features to a prediction.

    features: tokens (B, P', C'), a grid (B, C', d, h, w, T) or, already averaged over tokens, (B, C')

    classification  v1  mean over tokens -> linear
                    v2  mean over tokens -> linear to 4 C' -> linear
                    v3  class token + tokens + learned positions -> transformer -> the class token, normalised -> linear
    regression      v1  mean over tokens -> linear
    embedding       v1  mean over tokens -> linear -> batch norm -> unit length

Parameter names are the released ones, below ``output_head.`` in a released Lightning checkpoint. A grid is flattened in
raster order (d, h, w, frame; the frame fastest), which is also the order of tokens that v3's positions stand for. Where
only brain patches are tokens, give tokens: the grid is zero in its other cells, and zeros would enter the mean.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn.functional import normalize

KINDS = {"classification": ("v1", "v2", "v3"), "regression": ("v1",), "embedding": ("v1",)}  # and their versions

_PREFIX = "output_head."  # of a Lightning checkpoint's keys
_WIDENING = 4  # hidden width over the features' in v2 and v3
_DROPOUT = 0.1  # of v3 in training


class _Head(nn.Module, ABC):
    """``features(x)`` (B, F), what the last linear map reads, and its outputs (B, outputs)."""

    width: int  # C' of the features it takes
    head: nn.Module

    @abstractmethod
    def features(self, x: Tensor) -> Tensor:
        """What the last linear map reads: (B, F)."""

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.features(x))


class LinearHead(_Head):
    """Mean over tokens, then a linear map (v1 of classification and regression)."""

    def __init__(self, width: int, outputs: int) -> None:
        super().__init__()
        self.width = width
        self.head = nn.Linear(width, outputs)

    def features(self, x: Tensor) -> Tensor:
        return mean_of_tokens(x)


class HiddenHead(_Head):
    """Mean over tokens, then two linear maps (v2 of classification)."""

    def __init__(self, width: int, outputs: int) -> None:
        super().__init__()
        self.width = width
        self.hidden = nn.Linear(width, _WIDENING * width)
        self.head = nn.Linear(_WIDENING * width, outputs)

    def features(self, x: Tensor) -> Tensor:
        # Quirk of the released models: no non-linearity follows, so the two maps are one linear map in effect.
        return self.hidden(mean_of_tokens(x))


class TransformerHead(_Head):
    """A class token attends to all tokens through post-norm ReLU layers (v3 of classification).

    Args:
        width: C', a multiple of ``heads``.
        outputs: logits.
        tokens: most tokens that a clip has; each has a learned position, in the order given.
        depth, heads: layers and attention heads.
    """

    def __init__(self, width: int, outputs: int, tokens: int, depth: int, heads: int) -> None:
        super().__init__()
        self.width = width
        self.cls_token = nn.Parameter(torch.empty(1, 1, width))
        self.pos_embed = nn.Parameter(torch.empty(1, tokens + 1, width))
        nn.init.trunc_normal_(self.cls_token, std=0.02)
        nn.init.trunc_normal_(self.pos_embed, std=0.02)
        self.transformer_encoder = nn.ModuleDict()  # nn.TransformerEncoder would start every layer as the same copy
        self.transformer_encoder["layers"] = nn.ModuleList(
            nn.TransformerEncoderLayer(width, heads, _WIDENING * width, _DROPOUT, batch_first=True)
            for _ in range(depth)
        )
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, outputs)

    def features(self, x: Tensor) -> Tensor:
        x = as_tokens(x)
        count, known = x.shape[1] + 1, self.pos_embed.shape[1]
        if count > known:
            raise ValueError(f"features of {count - 1} tokens: this head has positions for {known - 1} (tokens)")
        x = torch.cat([self.cls_token.expand(len(x), -1, -1).to(x.dtype), x], 1) + self.pos_embed[:, :count]
        for layer in self.transformer_encoder["layers"]:  # type: ignore[attr-defined]  # a ModuleList
            x = layer(x)
        return self.norm(x[:, 0])


class EmbeddingHead(_Head):
    """Mean over tokens -> (B, size) of unit length; in training mode B is at least 2, for the batch norm."""

    def __init__(self, width: int, size: int) -> None:
        super().__init__()
        self.width = width
        self.fc1 = nn.Linear(width, size, bias=False)
        self.bn1 = nn.BatchNorm1d(size)

    def features(self, x: Tensor) -> Tensor:
        return mean_of_tokens(x)

    def forward(self, x: Tensor) -> Tensor:
        return normalize(self.bn1(self.fc1(self.features(x))), dim=1)


class VersionedHead(_Head):
    """Holds a classification or regression head as ``head``: the released names have that level."""

    head: _Head

    def __init__(self, head: _Head) -> None:
        super().__init__()
        self.width = head.width
        self.head = head

    def features(self, x: Tensor) -> Tensor:
        return self.head.features(x)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(x)


def as_tokens(x: Tensor) -> Tensor:
    """Tokens (B, P', C') or a grid (B, C', d, h, w, T) -> tokens; a grid's in raster order, the frame fastest."""
    if x.ndim == 6:
        return rearrange(x, "b c d h w t -> b (d h w t) c")
    if x.ndim != 3:
        raise ValueError(f"features of shape {tuple(x.shape)}: tokens (B, P', C') or a grid (B, C', d, h, w, T)")
    return x


def mean_of_tokens(x: Tensor) -> Tensor:
    """Tokens, a grid or the mean itself -> the mean (B, C')."""
    return x if x.ndim == 2 else as_tokens(x).mean(1)


def build_head(
    kind: str,
    width: int,
    outputs: int,
    version: str = "v1",
    *,
    tokens: int | None = None,
    depth: int = 6,
    heads: int = 8,
) -> VersionedHead | EmbeddingHead:
    """A new head on features of width C'.

    Args:
        kind, version: as in ``KINDS``.
        width: C', the width of the encoder's last stage.
        outputs: classification: the number of classes, at least 2. As in the released models two classes have one
            logit (above 0: the second class) and more have one each. Regression: the number of targets.
            Embedding: its size (the released one has 128).
        tokens: v3 only, which needs it: the most tokens of a clip, those of the encoder's last stage.
        depth, heads: v3 only: layers and attention heads; those of the released models by default.

    Raises:
        ValueError: a name is unknown (the valid ones are listed), or a number is missing or impossible.
    """
    if kind not in KINDS:
        raise ValueError(f"kind = {kind!r}: one of {', '.join(KINDS)}")
    if version not in KINDS[kind]:
        raise ValueError(f"version = {version!r}: for {kind} one of {', '.join(KINDS[kind])}")
    least = 2 if kind == "classification" else 1
    if width < 1 or outputs < least:
        raise ValueError(f"width = {width}, outputs = {outputs}: for {kind} at least 1 and {least}")
    if kind == "embedding":
        return EmbeddingHead(width, outputs)
    logits = 1 if kind == "classification" and outputs == 2 else outputs
    if version == "v3":
        return VersionedHead(_transformer_head(width, logits, tokens, depth, heads))
    return VersionedHead(LinearHead(width, logits) if version == "v1" else HiddenHead(width, logits))


def head_from_released(state_dict: Mapping[str, Tensor], heads: int = 8) -> VersionedHead | EmbeddingHead:
    """The head whose released parameters these are, in eval mode.

    Kind, version and sizes follow from names and shapes; v1 of classification and of regression are the same module.

    Args:
        state_dict: a released Lightning checkpoint's, of which ``output_head.*`` counts, or a head's alone.
        heads: attention heads of a v3 head, which its parameters do not tell; the released default.

    Raises:
        ValueError: listing the keys that are unexpected, missing or of another shape, or those that fit no head.
    """
    own = {key.removeprefix(_PREFIX): value for key, value in state_dict.items() if key.startswith(_PREFIX)}
    given = own or dict(state_dict)
    head = _matching_head(given, heads)
    if head is None:
        raise ValueError(f"state dict: no released head has these keys: {sorted(given) or 'none at all'}")
    expected = head.state_dict()
    shared = sorted(expected.keys() & given.keys())
    shapes = [
        f"{key} {tuple(given[key].shape)} instead of {tuple(expected[key].shape)}"
        for key in shared
        if given[key].shape != expected[key].shape
    ]
    missing, unexpected = sorted(expected.keys() - given.keys()), sorted(given.keys() - expected.keys())
    if missing or unexpected or shapes:
        raise ValueError(
            f"state dict: it looks like a released head but does not fit. Missing: {missing or 'nothing'}. "
            f"Unexpected: {unexpected or 'nothing'}. Other shapes: {shapes or 'nothing'}."
        )
    head.load_state_dict(given)
    return head.eval()


def _matching_head(given: Mapping[str, Tensor], heads: int) -> VersionedHead | EmbeddingHead | None:
    """A new head of the kind, version and sizes that tell-tale parameters show; None if there are none of these."""
    if "fc1.weight" in given:
        size, width = _sizes(given, "fc1.weight", 2)
        return EmbeddingHead(width, size)
    if "head.head.weight" not in given:
        return None
    logits, width = _sizes(given, "head.head.weight", 2)
    if "head.pos_embed" in given:
        places = _sizes(given, "head.pos_embed", 3)[1]
        layers = {key.split(".")[3] for key in given if key.startswith("head.transformer_encoder.layers.")}
        return VersionedHead(_transformer_head(width, logits, places - 1, len(layers), heads))
    if "head.hidden.weight" in given:
        return VersionedHead(HiddenHead(_sizes(given, "head.hidden.weight", 2)[1], logits))
    return VersionedHead(LinearHead(width, logits))


def _sizes(given: Mapping[str, Tensor], key: str, axes: int) -> tuple[int, ...]:
    if given[key].ndim != axes:
        raise ValueError(f"state dict: {key} of shape {tuple(given[key].shape)}: {axes} axes are expected")
    return tuple(given[key].shape)


def _transformer_head(width: int, logits: int, tokens: int | None, depth: int, heads: int) -> TransformerHead:
    if tokens is None or tokens < 1:
        raise ValueError(f"tokens = {tokens}: v3 has a position per token, give the most tokens that a clip has")
    if depth < 1:
        raise ValueError(f"depth = {depth}: at least one layer")
    if heads < 1 or width % heads:
        raise ValueError(f"heads = {heads}: it must divide the features' width {width}")
    return TransformerHead(width, logits, tokens, depth, heads)
