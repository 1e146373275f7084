"""The model of a configuration on a store's grid, and the export of what it learned."""

from pathlib import Path

import torch

from neurostorm.config import Config, ConfigError
from neurostorm.data.device import ClipUnpacker
from neurostorm.model.hub import save_pretrained
from neurostorm.model.mae import MaskedAutoencoder
from neurostorm.model.masking import MaskConfig
from neurostorm.model.strd import StrdConfig
from neurostorm.model.swin4d import SwinConfig
from neurostorm.store.reader import FrameStore
from neurostorm.train.engine import Engine


def swin_config(config: Config, store: FrameStore) -> SwinConfig:
    """The encoder's shape: the configuration's on the store's grid. Raises ConfigError when they do not fit."""
    model = config.model
    try:
        swin = SwinConfig(
            img_size=(*store.grid.shape, config.data.clip_frames),
            patch_size=model.patch,
            embed_dim=model.embed_dim,
            depths=model.depths,
            heads=model.heads,
            window=model.window,
            first_window=model.first_window,
            full_last=model.full_last,
            drop_path=model.drop_path,
            mixer=model.mixer,
        )
        swin.validate()
    except ValueError as error:
        raise ConfigError(f"the model does not fit the store's {store.grid.shape} grid: {error}") from error
    return swin


def build_model(config: Config, store: FrameStore) -> MaskedAutoencoder:
    """The masked autoencoder with weights drawn from the run's seed."""
    torch.manual_seed(config.run.seed)
    return MaskedAutoencoder(
        swin_config(config, store),
        mask=MaskConfig(kind=config.mask.kind, ratio=config.mask.ratio, window=config.mask.window),
        strd=StrdConfig(enabled=config.strd.enabled, space=config.strd.space, time=config.strd.time),
        loss_on=config.model.loss_on,
        brain=torch.from_numpy(store.mask),
    )


def build_unpacker(model: MaskedAutoencoder, store: FrameStore, frames: int, device: torch.device) -> ClipUnpacker:
    """What turns packed clips into the model's patches on `device`."""
    geometry = model.geometry(frames)
    table = model.patch_table(torch.from_numpy(store.mask))
    return ClipUnpacker(table, geometry.space_of_token, geometry.time_of_token).to(device)


def export(engine: Engine, config: Config, store: FrameStore, folder: Path, *, rank: int, step: int) -> None:
    """Writes `model.safetensors` and `config.json` to `folder` on rank 0; a collective call."""
    weights = engine.full_weights()
    if rank != 0:
        return
    model = build_model(config, store)
    model.load_state_dict(weights)
    save_pretrained(
        model,
        folder,
        extra={
            "normalise": config.data.normalise,
            "grid": {"name": store.grid.name, "shape": list(store.grid.shape), "affine": store.grid.affine.tolist()},
            "tr_s": store.tr_s,
            "mask_sha256": store.mask_sha256,
            "store_sha256": store.content_hash(),
            "steps": step,
        },
    )
