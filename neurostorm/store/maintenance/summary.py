"""A store, and a run, in figures: what is in it, how good it is, how much room it takes.

inventory (bytes) + manifest (figures) ─> per dataset ─┐
participants, quarantine, withdrawn ───────────────────┴─> one tree of JSON values, for people and programs
"""

import re
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from statistics import median
from typing import Any

import numpy as np
import pyarrow as pa

from neurostorm.store.files import StorePath
from neurostorm.store.layout import FORMAT, MANIFEST, RUNS, StoreError, split_run
from neurostorm.store.maintenance.inventory import Inventory, take_inventory
from neurostorm.store.manifest import build_manifest, read_manifest, read_participants
from neurostorm.store.reader import FrameStore
from neurostorm.store.tables import read_quarantine, withdrawn_subjects

_NUMBER = re.compile(r"\d[\d.,]*")
_BLOCK_FRAMES = 60  # read at a time: 14 MB of bytes at 2 mm
_FIGURES = ("tsnr_median", "coverage", "clipped_fraction")


def summarise(path: StorePath) -> dict[str, Any]:
    """The store at a glance.

    Returns:
        store, format, grid, voxel_mm, shape, mask_voxels, mask_share, tr_s, recipe, recipe_version; files, size_bytes;
        datasets: a list of name, subjects, runs, frames, hours, size_bytes, and the medians over runs of tsnr_median,
        coverage, clipped_fraction (null without runs), the last one named `all`; participants: rows, and how many of
        them have each label; quarantine: inputs, and reasons (alike but for numbers) with count and an example;
        withdrawn: how many; notes: what is not as it should be.

    Raises:
        StoreError: as `FrameStore.open` and `build_manifest`.
        OSError: the store cannot be listed.
    """
    store = FrameStore.open(path)
    inventory = take_inventory(store.path)
    notes: list[str] = []
    manifest = _manifest(store, inventory, notes)
    if inventory.leftovers:
        notes.append(f"{len(inventory.leftovers)} unfinished run(s) or file(s) lie about: `repair` clears them away")
    return {
        "store": str(store.path),
        "format": FORMAT,
        "grid": store.grid.name,
        "voxel_mm": store.grid.voxel_mm,
        "shape": list(store.grid.shape),
        "mask_voxels": store.voxel_count,
        "mask_share": store.voxel_count / store.mask.size,
        "tr_s": store.tr_s,
        "recipe": store.recipe["name"],
        "recipe_version": store.recipe["version"],
        "files": inventory.files,
        "size_bytes": inventory.size_bytes,
        "datasets": _datasets(manifest.to_pylist(), inventory.runs, store.tr_s),
        "participants": _labels(read_participants(store.path)),
        "quarantine": _quarantine(read_quarantine(store.path)),
        "withdrawn": len(withdrawn_subjects(store.path)),
        "notes": notes,
    }


def list_runs(path: StorePath) -> dict[str, Any]:
    """The runs of a store, from its manifest.

    Returns:
        store; runs: a list of run (its path without `runs/`), dataset, subject, session, task, frames, minutes and
        coverage (share of the brain mask, null if it is not recorded), sorted by run; notes: what is not as it should
        be.

    Raises as `summarise`.
    """
    store, notes = FrameStore.open(path), list[str]()
    manifest = _manifest(store, take_inventory(store.path), notes)
    names = ("dataset", "subject", "session", "task", "frames", "coverage")
    rows = [
        {
            "run": row["run"].removeprefix(f"{RUNS}/"),
            **{name: row[name] for name in names},
            "minutes": row["frames"] * store.tr_s / 60,
        }
        for row in manifest.sort_by("run").to_pylist()
    ]
    return {"store": str(store.path), "runs": rows, "notes": notes}


def run_figures(store: FrameStore, run: str) -> dict[str, Any]:
    """A run in figures, from its stored bytes alone.

    Returns:
        frames, minutes; coverage: share of the mask that has signal; tsnr: the 5th, 50th and 95th percentile over these
        voxels of mean / std, null without any; clipped_fraction: share of their values at the limit, |z| >= 7.9.

    StoreError as `FrameStore.frames`.
    """
    mean, std = store.moments(run)
    frames, inside = store.frame_count(run), std > 0
    clipped = 0
    for first in range(0, frames, _BLOCK_FRAMES):
        block = store.frames(run, first, min(_BLOCK_FRAMES, frames - first))
        clipped += store.codec.count_clipped(block)
    snr = np.percentile(mean[inside] / std[inside], (5, 50, 95)).tolist() if inside.any() else None
    return {
        "frames": frames,
        "minutes": frames * store.tr_s / 60,
        "coverage": float(inside.mean()),
        "tsnr": snr,
        "clipped_fraction": clipped / max(1, frames * int(inside.sum())),
    }


def _manifest(store: FrameStore, inventory: Inventory, notes: list[str]) -> pa.Table:
    """The manifest if it lists the runs that are there; else one made of them, with a note, as training plans on it."""
    gone = withdrawn_subjects(store.path)
    runs = {run for run in inventory.runs if split_run(run)[:2] not in gone}
    if len(runs) < len(inventory.runs):
        notes.append(f"{len(inventory.runs) - len(runs)} run(s) are of subjects who withdrew: `remove` them again")
    try:
        table = read_manifest(store.path)
        if set(table.column("run").to_pylist()) == runs:
            return table
        notes.append(f"{MANIFEST} ({table.num_rows:,} runs) is not up to date: `repair` rebuilds it")
    except StoreError as error:
        notes.append(str(error))
    return build_manifest(store.path)


def _datasets(rows: Sequence[Mapping[str, Any]], sizes: Mapping[str, int], tr_s: float) -> list[dict[str, Any]]:
    by_name: dict[str, list[Mapping[str, Any]]] = defaultdict(list)
    for row in rows:
        by_name[row["dataset"]].append(row)
    named = [(name, by_name[name]) for name in sorted(by_name)]
    return [_dataset(name, chosen, sizes, tr_s) for name, chosen in (*named, ("all", rows))]


def _dataset(name: str, rows: Sequence[Mapping[str, Any]], sizes: Mapping[str, int], tr_s: float) -> dict[str, Any]:
    frames = sum(row["frames"] for row in rows)
    known = {figure: [row[figure] for row in rows if row[figure] is not None] for figure in _FIGURES}
    return {
        "name": name,
        "subjects": len({(row["dataset"], row["subject"]) for row in rows}),
        "runs": len(rows),
        "frames": frames,
        "hours": frames * tr_s / 3600,
        "size_bytes": sum(sizes.get(row["run"], 0) for row in rows),
        **{figure: median(values) if values else None for figure, values in known.items()},
    }


def _labels(table: pa.Table | None) -> dict[str, Any]:
    if table is None:
        return {"rows": 0, "labels": {}}
    names = [name for name in table.column_names if name not in ("dataset", "participant_id")]
    return {"rows": table.num_rows, "labels": {name: len(table) - table.column(name).null_count for name in names}}


def _quarantine(table: pa.Table) -> dict[str, Any]:
    """Reasons that differ only in their numbers are one; the most frequent first."""
    rows = table.to_pylist()
    counts = Counter(_NUMBER.sub("#", row["reason"]) for row in rows)
    examples = {_NUMBER.sub("#", row["reason"]): row for row in reversed(rows)}
    reasons = [
        {"count": count, "reason": examples[kind]["reason"], "source": examples[kind]["source"]}
        for kind, count in counts.most_common()
    ]
    return {"inputs": table.num_rows, "reasons": reasons}
