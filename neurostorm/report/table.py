"""A table that knows where its numbers come from, as CSV, as Markdown, and cell by cell for the page.

    Cell(text for people, value and spread for machines, run ids) --> Table --frame--> pandas --csv--> text
                                                                    '--markdown--> text

CSV has numbers at full precision, the spread in columns of its own and the run ids of each row; Markdown has what the
page shows.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import pandas as pd

from neurostorm.downstream.statistics.uncertainty import Summary, summary

NONE = "\u2013"  # a dash
_MINUS = "\u2212"
_THIN = "\u202f"  # narrow no-break space


@dataclass(frozen=True)
class Cell:
    """One entry.

    Attributes:
        text: what people read.
        value: the same at full precision; `text` if not given.
        spread: of a mean over replicates.
        runs: MLflow ids that the number comes from.
        strong: the best of its kind.
    """

    text: str
    value: float | int | str | None = None
    spread: Summary | None = None
    runs: tuple[str, ...] = ()
    strong: bool = False


@dataclass(frozen=True)
class Column:
    """A column's name; `spread`: it holds means over replicates; `number`: it is set flush right."""

    name: str
    spread: bool = False
    number: bool = True


@dataclass(frozen=True)
class Table:
    """Rows of cells, one for each column. `name` is that of its files, `note` a sentence below it."""

    name: str
    title: str
    columns: tuple[Column, ...]
    rows: tuple[tuple[Cell, ...], ...]
    note: str = ""

    def __post_init__(self) -> None:
        wrong = [len(row) for row in self.rows if len(row) != len(self.columns)]
        if wrong:
            raise ValueError(f"table {self.name}: a row has {wrong[0]} cells, there are {len(self.columns)} columns")

    def only(self, keep: Iterable[int]) -> "Table":
        """The same table with the columns at the places `keep`."""
        at = list(keep)
        rows = tuple(tuple(row[place] for place in at) for row in self.rows)
        return replace(self, columns=tuple(self.columns[place] for place in at), rows=rows)

    def frame(self) -> pd.DataFrame:
        """The values at full precision: a mean is followed by `NAME sd` and `NAME n`; `runs`, the ids, comes last."""
        columns: list[tuple[str, list[Any]]] = []
        for place, column in enumerate(self.columns):
            cells = [row[place] for row in self.rows]
            columns.append((column.name, [cell.text if cell.value is None else cell.value for cell in cells]))
            if column.spread:
                columns.append((f"{column.name} sd", [cell.spread.sd if cell.spread else math.nan for cell in cells]))
                columns.append((f"{column.name} n", [cell.spread.n if cell.spread else 0 for cell in cells]))
        columns.append(
            ("runs", [" ".join(dict.fromkeys(run for cell in row for run in cell.runs)) for row in self.rows])
        )
        # As objects: an integer beside a nan stays one, and two columns of one name stay two.
        return pd.concat([pd.Series(values, name=name, dtype=object) for name, values in columns], axis=1)

    def csv(self) -> str:
        """`frame` as comma-separated values (RFC 4180); nan is an empty field."""
        return str(self.frame().to_csv(index=False, lineterminator="\n"))

    def markdown(self) -> str:
        """A heading, a GitHub-flavoured table and the note."""
        lines = [f"## {_markdown(self.title)}", ""]
        lines.append("| " + " | ".join(_markdown(column.name) for column in self.columns) + " |")
        lines.append("|" + "|".join(" ---: " if column.number else " --- " for column in self.columns) + "|")
        for row in self.rows:
            texts = (f"**{_markdown(cell.text)}**" if cell.strong else _markdown(cell.text) for cell in row)
            lines.append("| " + " | ".join(texts) + " |")
        return "\n".join([*lines, *(["", _markdown(self.note)] if self.note else [])]) + "\n"


def words(text: str, runs: Sequence[str] = ()) -> Cell:
    """A cell of text."""
    return Cell(text or NONE, value=text, runs=tuple(runs))


def number(value: float, text: str, runs: Sequence[str] = ()) -> Cell:
    """A cell of one number; a dash for nan."""
    return Cell(NONE if math.isnan(value) else text, value=value, runs=tuple(runs))


def replicated(values: Mapping[str, float], strong: bool = False) -> Cell:
    """Mean ± sd of a number by run id, for replicates that are finite; a dash if there are none."""
    if not values:
        return Cell(NONE, value=math.nan)
    found = summary(list(values.values()))
    return Cell(mean_sd(found), found.mean, found, tuple(values), strong)


def mean_sd(found: Summary) -> str:
    """`0.512 ± 0.031`, with the mean alone when there was one replicate."""
    digits = decimals(found.mean)
    mean = minus(f"{found.mean:.{digits}f}")
    return mean if math.isnan(found.sd) else f"{mean} ± {found.sd:.{digits}f}"


def decimals(value: float) -> int:
    """Decimals for about three digits: 0.123, 1.23 (but 0.999 -> 1.000 stays with three), 12.3, 123."""
    return 3 if abs(value) < 1.5 else max(0, 2 - math.floor(math.log10(abs(value))))


def minus(text: str) -> str:
    """The text with a typographic minus."""
    return text.replace("-", _MINUS)


def p_text(p: float) -> str:
    """`0.012`, `<0.001`, or a dash for a test that was not made."""
    if math.isnan(p):
        return NONE
    return "<0.001" if p < 0.001 else f"{p:.3f}"


def percent(share: float) -> str:
    """`25 %` of a share; one decimal where it is needed."""
    return f"{round(100 * share, 1):g}{_THIN}%"


def grouped(count: float) -> str:
    """A count with thousands set apart."""
    return f"{count:,.0f}".replace(",", _THIN)


def _markdown(text: str) -> str:
    """Text that cannot end its cell or start markup; also none of HTML, which Markdown would let through."""
    for sign, escaped in (("\\", "\\\\"), ("&", "&amp;"), ("<", "&lt;"), (">", "&gt;"), ("|", "\\|"), ("*", "\\*")):
        text = text.replace(sign, escaped)
    return " ".join(text.replace("_", "\\_").replace("`", "\\`").split())
