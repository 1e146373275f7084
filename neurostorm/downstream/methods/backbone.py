"""The network under a method: pretrained, with random weights, or pretrained by contrast, always as a model's folder.

    pretrained model --.
    its shape, a seed --+--> Backbone: a folder (model.safetensors, config.json), and a key that names its weights
    its shape, runs ---'     CACHE/models/<kind>-<key>, made once

So whatever takes a model takes each of them, and what was computed with one can be kept under its key.
"""

import hashlib
import json
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch

from neurostorm.config import ConfigError
from neurostorm.data.plan.split import subject_hash
from neurostorm.downstream.cohort import Cohort
from neurostorm.downstream.embed.pretrained import Normalise, Pretrained
from neurostorm.downstream.methods.method import Method
from neurostorm.io.local_copies import local_copy, upload_folder
from neurostorm.io.paths import AnyPath
from neurostorm.model.autoencoder import MaskedAutoencoder
from neurostorm.model.config import SwinConfig
from neurostorm.model.encoder import SwinEncoder
from neurostorm.model.hub.pretrained import CONFIG, NeuroStorm, save_pretrained
from neurostorm.store import FrameStore
from neurostorm.train.contrastive import ContrastiveRecipe, ContrastiveRuns, pretrain_contrastive


@dataclass(frozen=True)
class Backbone:
    """A network to adapt.

    Attributes:
        place: folder of the model.
        key: names its weights; equal keys, equal weights.
        normalise: how its clips are normalised.
        clip_frames: frames of its clips.
        seen: hashes of the subjects that it was pretrained on (`subject_hash`); None: it does not say.
    """

    place: AnyPath
    key: str
    normalise: Normalise
    clip_frames: int
    seen: frozenset[str] | None

    def encoder(self) -> SwinEncoder:
        """The encoder, newly read, on the CPU."""
        with local_copy(self.place) as folder:
            network = NeuroStorm.from_pretrained(folder).network
        return network.encoder() if isinstance(network, MaskedAutoencoder) else network

    def overlap(self, subjects: tuple[str, ...]) -> float | None:
        """Share of `subjects` that pretraining saw; None: it does not say."""
        if self.seen is None:
            return None
        return sum(subject_hash(subject) in self.seen for subject in subjects) / max(1, len(subjects))


def pretrained_backbone(found: Pretrained) -> Backbone:
    """The pretrained network as it is."""
    seen = found.model.extra.get("subjects_sha256")
    known = None if seen is None else frozenset(seen)
    return Backbone(found.place, found.sha256[:16], found.normalise, found.model.config.frames, known)


def backbone_of(
    method: Method,
    found: Pretrained,
    cohort: Cohort,
    models: AnyPath,
    *,
    seed: int,
    recipe: ContrastiveRecipe,
    device: str = "cpu",
) -> Backbone:
    """The network under a method; made in the folder `models` if it is not there.

    Args:
        method: one that has a backbone.
        found: the pretrained model, whose shape all others have.
        cohort: the store; contrastive pretraining takes the runs of the subjects that `found` was pretrained on, or
            all where it does not say.
        models: place of the folders.
        seed: of random weights.
        recipe: of contrastive pretraining, which happens on `device`.
    """
    if method.weights == "pretrained":
        return pretrained_backbone(found)
    swin: SwinConfig = replace(found.model.config, prompts=0)
    if method.mixer is not None:
        swin = replace(swin, mixer=method.mixer, layout="clean")
    facts: dict[str, Any] = {"swin": asdict(swin), "mask": cohort.store.mask_sha256, "seed": seed}
    seen: frozenset[str] | None = frozenset()
    if method.weights == "contrastive":
        runs = _contrastive_runs(cohort, found, swin.frames)
        seen = frozenset(subject_hash(subject) for subject in runs.subjects)
        facts |= {"recipe": asdict(recipe), "runs": runs.paths, "store": cohort.store.content_hash()}
    key = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]
    folder = models / f"{method.weights}-{key}"
    if not (folder / CONFIG).is_file():
        if method.weights == "contrastive":
            encoder = pretrain_contrastive(recipe, cohort.store, runs, swin, normalise=found.normalise, device=device)
        else:
            encoder = random_encoder(swin, cohort.store, seed)
        extra = {"normalise": found.normalise, "subjects_sha256": sorted(seen or ())}
        with upload_folder(folder) as out:
            save_pretrained(encoder, out, extra)
    return Backbone(folder, key, found.normalise, swin.frames, seen)


def random_encoder(swin: SwinConfig, store: FrameStore, seed: int) -> SwinEncoder:
    """An encoder of this shape with weights as pretraining begins with them."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return SwinEncoder(swin, brain=torch.from_numpy(store.mask))


def _contrastive_runs(cohort: Cohort, found: Pretrained, clip_frames: int) -> ContrastiveRuns:
    seen = found.model.extra.get("subjects_sha256")
    runs = [
        run
        for run in cohort.runs
        if run.frames >= clip_frames and (seen is None or subject_hash(run.subject) in set(seen))
    ]
    if not runs:
        raise ConfigError(f"adapt.method=swift: no run of {cohort.store.path} is of a subject that pretraining saw")
    return ContrastiveRuns(
        tuple(run.path for run in runs), tuple(run.subject for run in runs), tuple(run.frames for run in runs)
    )
