"""The runs of a manifest in the memory of a process that reads them, in some 70 bytes each.

    manifest -> paths, frames, rows of a chunk, compression, mean and std of each run -> RunIndex: where every row lies

Plain arrays: 66,000 Python strings and layouts would take hundreds of megabytes in every training worker. Arrays travel
between the processes of a node without a copy.
"""

import bisect
from collections.abc import Iterator, Sequence
from typing import Any, overload

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from neurostorm.store.shard import COMPRESSIONS, RunLayout

_UNKNOWN = 255  # compression of a run whose layout the manifest does not state
_COMPRESSIONS = tuple(COMPRESSIONS)
_MARKED = 64  # every how many-th path is a Python string, for a search that takes some microseconds


class RunIndex(Sequence[str]):
    """Paths of runs in the manifest's order, and what their layouts follow from.

    Args:
        manifest: `run`, `frames` and, as far as they are known, `chunk_frames` and `compression`.
        moments: also keep `global_mean` and `global_std`, eight bytes a run.
    """

    def __init__(self, manifest: pa.Table, *, moments: bool = False) -> None:
        self._paths = manifest["run"].combine_chunks()
        self._frames = manifest["frames"].to_numpy().astype(np.int32)
        self._chunk_frames = manifest["chunk_frames"].fill_null(0).to_numpy().astype(np.int32)
        compression = (
            pc.fill_null(pc.index_in(manifest["compression"], pa.array(_COMPRESSIONS)), _UNKNOWN)
            .to_numpy()
            .astype(np.uint8)
        )
        self._compression = np.where(self._chunk_frames > 0, compression, np.uint8(_UNKNOWN))
        order = pc.array_sort_indices(self._paths).to_numpy().astype(np.int32)
        self._marks: list[str] = self.take(order[::_MARKED]).to_pylist()
        # A manifest is sorted by run, so that none has to be kept.
        self._order = None if (order == np.arange(len(order))).all() else order
        names = ("global_mean", "global_std")
        self._moments = np.stack([_floats(manifest[name]) for name in names], axis=1) if moments else None

    def __len__(self) -> int:
        return len(self._paths)

    @overload
    def __getitem__(self, number: int) -> str: ...
    @overload
    def __getitem__(self, number: slice) -> tuple[str, ...]: ...
    def __getitem__(self, number: int | slice) -> str | tuple[str, ...]:
        if isinstance(number, slice):
            return tuple(self._paths[number].to_pylist())
        return str(self._paths[int(number)].as_py())

    def __iter__(self) -> Iterator[str]:
        for first in range(0, len(self), 1024):
            yield from self[first : first + 1024]

    def __contains__(self, run: object) -> bool:
        return isinstance(run, str) and self.find(run) is not None

    def take(self, numbers: NDArray[np.integer[Any]]) -> pa.Array:
        """The paths of `numbers` (n), as Arrow strings."""
        return self._paths.take(pa.array(numbers))

    def find(self, run: str) -> int | None:
        """The number of a run, None if it is not there."""
        first = _MARKED * (bisect.bisect_right(self._marks, run) - 1)
        if first < 0:
            return None
        places = np.arange(first, min(first + _MARKED, len(self)))
        numbers = places if self._order is None else self._order[places]
        names = self.take(numbers).to_pylist()
        return int(numbers[names.index(run)]) if run in names else None

    def layout(self, number: int, voxels: int) -> RunLayout | None:
        """The layout of a run whose rows have `voxels` bytes, None if the manifest does not state it."""
        compression = int(self._compression[number])
        if compression == _UNKNOWN:
            return None
        return RunLayout(int(self._frames[number]), voxels, int(self._chunk_frames[number]), _COMPRESSIONS[compression])

    def moments(self, number: int) -> tuple[float, float] | None:
        """Mean and std over a run's brain and frames, source units; None if they are not known, or were not kept."""
        if self._moments is None or np.isnan(self._moments[number]).any():
            return None
        mean, std = self._moments[number].tolist()
        return mean, std


def _floats(column: pa.ChunkedArray) -> NDArray[np.float32]:
    return column.cast(pa.float32()).to_numpy(zero_copy_only=False).astype(np.float32)
