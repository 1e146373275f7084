"""The frame store: preprocessed fMRI as Zarr v3, one byte per brain voxel and frame.

    layout (names, grids) -> codec (z-scores <-> bytes) -> shard (bytes of a run) -> writer -> reader
    files (headers, which runs are there)    manifest (tables at the root)
    inventory, verify, care, merge, summary, export: looking after a store, imported where they are needed

`places` is the floor under them: local paths and object stores. No Ray, no torch.
"""

from neurostorm.store.codec import FRAME_CODECS, INT8_16, FrameCodec
from neurostorm.store.layout import (
    FORMAT,
    GRIDS,
    ClipReadError,
    FrameRangeError,
    Grid,
    StoreError,
    StoreUnavailableError,
    mask_hash,
    run_path,
)
from neurostorm.store.manifest import (
    MANIFEST_SCHEMA,
    build_manifest,
    read_manifest,
    read_participants,
    write_manifest,
    write_participants,
)
from neurostorm.store.partials import remove_partials
from neurostorm.store.reader import FrameStore
from neurostorm.store.shard import run_bytes, run_files
from neurostorm.store.tables import (
    add_quarantine,
    clear_quarantine,
    read_quarantine,
    read_withdrawn,
    withdrawn_subjects,
)
from neurostorm.store.writer import create_store, write_run

__all__ = [
    "FORMAT",
    "FRAME_CODECS",
    "GRIDS",
    "INT8_16",
    "MANIFEST_SCHEMA",
    "ClipReadError",
    "FrameCodec",
    "FrameRangeError",
    "FrameStore",
    "Grid",
    "StoreError",
    "StoreUnavailableError",
    "add_quarantine",
    "build_manifest",
    "clear_quarantine",
    "create_store",
    "mask_hash",
    "read_manifest",
    "read_participants",
    "read_quarantine",
    "read_withdrawn",
    "remove_partials",
    "run_bytes",
    "run_files",
    "run_path",
    "withdrawn_subjects",
    "write_manifest",
    "write_participants",
    "write_run",
]
