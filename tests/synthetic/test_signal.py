"""What the synthetic brains do over time: bands, head motion, and responses to the task's states."""

from dataclasses import replace

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from neurostorm.store.events import framewise_displacement
from neurostorm.synthetic.people import NAMES, make_subject
from neurostorm.synthetic.signal import STATES, Recording, TaskEvent, task_response


@settings(deadline=None, max_examples=10)
@given(index=st.integers(0, 500), session=st.integers(1, 3))
def test_network_courses_stay_in_their_band(index, session):
    times_s = np.arange(0, 600, 0.5)
    courses = Recording(make_subject(0, index), session, "rest", 600).network_courses(times_s)
    power = np.abs(np.fft.rfft(courses * np.hanning(len(times_s)), axis=1)) ** 2
    frequencies_hz = np.fft.rfftfreq(len(times_s), 0.5)
    band = (frequencies_hz > 0.008) & (frequencies_hz < 0.102)
    assert power[:, band].sum() / power.sum() > 0.999


def test_sites_with_different_tr_watch_the_same_activity():
    recording = Recording(make_subject(0, 2), 1, "rest", 144.0)
    fast_s, slow_s = 0.72 * np.arange(200), 2.0 * np.arange(72)
    fast, slow = recording.region_courses(fast_s), recording.region_courses(slow_s)
    for course, other in zip(fast, slow, strict=True):
        np.testing.assert_allclose(np.interp(slow_s[:-1], fast_s, course), other[:-1], atol=0.1)
    motion, _ = recording.head_motion(slow_s)
    longer, _ = replace(recording, duration_s=500.0).head_motion(2.0 * np.arange(250))
    np.testing.assert_array_equal(longer[:, :72], motion)


def test_head_motion_has_spikes_that_show_in_framewise_displacement():
    times_s = 0.72 * np.arange(3000)
    motion, spikes_mm = Recording(make_subject(0, 1), 1, "rest", 2160.0).head_motion(times_s)
    displacement_mm = framewise_displacement(motion)
    onsets = np.flatnonzero(np.diff(spikes_mm) > 0.1) + 1
    assert 5 <= len(onsets) <= 60
    assert np.median(displacement_mm[onsets]) > 5 * np.nanmedian(displacement_mm)


def test_framewise_displacement_of_a_known_movement():
    motion = np.zeros((6, 3))
    motion[0, 1:], motion[4, 2] = 1.0, 0.02  # 1 mm along x, then .02 rad: an arc of 1 mm
    np.testing.assert_allclose(framewise_displacement(motion), [np.nan, 1.0, 1.0])


def test_response_is_the_boxcar_convolved_with_the_canonical_double_gamma():
    from nilearn.glm.first_level import spm_hrf

    times_s = np.arange(0, 80, 0.05)
    boxcar = ((times_s >= 10) & (times_s < 24)).astype(float)
    expected = np.convolve(boxcar, spm_hrf(0.05, oversampling=1))[: len(times_s)]
    np.testing.assert_allclose(task_response([TaskEvent(10, 14, "any")], times_s), expected, atol=0.02)


def test_each_state_activates_its_own_network():
    frames, tr_s = 300, 1.5
    times_s = tr_s * np.arange(frames)
    main = {state: max(drive, key=lambda name: drive[name]) for state, drive in STATES.items()}
    fits = {state: [] for state in STATES}
    for index in range(8):
        recording = Recording(make_subject(0, index), 1, "states", frames * tr_s)
        design = np.stack([task_response([e for e in recording.events if e.state == s], times_s) for s in STATES])
        courses = recording.network_courses(times_s)
        betas, *_ = np.linalg.lstsq(np.vstack([design, np.ones(frames)]).T, courses.T, rcond=None)
        for row, state in zip(betas, STATES, strict=False):
            fits[state].append(row)
            assert np.corrcoef(design[list(STATES).index(state)], courses[NAMES.index(main[state])])[0, 1] > 0.2
    for state, rows in fits.items():
        assert NAMES[int(np.argmax(np.mean(rows, axis=0)))] == main[state]
