"""The frame store: preprocessed fMRI as Zarr v3, one byte per brain voxel and frame.

    layout (names, grids) -> codec (z-scores <-> bytes) -> writer -> reader -> manifest (tables at the root)

`files` is the floor under them: attributes, renames, locks. No Ray, no torch.
"""

from neurostorm.store.codec import dequantise, quantise
from neurostorm.store.layout import FORMAT, GRIDS, ClipReadError, FrameRangeError, Grid, StoreError, mask_hash, run_path
from neurostorm.store.manifest import (
    MANIFEST_SCHEMA,
    add_quarantine,
    build_manifest,
    clear_quarantine,
    read_manifest,
    read_participants,
    read_quarantine,
    write_manifest,
    write_participants,
)
from neurostorm.store.reader import FrameStore
from neurostorm.store.writer import create_store, remove_partials, write_run

__all__ = [
    "FORMAT",
    "GRIDS",
    "MANIFEST_SCHEMA",
    "ClipReadError",
    "FrameRangeError",
    "FrameStore",
    "Grid",
    "StoreError",
    "add_quarantine",
    "build_manifest",
    "clear_quarantine",
    "create_store",
    "dequantise",
    "mask_hash",
    "quantise",
    "read_manifest",
    "read_participants",
    "read_quarantine",
    "remove_partials",
    "run_path",
    "write_manifest",
    "write_participants",
    "write_run",
]
