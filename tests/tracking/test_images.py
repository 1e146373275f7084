"""Pictures that cannot swap left and right, and captions whose numbers are those of the volumes."""

from typing import Any

import numpy as np
import pytest

from neurostorm.tracking import images
from neurostorm.tracking.images import Row, brain_figure, percentiles, planes, reconstruction_figure, rows_figure

SHAPE = (10, 12, 8)
AFFINE = np.array([[4.0, 0, 0, -18], [0, 4, 0, -22], [0, 0, 4, -14], [0, 0, 0, 1]])


@pytest.fixture
def brain() -> np.ndarray:
    """An ellipsoid in the box."""
    axes = np.meshgrid(*(np.linspace(-1.2, 1.2, n) for n in SHAPE), indexing="ij")
    return sum(axis**2 for axis in axes) < 1


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What the figure functions hand to `rows_figure`, which then draws as ever."""
    seen: dict[str, Any] = {}
    draw = rows_figure

    def spy(rows: Any, mask: Any, title: str, **options: Any) -> np.ndarray:
        seen.update(rows=rows, mask=mask, title=title, **options)
        return draw(rows, mask, title, **options)

    monkeypatch.setattr(images, "rows_figure", spy)
    return seen


@pytest.mark.parametrize(
    ("marked", "spots"),
    [
        # voxel (x, y, z) -> (row, column) in the sagittal, coronal and axial picture through it
        ((9, 11, 7), [(0, 11), (0, 0), (0, 0)]),  # right, front, top: A at the right edge, R at the left
        ((0, 0, 0), [(7, 0), (7, 9), (11, 9)]),  # left, back, bottom
        ((9, 0, 3), [(4, 0), (4, 0), (11, 0)]),
    ],
)
def test_a_voxel_is_drawn_on_its_side_of_the_person(marked: tuple[int, int, int], spots: list[tuple[int, int]]) -> None:
    volume = np.zeros(SHAPE)
    volume[marked] = 1
    cuts = planes(volume, AFFINE, marked)
    assert [cut.name for cut in cuts] == ["sagittal", "coronal", "axial"]
    assert [(cut.left, cut.right) for cut in cuts] == [("P", "A"), ("R", "L"), ("R", "L")]
    assert [tuple(np.argwhere(cut.image)[0].tolist()) for cut in cuts] == spots
    millimetres = (AFFINE @ [*marked, 1])[:3]
    assert [cut.position for cut in cuts] == [f"{a} = {mm:.0f} mm" for a, mm in zip("xyz", millimetres, strict=True)]


def test_without_a_centre_the_cuts_go_through_what_is_there() -> None:
    volume = np.zeros(SHAPE)
    volume[2:5, 6, 7] = 3
    assert [cut.index for cut in planes(volume)] == [3, 6, 7]
    assert [cut.position for cut in planes(volume)] == ["x = 3", "y = 6", "z = 7"]
    assert all(cut.image.any() for cut in planes(volume))
    assert planes(np.zeros(SHAPE))[0].image.shape == (8, 12)


def test_what_is_no_volume_is_refused(brain: np.ndarray) -> None:
    with pytest.raises(ValueError, match="three axes"):
        planes(np.zeros((4, 4)))
    with pytest.raises(ValueError, match="outside the volume"):
        planes(np.zeros(SHAPE), centre=(0, 0, 8))
    with pytest.raises(ValueError, match="'Mean image' has shape"):
        rows_figure([Row("Mean image", np.zeros((2, 2, 2)), (0, 1), "")], brain, "")


def test_the_right_of_the_person_is_on_the_left_of_the_finished_figure(brain: np.ndarray) -> None:
    flat = brain_figure(brain * 1.0, "flat", 0, 3, mask=brain)
    columns = {}
    for side, half in (("left", slice(0, 4)), ("right", slice(6, 10))):
        volume = brain * 1.0
        volume[half] *= 3
        changed = brain_figure(volume, "flat", 0, 3, mask=brain, centre=None)
        assert changed.dtype == np.uint8 and changed.ndim == 3 and changed.shape[2] == 3
        columns[side] = np.argwhere((changed != flat).any(axis=2))[:, 1]
    assert columns["right"].min() < columns["left"].min()
    assert columns["right"].max() < columns["left"].max()


def test_values_outside_the_brain_are_never_drawn(brain: np.ndarray) -> None:
    quiet, loud = brain * 1.0, np.where(brain, 1.0, 99.0)
    assert np.array_equal(*(brain_figure(volume, "t", 0, 2, mask=brain) for volume in (quiet, loud)))


def test_missing_values_inside_the_brain_have_a_colour_of_their_own(brain: np.ndarray) -> None:
    holes = np.where(brain, 1.0, 0.0)
    holes[4:7, 4:8, 3:5] = np.nan
    grey = np.array([0x7F] * 3, np.uint8)
    counts = [(brain_figure(v, "", 0, 2, mask=brain) == grey).all(axis=2).sum() for v in (brain * 1.0, holes)]
    assert counts[1] > counts[0] + 500


def test_each_row_adds_to_the_figure_and_long_titles_fit(brain: np.ndarray) -> None:
    row = Row("Label\nwith detail", brain * 1.0, (0, 1), "z", "amount")
    one, three = (rows_figure([row] * n, brain, "Title\nand more of it", affine=AFFINE) for n in (1, 3))
    assert three.shape[0] > 2 * one.shape[0] - 200 and three.shape[1] == one.shape[1]
    assert (one[:, 0] == 255).all(), "nothing touches the edge"


def test_limits_follow_the_values_and_their_sign(brain: np.ndarray, drawn: dict[str, Any]) -> None:
    rng = np.random.default_rng(0)
    volume = np.where(brain, rng.uniform(100, 200, SHAPE), -1e6)
    brain_figure(volume, "mean", mask=brain, unit="a.u.")
    (row,) = drawn["rows"]
    assert 100 <= row.limits[0] < 110 and 190 < row.limits[1] <= 200 and row.kind == "anatomy"
    brain_figure(volume - 150, "z", vmin=-20, mask=brain)
    assert drawn["rows"][0].limits[0] == -20 and drawn["rows"][0].kind == "signed"


def test_the_limits_of_nothing_are_still_limits() -> None:
    assert percentiles(np.array([])) == (0.0, 1.0)
    assert percentiles(np.array([np.nan, 2.0, 2.0])) == (2.0, 3.0)


def test_the_caption_states_the_error_where_it_was_hidden(brain: np.ndarray, drawn: dict[str, Any]) -> None:
    rng = np.random.default_rng(1)
    target = rng.standard_normal(SHAPE) * brain
    hidden = np.zeros(SHAPE, bool)
    hidden[:, :6] = True
    prediction = np.where(hidden, target + 0.5, 77.0)  # what is visible does not count
    picture = reconstruction_figure(target, np.where(hidden, 55.0, target), prediction, hidden, "t", brain=brain)
    assert picture.dtype == np.uint8 and picture.shape[2] == 3
    zero = np.sqrt(np.mean(target[hidden & brain] ** 2))
    share = (hidden & brain).sum() / brain.sum()
    assert drawn["caption"] == (
        f"{share:.0%} of the brain hidden; root mean square error there 0.50, of predicting 0: {zero:.2f}"
    )


def test_the_rows_show_what_was_seen_and_the_error_elsewhere(brain: np.ndarray, drawn: dict[str, Any]) -> None:
    target = np.random.default_rng(1).standard_normal(SHAPE) * brain
    hidden = np.zeros(SHAPE, bool)
    hidden[3:] = True
    reconstruction_figure(target, np.where(hidden, 0, target), target * 0.5, hidden, "t", "z", brain=brain)
    rows = drawn["rows"]
    assert [row.label.split("\n")[0] for row in rows] == ["Input", "Seen", "Prediction", "Error"]
    assert len({row.limits for row in rows}) == 1 and rows[0].limits[0] == -rows[0].limits[1] < 0
    assert np.array_equal(np.isnan(rows[1].volume), hidden & brain)
    assert np.array_equal(np.isnan(rows[3].volume), ~(hidden & brain))
    assert np.allclose(rows[3].volume[hidden & brain], -0.5 * target[hidden & brain])


def test_nothing_hidden_and_no_brain_are_said_and_drawn(brain: np.ndarray, drawn: dict[str, Any]) -> None:
    nothing = np.zeros(SHAPE, bool)
    reconstruction_figure(brain * 1.0, brain * 1.0, brain * 1.0, nothing, "t")
    assert drawn["caption"] == "nothing was hidden from the model"
    assert np.array_equal(drawn["mask"], brain), "without a mask the brain is where the target is not zero"
    assert reconstruction_figure(*[nothing * 1.0] * 3, ~nothing, "t").size > 0
