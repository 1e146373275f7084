"""Names from elsewhere cannot leave their folder: each is refused with the field and the value, and nothing is written.

command line, participants.tsv, manifest, withdrawn.parquet, checkpoint marker, keys of objects, file names  ->  refused
"""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path, PurePosixPath

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from neurostorm.commands.options import build
from neurostorm.config import Config, ConfigError
from neurostorm.ingest.layouts import LAYOUTS
from neurostorm.ingest.layouts.discover import DiscoverError, read_participants
from neurostorm.ingest.layouts.layout import slug
from neurostorm.io.object_store import ObjectStoreError
from neurostorm.io.paths import copy_files, path_component, relative_path
from neurostorm.store import FrameStore, StoreError, read_manifest, run_path
from neurostorm.store.layout import RUN_PATTERN, split_run
from neurostorm.store.maintenance.care import remove_subject
from neurostorm.store.maintenance.merge import merge
from neurostorm.store.manifest import write_participants
from neurostorm.store.tables import add_withdrawn
from neurostorm.train.checkpoint.checkpoints import MARKER, newest
from neurostorm.train.records.pinned_manifest import KEPT, planned

ESCAPES = ["../../x", "..", ".", "/etc/x", "a/../../x", "a/b", "a\\b", "a\0b", "a\nb", "x/"]
OUT = "runs/../../x"


@pytest.fixture
def store(ball_store: Path, tmp_path: Path) -> Path:
    """A copy of the small store that a test may spoil."""
    return Path(shutil.copytree(ball_store, tmp_path / "home" / "store"))


def spoil(file: Path, column: str, value: str) -> None:
    """Gives the first row of a table another value."""
    table = pq.read_table(file)
    values = [value, *table.column(column).to_pylist()[1:]]
    pq.write_table(table.set_column(table.column_names.index(column), column, pa.array(values)), file)


def everything(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


@pytest.mark.parametrize("value", ESCAPES)
@pytest.mark.parametrize("field", ["run.name", "ingest.dataset", "embed.dataset"])
def test_a_name_on_the_command_line_is_one_step(field: str, value: str) -> None:
    section, name = field.split(".")
    with pytest.raises(ConfigError, match=f"^{field}: ") as refused:
        build({section: {name: value}})
    assert repr(value) in str(refused.value)


def test_names_of_people_stay_possible() -> None:
    config = build({"run": {"name": "Größe 2, lr=1e-3"}, "ingest": {"dataset": "HCP (young adults)"}})
    assert config.run.folder.name == "Größe 2, lr=1e-3"
    assert slug(str(config.ingest.dataset)) == "HCP-young-adults"


@settings(deadline=None)
@given(st.text(st.sampled_from("./\\ax\0\n~"), max_size=8) | st.text(max_size=8))
@example("..")
def test_what_one_step_takes_is_a_child_of_its_folder(text: str) -> None:
    try:
        path_component(text)
    except ValueError as error:
        assert repr(text) in str(error)
    else:
        assert os.path.dirname(os.path.normpath(f"/home/folder/{text}")) == "/home/folder"


@settings(deadline=None)
@given(st.lists(st.sampled_from(["a", ".", "..", "", "...", ".b", "\0"]), max_size=5))
def test_what_inside_takes_stays_below_its_folder(steps: list[str]) -> None:
    name = "/".join(steps)
    stays = os.path.normpath(f"/home/folder/{name}") == f"/home/folder/{name}"
    if stays and name and "\0" not in name:
        assert relative_path(name) == name
    else:
        with pytest.raises(ValueError, match="leads out of its folder"):
            relative_path(name)


STEP = st.text(st.sampled_from("a.-_~ \\é"), min_size=1, max_size=6) | st.sampled_from(["..", "sub-..", "MNINonLinear"])


@settings(deadline=None)
@given(st.lists(STEP, min_size=1, max_size=4), STEP, st.sampled_from([".nii", ".nii.gz", "_bold.nii.gz"]))
@example([".."], "sub-.._task-.._space-MNI_desc-preproc", "_bold.nii.gz")
def test_whatever_a_file_is_called_its_run_lies_in_the_store(folders: list[str], stem: str, ending: str) -> None:
    path = PurePosixPath(*folders, stem + ending)
    for name in filter(None, (layout.parse(path) for layout in LAYOUTS.values())):
        run = run_path(slug(folders[0]), name.subject, name.stem)
        assert os.path.normpath(f"/home/store/{run}") == f"/home/store/{run}"


@settings(deadline=None)
@given(st.lists(st.sampled_from(["runs", "a", "sub-1", "..", ".", "", ".x", "a b", "x\n"]), max_size=5).map("/".join))
def test_a_manifest_is_checked_by_the_rule_for_runs(run: str) -> None:
    try:
        split_run(run)
        allowed = True
    except ValueError:
        allowed = False
    assert pa.compute.match_substring_regex(pa.array([run]), RUN_PATTERN).to_pylist() == [allowed]


@pytest.mark.parametrize(
    "value", [OUT, "/etc/passwd", "runs/a/../b", "runs/a/b/c/../../../../x", "runs/balls/sub-0/a b"]
)
def test_a_manifest_that_leads_out_of_the_store_is_refused(store: Path, value: str) -> None:
    spoil(store / "manifest.parquet", "run", value)
    with pytest.raises(StoreError, match=r"manifest\.parquet: `run` is ") as refused:
        read_manifest(store)
    assert repr(value) in str(refused.value)


def test_a_kept_manifest_that_leads_out_is_refused(ball_config: Callable[..., Config], ball_store: Path) -> None:
    config = ball_config()
    config.run.folder.mkdir(parents=True)
    shutil.copy(ball_store / "manifest.parquet", config.run.folder / KEPT)
    planned(config)
    spoil(config.run.folder / KEPT, "run", OUT)
    with pytest.raises(StoreError, match="is not the path of a run"):
        planned(config)


@pytest.mark.parametrize("run", [OUT, "../x", "runs/a/b/../../../x"])
def test_a_store_gives_no_run_from_outside(ball_store: Path, run: str) -> None:
    store = FrameStore.open(ball_store)
    for ask in (store.run_attributes, store.moments, lambda run: store.frames(run, 0, 1)):
        with pytest.raises(StoreError, match=r"is not the path of a run|cannot name a dataset"):
            ask(run)


@pytest.mark.parametrize("value", ["../../x", "sub-../../x", "a/b"])
def test_a_participant_called_by_a_path_is_refused(tmp_path: Path, value: str) -> None:
    (tmp_path / "participants.tsv").write_text(f"participant_id\tage\nsub-1\t20\n{value}\t30\n")
    with pytest.raises(DiscoverError, match=r"participants\.tsv: participant_id: ") as refused:
        read_participants(tmp_path / "participants.tsv", "hcp")
    assert repr(value.removeprefix("sub-")) in str(refused.value)


@pytest.mark.parametrize("column", ["dataset", "participant_id"])
def test_labels_of_a_subject_called_by_a_path_do_not_enter_a_store(store: Path, column: str) -> None:
    row = {"dataset": "balls", "participant_id": "sub-1", "age": 20.0} | {column: "../../x"}
    with pytest.raises(ValueError, match=rf"^participants: {column}: '\.\./\.\./x'"):
        write_participants(store, pa.Table.from_pylist([row]))
    assert not (store / "participants.parquet").exists()


def test_nobody_withdraws_by_a_path(store: Path) -> None:
    beside = store.parent / "precious"
    beside.mkdir()
    with pytest.raises(ValueError, match=r"'\.\.' cannot name"):
        remove_subject(store, "..", "../precious")
    with pytest.raises(StoreError, match=r"withdrawn\.parquet: dataset or subject: '\.\./\.\./precious'"):
        add_withdrawn(store, [("balls", "../../precious")])
    assert beside.is_dir() and not (store / "withdrawn.parquet").exists()


def test_a_store_from_elsewhere_whose_tables_lead_out_is_not_merged(store: Path, ball_store: Path) -> None:
    row = {"dataset": "..", "subject": "../x", "when": "2026"}
    pq.write_table(pa.Table.from_pylist([row]), store / "withdrawn.parquet")
    whole = store.parent / "whole"
    with pytest.raises(StoreError, match=r"withdrawn\.parquet: dataset or subject: '\.\.' cannot name"):
        merge(whole, [store])
    assert {path.name for path in store.parents[1].iterdir()} == {"home"}
    assert {path.name for path in store.parent.iterdir()} == {"store", "whole"}


def test_labels_of_a_store_from_elsewhere_that_lead_out_are_not_merged(store: Path, ball_store: Path) -> None:
    row = {"dataset": "balls", "participant_id": "../../x", "age": 20.0}
    pq.write_table(pa.Table.from_pylist([row]), store / "participants.parquet")
    whole = store.parent / "whole"
    with pytest.raises(StoreError, match=r"store/participants\.parquet cannot be merged: .*'\.\./\.\./x'"):
        merge(whole, [store])
    assert not (whole / "participants.parquet").exists()


@pytest.mark.parametrize("name", ["../x", "/etc/x", "a/../../x", "a//x", ""])
def test_files_are_copied_into_their_folder_only(tmp_path: Path, name: str) -> None:
    (tmp_path / "from" / "a").mkdir(parents=True)
    (tmp_path / "x").write_text("outside")
    (tmp_path / "to").mkdir()
    with pytest.raises(ObjectStoreError, match=r"from: .* leads out of its folder"):
        copy_files(tmp_path / "from", tmp_path / "to" / "deep", [name])
    assert everything(tmp_path) == {"from", "from/a", "x", "to"}


@pytest.mark.parametrize("where", ["files", "ranks"])
def test_a_checkpoint_marker_that_leads_out_does_not_count(where: str, tmp_path: Path, caplog) -> None:
    step = tmp_path / "checkpoints" / "step-00000005"
    step.mkdir(parents=True)
    (tmp_path / "outside").write_text("")
    (step / "trainer.json").write_text('{"step": 5}')
    name = "../../outside"
    marker = {"files": {name: [0, 0]} if where == "files" else {}, "ranks": [[name] if where == "ranks" else []]}
    (step / MARKER).write_text(json.dumps(marker))
    assert newest(tmp_path / "checkpoints") is None
    assert f"'{name}' leads out of its folder" in caplog.text
    (step / MARKER).write_text(json.dumps({"files": {}, "ranks": [[]]}))
    assert newest(tmp_path / "checkpoints") is not None
