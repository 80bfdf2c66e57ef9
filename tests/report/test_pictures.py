"""The pictures of examples, pixel by pixel."""

from __future__ import annotations

import io
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from matplotlib.image import imread

from advmed.report import Example, View
from advmed.report.figures import CLASS_COLOURS, FOUND_POINT, TRUE_POINT, ExamplePictures, verbatim
from helpers.examples import POINTS, landmarks, segmented


def pixels(png: bytes) -> Any:
    return (imread(io.BytesIO(png))[..., :3] * 255).round().astype(int)


def test_pictures_show_grey_values_labels_and_outlines() -> None:
    draw = ExamplePictures(segmented(), [1])
    width, height = draw.size
    zoom = width // 8
    clean = pixels(draw.clean())
    assert clean.shape == (height, width, 3)
    assert (clean[:, : 4 * zoom] == 0).all()
    assert (clean[:, 4 * zoom :] == 255).all()
    inside = (5 * zoom // 2, 5 * zoom // 2)  # pixel (2, 2): black image, label 1
    truth = pixels(draw.truth())
    np.testing.assert_allclose(truth[inside], 0.35 * CLASS_COLOURS[0], atol=1)
    np.testing.assert_array_equal(truth[2 * zoom, 3 * zoom], CLASS_COLOURS[0])  # its rim
    np.testing.assert_array_equal(truth[0, 0], 0)
    missed = pixels(draw.prediction(segmented().views[1]))  # predicts nothing: only the outline of the truth is drawn
    assert (missed[2 * zoom, 3 * zoom] == 255).all()
    assert missed[inside].max() < 10


def place(draw: ExamplePictures, x: float, y: float) -> tuple[int, int]:
    """Row and column of a point in a picture; (0, 0) is the centre of the top left pixel."""
    factor = draw.size[0] / draw.example.image.shape[1]
    return round((y + 0.5) * factor - 0.5), round((x + 0.5) * factor - 0.5)


@pytest.mark.parametrize("colour", [False, True])
def test_points_are_dots_where_they_are(colour: bool) -> None:
    draw = ExamplePictures(landmarks(colour=colour), [])
    assert draw.size == (16 * 24, 10 * 24)
    assert place(draw, 0, 0) in ((11, 11), (12, 12))
    plain, truth, found = (pixels(png) for png in (draw.clean(), draw.truth(), draw.prediction(draw.example.views[0])))
    first, second = place(draw, 2, 1), place(draw, 13, 6.5)
    for row, column in (first, second):
        np.testing.assert_array_equal(truth[row, column], TRUE_POINT)
        rows, columns = np.ogrid[: truth.shape[0], : truth.shape[1]]
        away = np.hypot(rows - row, columns - column)
        assert (truth[away <= 2] == TRUE_POINT).all()  # three pixels, and a rim of one
        assert (truth[(away > 3.7) & (away < 3.9)] == 0).all()
        np.testing.assert_array_equal(truth[(away > 5) & (away < 12)], plain[(away > 5) & (away < 12)])
    changed = (truth != plain).any(2)
    assert 2 * 40 < changed.sum() < 2 * 64  # two dots and no third
    np.testing.assert_array_equal(found[first], TRUE_POINT)
    np.testing.assert_array_equal(found[place(draw, 6, 1)], FOUND_POINT)
    np.testing.assert_array_equal(found[second], FOUND_POINT)  # on the true one
    np.testing.assert_array_equal(found[place(draw, 3, 8)], FOUND_POINT)  # found, though the truth is not known


def test_a_line_joins_what_was_found_with_the_truth() -> None:
    draw = ExamplePictures(landmarks(), [])
    plain, found = pixels(draw.clean()), pixels(draw.prediction(draw.example.views[0]))
    row, start = place(draw, 2, 1)
    _, end = place(draw, 6, 1)
    here = slice(0, 4 * row)  # the third point is below
    between = found[here, start + 6 : end - 5]
    yellow = (between == FOUND_POINT).all(2)
    assert (yellow.sum(0) == yellow.sum(0)[0]).all()
    assert 2 <= yellow.sum(0)[0] <= 3  # a thin one
    assert set(np.nonzero(yellow)[0]) <= {row - 1, row, row + 1}
    np.testing.assert_array_equal(between[~yellow], plain[here, start + 6 : end - 5][~yellow])
    np.testing.assert_array_equal(found[:, : start - 6], plain[:, : start - 6])  # it ends at the points
    np.testing.assert_array_equal(found[: row - 6], plain[: row - 6])
    # No line leads to or from a point that is not known: around the third, found alone, there is nothing.
    low, left = place(draw, 3, 8)
    rows, columns = np.ogrid[: found.shape[0], : found.shape[1]]
    away = np.hypot(rows - low, columns - left)
    np.testing.assert_array_equal(found[(away > 5) & (away < 60)], plain[(away > 5) & (away < 60)])


def test_lines_are_drawn_in_every_direction() -> None:
    image = np.tile(np.linspace(0, 1, 20), (20, 1))
    corners = np.array([(3.0, 3.0), (16.0, 3.0), (9.0, 2.0)])
    ends = np.array([(12.0, 15.0), (5.0, 14.0), (9.0, 17.0)])
    view = View("own", "", 0, image, points=ends)
    draw = ExamplePictures(Example("cross", image, None, [view], points=corners), [])
    found = pixels(draw.prediction(view))
    for (x1, y1), (x2, y2) in zip(corners, ends, strict=True):
        for part in (0.3, 0.7):
            spot = place(draw, x1 + part * (x2 - x1), y1 + part * (y2 - y1))
            np.testing.assert_array_equal(found[spot], FOUND_POINT)


def test_points_of_pictures_that_are_thinned() -> None:
    draw = ExamplePictures(landmarks(1000, 1600, 100.0), [])
    assert draw.size == (534, 334)  # every third pixel
    truth = pixels(draw.truth())
    marked = np.argwhere((truth == TRUE_POINT).all(2))
    for x, y in POINTS[[0, 2]] * 100:
        near = marked[np.hypot(marked[:, 0] - y / 3, marked[:, 1] - x / 3) < 8]
        np.testing.assert_allclose(near.mean(0), ((y + 0.5) / 3 - 0.5, (x + 0.5) / 3 - 0.5), atol=0.5)
    assert len(marked) <= 2 * 32


def test_truth_is_drawn_under_predictions_of_points_only() -> None:
    """A model that gives no points, such as a classifier, keeps its image."""
    example = landmarks()
    bare = replace(example.views[0], points=None)
    draw = ExamplePictures(replace(example, views=[bare]), [])
    np.testing.assert_array_equal(pixels(draw.prediction(bare)), pixels(draw.clean()))
    unknown = replace(example, points=None)
    found = pixels(ExamplePictures(unknown, []).prediction(example.views[0]))
    assert not (found == TRUE_POINT).all(2).any()
    dots = (found == FOUND_POINT).all(2).sum()
    assert 3 * 20 < dots <= 3 * 32  # three dots, no lines


def test_points_outside_of_the_image_and_those_that_are_none_do_no_harm() -> None:
    far = np.array([(-30.0, 4.0), (200.0, 200.0), (np.nan, 3.0)])
    view = View("own", "", 0, np.zeros((10, 16)), points=far)
    draw = ExamplePictures(Example("far", np.zeros((10, 16)), None, [view], points=far), [])
    np.testing.assert_array_equal(pixels(draw.prediction(view)), pixels(draw.clean()))


def test_noise_is_amplified_by_a_round_factor_around_grey() -> None:
    draw = ExamplePictures(segmented(), [1])
    assert draw.amplification == 50  # 0.01 of the grey range becomes half of it
    noise = pixels(draw.noise(segmented().views[1]))
    zoom = draw.size[0] // 8
    assert abs(noise[0, 0] - 127.5).max() <= 0.5
    assert (noise[5 * zoom // 2, 5 * zoom // 2] == 255).all()
    still = ExamplePictures(replace(segmented(), views=segmented().views[:1]), [1])
    assert still.amplification == 1


def test_pictures_of_large_and_of_colour_images() -> None:
    generator = np.random.default_rng(0)
    image = generator.random((900, 2000, 3))
    view = View("STD", "pgd5", 1, np.clip(image + 0.1, 0, 1), None)
    draw = ExamplePictures(Example("photo", image, None, [view]), [])
    assert draw.size == (667, 300)
    assert pixels(draw.prediction(view)).shape == (300, 667, 3)
    assert np.ptp(pixels(draw.clean()), axis=2).max() > 100  # still in colour


def test_examples_that_do_not_fit() -> None:
    shape = r"must be \(H, W\) or \(H, W, 3\), got \(6, 8, 2\)"
    with pytest.raises(ValueError, match=f"case_a {shape}"):
        ExamplePictures(replace(segmented(), image=np.zeros((6, 8, 2))), [1])
    with pytest.raises(ValueError, match="case_a must be finite and of one shape"):
        ExamplePictures(replace(segmented(), truth=np.zeros((5, 8), int)), [1])
    with pytest.raises(ValueError, match="case_a must be finite and of one shape"):
        ExamplePictures(replace(segmented(), image=np.full((6, 8), np.nan)), [1])


@pytest.mark.parametrize("name", ["_std", "__", "a$b^$", "$"])
def test_every_name_is_in_the_legend_as_it_is(name: str) -> None:
    """A line that begins with an underscore has no entry by default, and dollars make a formula, or an error."""
    from matplotlib.figure import Figure

    figure = Figure()
    axes = figure.subplots()
    axes.plot([0, 1], [0, 1], label=verbatim(name))
    (text,) = axes.legend().get_texts()
    figure.savefig(io.BytesIO())
    assert text.get_text().replace(r"\$", "$").strip() == name
    axes.set_title(verbatim(name))
    figure.savefig(io.BytesIO())
