"""Released weights in our modules.

    state dict of the released SwiFT + its own hyperparameter names --> SwinEncoder with those weights, in eval mode

Names and shapes must match one for one: a checkpoint that fits only in part is refused with every key listed, because
a silently skipped key is a model that was never loaded. What may be left over, and why, is listed in ``_IGNORED``.
"""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from neurostorm.model.swin4d import SwinConfig, SwinEncoder

# hyperparameter of the released code -> field of SwinConfig
_FIELDS = {
    "img_size": "img_size",
    "patch_size": "patch_size",
    "in_chans": "in_chans",
    "embed_dim": "embed_dim",
    "depths": "depths",
    "num_heads": "heads",
    "window_size": "window",
    "first_window_size": "first_window",
    "last_layer_full_MSA": "full_last",
    "c_multiplier": "c_multiplier",
    "mlp_ratio": "mlp_ratio",
    "qkv_bias": "qkv_bias",
}
_REQUIRED = ("img_size", "patch_size", "embed_dim", "depths", "num_heads", "window_size")

_PREFIX = "model."  # of a Lightning checkpoint; its other keys belong to the head
_IGNORED = ("norm.weight", "norm.bias")  # the released SwiFT has a final norm that its forward never calls


class ReferenceMismatch(ValueError):
    """The state dict and the hyperparameters do not describe the same released model; lists every key."""


class ReferenceEncoder(SwinEncoder):
    """A SwinEncoder with released weights: (B, C, X, Y, Z, T) -> (B, C', d, h, w, T).

    Attributes:
        unused_keys: keys of the state dict that the released forward does not use either, or that belong to a head.
        missing_keys: parameters of this module that the state dict need not have and has not.
    """

    unused_keys: tuple[str, ...] = ()
    missing_keys: tuple[str, ...] = ()


def load_reference(state_dict: Mapping[str, Tensor], hparams: Mapping[str, Any]) -> ReferenceEncoder:
    """The released SwiFT encoder.

    Args:
        state_dict: released parameter names, bare or as in a Lightning checkpoint (``model.`` before each).
        hparams: the released hyperparameter names; others are ignored. Needed are img_size, patch_size, embed_dim,
            depths, num_heads and window_size.

    Returns:
        The encoder in eval mode, float32.

    Raises:
        ReferenceMismatch: a hyperparameter is missing, or keys are missing, unexpected or of another shape.
    """
    absent = [name for name in _REQUIRED if name not in hparams]
    if absent:
        raise ReferenceMismatch(f"hyperparameters missing: {', '.join(absent)}")
    config = SwinConfig(**{ours: hparams[theirs] for theirs, ours in _FIELDS.items() if theirs in hparams})
    encoder = ReferenceEncoder(config)
    given, heads = _strip_prefix(state_dict)
    unused = [key for key in _IGNORED if key in given]
    weights = {key: value for key, value in given.items() if key not in unused}
    _require_match(weights, encoder.state_dict())
    encoder.load_state_dict(weights)
    encoder.unused_keys = (*unused, *heads)
    return encoder.eval()


def _strip_prefix(state_dict: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], list[str]]:
    """Parameters of the network by bare name, and the keys beside them (of a head)."""
    if not any(key.startswith(_PREFIX) for key in state_dict):
        return dict(state_dict), []
    network = {key.removeprefix(_PREFIX): value for key, value in state_dict.items() if key.startswith(_PREFIX)}
    return network, [key for key in state_dict if not key.startswith(_PREFIX)]


def _require_match(weights: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    missing = sorted(expected.keys() - weights.keys())
    unexpected = sorted(weights.keys() - expected.keys())
    shapes = [
        f"{name} {tuple(weights[name].shape)} instead of {tuple(expected[name].shape)}"
        for name in sorted(expected.keys() & weights.keys())
        if weights[name].shape != expected[name].shape
    ]
    if missing or unexpected or shapes:
        raise ReferenceMismatch(
            f"the state dict does not fit the hyperparameters. Missing: {missing or 'nothing'}. "
            f"Unexpected: {unexpected or 'nothing'}. Other shapes: {shapes or 'nothing'}."
        )
