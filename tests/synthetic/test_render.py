"""One rendered run: the same world on every grid, the promised temporal SNR, and networks that can be predicted."""

import csv
from dataclasses import replace

import nibabel as nib
import numpy as np
import pytest

from neurostorm.synthetic.cohort import write_run
from neurostorm.synthetic.people import NETWORK_OF_REGION, make_subject
from neurostorm.synthetic.render import render_run, write_bold
from neurostorm.synthetic.signal import STATES, TaskEvent, task_response
from neurostorm.synthetic.sites import SITES, choose_sites

FOUR_MM = choose_sites("4mm")
REGIONS = slice(0, len(NETWORK_OF_REGION))  # rows of a run's maps and columns of its courses


@pytest.mark.parametrize("voxel_mm, shape", [(2.0, (91, 109, 91)), (3.0, (61, 73, 61)), (4.0, (46, 55, 46))])
def test_nlin6_grids_lie_on_the_fsl_lattice(voxel_mm, shape):
    site = replace(SITES[0], voxel_mm=voxel_mm, orientation="RAS", space="MNI152NLin6Asym")
    assert site.shape == shape
    np.testing.assert_array_equal(site.affine[:3, 3], (-90, -126, -72))
    assert replace(site.at(2.0), space="MNI152NLin2009cAsym").shape == (97, 115, 97)


def test_sites_differ_as_real_ones_do():
    sites = choose_sites("all")
    assert {site.voxel_mm for site in sites} == {2.0, 2.4, 3.0, 4.0}
    assert {site.orientation for site in sites} == {"RAS", "LAS"}
    assert {site.space for site in sites} == {"MNI152NLin6Asym", "MNI152NLin2009cAsym"}
    assert min(site.tr_s for site in sites) == 0.72
    assert max(site.tr_s for site in sites) == 2.0
    assert {site.voxel_mm for site in FOUR_MM} == {4.0}
    assert [site.tr_s for site in FOUR_MM] == [site.tr_s for site in sites]


@pytest.mark.parametrize("space", ["MNI152NLin6Asym", "MNI152NLin2009cAsym"])
def test_las_and_ras_show_the_same_world(tmp_path, space):
    canonical = []
    for orientation in ("LAS", "RAS"):
        site = replace(FOUR_MM[0], orientation=orientation, space=space)
        write_bold(tmp_path / f"{orientation}.nii.gz", render_run(make_subject(0, 0), site, frames=3))
        image = nib.load(tmp_path / f"{orientation}.nii.gz")
        assert "".join(nib.aff2axcodes(image.affine)) == orientation
        canonical.append((np.asarray(image.dataobj), nib.as_closest_canonical(image)))
    (stored_las, las), (stored_ras, ras) = canonical
    np.testing.assert_allclose(las.affine, ras.affine)
    np.testing.assert_array_equal(las.get_fdata(), ras.get_fdata())
    assert not np.array_equal(stored_las, stored_ras)


def test_two_grids_show_the_same_brain_doing_the_same():
    fine = replace(SITES[0], voxel_mm=2.0, tr_s=2.0)
    coarse = replace(SITES[0], voxel_mm=4.0, tr_s=2.0)
    subject = make_subject(0, 5)
    boxes = []
    for site in (fine, coarse):
        run = render_run(subject, site, frames=24)
        box = np.full((24, *run.anatomy.mask.shape), np.nan, dtype=np.float32)
        box[:, run.anatomy.mask] = np.concatenate(list(run.blocks()))
        boxes.append(box)
    shared = boxes[0][:, ::2, ::2, ::2]  # both grids have centres there
    inside = ~np.isnan(boxes[1][0])
    assert np.array_equal(inside, ~np.isnan(shared[0]))
    one, other = shared[:, inside], boxes[1][:, inside]
    assert np.corrcoef(one.mean(axis=0), other.mean(axis=0))[0, 1] > 0.99
    zs = [(values - values.mean(axis=0)) / values.std(axis=0) for values in (one, other)]
    assert np.median(np.mean(zs[0] * zs[1], axis=0)) > 0.4  # the shared share of two noisy measurements


@pytest.fixture(scope="module")
def measured():
    """(run, frames (T, V) float32) of eight subjects at the four sites, long enough for stable variances."""
    runs = [render_run(make_subject(0, k), FOUR_MM[k % 4], frames=160) for k in range(8)]
    return [(run, np.concatenate(list(run.blocks()))) for run in runs]


def test_temporal_snr_of_grey_matter_is_40_to_100(measured):
    inside = []
    for run, frames in measured:
        tsnr = (frames.mean(axis=0) / frames.std(axis=0))[run.anatomy.grey > 0.5]
        assert 45 < np.median(tsnr) < 90
        inside.append(np.mean((tsnr > 40) & (tsnr < 100)))
    assert np.mean(inside) > 0.95


def test_networks_carry_half_to_two_thirds_of_grey_matter_variance(measured):
    shares = []
    for run, frames in measured:
        grey = run.anatomy.grey > 0.5
        networks = run.courses[:, REGIONS] @ run.maps[REGIONS][:, grey]
        shares.append(np.mean(networks.var(axis=0) / frames[:, grey].var(axis=0)))
    assert 0.5 < np.mean(shares) < 0.67


def test_every_brain_voxel_shares_signal_with_others(measured):
    for run, frames in measured[:4]:
        shared = (run.courses @ run.maps).var(axis=0) / frames.var(axis=0)
        assert shared.min() > 0.1


def test_thermal_noise_remembers_the_last_frame(measured):
    fast, slow = measured[0], measured[3]  # TR .72 s and 2 s
    correlations = []
    for run, frames in (fast, slow):
        noise = frames - run.mean - run.courses @ run.maps
        correlations.append(np.mean(noise[1:] * noise[:-1]) / np.mean(noise**2))
    assert 0.2 < correlations[0] < 0.4
    assert 0.0 < correlations[1] < 0.1


def test_the_image_shows_the_state_of_the_events_file(tmp_path):
    site = FOUR_MM[2]
    run = render_run(make_subject(0, 0), site, task="states", frames=120)
    write_run(tmp_path, "run", run)
    image = nib.load(next(tmp_path.glob("*bold.nii.gz")))
    voxel = np.rint(np.linalg.inv(image.affine) @ (10, -84, 4, 1)).astype(int)[:3]  # calcarine cortex
    around = tuple(slice(centre - 1, centre + 2) for centre in voxel)
    course = image.get_fdata()[around].mean(axis=(0, 1, 2))
    with (tmp_path / "run_events.tsv").open() as file:
        rows = list(csv.DictReader(file, delimiter="\t"))
    events = [TaskEvent(float(row["onset"]), float(row["duration"]), row["trial_type"]) for row in rows]
    times_s = site.tr_s * np.arange(120)
    matches = {
        state: np.corrcoef(task_response([e for e in events if e.state == state], times_s), course)[0, 1]
        for state in STATES
    }
    assert max(matches, key=lambda state: matches[state]) == "vision"
    assert matches["vision"] > 0.3


def test_unknown_tasks_are_refused():
    with pytest.raises(ValueError, match="use rest or states"):
        render_run(make_subject(0, 0), FOUR_MM[0], task="nap")


def test_topography_is_the_persons_own():
    def maps(index: int, session: int) -> np.ndarray:
        run = render_run(make_subject(0, index), FOUR_MM[0], session=session, frames=2)
        return (run.maps[REGIONS] / run.mean).ravel()

    again, other = np.corrcoef([maps(0, 1), maps(0, 2), maps(1, 1)])[0, 1:]
    assert again > 0.98
    assert other < 0.95
