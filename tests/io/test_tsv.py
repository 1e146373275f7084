"""Tab-separated tables: quotation marks are characters, numbers are what people write, codes keep their zeros."""

import csv
import io

import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from neurostorm.io.tsv import is_code, number, read_rows, read_tsv

CELL = st.text(st.characters(exclude_characters="\t\r\n", exclude_categories=["Cs", "Zl", "Zp", "Cc"]), max_size=8)


def test_a_quotation_mark_loses_no_row():
    header, rows = read_tsv(b'participant_id\tnote\nsub-1\t6" frame\nsub-2\tfine\n\nsub-3\t"\n')
    assert header == ["participant_id", "note"]
    assert [(row.line, row.cells) for row in rows] == [
        (2, ["sub-1", '6" frame']), (3, ["sub-2", "fine"]), (5, ["sub-3", '"']),
    ]  # fmt: skip


@given(st.lists(st.lists(CELL, min_size=2, max_size=2), max_size=6))
def test_every_row_with_a_cell_comes_back(rows):
    text = "\n".join("\t".join(row) for row in [["a", "b"], *rows]) + "\n"
    found = [row.cells for row in read_tsv(text.encode())[1]]
    assert len(found) == sum(any(bare(cell) for cell in row) for row in rows)
    assert found == [[bare(cell) for cell in row] for row in rows if any(bare(cell) for cell in row)]


@given(st.lists(st.lists(st.text("ab0 \"',;.-é", max_size=5), min_size=3, max_size=3), min_size=1, max_size=5))
def test_a_regular_table_reads_as_with_pandas(rows):
    """Text throughout: an id keeps its zeros, and neither n/a nor an empty cell becomes a number."""
    rows = [["007", "n/a", ""], *rows]
    for delimiter, quoting in (("\t", csv.QUOTE_NONE), (",", csv.QUOTE_ALL)):
        text = io.StringIO()
        csv.writer(text, delimiter=delimiter, quoting=quoting, quotechar='"' if delimiter == "," else None).writerows(
            rows
        )
        frame = pd.read_csv(
            io.StringIO(text.getvalue()), sep=delimiter, quoting=quoting, dtype=str, keep_default_na=False, header=None,
            skip_blank_lines=False,
        )  # fmt: skip
        header, found = read_rows(text.getvalue().encode(), delimiter)
        clean = bare if delimiter == "\t" else str.strip
        cells = [[clean(cell) for cell in row] for row in frame.to_numpy().tolist()]
        assert [header, *(row.cells for row in found)] == [row for row in cells if any(row)]


def bare(cell: str) -> str:
    """A cell as the table means it."""
    cell = cell.strip()
    return cell[1:-1].replace('""', '"').strip() if len(cell) > 1 and cell[0] == cell[-1] == '"' else cell


def test_quotation_marks_around_whole_cells_are_taken_off():
    header, rows = read_tsv(b'"id"\t"note"\n"sub-1"\t"a ""b"" c"\n')
    assert (header, rows[0].cells) == (["id", "note"], ["sub-1", 'a "b" c'])


@pytest.mark.parametrize(("text", "value"), [("1", 1.0), (" -2.5 ", -2.5), ("1e3", 1000.0), (".5", 0.5), ("007", 7.0)])
def test_numbers_are_read(text, value):
    assert number(text) == value


@pytest.mark.parametrize("text", ["1_1", "inf", "-inf", "nan", "", "1,5", "0x1", "1e999", "٣"])
def test_what_only_python_takes_for_a_number_is_none(text):
    with pytest.raises(ValueError, match="is no finite number"):
        number(text)


def test_digits_with_leading_zeros_are_a_code():
    assert [is_code(text) for text in ("001", "-01", "0", "0.5", "10")] == [True, True, False, False, False]
