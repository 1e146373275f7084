"""From a configuration and a corpus to the parts of one rank, resumed, and from a trained engine to files. Ray-free.

config + store -> model, unpacker, engine -> newest checkpoint -> Loop ... -> export
"""

import logging
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist

from neurostorm.config import Config, ConfigError
from neurostorm.data.batch_stream import BatchStream
from neurostorm.data.corpus import Corpus
from neurostorm.data.plan.split import subject_hash
from neurostorm.data.unpack import ClipUnpacker, unpacker_for
from neurostorm.data.views import ViewUnpacker
from neurostorm.io.local_copies import upload_folder
from neurostorm.io.object_requests import RETRY_S
from neurostorm.io.paths import AnyPath
from neurostorm.model.autoencoder import MaskedAutoencoder
from neurostorm.model.config import SwinConfig
from neurostorm.model.cost import clip_cost
from neurostorm.model.encoder import compile_blocks
from neurostorm.model.hub.pretrained import save_pretrained
from neurostorm.model.masking.atlas import patch_labels
from neurostorm.model.masking.masks import MaskConfig
from neurostorm.model.strd.dropout import StrdConfig
from neurostorm.store.reader import FrameStore
from neurostorm.tracking.tracker import Tracker, code_revision
from neurostorm.train.checkpoint import checkpoints
from neurostorm.train.engine import Engine
from neurostorm.train.health.barrier import Barrier
from neurostorm.train.health.collectives import gather, set_collective_timeout
from neurostorm.train.health.timeouts import CollectiveTimeouts
from neurostorm.train.loop import Loop
from neurostorm.train.records.log_lines import line
from neurostorm.train.records.time_account import TimeAccount
from neurostorm.train.records.withdrawn_clips import removed
from neurostorm.train.validation import Validation

logger = logging.getLogger(__name__)


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
            layout=model.layout,
            tokens=model.tokens,
        )
        swin.validate()
    except ValueError as error:
        raise ConfigError(f"the model does not fit the store's {store.grid.shape} grid: {error}") from error
    return swin


def atlas_of(config: Config, store: FrameStore) -> torch.Tensor | None:
    """The region of each patch, int32 (d, h, w), for masks of atlas regions; None for others.

    Raises ConfigError for an atlas that cannot be used.
    """
    mask = config.mask
    if mask.kind != "atlas":
        return None
    assert mask.atlas is not None
    try:
        labels = patch_labels(mask.atlas, store.grid.affine, store.grid.shape, config.model.patch)
    except ValueError as error:
        raise ConfigError(f"mask.atlas: {error}") from error
    return torch.from_numpy(labels)


def build_model(config: Config, store: FrameStore) -> MaskedAutoencoder:
    """The masked autoencoder with weights drawn from the run's seed. Raises ConfigError for an unusable atlas."""
    mask = config.mask
    torch.manual_seed(config.run.seed)
    return MaskedAutoencoder(
        swin_config(config, store),
        mask=MaskConfig(mask.kind, mask.ratio, mask.window, mask.tube_frames),
        strd=StrdConfig(**config.strd.model_dump()),
        loss_on=config.model.loss_on,
        brain=torch.from_numpy(store.mask),
        normalise_targets=config.model.normalize_targets,
        atlas=atlas_of(config, store),
        decoder=config.model.decoder,
        decoder_depth=config.model.decoder_depth,
        predicted=config.model.predicted,
    )


def build_unpacker(model: MaskedAutoencoder, store: FrameStore, frames: int, device: torch.device) -> ClipUnpacker:
    """What turns packed clips into the model's patches on `device`."""
    return unpacker_for(store, model.geometry(frames), model.config.patch_size, device)


def assemble(
    config: Config,
    corpus: Corpus,
    tracker: Tracker,
    account: TimeAccount,
    feed: Callable[..., BatchStream],
    *,
    rank: int,
    device: torch.device,
    notice: Callable[[], bool] = lambda: False,
    stop: Callable[[], bool] = lambda: False,
) -> Loop:
    """The loop of one rank, at the step that the newest checkpoint reached.

    feed    called with `first_step=`, gives this rank's batches from that step on
    notice  see `Loop`
    stop    see `Barrier`
    Needs an initialised process group; a collective call.
    """
    model = build_model(config, corpus.store)
    clip_flops = clip_cost(model, config.data.clip_frames).train_flops  # before ZeRO 3 parts the parameters
    unpack = build_unpacker(model, corpus.store, config.data.clip_frames, device)
    brain = torch.from_numpy(corpus.store.mask)
    if config.train.compile:
        compile_blocks(model)
    found = checkpoints.choose(config.run.folder / "checkpoints", gather=gather, rank=rank)
    engine = Engine(model, config.train, config.clips_per_worker, device)
    first_step = 0 if found is None else resume(found, engine, rank, config.train.zero_stage)
    timeouts = collective_timeouts(config)
    barrier = Barrier(timeouts, config.scale.min_collective_timeout_s, stop)
    held_out = corpus.validation
    return Loop(
        config=config,
        engine=engine,
        model=model,
        unpack=unpack,
        unpack_view=ViewUnpacker(unpack, brain, config.model.patch) if config.augment.enabled else None,
        batches=feed(first_step=first_step),
        barrier=barrier,
        timeouts=timeouts,
        validation=Validation(config, engine, model, unpack, corpus.reader, held_out, tracker, barrier, rank),
        tracker=tracker,
        account=account,
        notice=notice,
        runs=corpus.runs,
        trainer={
            "config": config.model_dump(mode="json"),
            "workers": dist.get_world_size(),
            "code_revision": code_revision(),
            "store_sha256": corpus.content_sha256,
        },
        rank=rank,
        first_step=first_step,
        total_steps=corpus.plan.total_steps(config.train.epochs, config.train.max_steps),
        clips_per_epoch=corpus.plan.clips_per_epoch,
        clip_flops=clip_flops,
    )


def collective_timeouts(config: Config) -> CollectiveTimeouts:
    """The timeouts of a run's collectives, within the bounds of its configuration."""
    scale = config.scale
    # A rank whose shard waits for a busy object store is not hung.
    upload_s = 0.0 if isinstance(config.run.folder, Path) else RETRY_S + scale.min_collective_timeout_s
    least_s, most_s = scale.min_collective_timeout_s, scale.collective_timeout_s
    return CollectiveTimeouts(least_s, most_s, set_collective_timeout, {"checkpoint": upload_s})


def resume(found: checkpoints.Checkpoint, engine: Engine, rank: int, zero_stage: int) -> int:
    """Loads a checkpoint and returns its number of finished steps; a collective call.

    One of another ZeRO stage or number of workers is converted.
    """
    workers, saved_stage = dist.get_world_size(), found.trainer["config"]["train"]["zero_stage"]
    convert = found.workers != workers or saved_stage != zero_stage
    load = partial(engine.load, convert=convert)
    checkpoints.restore(found, load, gather=gather, rank=rank, convert=convert)
    if rank == 0:
        stages = {"zero_stage": zero_stage, "saved_at_stage": saved_stage} if saved_stage != zero_stage else {}
        about = {"saved_by": found.workers, "workers": workers, **stages}
        logger.info(line("resume", step=found.step, checkpoint=found.path, **about))
    return found.step


def export(loop: Loop, corpus: Corpus, folder: AnyPath) -> None:
    """Writes `model.safetensors` and `config.json` to `folder` on rank 0; a collective call."""
    weights = loop.engine.full_weights()
    if loop.rank != 0:
        return
    store = corpus.store
    extra = {
        "normalise": loop.config.data.normalize,
        "grid": {"name": store.grid.name, "shape": list(store.grid.shape), "affine": store.grid.affine.tolist()},
        "tr_s": store.tr_s,
        "mask_sha256": store.mask_sha256,
        "store_sha256": corpus.content_sha256,
        "steps": loop.total_steps,
        "subjects_sha256": trained_subjects(corpus),
        "withdrawn": removed(corpus, loop.config.run.folder),
    }
    with upload_folder(folder) as local:
        save_pretrained(loop.model, local, extra=extra, state_dict=weights)


def trained_subjects(corpus: Corpus) -> list[str]:
    """`subject_hash` of `Corpus.trained_subjects`, sorted: an evaluation may meet them again.

    Those who withdrew in the meantime are among them: the weights may follow from their clips of earlier steps.
    """
    return sorted(map(subject_hash, corpus.trained_subjects))
