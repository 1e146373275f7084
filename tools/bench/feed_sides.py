"""The sides of tools/bench/feed.py that need no Ray: the same clips by each means there is to bring them in.

make_store -> open_work: batches of plan rows -> direct_sides: memcpy, pread, mmap, ClipReader, the libraries
                                              -> patch_sides:  float patches, ours and by the released path
"""

import importlib.util
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
import zarr
from einops import rearrange
from numpy.typing import NDArray

from neurostorm.data.clips import ClipReader
from neurostorm.data.plan.clip_plan import ClipPlan
from neurostorm.data.plan.split import Segments
from neurostorm.data.unpack import unpacker_for
from neurostorm.ingest.resample.template import brain_mask
from neurostorm.model.config import SwinConfig
from neurostorm.model.encoder import SwinEncoder
from neurostorm.model.strd.dropout import StrdConfig
from neurostorm.store import GRIDS, FrameStore, create_store, read_manifest, run_path, write_manifest, write_run
from neurostorm.store.files import read_metadata
from neurostorm.store.run_index import RunIndex
from neurostorm.store.shard import SHARD_FILE, RunLayout, layout_of

CLIP_FRAMES = 20
PATCH = (6, 6, 6, 1)


@dataclass(frozen=True)
class Work:
    """One round: batches of plan rows over the store's runs."""

    store: FrameStore
    runs: RunIndex
    plan: ClipPlan
    steps: int

    @property
    def reader(self) -> ClipReader:
        """A reader of voxel z."""
        return ClipReader(self.store, self.runs, CLIP_FRAMES, "voxel")

    @property
    def clips(self) -> int:
        """Clips of a round."""
        return self.steps * self.plan.global_batch

    @property
    def size_gb(self) -> float:
        """Clips of a round, in GB."""
        return self.clips * self.reader.clip_bytes / 1e9

    def batches(self) -> list[NDArray[np.void]]:
        """The plan rows of each batch."""
        return [self.plan.step_rows(step, 0, 1) for step in range(self.steps)]


def make_store(folder: Path, runs: int, frames: int) -> Path:
    """A store on the 2 mm grid with runs of random bytes, which no file system compresses."""
    grid = GRIDS["2mm"]
    mask = brain_mask(grid, None)
    path = folder / "store.zarr"
    create_store(path, grid=grid, mask=mask, tr_s=0.8, recipe="bench")
    rng = np.random.default_rng(0)
    ones = np.ones(int(mask.sum()), np.float32)
    for number in range(runs):
        values = rng.integers(-60, 61, (frames, len(ones)), dtype=np.int8)
        run = run_path("bench", f"sub-{number:03d}", "task-rest")
        write_run(path, run, frames=values, mean=1000 * ones, std=ones, attributes={})
    write_manifest(path)
    return path


def open_work(store: FrameStore, batch: int, steps: int) -> Work:
    """Clips of all runs in random order, at random places."""
    manifest = read_manifest(store.path)
    runs, frames = RunIndex(manifest), manifest["frames"].to_numpy()
    segments = Segments(np.arange(len(runs), dtype=np.int32), np.zeros_like(frames), frames)
    return Work(store, runs, ClipPlan(segments, CLIP_FRAMES, CLIP_FRAMES, seed=0, global_batch=batch), steps)


def direct_sides(work: Work) -> dict[str, Callable[[], object]]:
    """Everything that needs no Ray, as functions of no argument that bring in one round's clips."""
    every = FrameStore.open(work.store.path, verify="always")
    readers = {"reader": work.reader, "reader, every checksum": ClipReader(every, work.runs, CLIP_FRAMES, "voxel")}
    held = np.ones((work.plan.global_batch, work.reader.clip_bytes), np.int8)
    return {
        "memcpy": lambda: each(work, lambda rows: held.copy()),
        "pread": lambda: each(work, lambda rows: pread(work, rows)),
        "mmap": lambda: each(work, lambda rows: mmap(work, rows)),
        **{name: (lambda r=reader: each(work, r.read)) for name, reader in readers.items()},
        "zarr-python": lambda: each(work, lambda rows: by_zarr(work, rows)),
        **other_libraries(work),
    }


def other_libraries(work: Work) -> dict[str, Callable[[], object]]:
    """Readers that the project does not need, if they happen to be there (pip install zarrs tensorstore)."""
    found: dict[str, Callable[[], object]] = {}
    if importlib.util.find_spec("zarrs"):

        def by_zarrs() -> None:
            with zarr.config.set({"codec_pipeline.path": "zarrs.ZarrsCodecPipeline"}):
                each(work, lambda rows: by_zarr(work, rows))

        found["zarrs"] = by_zarrs
    if importlib.util.find_spec("tensorstore"):
        found["tensorstore"] = lambda: each(work, lambda rows: by_tensorstore(work, rows))
    return found


def by_tensorstore(work: Work, rows: NDArray[np.void]) -> NDArray[np.int8]:
    """The clips by tensorstore, arrays opened anew for each."""
    import tensorstore

    batch = np.empty((len(rows), CLIP_FRAMES, work.store.voxel_count), np.int8)
    for values, row in zip(batch, rows, strict=True):
        where = {"driver": "file", "path": str(work.store.path / work.runs[row["run"]])}
        array = tensorstore.open({"driver": "zarr3", "kvstore": where}, read=True, open=True).result()
        values[:] = array[int(row["start"]) : int(row["start"]) + CLIP_FRAMES].read().result()
    return batch


def each(work: Work, side: Callable[[NDArray[np.void]], object]) -> None:
    """One batch after the other; as in training, none outlives the next."""
    for rows in work.batches():
        side(rows)


def ranges(work: Work, rows: NDArray[np.void]) -> Iterator[tuple[Path, int, int]]:
    """File, first byte and number of bytes of each clip, with the checksums that lie between its frames."""
    for row in rows:
        folder = work.store.path / work.runs[row["run"]]
        layout = layout_of_run(folder)
        chunks = layout.chunk_range(int(row["start"]), CLIP_FRAMES)
        index = layout.packed_index(chunks)
        yield folder / SHARD_FILE, int(index[0, 0]), int(index[:, 1].sum())


@lru_cache
def layout_of_run(folder: Path) -> RunLayout:
    """Where an uncompressed run's chunks lie, read once."""
    return layout_of(read_metadata(folder))


def pread(work: Work, rows: NDArray[np.void]) -> list[NDArray[np.int8]]:
    """The clips' bytes by pread, one call a clip."""
    found = list(ranges(work, rows))
    batch = np.empty((len(found), max(size for _, _, size in found)), np.int8)
    for values, (file, offset, size) in zip(batch, found, strict=True):
        handle = os.open(file, os.O_RDONLY)
        os.preadv(handle, [values[:size]], offset)
        os.close(handle)
    return list(batch)


def mmap(work: Work, rows: NDArray[np.void]) -> NDArray[np.int8]:
    """The clips' bytes copied out of a map of their files."""
    found = list(ranges(work, rows))
    batch = np.empty((len(found), max(size for _, _, size in found)), np.int8)
    for values, (file, offset, size) in zip(batch, found, strict=True):
        values[:size] = np.memmap(file, np.int8, "r")[offset : offset + size]
    return batch


def by_zarr(work: Work, rows: NDArray[np.void]) -> NDArray[np.int8]:
    """The clips by zarr-python, arrays opened anew for each."""
    batch = np.empty((len(rows), CLIP_FRAMES, work.store.voxel_count), np.int8)
    for values, row in zip(batch, rows, strict=True):
        array = zarr.open_array(work.store.path / work.runs[row["run"]], mode="r")
        values[:] = array[int(row["start"]) : int(row["start"]) + CLIP_FRAMES]
    return batch


def patch_sides(work: Work, folder: Path, frames: int) -> dict[str, Callable[[], object]]:
    """Float patches of one clip after the other: ours of brain patches, the released path's of the dense volume."""
    shape = work.store.grid.shape
    files = [folder / f"dense-{number}.pt" for number in range(4)]
    for file in files:
        values = torch.randint(-127, 128, (frames, *shape), dtype=torch.int8)
        torch.save({"frames": values, "scale": torch.tensor(0.05)}, file)
    brain = torch.from_numpy(work.store.mask)
    config = SwinConfig(img_size=(*shape, CLIP_FRAMES), patch_size=PATCH, tokens="brain")
    unpack = unpacker_for(work.store, SwinEncoder(config, StrdConfig(), brain=brain).geometry(CLIP_FRAMES), PATCH)
    reader = work.reader

    def ours() -> None:
        for rows in work.batches():
            for index in range(len(rows)):
                unpack(reader.batch(rows[index : index + 1]))

    def released() -> None:
        for rows in work.batches():
            for row in rows:
                held = torch.load(files[row["run"] % len(files)], mmap=True, weights_only=True)
                clip = held["frames"][row["start"] : row["start"] + CLIP_FRAMES].float() * held["scale"]
                rearrange(
                    clip, "t (d p) (h q) (w r) -> (t d h w) (p q r)", p=PATCH[0], q=PATCH[1], r=PATCH[2]
                ).contiguous()

    return {"patches": ours, "patches, released path": released}
