"""Tables of text. Tab-separated ones are as BIDS defines them: a quotation mark is a character like any other.

    bytes --read_tsv, read_rows--> header, rows with their line numbers --number--> finite floats

Some programs (R) still put quotation marks around whole cells of a .tsv; these are taken off. They never join lines or
cells. The parser is the csv module's: pandas pads short rows, refuses a further empty cell, and counts no lines, so a
wrong row could not be named.
"""

import csv
import io
import math
import re
from collections.abc import Iterator
from typing import NamedTuple

# What Python's float takes beyond this (1_1, inf, nan, Arabic digits) is no number in a table of people.
_NUMBER = re.compile(r"[+-]?(\d+(\.\d*)?|\.\d+)([eE][+-]?\d+)?", re.ASCII)
_CODE = re.compile(r"[+-]?0\d")  # 001: a label whose zeros would be lost


class Row(NamedTuple):
    """One row: its line in the file, from 1, and its cells without blanks around them."""

    line: int
    cells: list[str]


def read_tsv(data: bytes) -> tuple[list[str], list[Row]]:
    """The names of the columns and the rows that are not empty.

    ValueError (UnicodeDecodeError) for what is no UTF-8 text, csv.Error for a cell of more than 131,072 characters.
    """
    header, rows = read_rows(data, "\t")
    return header, list(rows)


def read_rows(data: bytes, delimiter: str) -> tuple[list[str], Iterator[Row]]:
    """As `read_tsv` for any delimiter, row by row; the errors come with the row.

    Args:
        data: the file.
        delimiter: a tab, or one such as a comma, with which quotation marks quote (RFC 4180).
    """
    tabs = delimiter == "\t"
    clean = _bare if tabs else str.strip
    lines = io.TextIOWrapper(io.BytesIO(data), "utf-8-sig", newline="")
    reader = csv.reader(lines, delimiter=delimiter, quoting=csv.QUOTE_NONE if tabs else csv.QUOTE_MINIMAL)
    header = [clean(name) for name in next(reader, [])]
    rows = (Row(reader.line_num, [clean(cell) for cell in cells]) for cells in reader)
    return header, (row for row in rows if any(row.cells))


def _bare(cell: str) -> str:
    """A cell without blanks and a pair of quotation marks around it."""
    cell = cell.strip()
    return cell[1:-1].replace('""', '"').strip() if len(cell) > 1 and cell[0] == cell[-1] == '"' else cell


def number(text: str) -> float:
    """A finite number as people write it; ValueError for other text."""
    stripped = text.strip()
    if _NUMBER.fullmatch(stripped) and math.isfinite(value := float(stripped)):
        return value
    raise ValueError(f"{text!r} is no finite number")


def is_code(text: str) -> bool:
    """Whether a text is a label of digits, such as 001, rather than a number."""
    return _CODE.match(text.strip()) is not None
