"""Finding runs by their names: BIDS derivatives, HCP, plain files, and what each inherits from the folders above."""

import json
from collections.abc import Callable
from pathlib import Path, PurePosixPath

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from neurostorm.ingest.layouts import LAYOUTS
from neurostorm.ingest.layouts.discover import DiscoverError, Source, discover, read_participants
from neurostorm.ingest.layouts.layout import Name, safe_label, slug
from neurostorm.store.layout import safe_name

BIDS = "sub-{0}/func/sub-{0}_task-rest"
NLIN6 = "_space-MNI152NLin6Asym_desc-preproc_bold.nii.gz"


@pytest.fixture
def tree(tmp_path: Path) -> Callable[..., Path]:
    """Makes a folder with empty files of these names; a dict gives contents."""

    def make(*names: str, root: str = "data", **contents: object) -> Path:
        home = tmp_path / root
        home.mkdir(parents=True, exist_ok=True)
        for name in names:
            (home / name).parent.mkdir(parents=True, exist_ok=True)
            (home / name).touch()
        return home

    return make


def write_json(path: Path, facts: dict[str, object]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(facts))


def taken(sources: list[Source], root: Path) -> list[str]:
    return [source.path.relative_to(root).as_posix() for source in sources]


def test_bids_takes_one_preprocessed_version_of_each_run(tree: Callable[..., Path]) -> None:
    stem = BIDS.format("01")
    root = tree(
        f"{stem}_run-1_space-MNI152NLin2009cAsym_res-2_desc-preproc_bold.nii.gz",
        f"{stem}_run-1_space-MNI152NLin6Asym_res-1_desc-preproc_bold.nii.gz",
        f"{stem}_run-1_space-MNI152NLin6Asym_res-2_desc-preproc_bold.nii.gz",
        f"{stem}_run-1_space-MNI152NLin6Asym_res-2_desc-brain_mask.nii.gz",
        f"{stem}_run-1_space-MNI152NLin6Asym_res-2_boldref.nii.gz",
        f"{stem}_run-1_space-T1w_desc-preproc_bold.nii.gz",
        f"{stem}_run-2_space-MNI152NLin2009cAsym_desc-preproc_bold.nii",
        f"{stem}_run-2_desc-preproc_bold.nii.gz",
        f"{stem}_run-2_space-fsLR_den-91k_bold.dtseries.nii",
        f"{stem}_run-2_desc-confounds_timeseries.tsv",
        "sub-01/anat/sub-01_space-MNI152NLin6Asym_desc-preproc_T1w.nii.gz",
        "sub-01/anat/sub-01_dseg.nii.gz",
        "sub-01/func/.sub-01_task-rest_space-MNI152NLin6Asym_desc-preproc_bold.nii.gz",
    )
    sources = discover(root)
    assert taken(sources, root) == [
        f"{stem}_run-1_space-MNI152NLin6Asym_res-2_desc-preproc_bold.nii.gz",
        f"{stem}_run-2_space-MNI152NLin2009cAsym_desc-preproc_bold.nii",
    ]
    first, second = sources
    assert (first.subject, first.session, first.task, first.run_label) == ("sub-01", "", "rest", "1")
    assert first.run == "runs/data/sub-01/task-rest_run-1"
    assert first.entities["space"] == "MNI152NLin6Asym"
    assert first.mask_path == root / f"{stem}_run-1_space-MNI152NLin6Asym_res-2_desc-brain_mask.nii.gz"
    assert second.mask_path is None
    assert {source.format for source in sources} == {"bids"}
    assert not any(source.refused for source in sources)


def test_a_run_only_in_native_space_is_refused_with_the_reason(tree: Callable[..., Path]) -> None:
    root = tree(
        f"{BIDS.format('01')}_space-T1w_desc-preproc_bold.nii.gz",
        f"{BIDS.format('02')}_desc-preproc_bold.nii.gz",
        BIDS.format("03") + NLIN6,
    )
    first, second, third = discover(root)
    assert "space-T1w, not in MNI space" in first.refused
    assert "no space- in the name" in second.refused
    assert third.refused == ""


def test_sessions_and_other_entities_name_the_run(tree: Callable[..., Path]) -> None:
    root = tree(f"sub-A1/ses-02/func/sub-A1_ses-02_task-nback_acq-mb8_dir-AP_run-03{NLIN6}")
    (source,) = discover(root, dataset="My data: one")
    assert source.run == "runs/My-data-one/sub-A1/ses-02_task-nback_acq-mb8_dir-AP_run-03"
    assert (source.session, source.task, source.run_label) == ("02", "nback", "03")


def test_sidecars_are_inherited_up_the_tree(tree: Callable[..., Path]) -> None:
    """Nearest folder first, most specific first, and none with an entity that the run does not have."""
    root = tree(
        "sub-1/ses-1/func/sub-1_ses-1_task-rest" + NLIN6,
        "sub-1/ses-1/func/sub-1_ses-1_task-rest" + NLIN6.replace(".nii.gz", ".json"),
        "sub-1/ses-1/func/sub-1_ses-1_task-motor_bold.json",
        "sub-1/ses-1/sub-1_ses-1_task-rest_bold.json",
        "sub-1/sub-1_bold.json",
        "sub-1/sub-1_task-rest_bold.json",
        "task-rest_bold.json",
        "task-rest_acq-fast_bold.json",
        "bold.json",
    )
    (source,) = discover(root)
    assert [path.relative_to(root).as_posix() for path in source.sidecars] == [
        "sub-1/ses-1/func/sub-1_ses-1_task-rest" + NLIN6.replace(".nii.gz", ".json"),
        "sub-1/ses-1/sub-1_ses-1_task-rest_bold.json",
        "sub-1/sub-1_task-rest_bold.json",
        "sub-1/sub-1_bold.json",
        "task-rest_bold.json",
        "bold.json",
    ]


def test_a_derivative_takes_name_labels_and_sidecars_of_the_raw_dataset_around_it(tree: Callable[..., Path]) -> None:
    root = tree("sub-1/func/sub-1_task-rest_bold.nii.gz", "derivatives/fmriprep/" + BIDS.format("1") + NLIN6)
    write_json(root / "dataset_description.json", {"Name": "Sleepy & Rested", "DatasetType": "raw"})
    write_json(root / "task-rest_bold.json", {"RepetitionTime": 2})
    (root / "participants.tsv").write_text("participant_id\tage\nsub-1\t30\n")
    derivative = root / "derivatives" / "fmriprep"
    write_json(derivative / "dataset_description.json", {"Name": "fMRIPrep - workflow", "DatasetType": "derivative"})
    for source in (root, derivative, derivative / "sub-1"):
        (run,) = discover(source)
        assert run.dataset == "Sleepy-Rested"
        assert run.participants == root / "participants.tsv"
        assert root / "task-rest_bold.json" in run.sidecars


def test_the_name_of_a_dataset(tree: Callable[..., Path]) -> None:
    file = BIDS.format("1") + NLIN6
    alone = tree(file, root="cohort/derivatives/fmriprep")
    assert discover(alone)[0].dataset == "cohort"  # the folder that no pipeline made, when no description says more
    write_json(
        alone / "dataset_description.json", {"Name": "fMRIPrep - fMRI PREProcessing workflow", "GeneratedBy": []}
    )
    assert discover(alone)[0].dataset == "cohort"
    write_json(alone / "dataset_description.json", {"Name": "Cohort X", "DatasetType": "derivative"})
    assert discover(alone)[0].dataset == "Cohort-X"
    assert discover(alone, dataset="mine")[0].dataset == "mine"


def test_two_files_never_become_one_run(tree: Callable[..., Path]) -> None:
    root = tree("a/" + BIDS.format("1") + NLIN6, "b/" + BIDS.format("1") + NLIN6, "b/" + BIDS.format("2") + NLIN6)
    sources = discover(root)
    assert [bool(source.refused) for source in sources] == [False, True, False]
    assert str(sources[0].path) in sources[1].refused
    for name in ("a", "b"):
        write_json(root / name / "dataset_description.json", {"Name": name})
    assert not any(source.refused for source in discover(root))


def test_hcp_names(tree: Callable[..., Path]) -> None:
    results = "{}/MNINonLinear/Results/{}/{}"
    root = tree(
        *(results.format("100307", "rfMRI_REST1_LR", file) for file in (
            "rfMRI_REST1_LR.nii.gz", "rfMRI_REST1_LR_hp2000_clean.nii.gz", "rfMRI_REST1_LR_SBRef.nii.gz",
            "rfMRI_REST1_LR_Atlas_MSMAll.dtseries.nii", "rfMRI_REST1_LR_dropouts.nii.gz", "brainmask_fs.2.nii.gz",
        )),
        results.format("100307", "tfMRI_MOTOR_RL", "tfMRI_MOTOR_RL.nii.gz"),
        results.format("HCA6002236_V1_MR", "rfMRI_REST2_AP", "rfMRI_REST2_AP_hp0_clean.nii.gz"),
        "100307/MNINonLinear/T1w_restore.2.nii.gz",
        "100307/T1w/Results/rfMRI_REST1_LR/rfMRI_REST1_LR.nii.gz",
    )  # fmt: skip
    rest, motor, aging = discover(root, dataset="hcp")
    assert rest.path.name == "rfMRI_REST1_LR_hp2000_clean.nii.gz"
    assert rest.mask_path == rest.path.parent / "brainmask_fs.2.nii.gz"
    assert rest.run == "runs/hcp/sub-100307/ses-REST1_task-rest_run-LR"
    assert (rest.session, rest.task, rest.run_label, rest.format) == ("REST1", "rest", "LR", "hcp")
    assert motor.run == "runs/hcp/sub-100307/task-motor_run-RL"
    assert motor.mask_path is None
    assert aging.run == "runs/hcp/sub-HCA6002236/ses-V1REST2_task-rest_run-AP"


@pytest.mark.parametrize(
    ("run", "stem"),
    [
        ("rfMRI_REST1_7T_PA", "ses-REST1_task-rest_run-7TPA"),
        ("rfMRI_REST", "task-rest"),
        ("tfMRI_RETBAR1_7T_AP", "ses-RETBAR1_task-retbar_run-7TAP"),
    ],
)
def test_more_hcp_names(run: str, stem: str) -> None:
    name = LAYOUTS["hcp"].parse(PurePosixPath(f"1/MNINonLinear/Results/{run}/{run}_hp2000_clean_rclean_tclean.nii.gz"))
    assert name is not None
    assert name.stem == stem


def test_plain_files(tree: Callable[..., Path]) -> None:
    root = tree(
        "alice.nii.gz", "alice_mask.nii.gz", "bob smith.nii", "eve/run1.nii.gz", "eve/run2.nii.gz", "eve/mask.nii.gz",
        "eve/day2/run1.nii.gz", "sub-7/sub-7_ses-2_rest.nii.gz", "notes.txt", "surface.dtseries.nii", "T1w.nii.gz",
    )  # fmt: skip
    sources = discover(root)
    assert [source.run for source in sources] == [
        "runs/data/sub-alice/run",
        f"runs/data/sub-{safe_label('bob smith')}/run",
        "runs/data/sub-eve/day2-run1",
        "runs/data/sub-eve/run1",
        "runs/data/sub-eve/run2",
        "runs/data/sub-7/ses-2_rest",
    ]
    masks = {source.run.split("/", 2)[2]: source.mask_path for source in sources}
    assert masks["sub-alice/run"] == root / "alice_mask.nii.gz"
    assert masks["sub-eve/run1"] == root / "eve" / "mask.nii.gz"
    assert masks["sub-eve/day2-run1"] is None
    assert sources[-1].session == "2"


def test_raw_bids_is_not_mistaken_for_plain_files(tree: Callable[..., Path]) -> None:
    root = tree(BIDS.format("1") + "_bold.nii.gz", "sub-1/anat/sub-1_T1w.nii.gz")
    with pytest.raises(DiscoverError, match=r"no run found .*raw BOLD, which has to be preprocessed"):
        discover(root)


def test_nothing_to_find_says_what_is_looked_for(tree: Callable[..., Path]) -> None:
    root = tree("readme.txt")
    with pytest.raises(DiscoverError, match=r"no NIfTI file there.*desc-preproc_bold.*MNINonLinear.*\*\.nii"):
        discover(root)
    with pytest.raises(DiscoverError, match="does not exist"):
        discover(root / "nowhere")
    with pytest.raises(DiscoverError, match="is a file: give the folder"):
        discover(root / "readme.txt")


def test_links_are_followed_but_not_in_circles(tree: Callable[..., Path], tmp_path: Path) -> None:
    root = tree(BIDS.format("1") + NLIN6)
    elsewhere = tree(BIDS.format("2") + NLIN6, root="elsewhere")
    (root / "sub-2").symlink_to(elsewhere / "sub-2")
    (root / "sub-1" / "loop").symlink_to(root)
    assert [source.subject for source in discover(root)] == ["sub-1", "sub-2"]


@settings(deadline=None, max_examples=200)
@given(st.text(min_size=1, max_size=30), st.text(min_size=1, max_size=30))
def test_any_label_becomes_a_safe_path_and_stays_apart(first: str, second: str) -> None:
    for label in (safe_label(first), slug(first)):
        safe_name(label)
    assert (safe_label(first) == safe_label(second)) == (first == second)


def test_a_label_cannot_climb_out_of_the_store() -> None:
    name = LAYOUTS["plain"].parse(PurePosixPath("..evil/..nii/run.nii.gz"))
    assert name is not None
    assert ".." not in f"{name.subject}/{name.stem}".split("/")
    safe_name(name.subject)
    safe_name(name.stem)


def test_participants_become_typed_columns(tmp_path: Path) -> None:
    path = tmp_path / "participants.tsv"
    path.write_text(
        "\ufeffparticipant_id\tage\tsex\tsite\nsub-01\t31.5\tF\t1\n02\tn/a\tM\tA\n\n01\t31.5\tF\t1\nsub-03\t\tn/a\t3\n",
        encoding="utf-8",
    )
    table = read_participants(path, "cohort")
    assert table.to_pydict() == {
        "participant_id": ["sub-01", "sub-02", "sub-03"],
        "age": [31.5, None, None],
        "sex": ["F", "M", None],
        "site": ["1", "A", "3"],
        "dataset": ["cohort"] * 3,
    }


def test_labels_are_those_of_the_runs(tree: Callable[..., Path]) -> None:
    """A label that cannot be a folder's name is cleaned alike in both, or labels would not find their runs."""
    root = tree(f"sub-A B/func/sub-A B_task-rest{NLIN6}")
    (root / "participants.tsv").write_text("participant_id\tage\nsub-A B\t30\n")
    (source,) = discover(root)
    assert source.participants is not None
    assert read_participants(source.participants, "x").column("participant_id").to_pylist() == [source.subject]


@pytest.mark.parametrize("text", ["", "name\tage\nx\t3\n", "participant_id\tage\n"])
def test_a_table_without_participants_is_named(tmp_path: Path, text: str) -> None:
    (tmp_path / "participants.tsv").write_text(text)
    with pytest.raises(DiscoverError, match=r"participants\.tsv.*participant_id"):
        read_participants(tmp_path / "participants.tsv", "cohort")


def test_a_quotation_mark_in_participants_loses_no_subject(tmp_path: Path) -> None:
    path = tmp_path / "participants.tsv"
    path.write_text('participant_id\tage\tnote\nsub-1\t30\t"unclear\nsub-2\t40\tfine\nsub-3\t50\t\n')
    table = read_participants(path, "cohort")
    assert table.column("participant_id").to_pylist() == ["sub-1", "sub-2", "sub-3"]
    assert table.column("age").to_pylist() == [30.0, 40.0, 50.0]


def test_two_rows_of_a_participant_that_disagree_are_named(tmp_path: Path) -> None:
    path = tmp_path / "participants.tsv"
    path.write_text("participant_id\tage\tsex\nsub-1\t30\tF\nsub-2\t40\tM\n1\t30\tF\nsub-2\t41\tM\n")
    with pytest.raises(DiscoverError, match=r"lines 3 and 5 both are sub-2 and differ in age: keep one row"):
        read_participants(path, "cohort")
    path.write_text("participant_id\tage\nsub-1\t30\nsub-1\t30\n")
    assert read_participants(path, "cohort").num_rows == 1


def test_values_that_python_alone_takes_for_numbers_stay_text(tmp_path: Path) -> None:
    path = tmp_path / "participants.tsv"
    path.write_text("participant_id\tgroup\tcode\tscore\tage\nsub-1\t1_1\t001\tinf\t30\nsub-2\t2\t2\t1\tn/a\n")
    table = read_participants(path, "cohort")
    assert table.column("group").to_pylist() == ["1_1", "2"]
    assert table.column("code").to_pylist() == ["001", "2"]
    assert table.column("score").to_pylist() == ["inf", "1"]
    assert table.column("age").to_pylist() == [30.0, None]


def test_a_description_that_nests_too_deep_costs_its_name_alone(tree: Callable[..., Path]) -> None:
    root = tree(f"sub-1/func/sub-1_task-rest{NLIN6}")
    (root / "dataset_description.json").write_text("[" * 100_000)
    (source,) = discover(root)
    assert source.dataset == root.name


class Lab:
    """The layout of a laboratory: BOLD_<subject>_<number>.nii."""

    name, looks_for = "lab", "BOLD_<subject>_<number>.nii"

    def parse(self, path: PurePosixPath) -> Name | None:
        kind, _, rest = path.stem.partition("_")
        subject, _, number = rest.partition("_")
        found = Name(f"sub-{subject}", "", "rest", number, f"run-{number}", (path.name,), (0,))
        return found if kind == "BOLD" else None

    def mask_names(self, path: PurePosixPath) -> list[str]:
        return [path.name.replace("BOLD", "BRAIN")]

    def motion_names(self, path: PurePosixPath) -> list[str]:
        return [f"{path.stem}.par"]

    def is_motion(self, name: str) -> bool:
        return name.endswith(".par")


def test_a_layout_is_one_class_and_one_entry(tree: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(LAYOUTS, "lab", Lab())
    root = tree("scans/BOLD_ann_1.nii", "scans/BRAIN_ann_1.nii", "scans/BOLD_ann_1.par", "scans/other.nii")
    (source,) = discover(root)
    assert (source.format, source.subject, source.task, source.run_label) == ("lab", "sub-ann", "rest", "1")
    assert source.mask_path == root / "scans/BRAIN_ann_1.nii" and source.motion == root / "scans/BOLD_ann_1.par"
