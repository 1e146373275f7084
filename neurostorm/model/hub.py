"""A model as two files that anyone may open: ``model.safetensors`` and ``config.json``. Never pickle.

    config.json        {"format": 1, "class": ..., "swin": {}, "strd": {}, "mask": {}, "loss_on": ..., "extra": {}}
    model.safetensors  parameters under the released names; ``brain`` uint8 (X, Y, Z) when the model has a brain mask

``extra`` is any JSON that the caller wants to travel along (normalisation, grid, hash of the store).
"""

import json
import os
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from neurostorm.model.mae import MaskedAutoencoder
from neurostorm.model.masking import MaskConfig
from neurostorm.model.strd import StrdConfig
from neurostorm.model.swin4d import SwinConfig, SwinEncoder

FORMAT = 1
WEIGHTS = "model.safetensors"
CONFIG = "config.json"


class HubError(ValueError):
    """A saved model cannot be read: the message names the file, the field and the fix."""


def save_pretrained(
    model: SwinEncoder,
    directory: str | os.PathLike[str],
    extra: Mapping[str, Any] | None = None,
    state_dict: Mapping[str, Tensor] | None = None,
) -> None:
    """Write a model. Each file appears whole or not at all, the configuration last.

    Args:
        model: MaskedAutoencoder or SwinEncoder.
        directory: made if missing; files of an earlier save are replaced.
        extra: JSON-serialisable; the model's own ``extra`` by default.
        state_dict: full parameters when the model's own are partitioned (ZeRO stage 3).

    Raises:
        HubError: ``state_dict`` does not hold exactly the model's parameters.
    """
    target = Path(directory)
    target.mkdir(parents=True, exist_ok=True)
    tensors = dict(model.state_dict() if state_dict is None else state_dict)
    _require_keys(target / WEIGHTS, set(tensors), set(model.state_dict()))
    config: dict[str, Any] = {"format": FORMAT, "class": "SwinEncoder", "swin": asdict(model.config)}
    config["strd"] = asdict(model.strd_config)
    if isinstance(model, MaskedAutoencoder):
        config |= {"class": "MaskedAutoencoder", "mask": asdict(model.mask_config), "loss_on": model.loss_on}
        if model.brain is not None:
            tensors["brain"] = model.brain.to(torch.uint8)
    config["extra"] = dict(model.extra if extra is None else extra)
    text = json.dumps(config, indent=2) + "\n"
    part = target / (WEIGHTS + ".part")
    save_file({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, part)
    os.replace(part, target / WEIGHTS)
    part = target / (CONFIG + ".part")
    part.write_text(text)
    os.replace(part, target / CONFIG)


def load_pretrained(directory: str | os.PathLike[str]) -> SwinEncoder:
    """The model saved in ``directory``: same class, configuration, dtype and parameters, on the CPU, in eval mode.

    Raises:
        HubError: a file is missing or unreadable, the format is another one, or fields and parameters do not match.
    """
    source = Path(directory)
    config = _read_config(source / CONFIG)
    try:
        tensors = load_file(source / WEIGHTS)
    except (OSError, SafetensorError) as error:
        raise HubError(f"{source / WEIGHTS}: cannot be read ({error}); save the model again") from error
    brain = tensors.pop("brain", None)
    model = _build(config, brain, source / CONFIG)
    expected = model.state_dict()
    _require_keys(source / WEIGHTS, set(tensors), set(expected))
    shapes = [
        f"{name} {tuple(tensors[name].shape)} instead of {tuple(expected[name].shape)}"
        for name in sorted(expected)
        if tensors[name].shape != expected[name].shape
    ]
    if shapes:
        raise HubError(f"{source / WEIGHTS}: shapes differ from {CONFIG}: {', '.join(shapes)}")
    model.load_state_dict(tensors, assign=True)  # keeps the saved dtype
    model.extra = config["extra"]
    return model.eval()


def _read_config(path: Path) -> dict[str, Any]:
    try:
        config = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise HubError(f"{path}: cannot be read ({error}); save the model again") from error
    if not isinstance(config, dict) or config.get("format") != FORMAT:
        found = config.get("format") if isinstance(config, dict) else None
        raise HubError(f"{path}: format is {found!r}, this version reads {FORMAT}; use the version that wrote it")
    return config


def _build(config: dict[str, Any], brain: Tensor | None, path: Path) -> SwinEncoder:
    known = {"format", "class", "swin", "strd", "extra"}
    if config.get("class") == "MaskedAutoencoder":
        known |= {"mask", "loss_on"}
    elif config.get("class") != "SwinEncoder":
        raise HubError(f"{path}: class is {config.get('class')!r}, known are MaskedAutoencoder and SwinEncoder")
    _require_keys(path, set(config), known)
    try:
        swin, strd = SwinConfig(**config["swin"]), StrdConfig(**config["strd"])
        if config["class"] == "SwinEncoder":
            return SwinEncoder(swin, strd)
        return MaskedAutoencoder(swin, MaskConfig(**config["mask"]), strd, config["loss_on"], brain)
    except (TypeError, ValueError) as error:
        raise HubError(f"{path}: {error}") from error


def _require_keys(path: Path, found: set[str], expected: set[str]) -> None:
    if found != expected:
        missing, unexpected = sorted(expected - found), sorted(found - expected)
        raise HubError(f"{path}: missing {missing or 'nothing'}, unexpected {unexpected or 'nothing'}")
