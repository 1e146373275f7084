"""Settings of the network: encoder and decoder, masks, redundancy dropout, augmentation."""

from typing import Literal

from pydantic import Field, model_validator

from neurostorm.config.base import (
    Four,
    LocalPath,
    Positive,
    Section,
    Share,
)


class ModelConfig(Section):
    """The 4D Swin encoder and its decoder."""

    mixer: Literal["attention", "mamba"] = Field("attention", description="what mixes the tokens of a window")
    layout: Literal["clean", "paper"] = Field(
        "clean", description="how windows are cut; paper: as released, padded with zero tokens, Mamba wraps round"
    )
    tokens: Literal["dense", "brain"] = Field(
        "dense", description="patches that are computed: all, or those with brain"
    )
    embed_dim: Positive = Field(36, description="channels of the first stage; doubles at each stage")
    depths: tuple[Positive, ...] = Field((2, 2, 6, 2), description="blocks per stage")
    heads: tuple[Positive, ...] = Field((3, 6, 12, 24), description="attention heads per stage")
    patch: Four = Field((6, 6, 6, 1), description="voxels x voxels x voxels x frames per token")
    window: Four = Field((4, 4, 4, 4), description="tokens per window along x, y, z and time")
    first_window: Four = Field((4, 4, 4, 4), description="the window of the first stage")
    full_last: bool = Field(False, description="the last stage's window spans all of space")
    drop_path: float = Field(0.0, ge=0, lt=1, description="stochastic depth at the deepest block")
    loss_on: Literal["brain", "all"] = Field("brain", description="voxels of masked patches that the loss counts")
    normalize_targets: bool = Field(False, description="the loss sees each patch with mean 0 and variance 1")
    decoder: Literal["paper", "light"] = Field(
        "paper",
        description="paper: all tokens pass through encoder and decoder, as released; light: the encoder sees visible "
        "tokens alone, a small decoder predicts hidden ones alone",
    )
    decoder_depth: Positive = Field(2, description="blocks of the light decoder")
    predicted: Share = Field(1.0, description="share of hidden tokens that the light decoder predicts in training")

    @model_validator(mode="after")
    def _stages_agree(self) -> "ModelConfig":
        if len(self.depths) != len(self.heads):
            raise ValueError(
                f"depths has {len(self.depths)} stages but heads has {len(self.heads)}: give one per stage"
            )
        for stage, heads in enumerate(self.heads):
            width = self.embed_dim * 2**stage
            if width % heads:
                raise ValueError(f"heads[{stage}]={heads} does not divide the stage's {width} channels")
        if self.decoder == "light" and self.layout == "paper":
            raise ValueError("decoder=light goes with layout=clean; the paper's layout has the paper's decoder")
        if self.decoder == "paper" and self.predicted < 1:
            raise ValueError(f"predicted={self.predicted}: the paper's decoder predicts every hidden token")
        if self.patch[3] != 1:
            raise ValueError(f"patch[3]={self.patch[3]}: time is never patched, use 1")
        return self


class MaskConfig(Section):
    """Which tokens the model does not see."""

    kind: Literal["random", "window", "tube", "window-tube", "atlas"] = Field(
        "window", description="single tokens, windows, patches or windows over all frames, or atlas regions"
    )
    ratio: float = Field(0.5, gt=0, lt=1, description="share masked, exact for every clip")
    window: Four = Field((4, 4, 4, 4), description="tokens per masked window (kind=window, window-tube)")
    tube_frames: Positive | None = Field(None, description="frames of a masked tube (kind=tube); default: all")
    atlas: LocalPath | None = Field(None, description="label NIfTI, on any grid, with the regions to mask (kind=atlas)")

    @model_validator(mode="after")
    def _atlas_is_given(self) -> "MaskConfig":
        if self.kind == "atlas" and self.atlas is None:
            raise ValueError("atlas: kind=atlas needs a label NIfTI, --mask.atlas FILE.nii.gz")
        if self.kind != "atlas" and self.atlas is not None:
            raise ValueError(f"atlas={self.atlas} is not used with kind={self.kind}: add --mask.kind atlas")
        return self


class StrdConfig(Section):
    """Spatiotemporal Redundancy Dropout, in training only."""

    enabled: bool = Field(False, description="drop attention elements (or, with mamba, tokens) by their redundancy")
    space: Positive = Field(5, description="extent of the spatial neighbourhood, tokens")
    time: Positive = Field(5, description="extent of the temporal neighbourhood, frames")
    rate: float | None = Field(None, gt=0, lt=1, description="mean drop rate to scale to; default: as released")


class AugmentConfig(Section):
    """Views of training clips: each turned, stretched and made noisy a little, as its row in the plan says."""

    enabled: bool = Field(False, description="train on views; validation always sees clips as they are")
    rotate_rad: float = Field(0.1, ge=0, description="each of three angles lies within +- this, radians")
    scale: float = Field(0.05, ge=0, lt=1, description="each axis is stretched by a factor within 1 +- this")
    noise_probability: float = Field(0.3, ge=0, le=1, description="share of the clips that get noise")
    noise_std: float = Field(0.1, ge=0, description="its standard deviation, in the units of the clips (z-scores)")
