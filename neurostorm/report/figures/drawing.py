"""What all figures share: sizes that stay readable on the page, quiet axes, bars of replicates, PNG and SVG bytes.

    canvas --> panels --bars, chance_line, brackets--> Drawn(name, title, caption, figure, runs) --png, svg--> bytes

A figure of the page's width is shown at 96 pixels per inch, so 9 points are 12 pixels on the screen. Pictures are drawn
without pyplot, so nothing is kept between them, and the same results make the same bytes.
"""

import io
import math
import re
import textwrap
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import matplotlib
import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.lines import Line2D

from neurostorm.downstream.statistics.uncertainty import summary
from neurostorm.report.methods import look

WIDTH_INCHES = 11.2
TEXT_PT, TITLE_PT = 9.0, 10.5
INK, QUIET, GRID = "#1f2328", "#59636e", "#e4e7eb"
_DPI = 160
_JITTER = 0.2  # of a bar's width to either side
STYLE = {"font.family": "DejaVu Sans", "svg.hashsalt": "neurostorm", "svg.fonttype": "path", "hatch.linewidth": 0.8}


@dataclass(frozen=True)
class Drawn:
    """A figure with its words and the runs behind it; `name` is that of its files, `task` set if it is of one alone."""

    name: str
    title: str
    caption: str
    figure: Figure
    runs: tuple[str, ...]
    task: str = ""

    @cached_property
    def png(self) -> bytes:
        """The picture in pixels, 160 per inch."""
        return self._saved("png", {"Software": None})

    @cached_property
    def svg(self) -> bytes:
        """The picture in lines, text as outlines so that it looks the same everywhere."""
        return self._saved("svg", {"Date": None})

    def _saved(self, kind: str, metadata: dict[str, Any]) -> bytes:
        out = io.BytesIO()
        with matplotlib.rc_context(STYLE):
            FigureCanvasAgg(self.figure)
            self.figure.savefig(out, format=kind, dpi=_DPI, metadata=metadata)
        self.figure.set_layout_engine("none")  # what was arranged for the first picture holds for the second
        return out.getvalue()


@dataclass(frozen=True)
class Bracket:
    """A comparison over two bars, by their positions."""

    left: int
    right: int
    text: str


def panels(
    count: int, columns: int, panel_inches: float, width_inches: float = WIDTH_INCHES
) -> tuple[Figure, list[Any]]:
    """A white figure and `count` axes in rows of at most `columns`; unused places of the last row stay empty."""
    columns = min(columns, count)
    rows = math.ceil(count / columns)
    room = ConstrainedLayoutEngine(w_pad=0.12, h_pad=0.1, wspace=0.02, hspace=0.04)
    figure = Figure(figsize=(width_inches, rows * panel_inches), facecolor="white", layout=room)
    grid = figure.add_gridspec(rows, columns)
    return figure, [figure.add_subplot(grid[number // columns, number % columns]) for number in range(count)]


def quiet(axis: Any, title: str, ylabel: str = "") -> None:
    """No frame, light horizontal lines behind the data, a title flush left."""
    for side in ("top", "right"):
        axis.spines[side].set_visible(False)
    for side in ("left", "bottom"):
        axis.spines[side].set_color("#aab2bb")
    axis.set_axisbelow(True)
    axis.grid(axis="y", color=GRID, linewidth=0.8)
    axis.tick_params(labelsize=TEXT_PT, colors=INK, length=3, color="#aab2bb")
    heading(axis, title)
    axis.set_ylabel(plain(ylabel), fontsize=TEXT_PT, color=QUIET)


def heading(axis: Any, title: str) -> None:
    """A panel's title, flush left; a long one in two lines."""
    wrapped = "\n".join(textwrap.wrap(title, 48)[:2])
    axis.set_title(plain(wrapped), loc="left", fontsize=TITLE_PT, fontweight="bold", color=INK, pad=8)


def bar(axis: Any, at: float, width: float, values: Sequence[float], method: str) -> float:
    """A bar of the mean with a dot per replicate and whiskers of one sd; returns the highest point that is drawn."""
    style, found = look(method), summary(values)
    face = "white" if style.untrained else style.colour
    axis.bar(
        at, found.mean, width, color=face, edgecolor=style.colour, linewidth=1.1, alpha=0.92,
        hatch="////" if style.untrained else None, zorder=2,
    )  # fmt: skip
    sd = 0.0 if math.isnan(found.sd) else found.sd
    if sd:
        axis.errorbar(at, found.mean, sd, color=INK, elinewidth=1.1, capsize=min(3.5, 9 * width), zorder=4)
    spread = np.linspace(-_JITTER, _JITTER, found.n) * width if found.n > 1 else np.zeros(1)
    size = 13 if width > 0.4 else 7
    axis.scatter(at + spread, values, s=size, color="white", edgecolor=INK, linewidth=0.8, zorder=5)
    return max(found.mean + sd, *values, 0.0)


def method_ticks(axis: Any, methods: Sequence[str]) -> None:
    """Short names of the methods below their bars, slanted when there are many."""
    axis.set_xticks(range(len(methods)), [plain(short(look(one).short)) for one in methods], fontsize=TEXT_PT)
    if len(methods) > 3:
        for label in axis.get_xticklabels():
            label.set(rotation=40, ha="right", rotation_mode="anchor")
    axis.set_xlim(-0.6, len(methods) - 0.4)
    axis.tick_params(axis="x", length=0)


def chance_line(axis: Any, level: float, word: str = "chance") -> None:
    """A dashed line where guessing would be, named outside the panel; none for nan."""
    if math.isnan(level):
        return
    axis.axhline(level, color=QUIET, linewidth=1.1, linestyle=(0, (4, 3)), zorder=3)
    axis.annotate(
        word, (1, level), (4, 0), xycoords=axis.get_yaxis_transform(), textcoords="offset points", va="center",
        fontsize=TEXT_PT, color=QUIET, annotation_clip=False,
    )  # fmt: skip


def brackets(axis: Any, top: float, drawn: Sequence[Bracket]) -> None:
    """Brackets stacked above `top`, the shortest lowest, and room for them in the panel."""
    low = axis.get_ylim()[0] if min(axis.dataLim.y0, 0) < 0 else 0.0
    step = 0.13 * (top - low or 1.0)
    for level, one in enumerate(sorted(drawn, key=lambda mark: mark.right - mark.left)):
        y, foot = top + (level + 0.45) * step, 0.22 * step
        axis.plot(
            [one.left, one.left, one.right, one.right], [y - foot, y, y, y - foot], color=INK, linewidth=1, zorder=6
        )
        axis.text((one.left + one.right) / 2, y, one.text, ha="center", va="bottom", fontsize=TEXT_PT, color=INK)
    axis.set_ylim(low, top + (len(drawn) + 0.5) * step)


def legend(figure: Figure, methods: Sequence[str], columns: int = 5) -> None:
    """One legend for all panels, below them."""
    handles = [Line2D([], [], label=plain(short(look(one).label, 34)), **line_style(one)) for one in methods]
    figure.legend(
        handles=handles, loc="outside lower center", ncols=min(columns, len(handles)), frameon=False,
        fontsize=TEXT_PT, labelcolor=INK, handlelength=2.6, columnspacing=1.6,
    )  # fmt: skip


def line_style(method: str) -> dict[str, Any]:
    """Colour, dashes and marker of a method's line."""
    style = look(method)
    return {
        "color": style.colour, "linestyle": (0, (4, 2)) if style.untrained else "-", "linewidth": 1.7,
        "marker": style.marker, "markersize": 5.5, "markeredgecolor": style.colour,
        "markerfacecolor": "white" if style.untrained else style.colour,
    }  # fmt: skip


def plain(text: str) -> str:
    """Text in which Matplotlib sees no formula."""
    return text.replace("\\", "\\\\").replace("$", r"\$") if "$" in text else text


def short(text: str, limit: int = 22) -> str:
    """The text, cut if it would run over its neighbours."""
    return text if len(text) <= limit else f"{text[: limit - 1]}…"


def file_names(prefix: str, names: Collection[str]) -> Mapping[str, str]:
    """A safe file name for each of `names`, after `prefix`; two that would be the same are numbered."""
    made: dict[str, str] = {}
    for name in names:
        stem = re.sub(r"[^A-Za-z0-9._-]+", "-", name).strip("-.") or "task"
        taken, number, candidate = set(made.values()), 2, f"{prefix}_{stem}"
        while candidate in taken:
            candidate, number = f"{prefix}_{stem}-{number}", number + 1
        made[name] = candidate
    return made
