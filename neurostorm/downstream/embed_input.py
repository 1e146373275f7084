"""What an embedding job is given, checked before anything starts: the model, its runs, and that they fit each other.

    settings --> model's files --> store (manifest) | source (discover) --> Input --> embed.json, or a refusal

Whether a folder may be gone on with follows from what changes a vector: the model's bytes, the clips' stride and
normalisation, and the data. Runs may be added to a store or a source between two starts; they are embedded then.
"""

import hashlib
import json
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import ray
import torch

import neurostorm
from neurostorm.config import ConfigError, EmbedConfig
from neurostorm.downstream.embed_parts import Run
from neurostorm.ingest.discover import Source, discover
from neurostorm.model.hub import CONFIG, WEIGHTS, NeuroStorm
from neurostorm.places import Place, replace
from neurostorm.staging import fetched
from neurostorm.store import FrameStore, StoreError, read_manifest
from neurostorm.tracking import code_revision

SETTINGS = "embed.json"
SAME_PLACE_MM = 1e-3
STAT_THREADS = 16


@dataclass(frozen=True)
class Input:
    """A model and the runs that it embeds, in the order of the tables.

    Attributes:
        model: place of the model.
        store: place of the store; None for NIfTI files.
        runs: those of one subject beside each other.
        tr_s: seconds between two frames of a clip.
        normalise: "voxel" or "global".
        clip_frames, stride_frames: of the model's clips, and between their starts.
        facts: what stands in embed.json.
    """

    model: Place
    store: Place | None
    runs: tuple[Run, ...]
    tr_s: float
    normalise: str
    clip_frames: int
    stride_frames: int
    facts: dict[str, Any]


def open_input(settings: EmbedConfig) -> Input:
    """Read and check what the settings name. Errors as `embed.embed`."""
    if settings.model is None:
        raise ConfigError("embed.model is not set: give the folder of a model, --model DIR")
    if (settings.store is None) == (settings.source is None):
        raise ConfigError("give either the store to embed, --store STORE, or a folder of NIfTI files, --source DIR")
    folder = settings.model.absolute()
    if not (folder / CONFIG).is_file():
        raise ConfigError(
            f"embed.model={settings.model}: no model there ({CONFIG} is missing); training writes RUN/model"
        )
    with fetched(folder) as local:
        model, weights_sha256 = NeuroStorm.from_pretrained(local), _sha256(local / WEIGHTS)
    data, runs, tr_s = _store(settings.store, model) if settings.store else _source(settings, model)
    normalise = _normalisation(model, settings)
    frames = model.config.frames
    stride = settings.clip_stride_frames or frames
    facts = {
        "model": {"path": str(folder), "sha256": weights_sha256, "config": _json(folder / CONFIG)},
        "data": data,
        "normalise": normalise,
        "clip_frames": frames,
        "clip_stride_frames": stride,
        "runs": len(runs),
        "versions": {
            "neurostorm": neurostorm.__version__, "code": code_revision(),
            "torch": torch.__version__, "ray": ray.__version__,
        },
    }  # fmt: skip
    store = settings.store.absolute() if settings.store else None
    ordered = tuple(sorted(runs, key=lambda run: (run.dataset, run.subject, run.run)))
    return Input(folder, store, ordered, tr_s, normalise, frames, stride, facts)


def check_fits(model: NeuroStorm, store: FrameStore) -> None:
    """StoreError, with the fix, unless the store has the grid, mask and TR that the model was trained on.

    What the model's files do not say is not checked; the grid's shape always is.
    """
    extra, size = model.extra, tuple(model.config.img_size[:3])
    grid = extra.get("grid") or {}
    problems = []
    if tuple(store.grid.shape) != size:
        problems.append(f"grid has {store.grid.shape} voxels, not {size}")
    elif "affine" in grid and not np.allclose(store.grid.affine, grid["affine"], rtol=0, atol=SAME_PLACE_MM):
        problems.append(f"grid {store.grid.name!r} lies elsewhere than {grid.get('name')!r}")
    elif not _same_brain(model, store):
        problems.append("brain mask is another one")
    if abs(extra.get("tr_s", store.tr_s) / store.tr_s - 1) > 1e-6:
        problems.append(f"TR is {store.tr_s:g} s, not {extra['tr_s']:g} s")
    if problems:
        raise StoreError(
            f"{store.path} is not what the model was trained on: its {', and its '.join(problems)}. Ingest the files "
            f"again with the model's grid ({grid.get('name', 'see its img_size')}), mask and TR "
            "(jobs/ingest.py --grid --mask --ingest.tr_s), or take a model of this store's"
        )


def _same_brain(model: NeuroStorm, store: FrameStore) -> bool:
    if model.brain is not None and not np.array_equal(store.mask, model.brain.cpu().numpy()):
        return False
    return bool(model.extra.get("mask_sha256", store.mask_sha256) == store.mask_sha256)


def remember(out: Place, given: Input) -> None:
    """Write embed.json, unless the folder holds an embedding that was made otherwise: ConfigError naming how."""
    file = out / SETTINGS
    if file.is_file():
        different = _differences(_json(file), given.facts)
        if different:
            raise ConfigError(
                f"{file} says that this folder holds another embedding: {'; '.join(different)}; take what it was made "
                "with again, or another folder, --out"
            )
    out.mkdir(parents=True, exist_ok=True)
    replace(file, (json.dumps(given.facts, indent=2) + "\n").encode())


def _differences(saved: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """`name: saved -> now` of all that changes a vector; data at another place may be the same."""
    before, after = dict(_flat(saved)), dict(_flat(now))
    if before.get("data.kind") != after["data.kind"]:
        return [f"data: {before.get('data.path')} -> {after['data.path']}"]
    moved = before.get("data.path") != after["data.path"] and before.get("data.sha256") != after["data.sha256"]
    passing = {"model.path", "data.sha256", "runs"} | (set() if moved else {"data.path"})
    return [
        f"{name}: {before.get(name)} -> {after.get(name)}"
        for name in sorted(before.keys() | after.keys())
        if before.get(name) != after.get(name) and name not in passing and not name.startswith("versions.")
    ]


def _flat(tree: dict[str, Any], above: str = "") -> Sequence[tuple[str, Any]]:
    return [
        leaf
        for name, value in tree.items()
        for leaf in (_flat(value, f"{above}{name}.") if isinstance(value, dict) else [(above + name, value)])
    ]


def _normalisation(model: NeuroStorm, settings: EmbedConfig) -> str:
    own, asked = model.extra.get("normalise"), settings.normalise
    if own is None and asked is None:
        raise ConfigError(
            f"embed.model={settings.model} does not say how its clips were normalised: give --embed.normalise global "
            "(the released models) or voxel"
        )
    if own is not None and asked is not None and own != asked:
        raise ConfigError(f"embed.normalise={asked}, but the model was trained on {own}: leave the option away")
    return str(own or asked)


def _store(path: Place, model: NeuroStorm) -> tuple[dict[str, Any], list[Run], float]:
    """What embed.json says of a store, its runs, and seconds between its frames."""
    store = FrameStore.open(path.absolute())
    check_fits(model, store)
    runs = [
        Run(
            run=row["run"],
            dataset=row["dataset"],
            subject=row["subject"],
            session=row["session"] or "",
            task=row["task"] or "",
            place=str(store.path / row["run"]),
            content=f"{row['source_sha256']} {row['frames']}",
            frames=row["frames"],
        )
        for row in read_manifest(store.path).to_pylist()
    ]
    facts = {
        "kind": "store", "path": str(store.path), "sha256": store.content_hash(), "grid": store.grid.describe(),
        "mask_sha256": store.mask_sha256, "tr_s": store.tr_s, "recipe": store.recipe,
    }  # fmt: skip
    return facts, runs, store.tr_s


def _source(settings: EmbedConfig, model: NeuroStorm) -> tuple[dict[str, Any], list[Run], float]:
    """What embed.json says of a folder of NIfTI files, its runs, and seconds between the frames of a clip."""
    assert settings.source is not None
    tr_s, root = model.clip_recipe().tr_s, settings.source
    if isinstance(root, Path):
        root = Path(os.path.abspath(root))
    sources = discover(root, settings.dataset)
    with ThreadPoolExecutor(STAT_THREADS) as pool:
        contents = list(pool.map(partial(_state_of, root), sources))
    runs = [
        Run(
            run=source.run,
            dataset=source.dataset,
            subject=source.subject,
            session=source.session,
            task=source.task,
            place=str(source.path),
            content=content,
            source=source,
        )
        for source, content in zip(sources, contents, strict=True)
    ]
    listed = sorted((run.run, run.content) for run in runs)
    sha256 = hashlib.sha256(json.dumps(listed).encode()).hexdigest()
    return {"kind": "source", "path": str(root), "sha256": sha256, "tr_s": tr_s}, runs, tr_s


def _state_of(root: Place, source: Source) -> str:
    """Where a run's files lie below the source, their sizes and times."""
    files = [source.path, *([source.mask_path] if source.mask_path else []), *source.sidecars]
    states = []
    for file in files:
        try:
            status = file.stat()
        except FileNotFoundError as error:  # a link to nowhere is a run that cannot be read, not the end of the job
            states.append(str(error.strerror))
        else:
            states.append(f"{status.st_size} {status.st_mtime_ns}")
    relative = str(source.path).removeprefix(f"{root}/")
    return f"{relative} {'; '.join(states)}"


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _json(path: Place) -> dict[str, Any]:
    try:
        return dict(json.loads(path.read_text()))
    except (OSError, ValueError, TypeError) as error:
        raise ConfigError(f"{path}: cannot be read as JSON ({error}); delete it to start anew") from error
