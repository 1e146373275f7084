"""Events and head motion travel with a run: from the right table, with the right numbers, and never at a run's cost."""

import errno
import logging
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from neurostorm.ingest import annotations as reading
from neurostorm.ingest.annotations import annotations, confounds_displacement, hcp_displacement, read_events
from neurostorm.ingest.convert import attempt, ingest_run
from neurostorm.ingest.layouts.discover import Source, discover
from neurostorm.ingest.nifti import RunError
from neurostorm.io.paths import AnyPath, to_path
from neurostorm.store import FrameStore, create_store
from neurostorm.store.events import Event, framewise_displacement, motion_facts, run_events
from neurostorm.synthetic.cohort import CohortPlan, make_cohort
from neurostorm.synthetic.render import render_run

RUN = "sub-1/ses-1/func/sub-1_ses-1_task-nback_run-1_space-MNI152NLin6Asym_desc-preproc_bold.nii.gz"
FUNC = "sub-1/ses-1/func"
STEM = f"{FUNC}/sub-1_ses-1_task-nback_run-1"
CONFOUNDS = f"{STEM}_desc-confounds_timeseries.tsv"
HCP = "100307/MNINonLinear/Results/tfMRI_WM_LR"


def events_tsv(*names: str) -> bytes:
    """A table of events, one a second, of these names."""
    rows = [f"{second}\t0.5\t{name}\n" for second, name in enumerate(names)]
    return "".join(["onset\tduration\ttrial_type\n", *rows]).encode()


def fill(root: AnyPath, files: dict[str, bytes]) -> None:
    for name, data in files.items():
        if isinstance(root, Path):
            (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(data)


@pytest.fixture
def found(tmp_path: Path) -> Callable[..., Source]:
    """Writes files below a folder and discovers the one run among them; `below` is the source to look in."""

    def make(files: dict[str, bytes], run: str = RUN, below: str = ".") -> Source:
        fill(tmp_path / "data", {run: b"", **files})
        (source,) = discover(tmp_path / "data" / below)
        return source

    return make


def names_of(source: Source) -> list[str]:
    """The trial types that a run takes along."""
    return [event.trial_type for event in run_events(annotations(source, 4))]


# A synthetic subject


@pytest.fixture(scope="module")
def cohort(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, CohortPlan]:
    """One subject with a run at rest and one of the five states."""
    plan = CohortPlan(subjects=1, sessions=1, frames=16, voxel_mm=8.0)
    folder = tmp_path_factory.mktemp("cohort") / "made"
    make_cohort(folder, plan)
    return folder, plan


def test_a_subjects_events_and_motion_reach_the_store(
    cohort: tuple[Path, CohortPlan], store: Path, tmp_path: Path, kit: Any, small_mask: np.ndarray
) -> None:
    """They are the generator's own, and a second ingest writes the same bytes."""
    folder, plan = cohort
    again = tmp_path / "again"
    create_store(again, grid=kit.small, mask=small_mask, tr_s=0.8, recipe="mni-voxelz")
    for source in discover(folder):
        for place_of_store in (store, again):
            assert ingest_run(source, place_of_store).status == "ingested"
        made = render_run(*plan.person(0), task=source.task, frames=plan.frames)
        facts = FrameStore.open(store).run_attributes(source.run)
        expected = [Event(event.onset_s, event.duration_s, event.state) for event in made.events]
        assert list(run_events(facts)) == expected
        assert len(expected) == (5 if source.task == "states" else 0)
        assert ("events" in facts) == (source.task == "states")
        displacement_mm = framewise_displacement(made.motion)[1:]
        assert facts["fd_mean_mm"] == pytest.approx(displacement_mm.mean(), abs=1e-6)
        assert facts["fd_max_mm"] == pytest.approx(displacement_mm.max(), abs=1e-6)
        assert facts["fd_spike_fraction"] == pytest.approx((displacement_mm > 0.5).mean(), abs=1e-6)
        for name in ("zarr.json", "0.0"):
            assert (store / source.run / name).read_bytes() == (again / source.run / name).read_bytes()


def test_tables_decide_neither_whether_a_run_is_complete_nor_whether_it_is_good(
    found: Callable[..., Source], kit: Any, store: Path, tmp_path: Path
) -> None:
    affine = kit.affine_of("LAS", 7.5, (26, 32, 26), (0.0, -18.0, 8.0))
    source = found({f"{STEM}_events.tsv": b"onset\tduration\n1\t2\n", CONFOUNDS: b"\xff\x00"})
    kit.save(source.path, kit.phantom((26, 32, 26), affine, 4, 0.8), affine)
    assert attempt(source, store).status == "ingested"
    facts = FrameStore.open(store).run_attributes(source.run)
    assert "events" not in facts and "fd_mean_mm" not in facts
    (mended,) = discover(tmp_path / "data")
    fill(tmp_path / "data", {f"{STEM}_events.tsv": events_tsv("late")})
    assert attempt(mended, store).status == "complete"
    assert FrameStore.open(store).run_attributes(source.run) == facts


# Which table


@pytest.mark.parametrize(
    ("tables", "taken"),
    [
        ((f"{STEM}_events.tsv", f"{FUNC}/sub-1_ses-1_task-nback_events.tsv", "task-nback_events.tsv"), 0),
        ((f"{FUNC}/sub-1_task-nback_events.tsv", "sub-1/sub-1_ses-1_task-nback_events.tsv"), 0),
        (("task-nback_run-1_events.tsv", "task-nback_events.tsv", "events.tsv"), 0),
        (("task-nback_run-2_events.tsv", "task-nback_acq-x_events.tsv", "task-nback_events.tsv"), 2),
        ((f"{FUNC}/sub-1_ses-1_task-motor_events.tsv", f"{FUNC}/sub-1_events.json", "sub-2/sub-2_events.tsv"), None),
    ],
)
def test_the_nearest_table_that_fits_replaces_the_others(
    found: Callable[..., Source], tables: tuple[str, ...], taken: int | None
) -> None:
    source = found({name: events_tsv(f"from {number}") for number, name in enumerate(tables)})
    assert names_of(source) == ([] if taken is None else [f"from {taken}"])


DERIVATIVE = "derivatives/fmriprep"
RAW_ORDER = (
    f"{DERIVATIVE}/task-nback_events.tsv",
    f"{STEM}_events.tsv",
    "sub-1/sub-1_task-nback_events.tsv",
    "task-nback_events.tsv",
)


@pytest.mark.parametrize("below", [".", DERIVATIVE, f"{DERIVATIVE}/sub-1"])
@pytest.mark.parametrize("first", range(len(RAW_ORDER) + 1))
def test_a_raw_dataset_around_its_derivative_gives_the_events(
    found: Callable[..., Source], first: int, below: str
) -> None:
    """Wherever the source begins: the derivative's own, the subject's own raw ones, then those for everybody."""
    files = {name: events_tsv(f"from {number}") for number, name in enumerate(RAW_ORDER) if number >= first}
    files |= {"dataset_description.json": b"{}", f"{DERIVATIVE}/dataset_description.json": b"{}"}
    source = found(files, f"{DERIVATIVE}/{RUN}", below)
    assert names_of(source) == ([f"from {first}"] if first < len(RAW_ORDER) else [])


def test_tables_are_read_from_a_bucket_as_from_a_folder(make_bucket: Callable[[], str], tmp_path: Path) -> None:
    files = {f"{DERIVATIVE}/{RUN}": b"", f"{DERIVATIVE}/{CONFOUNDS}": b"framewise_displacement\nn/a\n0.5\n"}
    far = to_path(make_bucket()) / "study"
    assert not isinstance(far, Path)
    for root in (far, tmp_path / "study"):
        fill(root, files | {f"{STEM}_events.tsv": events_tsv("near"), "events.tsv": events_tsv("far")})
    (one,), (other,) = discover(far / DERIVATIVE), discover(tmp_path / "study" / DERIVATIVE)
    assert annotations(one, 2) == annotations(other, 2) == {
        "events": [[0.0, 0.5, "near"]], "fd_mean_mm": 0.5, "fd_max_mm": 0.5, "fd_spike_fraction": 0.0,
    }  # fmt: skip


def test_motion_is_that_of_the_run_and_of_no_other(found: Callable[..., Source]) -> None:
    table = b"framewise_displacement\nn/a\n1\n"
    strangers = {CONFOUNDS.replace("run-1", "run-2"): table, f"{FUNC}/sub-1_desc-confounds_timeseries.tsv": table}
    assert found(strangers).motion is None
    old = CONFOUNDS.replace("timeseries", "regressors")
    assert str(found({old: table}).motion).endswith(old)
    assert str(found({CONFOUNDS: table}).motion).endswith(CONFOUNDS)


# What a table says


def test_events_are_read_as_bids_writes_them() -> None:
    table = (
        "\ufefftrial_type\tonset\tresponse_time\tduration\r\n"
        "go\t2.5\tn/a\tn/a\r\n"
        'stop\t-0.0000001\t1\t"0.12345678"\r\n'
        "n/a\t4\t1\t1\r\n"
        "go\tn/a\t1\t1\r\n"
        "\r\n"
        "  wait \t1e1\t0\r\n"
    )
    assert read_events(table.encode()) == [
        Event(0.0, 0.123457, "stop"), Event(2.5, 0.0, "go"), Event(10.0, 0.0, "wait"),
    ]  # fmt: skip


TIMES_S = st.floats(-1e4, 1e4).map(lambda value: round(value, 6) + 0.0)
NAMES = st.text(st.characters(categories=("L", "N", "P", "S"), exclude_characters='"'), min_size=1, max_size=8)
NAMES = NAMES.filter(lambda name: name.lower() not in ("n/a", "na", "nan"))


@settings(deadline=None, max_examples=60)
@given(st.lists(st.builds(Event, TIMES_S, TIMES_S.map(abs), NAMES), max_size=8))
def test_any_events_come_back_sorted(events: list[Event]) -> None:
    rows = [f"{event.trial_type}\t{event.onset_s!r}\t{event.duration_s!r}\n" for event in events]
    data = "".join(["trial_type\tonset\tduration\n", *rows]).encode()
    assert read_events(data) == sorted(events)


def test_displacement_is_fmripreps_own_or_follows_from_six_parameters() -> None:
    """Power et al. 2012: 0.1 mm to the right; then 0.004 rad about z, an arc of 0.2 mm, and 0.3 mm down."""
    head = "trans_x\trot_z\ttrans_y\ttrans_z\trot_x\trot_y"
    rows = ["0\t0\t0\t0\t0\t0", "0.1\t0\t0\t0\t0\t0", "0.1\t0.004\t0\t-0.3\t0\t0"]
    plain = "\n".join([head, *rows]).encode()
    np.testing.assert_allclose(confounds_displacement(plain), [np.nan, 0.1, 0.5], atol=1e-12)
    own = "\n".join([f"{head}\tframewise_displacement", *(row + "\t7" for row in rows)]).encode()
    assert confounds_displacement(own).tolist() == [7.0, 7.0, 7.0]


def test_the_hcps_rotations_are_in_degrees(found: Callable[..., Source]) -> None:
    """0.01 rad is an arc of 0.5 mm on the sphere of 50 mm; the six columns of changes do not count."""
    rows = np.zeros((3, 12))
    rows[1:, 4], rows[2, 1], rows[:, 6:] = np.degrees(0.01), 2.0, 99.0
    table = "\n".join("  ".join(f"{value:.9f}" for value in row) for row in rows).encode()
    np.testing.assert_allclose(hcp_displacement(table), [np.nan, 0.5, 2.0], atol=1e-6)
    source = found({f"{HCP}/Movement_Regressors.txt": table}, f"{HCP}/tfMRI_WM_LR.nii.gz")
    assert annotations(source, 3) == {"fd_mean_mm": 1.25, "fd_max_mm": 2.0, "fd_spike_fraction": 0.5}


def test_what_is_kept_of_motion() -> None:
    displacement_mm = np.array([np.nan, 0.2, 0.5, 0.6, np.nan, 1.0])
    assert motion_facts(displacement_mm) == {"fd_mean_mm": 0.575, "fd_max_mm": 1.0, "fd_spike_fraction": 0.5}
    for impossible in ([np.nan, np.nan], [np.nan, -0.1], [np.nan, np.inf]):
        with pytest.raises(ValueError, match="no framewise displacement, or an impossible one"):
            motion_facts(np.array(impossible))


# Tables that cannot be used


@pytest.mark.parametrize(
    ("name", "data", "words"),
    [
        ("events", b"onset\tduration\n1\t2\n", "no column trial_type"),
        ("events", b"onset\tduration\tstim_type\n1\t2\tface\n", "no column trial_type"),
        ("events", b"onset duration trial_type\n1 2 face\n", "no column onset, duration, trial_type"),
        ("events", b"", "no column onset"),
        ("events", b"onset\tduration\ttrial_type\nsoon\t2\tface\n", "soon"),
        ("events", b"onset\tduration\ttrial_type\n1\t-2\tface\n", "impossible"),
        ("events", b"onset\tduration\ttrial_type\ninf\t2\tface\n", "'inf' is no finite number"),
        ("events", b"onset\tduration\ttrial_type\n1\t2\tf\xe4ce\n", "decode"),
        ("events", b"onset\tduration\ttrial_type\n1\t2\t" + b"x" * 200_000, "field larger"),
        ("desc-confounds_timeseries", b"framewise_displacement\nn/a\n0.1\n", "2 rows where the run has 4 frames"),
        ("desc-confounds_timeseries", b"framewise_displacement\nn/a\n1\n1\n-1\n", "impossible"),
        ("desc-confounds_timeseries", b"framewise_displacement\n" + b"n/a\n" * 4, "no framewise displacement"),
        ("desc-confounds_timeseries", b"trans_x\ttrans_y\n" + b"0\t0\n" * 4, "no column trans_z, rot_x, rot_y, rot_z"),
    ],
)
def test_an_unusable_table_is_named_and_the_run_goes_without(
    found: Callable[..., Source], caplog: pytest.LogCaptureFixture, name: str, data: bytes, words: str
) -> None:
    source = found({f"{STEM}_{name}.tsv": data})
    with caplog.at_level(logging.WARNING):
        assert annotations(source, 4) == {}
    (record,) = caplog.records
    assert words in record.getMessage() and f"{name}.tsv" in record.getMessage() and source.run in record.getMessage()


@pytest.mark.parametrize("data", [b"", b"0 0 0 0 0 0\n" * 4, b"0 0\n" + b"0 " * 12, b"a " * 12, b"\xff"])
def test_an_unusable_table_of_the_hcp_costs_no_run(
    found: Callable[..., Source], caplog: pytest.LogCaptureFixture, data: bytes
) -> None:
    source = found({f"{HCP}/Movement_Regressors.txt": data}, f"{HCP}/tfMRI_WM_LR.nii.gz")
    assert annotations(source, 4) == {}
    assert "Movement_Regressors.txt" in caplog.text


@settings(deadline=None, max_examples=150)
@given(
    st.lists(
        st.sampled_from([b"\t", b"\n", b"\r", b'"', b"onset", b"duration", b"trial_type", b"framewise_displacement",
                         b"n/a", b"1e308", b"-1e308", b"1", b"x", b"\x00", b"\xff", b"nan", b" ",
                         b"onset\tduration\ttrial_type\n", b"framewise_displacement\n"]),
        max_size=12,
    ).map(b"".join)
)  # fmt: skip
def test_no_content_stops_a_run(tmp_path_factory: pytest.TempPathFactory, data: bytes) -> None:
    table = tmp_path_factory.getbasetemp() / "any.tsv"
    table.write_bytes(data)
    source = Source(table, "d", "sub-1", "", "t", "", "task-t", "bids", events=table, motion=table)
    for scheme in ("bids", "hcp"):
        facts = annotations(replace(source, format=scheme), 2)
        assert run_events(facts) == tuple(Event(*entry) for entry in facts.get("events", []))


def test_more_events_than_a_store_should_carry_are_cut(
    found: Callable[..., Source], caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = found({f"{STEM}_events.tsv": events_tsv("a", "b", "c")})
    assert names_of(source) == ["a", "b", "c"] and not caplog.records
    monkeypatch.setattr(reading, "MAX_EVENTS", 2)
    assert names_of(source) == ["a", "b"]
    assert "of 3 events the first 2 are kept" in caplog.text


@pytest.mark.parametrize("denied", [FileNotFoundError, PermissionError])
def test_a_table_that_went_away_costs_no_run(
    found: Callable[..., Source], monkeypatch: pytest.MonkeyPatch, denied: type[OSError]
) -> None:
    source = found({f"{STEM}_events.tsv": events_tsv("a"), CONFOUNDS: b"framewise_displacement\nn/a\n1\n"})

    def refuse(path: Path) -> bytes:
        raise denied(errno.EACCES, "gone", str(path))

    monkeypatch.setattr(Path, "read_bytes", refuse)
    assert annotations(source, 2) == {}


def test_a_place_that_does_not_answer_leaves_the_run_for_another_time(
    found: Callable[..., Source], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stored without its events now, it would count as complete ever after."""
    source = found({f"{DERIVATIVE}/{STEM}_events.tsv": events_tsv("a")}, f"{DERIVATIVE}/{RUN}")
    elsewhere = replace(source, events=None)

    def fail(path: Path) -> Any:
        raise OSError(errno.EIO, "Input/output error", str(path))

    monkeypatch.setattr(Path, "read_bytes", fail)
    with pytest.raises(RunError, match=r"cannot be read, .*_events\.tsv: Input/output error"):
        annotations(source, 4)
    monkeypatch.setattr(Path, "iterdir", fail)
    with pytest.raises(RunError, match=r"cannot be listed, .*sub-1/ses-1/func: Input/output error"):
        annotations(elsewhere, 4)
