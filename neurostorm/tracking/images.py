"""Pictures of brains: three planes of a volume, one row per volume, as an RGB array that MLflow or a PNG takes.

    volume (X, Y, Z) --planes--> sagittal | coronal | axial --rows--> (H, W, 3) uint8

Volumes are RAS+, as the store keeps them. Planes are shown in the radiological way, as if facing the person: the
person's left is on the right of the picture, and every plane says so in letters.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from matplotlib import colormaps
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Colormap, LinearSegmentedColormap, Normalize, to_rgba
from matplotlib.figure import Figure
from numpy.typing import NDArray

Volume = NDArray[Any]
Kind = Literal["anatomy", "amount", "signed"]

HIDDEN = "#7f7f7f"  # brain of which a row has nothing to show
_SIGNED = LinearSegmentedColormap.from_list("signed", ["#053061", "#2f79b5", "#f7f7f7", "#c43b3c", "#67001f"])
# Per kind of row: the colours, what surrounds the brain (told apart from every colour inside), and the letters on it.
_KINDS: dict[Kind, tuple[Colormap, str, str]] = {
    "anatomy": (colormaps["gray"], "black", "white"),
    "amount": (colormaps["inferno"], "black", "white"),
    "signed": (_SIGNED, "#d9d9d9", "black"),
}
_DPI = 100
_ROW_INCHES = 2.1
_LABEL_INCHES, _BAR_INCHES, _TITLE_INCHES, _CAPTION_INCHES = 1.55, 1.0, 0.85, 0.4


@dataclass(frozen=True)
class Plane:
    """One cut through a volume, ready to be drawn with its first row on top.

    Attributes:
        name: sagittal, coronal or axial.
        axis: the axis that is cut, 0 to 2.
        index: where.
        image: (rows, columns).
        left, right: the sides of the person at the picture's left and right edge (R, L, A or P).
        position: the cut in mm, as in `y = -12 mm`; an index if there is no affine.
    """

    name: str
    axis: int
    index: int
    image: Volume
    left: str
    right: str
    position: str


@dataclass(frozen=True)
class Row:
    """One volume of a figure.

    Attributes:
        label: what it is, to the left of the row; a second line after a newline is set smaller.
        volume: (X, Y, Z) numbers; nan inside the brain is drawn dark grey.
        limits: values of the first and the last colour.
        unit: of the values, beside the colour bar.
        kind: "anatomy" (black to white), "amount" (black over red to yellow, for what starts at zero) or "signed"
            (blue, white, red, for values around zero).
    """

    label: str
    volume: Volume
    limits: tuple[float, float]
    unit: str
    kind: Kind = "anatomy"


def planes(volume: Volume, affine: Volume | None = None, centre: tuple[int, int, int] | None = None) -> list[Plane]:
    """Sagittal, coronal and axial cut of `volume` (X, Y, Z), RAS+.

    Args:
        volume: (X, Y, Z) of any dtype.
        affine: (4, 4) voxel -> mm, for the captions.
        centre: voxel through which all three cuts go; without it the centre of what is not zero, or of the box.

    Raises:
        ValueError: the volume has not three axes, or the centre lies outside.
    """
    if volume.ndim != 3:
        raise ValueError(f"a volume has the three axes X, Y, Z; this one has shape {volume.shape}")
    point = _centre(volume) if centre is None else centre
    if not all(0 <= at < n for at, n in zip(point, volume.shape, strict=True)):
        raise ValueError(f"the centre {point} lies outside the volume {volume.shape}")
    cuts = []
    for axis, (name, left, right) in enumerate((("sagittal", "P", "A"), ("coronal", "R", "L"), ("axial", "R", "L"))):
        image = np.take(volume, point[axis], axis=axis).T[::-1]  # the higher axis upwards
        if axis:
            image = image[:, ::-1]  # the right of the person to the left of the picture
        position = f"{'xyz'[axis]} = {point[axis]}"
        if affine is not None:
            position = f"{'xyz'[axis]} = {(np.asarray(affine) @ [*point, 1])[axis]:.0f} mm"
        cuts.append(Plane(name, axis, point[axis], image, left, right, position))
    return cuts


def rows_figure(
    rows: Sequence[Row],
    mask: Volume,
    title: str,
    *,
    affine: Volume | None = None,
    centre: tuple[int, int, int] | None = None,
    caption: str = "",
    one_bar: bool = False,
) -> NDArray[np.uint8]:
    """A figure with one row of three planes per volume, all through the same point.

    Args:
        rows: the volumes, each of the shape of `mask`.
        mask: (X, Y, Z), non-zero inside the brain; the rest is one plain colour, wide margins are cut off.
        title: over the figure; a second line after a newline is set smaller.
        affine, centre: as in `planes`; the centre of the brain if not given.
        caption: a line under the figure.
        one_bar: one colour bar for all rows (they must have the same limits) instead of one each.

    Returns:
        (H, W, 3) uint8.
    """
    inside = np.asarray(mask) != 0
    for row in rows:
        if row.volume.shape != inside.shape:
            raise ValueError(f"{row.label!r} has shape {row.volume.shape}, the mask {inside.shape}")
    point = _centre(inside) if centre is None else centre
    crops = _crops(planes(inside, affine, point), inside)
    widths = [crop[1].stop - crop[1].start for crop in crops]
    height = max(crop[0].stop - crop[0].start for crop in crops)
    picture = _ROW_INCHES / height * sum(widths) + 0.16
    margin = _LABEL_INCHES if any(row.label for row in rows) else 0.12
    size = (margin + picture + _BAR_INCHES, _TITLE_INCHES + _ROW_INCHES * len(rows) + _CAPTION_INCHES)
    figure = Figure(figsize=size, dpi=_DPI, facecolor="white")
    grid = figure.add_gridspec(
        len(rows), 3, width_ratios=widths, wspace=0.03, hspace=0.05,
        left=margin / size[0], right=1 - _BAR_INCHES / size[0],
        bottom=_CAPTION_INCHES / size[1], top=1 - _TITLE_INCHES / size[1],
    )  # fmt: skip
    for number, row in enumerate(rows):
        axes = [figure.add_subplot(grid[number, column]) for column in range(3)]
        _draw_row(axes, row, inside, affine, point, crops, first=number == 0)
        box = axes[0].get_position()
        _label(figure, row.label, 0.12 / size[0], (box.y0 + box.y1) / 2, size[1])
        if not one_bar:
            _colour_bar(figure, row, box.y0 + 0.1 * box.height, 0.8 * box.height, size[0])
    if one_bar:
        low, high = _CAPTION_INCHES / size[1], 1 - _TITLE_INCHES / size[1]
        _colour_bar(figure, rows[0], low + 0.2 * (high - low), 0.6 * (high - low), size[0])
    heading, _, detail = title.partition("\n")
    figure.text(0.12 / size[0], 1 - 0.12 / size[1], heading, va="top", fontsize=12, weight="bold")
    figure.text(0.12 / size[0], 1 - 0.36 / size[1], detail, va="top", fontsize=9, color="#404040")
    figure.text(margin / size[0], 0.14 / size[1], caption, fontsize=9, color="#202020")
    return _pixels(figure)


def brain_figure(
    volume: Volume,
    title: str,
    vmin: float | None = None,
    vmax: float | None = None,
    *,
    unit: str = "",
    mask: Volume | None = None,
    affine: Volume | None = None,
    centre: tuple[int, int, int] | None = None,
) -> NDArray[np.uint8]:
    """Three planes of one volume (X, Y, Z), RAS+, as (H, W, 3) uint8.

    Without limits they are the 1st and 99th percentile inside `mask` (without that: where the volume is neither zero
    nor nan). Limits on both sides of zero get the signed colours.
    """
    inside = (np.nan_to_num(volume) != 0) if mask is None else np.asarray(mask) != 0
    limits = percentiles(volume[inside])
    limits = (limits[0] if vmin is None else vmin, limits[1] if vmax is None else vmax)
    row = Row("", volume, limits, unit, "signed" if limits[0] < 0 < limits[1] else "anatomy")
    return rows_figure([row], inside, title, affine=affine, centre=centre)


def reconstruction_figure(
    target: Volume,
    masked_input: Volume,
    prediction: Volume,
    mask: Volume,
    title: str,
    unit: str = "z",
    *,
    brain: Volume | None = None,
    affine: Volume | None = None,
    centre: tuple[int, int, int] | None = None,
) -> NDArray[np.uint8]:
    """What a masked autoencoder saw of one frame, what it made of it, and how far off it was.

    Args:
        target: (X, Y, Z) the frame.
        masked_input: (X, Y, Z) what the model saw of it; values in hidden voxels do not matter.
        prediction: (X, Y, Z) the model's output.
        mask: (X, Y, Z) non-zero in the voxels that were hidden from the model.
        title: over the figure; a second line after a newline is set smaller.
        unit: of all four volumes.
        brain: (X, Y, Z) non-zero inside the brain; without it, where the target is not zero.
        affine, centre: as in `planes`.

    Returns:
        (H, W, 3) uint8: rows input, seen, prediction, error (in hidden voxels only: the loss counts no others); columns
        sagittal, coronal, axial; one symmetric colour scale that ends at the 99th percentile of the frame's size.
        The caption has the root mean square error over hidden brain voxels, and beside it what predicting zero (for
        z-scores over time, each voxel's mean) would cost on the very same voxels.
    """
    inside = (target if brain is None else np.asarray(brain)) != 0
    hidden = inside & (np.asarray(mask) != 0)
    seen, wrong = np.where(hidden, np.nan, masked_input), np.where(hidden, prediction - target, np.nan)
    reach = percentiles(np.abs(target[inside]))[1]
    rows = [
        Row(label, volume, (-reach, reach), unit, "signed")
        for label, volume in (
            ("Input", target),
            ("Seen\ngrey: hidden from\nthe model", seen),
            ("Prediction", prediction),
            ("Error\nprediction - input,\nwhere hidden", wrong),
        )
    ]
    caption = "nothing was hidden from the model"
    if hidden.any():
        error, zero = (float(np.sqrt(np.mean(np.square(values[hidden])))) for values in (wrong, target))
        share = hidden.sum() / inside.sum()
        caption = (
            f"{share:.0%} of the brain hidden; root mean square error there {error:.2f}, of predicting 0: {zero:.2f}"
        )
    return rows_figure(rows, inside, title, affine=affine, centre=centre, caption=caption, one_bar=True)


def percentiles(values: Volume, low: float = 1, high: float = 99) -> tuple[float, float]:
    """Limits for a colour scale: two percentiles of the finite values, never equal; (0, 1) if there are none."""
    finite = values[np.isfinite(values)]
    if finite.size == 0:
        return 0.0, 1.0
    first, last = (float(value) for value in np.percentile(finite, (low, high)))
    return first, last if last > first else first + 1.0


def _centre(volume: Volume) -> tuple[int, int, int]:
    """The centre of mass of the voxels that hold something, or the middle of the box."""
    index = np.argwhere(np.nan_to_num(volume) != 0)
    middle = index.mean(axis=0) if len(index) else (np.array(volume.shape) - 1) / 2
    x, y, z = (round(float(at)) for at in middle)
    return x, y, z


def _crops(cuts: Sequence[Plane], inside: Volume) -> list[tuple[slice, slice]]:
    """Per plane the rows and columns to draw: the brain's bounding box, two voxels wider where the volume goes on."""
    low, high = np.zeros(3, int), np.array(inside.shape)
    if inside.any():
        index = np.argwhere(inside)
        low, high = np.maximum(index.min(0) - 2, 0), np.minimum(index.max(0) + 3, high)
    crops = []
    for cut in cuts:
        across, up = (axis for axis in range(3) if axis != cut.axis)
        n = inside.shape
        columns = (
            slice(n[across] - high[across], n[across] - low[across]) if cut.axis else slice(low[across], high[across])
        )
        crops.append((slice(n[up] - high[up], n[up] - low[up]), columns))
    return crops


def _colours(kind: Kind) -> Colormap:
    return _KINDS[kind][0].with_extremes(bad=HIDDEN)


def _draw_row(
    axes: Sequence[Any],
    row: Row,
    inside: Volume,
    affine: Volume | None,
    point: tuple[int, int, int],
    crops: Sequence[tuple[slice, slice]],
    *,
    first: bool,
) -> None:
    norm, colours = Normalize(*row.limits), _colours(row.kind)
    _, outside, ink = _KINDS[row.kind]
    cuts = zip(planes(row.volume, affine, point), planes(inside, affine, point), crops, axes, strict=True)
    for cut, brain, crop, axis in cuts:
        values = np.ma.masked_invalid(cut.image[crop].astype(np.float32))
        pixels = colours(norm(values))
        pixels[~brain.image[crop]] = to_rgba(outside)
        axis.imshow(pixels, interpolation="nearest", aspect="equal")
        axis.set_axis_off()
        for side, text, align in ((0.02, cut.left, "left"), (0.98, cut.right, "right")):
            axis.text(
                side, 0.98, text, transform=axis.transAxes, ha=align, va="top", fontsize=9, weight="bold", color=ink
            )
        if first:
            axis.set_title(f"{cut.name}   {cut.position}", fontsize=9, pad=4)


def _label(figure: Figure, label: str, left: float, middle: float, height_inches: float) -> None:
    name, _, detail = label.partition("\n")
    figure.text(left, middle, name, va="bottom" if detail else "center", fontsize=11, weight="bold")
    figure.text(left, middle - 0.06 / height_inches, detail, va="top", fontsize=8, color="#404040")


def _colour_bar(figure: Figure, row: Row, bottom: float, height: float, width_inches: float) -> None:
    axis = figure.add_axes((1 - (_BAR_INCHES - 0.12) / width_inches, bottom, 0.13 / width_inches, height))
    bar = figure.colorbar(ScalarMappable(Normalize(*row.limits), _colours(row.kind)), cax=axis)
    bar.ax.tick_params(labelsize=8)
    bar.set_label(row.unit, fontsize=9)


def _pixels(figure: Figure) -> NDArray[np.uint8]:
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()
