"""A model as two files that anyone may open: ``model.safetensors`` and ``config.json``. Never pickle.

    config.json        {"format": 3, "class", "swin", "strd", "extra"}, and of an autoencoder "mask", "loss_on",
                       "normalise_targets", "decoder", "decoder_depth", "predicted"
    model.safetensors  parameters and buffers under the released names; ``brain`` uint8 (X, Y, Z) if there is a mask

    NeuroStorm.from_pretrained(DIR or RUN) -> .embed(clip or NIfTI file) -> float32 (C',)

A folder may be local, or s3://BUCKET/KEY or gs://BUCKET/KEY; that of a pretraining run has the model in its `model/`.

``extra`` is any JSON that travels along; pretraining puts there how its clips were made (grid, TR, normalisation), and
that is what a NIfTI file is prepared by. Files of an older format are brought up step by step (``_STEPS``).
"""

import json
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from einops import reduce
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from neurostorm.io.local_copies import follow_umask, local_copy, upload_folder
from neurostorm.io.paths import AnyPath
from neurostorm.model.autoencoder import MaskedAutoencoder
from neurostorm.model.config import SwinConfig
from neurostorm.model.encoder import SwinEncoder
from neurostorm.model.hub.locate import CONFIG, WEIGHTS, HubError, find_model, place_of
from neurostorm.model.masking.masks import MaskConfig
from neurostorm.model.strd.dropout import StrdConfig

FORMAT = 3
_AUTOENCODER = ("loss_on", "normalise_targets", "decoder", "decoder_depth", "predicted")  # of a MaskedAutoencoder alone

Saved = tuple[dict[str, Any], dict[str, Tensor]]  # what the two files hold


class ClipRecipe(NamedTuple):
    """How the clips of a model were made: what it takes to make one of a NIfTI file.

    grid_affine  float64 (4, 4), voxel index -> mm; brain bool (X, Y, Z) on that grid
    tr_s         seconds between frames; normalise "voxel" (z of each voxel) or "global" (z over brain and frames)
    """

    grid_affine: np.ndarray
    brain: np.ndarray
    tr_s: float
    normalise: str


class NeuroStorm(nn.Module):
    """A pretrained network: called like it, saved like it, with its attributes, and with ``embed``.

    Args:
        network: SwinEncoder or MaskedAutoencoder.
    """

    def __init__(self, network: SwinEncoder) -> None:
        super().__init__()
        self.network = network

    @classmethod
    def from_pretrained(cls, directory: str | os.PathLike[str]) -> "NeuroStorm":
        """The model saved in ``directory``, on the CPU, in eval mode. Errors as :func:`load_pretrained`."""
        return cls(load_pretrained(directory)).eval()

    def save_pretrained(self, directory: str | os.PathLike[str]) -> None:
        """Write the network, as :func:`save_pretrained`."""
        save_pretrained(self.network, directory)

    def __getattr__(self, name: str) -> Any:
        """What is not found here is looked for in the network: config, extra, brain, draw_mask ..."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "network":  # not set yet, as while it is unpickled
                raise
            return getattr(self.network, name)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the network gives."""
        return self.network(*args, **kwargs)

    def embed(self, clip: Tensor | np.ndarray | str | os.PathLike[str]) -> Tensor:
        """One vector per clip or run: the mean of the last stage's tokens that exist, with nothing hidden or dropped.

        Args:
            clip: normalised as in training, (X, Y, Z, T), (C, X, Y, Z, T) or (B, C, X, Y, Z, T); or the path of a
                preprocessed 4D NIfTI file, which is brought to the model's grid, TR and normalisation. More frames than
                the model takes are cut into consecutive clips, of which the mean is returned; a rest shorter than a
                clip is left out.

        Returns:
            Float32 (C',) or, for a batch, (B, C'), without gradient, on the model's device.

        Raises:
            HubError: the model does not say how its clips were made, the file cannot be used, or the part of the
                package that reads NIfTI files is missing.
            ValueError: a clip of another size.
        """
        if isinstance(clip, str | os.PathLike):
            volumes = (volume[None, None] for volume in self._read(clip))
            return _mean([self._embed_clip(volume) for volume in volumes])[0]
        volume = torch.as_tensor(clip)
        if not 4 <= volume.ndim <= 6:
            raise ValueError(f"clip of shape {tuple(volume.shape)}: expected (X, Y, Z, T), (C, ...) or (B, C, ...)")
        batch = volume[(None,) * (6 - volume.ndim)]
        frames = self.network.config.frames
        clips = batch.split(frames, -1)[: max(1, batch.shape[-1] // frames)]
        vectors = _mean([self._embed_clip(part) for part in clips])
        return vectors if volume.ndim == 6 else vectors[0]

    def embed_patches(self, patches: Tensor) -> Tensor:
        """As :meth:`embed` for patches (B, P, p^3 C) of one clip each, in packed order: float32 (B, C')."""
        with torch.no_grad(), _evaluating(self.network):
            return self.network.feature_tokens(patches).float().mean(1)

    def embed_places(self, patches: Tensor) -> Tensor:
        """As :meth:`embed_patches`, averaged over frames alone: float32 (B, P', C'), places in raster order."""
        with torch.no_grad(), _evaluating(self.network):
            tokens = self.network.feature_tokens(patches).float()
        frames = patches.shape[1] // self.network.tokens_per_frame
        order = self.network.geometry(frames, tokens.device).levels[-1].order.argsort()
        return reduce(tokens.index_select(1, order), "b (p t) c -> b p c", "mean", t=frames)

    def clip_recipe(self) -> ClipRecipe:
        """How this model's clips were made. HubError naming what its files do not say."""
        extra, brain = self.network.extra, self.network.brain
        affine = (extra.get("grid") or {}).get("affine")
        needed = {
            "extra.grid.affine": affine,
            "extra.tr_s": extra.get("tr_s"),
            "extra.normalise": extra.get("normalise"),
        }
        missing = [f"{name} in {CONFIG}" for name, value in needed.items() if value is None]
        missing += [f"brain in {WEIGHTS}"] if brain is None else []
        if brain is None or missing:
            raise HubError(
                f"the model does not say how its clips were made (missing: {', '.join(missing)}), so no NIfTI file can "
                "be prepared for it: ingest the file and embed the store, python jobs/embed.py --store STORE"
            )
        return ClipRecipe(np.asarray(affine, np.float64), brain.cpu().numpy(), float(extra["tr_s"]), extra["normalise"])

    def _embed_clip(self, volume: Tensor) -> Tensor:
        device = next(self.network.parameters()).device
        return self.embed_patches(self.network.to_patches(volume.to(device).float()))

    def _read(self, path: str | os.PathLike[str]) -> Iterator[Tensor]:
        """The clips of a NIfTI file, float32 (X, Y, Z, T)."""
        file, recipe = place_of(path), self.clip_recipe()
        if isinstance(file, Path) and file.is_dir():
            raise HubError(
                f"{file} is a folder: give one 4D NIfTI file, or embed all that it holds with "
                f"python jobs/embed.py --source {file} --model MODEL --out FOLDER"
            )
        if isinstance(file, Path) and not file.exists():
            raise HubError(f"there is no file {file.absolute()}: give the path of a 4D NIfTI file")
        try:  # the one import from above the model's floor, and only here: a model is of use without the rest
            from neurostorm.ingest.resample.clip import read_clips
        except ImportError as error:
            raise HubError(
                f"{path}: reading NIfTI files needs all of neurostorm with nibabel ({error}); install it, or give a "
                "clip (X, Y, Z, T) as a tensor"
            ) from error
        try:
            return read_clips(file, **recipe._asdict(), frames=self.network.config.frames)
        except ValueError as error:
            raise HubError(f"{path}: {error}") from error


def save_pretrained(
    model: SwinEncoder,
    directory: str | os.PathLike[str],
    extra: Mapping[str, Any] | None = None,
    state_dict: Mapping[str, Tensor] | None = None,
) -> None:
    """Write a model. Each file appears whole or not at all, the configuration last.

    Args:
        model: MaskedAutoencoder or SwinEncoder.
        directory: made if missing; files of an earlier save are replaced. Local, s3:// or gs://.
        extra: JSON-serialisable; the model's own ``extra`` by default.
        state_dict: full parameters when the model's own are partitioned (ZeRO stage 3).

    Raises:
        HubError: ``state_dict`` does not hold exactly the model's parameters, or ``directory`` cannot be a folder.
    """
    target = place_of(directory)
    if not isinstance(target, Path):
        with upload_folder(target) as local:
            save_pretrained(model, local, extra, state_dict)
        return
    if target.exists() and not target.is_dir():
        raise HubError(f"{target} is a file: name a folder for {WEIGHTS} and {CONFIG}")
    target.mkdir(parents=True, exist_ok=True)
    tensors = dict(model.state_dict() if state_dict is None else state_dict)
    _require_keys(target / WEIGHTS, set(tensors), set(model.state_dict()))
    config: dict[str, Any] = {"format": FORMAT, "class": "SwinEncoder", "swin": asdict(model.config)}
    config["strd"] = asdict(model.strd_config)
    if isinstance(model, MaskedAutoencoder):
        config |= {"class": "MaskedAutoencoder", "mask": asdict(model.mask_config)}
        config |= {name: getattr(model, name) for name in _AUTOENCODER}
    if model.brain is not None:
        tensors["brain"] = model.brain.to(torch.uint8)
    config["extra"] = dict(model.extra if extra is None else extra)
    text = json.dumps(config, indent=2) + "\n"
    part = target / (WEIGHTS + ".part")
    save_file({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, part)
    follow_umask(part)
    os.replace(part, target / WEIGHTS)
    part = target / (CONFIG + ".part")
    part.write_text(text)
    os.replace(part, target / CONFIG)


def load_pretrained(directory: str | os.PathLike[str]) -> SwinEncoder:
    """The model saved in ``directory``: same class, configuration, dtype and parameters, on the CPU, in eval mode.

    Args:
        directory: of the model, or of the pretraining run (OUTPUT/NAME) that has it in its ``model/``. Local, s3:// or
            gs://.

    Raises:
        HubError: a file is missing or unreadable, the format is unknown, or fields and parameters do not match.
    """
    source = find_model(place_of(directory))
    config = _read_config(source / CONFIG)
    try:
        with local_copy(source / WEIGHTS) as local:
            tensors = load_file(local)
    except (OSError, SafetensorError) as error:
        raise HubError(f"{source / WEIGHTS}: cannot be read ({error}); save the model again") from error
    for step in _STEPS[config["format"] - 1 :]:
        config, tensors = step(config, tensors)
    brain = tensors.pop("brain", None)
    model = _build(config, brain, tensors.get("atlas_map"), source / CONFIG)
    expected = model.state_dict()
    _require_keys(source / WEIGHTS, set(tensors), set(expected))
    shapes = [
        f"{name} {tuple(tensors[name].shape)} instead of {tuple(expected[name].shape)}"
        for name in sorted(expected)
        if tensors[name].shape != expected[name].shape
    ]
    if shapes:
        raise HubError(f"{source / WEIGHTS}: shapes differ from {CONFIG}: {', '.join(shapes)}")
    # Assigned, to keep the saved dtype; copied, as products of memory that is aligned otherwise round otherwise.
    model.load_state_dict({name: tensor.clone() for name, tensor in tensors.items()}, assign=True)
    model.extra = config["extra"]
    return model.eval()


def upgrade_1(config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Saved:
    """Format 1 -> 2: what later became a choice takes the one value it had; a mask token that came later is zero."""
    swin = {"layout": "paper", "tokens": "dense", "prompts": 0, **config.get("swin", {})}
    strd = {"rate": None, **config.get("strd", {})}
    config, tensors = {**config, "format": 2, "swin": swin, "strd": strd}, dict(tensors)
    if config.get("class") == "MaskedAutoencoder":
        config |= {"mask": {"tube_frames": None, **config.get("mask", {})}, "normalise_targets": False}
        if "mask_token" in tensors:
            tensors["atlas_mask_token"] = torch.zeros_like(tensors["mask_token"])
    return config, tensors


def upgrade_2(config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Saved:
    """Format 2 -> 3: every autoencoder had the paper's decoder."""
    config = {**config, "format": 3}
    if config.get("class") == "MaskedAutoencoder":
        config |= {"decoder": "paper", "decoder_depth": 2, "predicted": 1.0}
    return config, dict(tensors)


# [n - 1]: format n -> n + 1
_STEPS: tuple[Callable[[Mapping[str, Any], Mapping[str, Tensor]], Saved], ...] = (upgrade_1, upgrade_2)


def _read_config(path: AnyPath) -> dict[str, Any]:
    try:
        config = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise HubError(f"{path}: cannot be read ({error}); save the model again") from error
    found = config.get("format") if isinstance(config, dict) else None
    if type(found) is not int or not 1 <= found <= FORMAT:
        newer = type(found) is int and found > FORMAT
        fix = "update neurostorm, a newer version wrote it" if newer else "it was not written by save_pretrained"
        raise HubError(f"{path}: format is {found!r}, this version reads 1 to {FORMAT}; {fix}")
    for name in ("swin", "strd", "mask", "extra"):
        if not isinstance(config.get(name, {}), dict):
            raise HubError(f"{path}: {name} is {config[name]!r}, expected named fields; save the model again")
    return config


def _build(config: dict[str, Any], brain: Tensor | None, atlas: Tensor | None, path: AnyPath) -> SwinEncoder:
    known = {"format", "class", "swin", "strd", "extra"}
    if config.get("class") == "MaskedAutoencoder":
        known |= {"mask", *_AUTOENCODER}
    elif config.get("class") != "SwinEncoder":
        raise HubError(f"{path}: class is {config.get('class')!r}, known are MaskedAutoencoder and SwinEncoder")
    _require_keys(path, set(config), known)
    for name, section in (("swin", SwinConfig), ("strd", StrdConfig), ("mask", MaskConfig)):
        if name in known:
            _require_keys(
                path, {f"{name}.{key}" for key in config[name]}, {f"{name}.{f.name}" for f in fields(section)}
            )
    try:
        swin, strd = SwinConfig(**config["swin"]), StrdConfig(**config["strd"])
        if config["class"] == "SwinEncoder":
            return SwinEncoder(swin, strd, brain)
        settings = {name: config[name] for name in _AUTOENCODER}
        return MaskedAutoencoder(swin, MaskConfig(**config["mask"]), strd, brain=brain, atlas=atlas, **settings)
    except (TypeError, ValueError) as error:
        raise HubError(f"{path}: {error}") from error


def _require_keys(path: AnyPath, found: set[str], expected: set[str]) -> None:
    if found != expected:
        missing, unexpected = sorted(expected - found), sorted(found - expected)
        raise HubError(f"{path}: missing {missing or 'nothing'}, unexpected {unexpected or 'nothing'}")


def _mean(vectors: list[Tensor]) -> Tensor:
    """Mean over clips of float32 (B, C'), summed in float64."""
    return torch.stack(vectors).double().mean(0).float()


@contextmanager
def _evaluating(module: nn.Module) -> Iterator[None]:
    """``module`` in eval mode, and each of its parts as it was afterwards."""
    training = [part for part in module.modules() if part.training]
    module.eval()
    try:
        yield
    finally:
        for part in training:
            part.training = True
