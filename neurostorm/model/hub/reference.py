"""Released weights in our modules.

    .ckpt, state dict --strip prefixes--> keys --> SwiFT, NeuroSTORM or its MAE? --> our module, paper layout, eval mode
                                                          |
    its own hyperparameter names ------> SwinConfig, MaskConfig, StrdConfig

Names and shapes must match one for one: a checkpoint that fits only in part is refused with every key listed, because
a silently skipped key is a model that was never loaded. What may be left over or lacking, and why, is said in
``_optional`` and ``_IGNORED``. Files are unpickled weights-only: a checkpoint cannot run code.

    python -m neurostorm.model.hub.reference CKPT OUT     writes OUT/model.safetensors and OUT/config.json
"""

import argparse
import json
import os
import pickle
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from neurostorm.io.errors import UserError
from neurostorm.model.autoencoder import MaskedAutoencoder
from neurostorm.model.config import SwinConfig
from neurostorm.model.encoder import SwinEncoder
from neurostorm.model.hub.pretrained import save_pretrained
from neurostorm.model.masking.masks import MaskConfig
from neurostorm.model.strd.dropout import StrdConfig

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
# Of the released NeuroSTORM, as an example of what a checkpoint without hyperparameters needs; the last three are of
# its autoencoder alone.
RELEASED = {
    "img_size": [96, 96, 96, 20],
    "patch_size": [6, 6, 6, 1],
    "in_chans": 1,
    "embed_dim": 36,
    "depths": [2, 2, 6, 2],
    "num_heads": [3, 6, 12, 24],
    "window_size": [4, 4, 4, 4],
    "first_window_size": [4, 4, 4, 4],
    "last_layer_full_MSA": True,
    "c_multiplier": 2,
    "spatial_mask": "window",
    "time_mask": "random",
    "mask_ratio": 0.5,
}
# Plain containers: to unpickle one runs no code of the file.
_SAFE_CLASSES: list[Any] = [argparse.Namespace]
_REFUSED = re.compile(r"GLOBAL (\S+)")  # in torch's words, the class that a weights-only load refused
_PLAIN = """\
  import torch
  kept = torch.load({path!r}, map_location="cpu", weights_only=False)  # runs code: only if you trust the file
  plain = (bool, int, float, str, list, tuple)
  hparams = {{k: v for k, v in dict(kept["hyper_parameters"]).items() if isinstance(v, plain)}}
  torch.save({{"state_dict": kept["state_dict"], "hyper_parameters": hparams}}, "plain.ckpt")"""

# (spatial_mask, time_mask) of the released code -> our strategy; its atlas masks are the same for both time masks
_MASKS = {
    ("random", "random"): "random",
    ("window", "random"): "window",
    ("random", "tube"): "tube",
    ("window", "tube"): "window-tube",
    ("atlas", "random"): "atlas",
    ("atlas", "tube"): "atlas",
}

_PREFIX, _HEAD = "model.", "output_head."  # of a Lightning checkpoint's keys
_IGNORED = ("norm.weight", "norm.bias")  # the released SwiFT has a final norm that its forward never calls
_OF_MAE = ("mask_token", "first_patch_expanding.", "layers_up.", "norm_up.", "decoder_pred.")


class ReferenceMismatch(UserError, ValueError):
    """The checkpoint and the hyperparameters do not describe the same released model; lists every key."""


class _Released:
    """What a module with released weights has beside those.

    Attributes:
        unused_keys: keys of the checkpoint that the released forward does not use either, or that belong to a head.
        missing_keys: parameters of this module that the checkpoint need not have and has not; they are zero.
    """

    unused_keys: tuple[str, ...] = ()
    missing_keys: tuple[str, ...] = ()

    def save_pretrained(self, directory: str | os.PathLike[str]) -> None:
        """Write the model as :func:`neurostorm.model.hub.pretrained.save_pretrained` does."""
        save_pretrained(self, directory)  # type: ignore[arg-type]


class ReferenceEncoder(_Released, SwinEncoder):
    """A SwinEncoder with released weights: (B, C, X, Y, Z, T) -> (B, C', d, h, w, T)."""


class ReferenceMae(_Released, MaskedAutoencoder):
    """A MaskedAutoencoder with released weights; ``mae(x, mask=mask)`` takes the released masks."""


def load_reference(
    checkpoint: Mapping[str, Tensor] | str | os.PathLike[str], hparams: Mapping[str, Any] | None = None
) -> ReferenceEncoder | ReferenceMae:
    """A released encoder (NeuroSTORM or SwiFT) or masked autoencoder, told apart by the parameters' names.

    Args:
        checkpoint: released parameter names, bare or as in a Lightning checkpoint (``model.`` before each), or the path
            of a Lightning ``.ckpt``, of a saved state dict, or of a safetensors file.
        hparams: the released hyperparameter names; others are ignored. Needed are img_size, patch_size, embed_dim,
            depths, num_heads and window_size. They add to those that a Lightning checkpoint holds.

    Returns:
        The module in eval mode, float32, in the paper's layout. An encoder gives ``module(x)``, features (B, C', d, h,
        w, T); an autoencoder ``mae(x, mask=mask)``, whose mask has the released shape: (B, tokens) for random and
        atlas, (B, blocks) for windows and tubes, both in raster order with the frame fastest.

    Raises:
        ReferenceMismatch: the file cannot be read, a hyperparameter is missing or impossible, or keys are missing,
            unexpected or of another shape.
    """
    if isinstance(checkpoint, str | os.PathLike):
        checkpoint, stored = read_checkpoint(Path(checkpoint))
        hparams = {**stored, **(hparams or {})}
    given, heads = _strip_prefix(checkpoint)
    hparams = hparams or {}
    absent = [name for name in _REQUIRED if name not in hparams]
    if absent:
        example = ",\n  ".join(f'"{name}": {json.dumps(value)}' for name, value in RELEASED.items())
        raise ReferenceMismatch(
            f"hyperparameters missing: {', '.join(absent)}. Write those that the model was trained with to a JSON file "
            "and convert with it: python -m neurostorm.model.hub.reference CKPT OUT --hparams FILE.json. Those of the "
            f"released NeuroSTORM:\n{{\n  {example}\n}}"
        )
    try:
        module = _build(given, hparams)
    except (TypeError, ValueError) as error:
        raise ReferenceMismatch(f"hyperparameters: {error}") from error
    expected = module.state_dict()
    unused = [key for key in given if key in _IGNORED or (key == "atlas_map" and key not in expected)]
    weights = {key: value for key, value in given.items() if key not in unused}
    missing = sorted(expected.keys() - weights.keys())
    lacking = [key for key in missing if key in _optional(module)]
    _require_match(weights, {key: value for key, value in expected.items() if key not in lacking})
    module.load_state_dict(weights, strict=False)
    module.unused_keys, module.missing_keys = (*unused, *heads), tuple(lacking)
    return module.eval()


def read_checkpoint(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The state dict of a file and the hyperparameters beside it; unpickled weights-only.

    Raises ReferenceMismatch naming the file when it cannot be read or holds no state dict.
    """
    _require_file(path)
    try:
        if path.suffix == ".safetensors":
            return load_file(path), {}
        _require_pickle(path)
        with torch.serialization.safe_globals(_SAFE_CLASSES):
            content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        refused = _REFUSED.search(str(error))
        raise ReferenceMismatch(
            f"{path}: refused, it holds more than tensors and plain values"
            f"{f' ({refused[1]})' if refused else ''}, and to load that could run code. If you trust the file, save "
            f"what is needed of it, and convert plain.ckpt:\n{_PLAIN.format(path=str(path))}"
        ) from error
    except (OSError, RuntimeError, EOFError, SafetensorError) as error:
        raise ReferenceMismatch(f"{path}: cannot be read ({error}); download or copy it again") from error
    weights = content.get("state_dict", content) if isinstance(content, dict) else None
    if not isinstance(weights, dict) or not weights or not all(isinstance(v, Tensor) for v in weights.values()):
        found = f"a {type(content).__name__}" if weights is None else f"entries {', '.join(map(str, content))[:200]}"
        raise ReferenceMismatch(
            f"{path}: no state dict in it, but {found}: expected a Lightning checkpoint, or names and tensors"
        )
    stored = content.get("hyper_parameters") if weights is not content else None
    return dict(weights), _named(stored, path)


def _named(stored: object, path: Path) -> dict[str, Any]:
    """Hyperparameters by name, out of a dict or of an argparse.Namespace, which may itself be an entry."""
    if stored is None:
        return {}
    found = vars(stored) if isinstance(stored, argparse.Namespace) else stored
    if not isinstance(found, Mapping):
        raise ReferenceMismatch(
            f"{path}: its 'hyper_parameters' are a {type(found).__name__}, not names and values: give them with "
            "--hparams FILE.json"
        )
    inner = [vars(value) for value in found.values() if isinstance(value, argparse.Namespace)]
    return {name: value for part in (*inner, found) for name, value in part.items()}


def _require_file(path: Path) -> None:
    """ReferenceMismatch unless `path` is a file, with the checkpoints of the folder that it names, or that it is in."""
    if path.is_file():
        return
    folder = path if path.is_dir() else path.parent
    names = sorted(str(file) for file in folder.glob("*") if file.suffix in (".ckpt", ".pt", ".pth", ".safetensors"))
    what = "is a folder" if path.is_dir() else "is not there"
    there = f"{folder} holds {', '.join(names[:3])}" if names else f"{folder} holds none (.ckpt, .pt, .safetensors)"
    raise ReferenceMismatch(f"{path}: {what}; give the file of a checkpoint, {there}")


def _require_pickle(path: Path) -> None:
    """ReferenceMismatch for what torch.save cannot have written, such as the page or pointer that a download gave."""
    with path.open("rb") as file:
        start = file.read(60)
    if start[:2] == b"PK" or start[:1] == b"\x80":  # a zip file, or a pickle of old
        return
    shown = start.decode(errors="replace").split("\n")[0].strip()
    if not start:
        raise ReferenceMismatch(f"{path}: is empty; download or copy it again")
    if shown.startswith("version https://git-lfs"):
        raise ReferenceMismatch(f"{path}: is a Git LFS pointer, not the checkpoint: run `git lfs pull` in its folder")
    raise ReferenceMismatch(
        f"{path}: is no checkpoint, it starts with {shown[:40]!r}. Download the file itself, not a page about it; a "
        "safetensors file must be named *.safetensors"
    )


def _build(given: Mapping[str, Tensor], hparams: Mapping[str, Any]) -> ReferenceEncoder | ReferenceMae:
    """The module that the keys and the hyperparameters describe, with weights of its own."""
    fields = {ours: hparams[theirs] for theirs, ours in _FIELDS.items() if theirs in hparams}
    of_mamba = sum(".mamba." in key for key in given) > sum(".attn." in key for key in given)
    prompts = max((value.shape[1] for key, value in given.items() if key.endswith(".prompt")), default=0)
    swin = SwinConfig(**fields, mixer="mamba" if of_mamba else "attention", layout="paper", prompts=prompts)
    strd = StrdConfig(
        bool(hparams.get("use_strd", False)), hparams.get("strd_l_spat", 5), hparams.get("strd_l_temp", 5)
    )
    if sum(any(key.startswith(part) for key in given) for part in _OF_MAE) < 3:
        return ReferenceEncoder(swin, strd)
    asked = hparams.get("spatial_mask", "random"), hparams.get("time_mask", "random")
    if asked not in _MASKS:
        raise ValueError(f"spatial_mask = {asked[0]!r}, time_mask = {asked[1]!r}: one of {sorted(_MASKS)}")
    kind = _MASKS[asked]
    mask = MaskConfig(kind, hparams.get("mask_ratio", 0.1), tube_frames=swin.window[3] if kind == "tube" else None)
    atlas = given.get("atlas_map") if kind == "atlas" else None
    return ReferenceMae(swin, mask, strd, loss_on="all", atlas=atlas)


def _optional(module: SwinEncoder) -> tuple[str, ...]:
    """Mask tokens of strategies that the model does not use: older checkpoints have none."""
    return tuple(
        name
        for name, parameter in module.named_parameters()
        if name.endswith("mask_token") and not parameter.requires_grad
    )


def _strip_prefix(state_dict: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], list[str]]:
    """Parameters of the network by bare name, and the keys of a head beside them."""
    if not any(key.startswith(_PREFIX) for key in state_dict):
        return dict(state_dict), []
    heads = [key for key in state_dict if key.startswith(_HEAD)]
    return {key.removeprefix(_PREFIX): value for key, value in state_dict.items() if key not in heads}, heads


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
            f"Unexpected: {unexpected or 'nothing'}. Other shapes: {shapes or 'nothing'}.\n"
            "Give the hyperparameters that this checkpoint was trained with: --hparams FILE.json"
        )


def main(argv: list[str] | None = None) -> int:
    """The converter's command line; exit status 0, or 1 with the reason."""
    parser = argparse.ArgumentParser(
        prog="python -m neurostorm.model.hub.reference", description="Convert a released checkpoint, keeping no pickle."
    )
    parser.add_argument("checkpoint", type=Path, metavar="CKPT", help="Lightning .ckpt, state dict or safetensors file")
    parser.add_argument("out", type=Path, metavar="OUT", help="folder for model.safetensors and config.json")
    parser.add_argument(
        "--hparams",
        type=Path,
        metavar="FILE.json",
        help="hyperparameters by their released names; they go before those in CKPT",
    )
    options = parser.parse_args(argv)
    try:
        module = load_reference(options.checkpoint, _read_hparams(options.hparams))
        module.save_pretrained(options.out)
    except (OSError, ValueError) as error:
        named = "" if str(options.checkpoint) in str(error) else f"{options.checkpoint}: "
        print(f"{named}{error}", file=sys.stderr)
        return 1
    parameters = sum(parameter.numel() for parameter in module.parameters())
    print(
        f"{options.out}: {type(module).__bases__[1].__name__}, {module.config.mixer} mixer, {parameters:,} parameters"
    )
    print(
        f"not used: {', '.join(module.unused_keys) or 'nothing'}; zero: {', '.join(module.missing_keys) or 'nothing'}"
    )
    return 0


def _read_hparams(file: Path | None) -> dict[str, Any]:
    """The hyperparameters in a JSON file. ReferenceMismatch naming it when it holds none."""
    if file is None:
        return {}
    try:
        found = json.loads(file.read_text())
    except (OSError, ValueError) as error:
        raise ReferenceMismatch(f"--hparams {file}: cannot be read as JSON ({error})") from error
    if not isinstance(found, dict):
        raise ReferenceMismatch(
            f'--hparams {file}: holds a {type(found).__name__}, expected {{"img_size": [96, 96, 96, 20], ...}}'
        )
    return found


if __name__ == "__main__":
    sys.exit(main())
