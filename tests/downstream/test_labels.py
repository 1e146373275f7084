"""Labels of a store's subjects: how ids meet, what is said of those that do not, and what is refused."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from neurostorm.downstream.labels import LabelError, MatchReport, read_labels
from neurostorm.ingest.layouts.discover import read_participants
from neurostorm.ingest.layouts.layout import safe_label
from neurostorm.io.paths import to_path
from neurostorm.store import Grid, create_store, write_participants

SUBJECTS = ("abcd/sub-001", "abcd/sub-002", "hcp/sub-100307")


@pytest.fixture
def store(tmp_path: Path) -> Path:
    """A store without runs whose participants.parquet went the way of an ingest; sub-009 has no runs."""
    path = tmp_path / "store.zarr"
    grid = Grid("box", (2, 2, 2), 4.0, (0.0, 0.0, 0.0))
    create_store(path, grid=grid, mask=np.ones(grid.shape, bool), tr_s=0.8, recipe="test")
    table = written(
        tmp_path / "participants.tsv", "participant_id\tage\tsite\nsub-001\t31\tA\n002\tn/a\tB\n009\t7\tB\n"
    )
    write_participants(path, read_participants(table, "abcd"))
    return path


def written(file: Path, text: str, encoding: str = "utf-8") -> Path:
    file.write_bytes(text.encode(encoding))
    return file


def test_the_stores_own_table_is_read_by_dataset_and_id(store: Path) -> None:
    labels = read_labels(store, SUBJECTS, "age", columns=["site", "age"], numeric=True)
    assert labels.values == {"abcd/sub-001": 31.0}
    assert labels.source == str(store / "participants.parquet")
    assert labels.columns["site"] == {"abcd/sub-001": "A", "abcd/sub-002": "B"}
    assert labels.columns["age"] == {"abcd/sub-001": "31"}  # float64 in the table, and still no 31.0
    assert labels.report == MatchReport(3, 1, ("hcp/sub-100307",), ("abcd/sub-002",), ("abcd/sub-009",), ())


@pytest.mark.parametrize("spelled", ["sub-001", "001", "abcd/sub-001", "abcd/001", " 001 "])
@pytest.mark.parametrize("ending", ["csv", "tsv", "parquet"])
def test_ids_meet_however_they_are_spelled(store: Path, tmp_path: Path, spelled: str, ending: str) -> None:
    file = tmp_path / f"labels.{ending}"
    table = pa.table({"participant_id": [spelled, "100307"], "sex": ["F", "M"]})
    if ending == "parquet":
        pq.write_table(table, file)
    else:
        options = pyarrow.csv.WriteOptions(delimiter="," if ending == "csv" else "\t")
        pyarrow.csv.write_csv(table, file, options)
    labels = read_labels(store, SUBJECTS, "sex", file=file)
    assert labels.values == {"abcd/sub-001": "F", "hcp/sub-100307": "M"}
    assert (labels.source, labels.report.unknown) == (str(file), ())


@settings(deadline=None, max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.text("ab0 ._-é", min_size=1, max_size=5), min_size=1, max_size=8, unique=True))
def test_every_label_is_found_as_ingest_spells_it(tmp_path: Path, names: list[str]) -> None:
    """The table has the raw ids, the store what ingest makes of them."""
    names = sorted({name.strip().removeprefix("sub-") for name in names} - {""})
    if not names:
        return
    file = tmp_path / "raw.parquet"
    pq.write_table(pa.table({"participant_id": names, "x": [str(n) for n in range(len(names))]}), file)
    labels = read_labels(tmp_path, [f"d/sub-{safe_label(name)}" for name in names], "x", file=file)
    assert labels.values == {f"d/sub-{safe_label(name)}": str(n) for n, name in enumerate(names)}


def test_numbers_of_a_parquet_table_are_ids_and_text(store: Path, tmp_path: Path) -> None:
    file = tmp_path / "labels.parquet"
    pq.write_table(pa.table({"eid": [100307, 5], "group": [1.0, 2.0], "iq": [101.5, None]}), file)
    labels = read_labels(store, SUBJECTS, "group", file=file, id_column="eid", columns=["iq"])
    assert (labels.values, labels.columns["iq"]) == ({"hcp/sub-100307": "1"}, {"hcp/sub-100307": "101.5"})
    assert read_labels(store, SUBJECTS, "iq", file=file, id_column="eid", numeric=True).values == {
        "hcp/sub-100307": 101.5
    }
    assert labels.report.unknown == ("5",)


def test_a_bom_quotes_and_blank_lines_are_understood(store: Path, tmp_path: Path) -> None:
    file = written(tmp_path / "x.CSV", 'participant_id,site\r\n001,"Köln, DE"\r\n,\r\n\r\n', "utf-8-sig")
    assert read_labels(store, SUBJECTS, "site", file=file).values == {"abcd/sub-001": "Köln, DE"}


def test_an_object_store_serves_as_well(store: Path, make_bucket) -> None:
    file = to_path(f"{make_bucket()}/tables/labels.tsv")
    file.write_bytes(b"participant_id\tsex\n001\tF\n")
    assert read_labels(store, SUBJECTS, "sex", file=file).values == {"abcd/sub-001": "F"}


def test_a_bare_id_of_two_datasets_is_left_out_unless_a_column_says_whose(store: Path, tmp_path: Path) -> None:
    both = ("a/sub-01", "b b/sub-01", "a/sub-02")
    bare = written(tmp_path / "bare.csv", "participant_id,x\n01,1\n02,2\n")
    labels = read_labels(store, both, "x", file=bare)
    assert labels.values == {"a/sub-02": "2"}
    assert labels.report == MatchReport(3, 1, ("a/sub-01", "b b/sub-01"), (), (), ("01",))
    told = written(tmp_path / "told.csv", "participant_id,dataset,x\n01,a,1\n01,B B,2\n02,c,3\n")
    labels = read_labels(store, ("a/sub-01", "B-B/sub-01", "a/sub-02"), "x", file=told)
    assert labels.values == {"a/sub-01": "1", "B-B/sub-01": "2"}
    assert labels.report.unknown == ("c/02",)


def test_a_column_that_the_file_lacks_comes_from_the_store(store: Path, tmp_path: Path) -> None:
    file = written(tmp_path / "x.csv", "participant_id,iq\n001,100\n002,90\n")
    assert read_labels(store, SUBJECTS, "iq", file=file, columns=["site"]).columns == {
        "site": {"abcd/sub-001": "A", "abcd/sub-002": "B"}
    }
    with pytest.raises(LabelError, match=r"x\.csv: has no column family_id .*participants\.parquet"):
        read_labels(store, SUBJECTS, "iq", file=file, columns=["family_id"])


def test_repeated_rows_are_one_when_they_agree(store: Path, tmp_path: Path) -> None:
    file = written(tmp_path / "x.csv", "participant_id,iq,site\n001,100,A\n001,100.0,A\nsub-001,,A\n002,n/a,B\n")
    labels = read_labels(store, SUBJECTS, "iq", file=file, numeric=True, columns=["site"])
    assert (labels.values, labels.report.without_value) == ({"abcd/sub-001": 100.0}, ("abcd/sub-002",))
    file = written(tmp_path / "x.csv", "participant_id,iq,site\n001,100,A\n001,101,B\n002,3,A\n")
    with pytest.raises(LabelError, match=r"iq: abcd/sub-001 has several rows .*\(100, 101\)"):
        read_labels(store, SUBJECTS, "iq", file=file)
    written(file, "participant_id,iq,site\n001,100,A\n001,100,B\n")
    with pytest.raises(LabelError, match=r"site: abcd/sub-001 .*\(A, B\)"):
        read_labels(store, SUBJECTS, "iq", file=file, columns=["site"])


@pytest.mark.parametrize("value", ["old", "inf", '"1,5"'])
def test_numbers_are_finite_numbers(store: Path, tmp_path: Path, value: str) -> None:
    file = written(tmp_path / "x.csv", f"participant_id,age\n001,3\n100307,{value}\n")
    with pytest.raises(LabelError, match=rf"age: hcp/sub-100307 has {value.strip(chr(34))}, where a finite number"):
        read_labels(store, SUBJECTS, "age", file=file, numeric=True)
    assert read_labels(store, SUBJECTS, "age", file=file).values["abcd/sub-001"] == "3"


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("x.csv", "participant_id,agee\n001,3\n", "no column age .*mean agee"),
        ("x.csv", "subject,age\n001,3\n", r"no column participant_id \(the ids\).* subject, age"),
        ("x.csv", "participant_id,age,age\n001,3,4\n", "2 columns named age"),
        ("x.csv", "participant_id,age\n001,3,4\n", "line 2 has 3 cells"),
        ("x.csv", "", "no column participant_id.*none"),
        ("x.xlsx", "participant_id,age\n", r"\.tsv, \.csv or \.parquet"),
        ("x.parquet", "no Parquet", "cannot be read"),
        ("x.csv", "participant_id,age\n001,\n", "column age: no subject has a label.*1 subject.s. have a row without"),
        ("x.csv", "participant_id,age\nNDAR_7,3\n", "ids differ in kind: NDAR_7 in the table, abcd/sub-001 in"),
    ],
)
def test_an_unusable_table_is_refused_with_the_fix(
    store: Path, tmp_path: Path, name: str, text: str, said: str
) -> None:
    file = written(tmp_path / name, text)
    with pytest.raises(LabelError, match=f"{name}.*{said}"):
        read_labels(store, SUBJECTS, "age", file=file)


def test_files_that_are_not_there_or_not_utf8_are_refused(store: Path, tmp_path: Path) -> None:
    with pytest.raises(LabelError, match=r"gone\.csv: there is no such table"):
        read_labels(store, SUBJECTS, "age", file=tmp_path / "gone.csv")
    file = written(tmp_path / "x.csv", "participant_id,age\n001,Köln\n", "latin-1")
    with pytest.raises(LabelError, match="UTF-8"):
        read_labels(store, SUBJECTS, "age", file=file)
    with pytest.raises(LabelError, match="no dataset came with"):
        read_labels(tmp_path / "other", SUBJECTS, "age")
    with pytest.raises(LabelError, match="no subjects to label"):
        read_labels(store, (), "age")


def test_the_report_counts_names_and_hints() -> None:
    ids = tuple(f"d/sub-00{n}" for n in range(7))
    lines = MatchReport(9, 2, ids, (), ("7", "4"), ("8",)).lines(most=2)
    assert lines[0] == "2 of 9 subject(s) of the store have a value"
    assert lines[1].startswith("7 subject(s) of the store have no row") and lines[1].endswith("sub-000, d/sub-001, ...")
    assert lines[2].endswith(": 7, 4") and lines[3].startswith("1 id(s) fit subjects of several datasets")
    assert "the table's 4 may be the store's d/sub-004" in lines[4]  # leading zeros went
    assert len(MatchReport(9, 9, (), (), ("zz",), ()).lines()) == 2
    assert "may be" in MatchReport(1, 0, ("a/sub-NDARINV1",), (), ("NDAR_INV1",), ()).lines()[-1]
