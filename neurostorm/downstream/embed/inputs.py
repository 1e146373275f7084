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

import ray
import torch

import neurostorm
from neurostorm.config import ConfigError, EmbedConfig
from neurostorm.downstream.embed.parts import RunToEmbed
from neurostorm.downstream.embed.pretrained import check_fits, open_pretrained
from neurostorm.ingest.layouts.discover import Source, discover
from neurostorm.io.atomic import atomic_write
from neurostorm.io.paths import AnyPath
from neurostorm.model.hub.pretrained import CONFIG, NeuroStorm
from neurostorm.store import FrameStore, read_manifest
from neurostorm.tracking.tracker import code_revision

SETTINGS = "embed.json"
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

    model: AnyPath
    store: AnyPath | None
    runs: tuple[RunToEmbed, ...]
    tr_s: float
    normalise: str
    clip_frames: int
    stride_frames: int
    facts: dict[str, Any]


def open_input(settings: EmbedConfig) -> Input:
    """Read and check what the settings name. Errors as `embed.embed`."""
    found = open_pretrained(settings.model, settings.normalize, section="embed")
    if (settings.store is None) == (settings.source is None):
        raise ConfigError("give either the store to embed, --store STORE, or a folder of NIfTI files, --source DIR")
    folder, model = found.place, found.model
    data, runs, tr_s = _store(settings.store, model) if settings.store else _source(settings, model)
    frames = model.config.frames
    stride = settings.clip_stride_frames or frames
    facts = {
        "model": {"path": str(folder), "sha256": found.sha256, "config": _json(folder / CONFIG)},
        "data": data,
        "normalise": found.normalise,
        "clip_frames": frames,
        "clip_stride_frames": stride,
        "runs": len(runs),
        "versions": {
            "neurostorm": neurostorm.__version__, "code": code_revision(),
            "torch": torch.__version__, "ray": ray.__version__,
        },
    }  # fmt: skip
    ordered = tuple(sorted(runs, key=lambda run: (run.dataset, run.subject, run.run)))
    return Input(folder, settings.store, ordered, tr_s, found.normalise, frames, stride, facts)


def remember(out: AnyPath, given: Input) -> None:
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
    atomic_write(file, (json.dumps(given.facts, indent=2) + "\n").encode())


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


def _store(path: AnyPath, model: NeuroStorm) -> tuple[dict[str, Any], list[RunToEmbed], float]:
    """What embed.json says of a store, its runs, and seconds between its frames."""
    store = FrameStore.open(path.absolute())
    check_fits(model, store)
    runs = [
        RunToEmbed(
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


def _source(settings: EmbedConfig, model: NeuroStorm) -> tuple[dict[str, Any], list[RunToEmbed], float]:
    """What embed.json says of a folder of NIfTI files, its runs, and seconds between the frames of a clip."""
    assert settings.source is not None
    tr_s, root = model.clip_recipe().tr_s, settings.source
    if isinstance(root, Path):
        root = Path(os.path.abspath(root))
    sources = discover(root, settings.dataset)
    with ThreadPoolExecutor(STAT_THREADS) as pool:
        contents = list(pool.map(partial(_state_of, root), sources))
    runs = [
        RunToEmbed(
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


def _state_of(root: AnyPath, source: Source) -> str:
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


def _json(path: AnyPath) -> dict[str, Any]:
    try:
        return dict(json.loads(path.read_text()))
    except (OSError, ValueError, TypeError) as error:
        raise ConfigError(f"{path}: cannot be read as JSON ({error}); delete it to start anew") from error
