"""The weights of resampling, from geometry alone: along one axis, and multiplied to a matrix for three.

    centres and widths of boxes, in source samples ──> axis_weights: (N, K) ──> volume_weights: CSR (V, X * Y * Z)

The source is interpolated linearly, and its interpolant averaged over a box. Both are one integral of the hat function
1 - |u|, so a weight is a difference of two values of its integral over the box's width; a box without width is a point.
"""

import numpy as np
from numpy.typing import NDArray
from scipy import sparse

Bool = NDArray[np.bool_]
Float32 = NDArray[np.float32]
Float64 = NDArray[np.float64]

COINCIDE = 1e-3  # share of a voxel within which two centres are the same place
_POINT = 1e-6  # a box below this width is a point
_NO_WEIGHT = 1e-6  # smaller weights are rounding
_WEIGHTS_AT_ONCE = 1 << 20  # bounds what planning needs


def box_width(ratio: Float64) -> Float64:
    """Width of the average, in source samples, for targets `ratio` source samples apart; 0 for interpolation."""
    return np.where(ratio > 1 + COINCIDE, np.sqrt(np.maximum(ratio**2 - 1, 0.0)), 0.0)


def axis_weights(centres: Float64, box: Float64, size: int) -> tuple[NDArray[np.intp], Float32]:
    """Weights of the linear interpolant's averages over boxes, along one axis with samples at 0 .. size - 1.

    Args:
        centres: (N,) middles of the boxes, in source samples.
        box: widths, one or (N,); each box must lie within 0 .. size - 1.

    Returns:
        index (N, K) of the samples that can matter, and weight (N, K) float32 with rows that sum to 1.
    """
    low, high = centres - box / 2, centres + box / 2
    index = np.floor(low).astype(np.intp)[:, None] + np.arange(int(np.ceil(np.max(box))) + 2)
    width = np.broadcast_to(box, centres.shape)[:, None]
    averaged = (_hat_integral(high[:, None] - index) - _hat_integral(low[:, None] - index)) / np.maximum(width, _POINT)
    weight = np.where(width > _POINT, averaged, np.clip(1 - np.abs(centres[:, None] - index), 0, None))
    weight[(weight < _NO_WEIGHT) | (index < 0) | (index >= size)] = 0
    weight /= weight.sum(axis=1, keepdims=True)
    return np.clip(index, 0, size - 1), weight.astype(np.float32)


def volume_weights(centres: Float64, box: Float64, inside: Bool, shape: tuple[int, ...]) -> sparse.csr_array:
    """The products of three axes' weights.

    Args:
        centres: (V, 3) middles of the boxes, in source voxels.
        box: (3,) their widths.
        inside: (V,) the rows to fill; the others stay empty.
        shape: X, Y, Z of the source.

    Returns:
        (V, X * Y * Z) float32 CSR over the source's voxels in Fortran order, made in pieces; columns rise in a row.
    """
    rows = np.flatnonzero(inside)
    stride = (1, shape[0], shape[0] * shape[1])  # Fortran order: x is fastest
    counts = np.zeros(len(centres) + 1, np.int64)
    weights: list[Float32] = []
    columns: list[NDArray[np.int32]] = []
    step = max(1, _WEIGHTS_AT_ONCE // int(np.prod(np.ceil(box) + 2)))
    for first in range(0, len(rows), step):
        part = rows[first : first + step]
        column = np.zeros((len(part), 1), np.int64)
        weight = np.ones((len(part), 1), np.float32)
        for axis in (2, 1, 0):  # x last, so that a row's columns rise
            index, share = axis_weights(centres[part, axis], box[axis], shape[axis])
            column = (column[:, :, None] + index[:, None, :] * stride[axis]).reshape(len(part), -1)
            weight = (weight[:, :, None] * share[:, None, :]).reshape(len(part), -1)
        used = weight > 0
        counts[part + 1] = used.sum(axis=1)
        weights.append(weight[used])
        columns.append(column[used].astype(np.int32))
    data = np.concatenate(weights) if weights else np.zeros(0, np.float32)
    indices = np.concatenate(columns) if columns else np.zeros(0, np.int32)
    return sparse.csr_array((data, indices, np.cumsum(counts)), shape=(len(centres), int(np.prod(shape))))


def copy_weights(centres: Float64, inside: Bool, shape: tuple[int, ...]) -> sparse.csr_array:
    """`volume_weights` of whole-numbered centres without boxes: a single 1 in every row to fill."""
    x, y, z = centres[inside].astype(np.int32).T
    column = x + np.int32(shape[0]) * (y + np.int32(shape[1]) * z)
    starts = np.concatenate([[0], np.cumsum(inside)])
    return sparse.csr_array((np.ones(len(column), np.float32), column, starts), (len(centres), int(np.prod(shape))))


def _hat_integral(x: Float64) -> Float64:
    """Integral from minus infinity to `x` of the hat function 1 - |u| on -1 .. 1."""
    x = np.clip(x, -1, 1)
    return 0.5 + x - np.sign(x) * x**2 / 2
