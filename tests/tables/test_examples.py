"""Strips of pictures: their colours are where masks, boxes and heat are, and their files small."""

import io

import numpy as np
import pytest
from PIL import Image

from medsyn_jax.core.detection import Boxes
from medsyn_jax.core.errors import UserError
from medsyn_jax.tables import examples
from medsyn_jax.tables.examples import PREDICTED, SIDE, TRUE

GREY = (100, 100, 100)


def pixels_of(path) -> np.ndarray:
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB"))


def is_color(pixels, color) -> np.ndarray:
    return (pixels == np.array(color)).all(axis=-1)


def grey(count, size=64) -> np.ndarray:
    return np.full((count, size, size), GREY[0], np.uint8)


def test_records_are_chosen_by_their_keys_alone():
    keys = [f"r{i}" for i in range(40)]
    usable = np.arange(40) % 2 == 0
    rows = examples.chosen(keys, usable)
    assert len(rows) == examples.SHOWN
    assert usable[rows].all()
    order = np.random.default_rng(0).permutation(40)
    again = examples.chosen([keys[i] for i in order], usable[order])
    assert [keys[order[i]] for i in again] == [keys[i] for i in rows]
    assert rows.tolist() != sorted(rows.tolist())
    assert examples.chosen(keys, np.zeros(40, bool)).tolist() == []


def test_the_true_outline_lies_inside_the_edge_and_the_predicted_one_outside(tmp_path):
    truth = np.zeros((2, 64, 64), bool)
    truth[:, 10:30, 20:40] = True  # in the strip: rows 20 to 59, columns 40 to 79
    predicted = truth.copy()
    predicted[1] = False
    examples.draw_masks(tmp_path / "a.png", grey(2), truth, predicted)
    strip = pixels_of(tmp_path / "a.png")
    for start in (0, SIDE + 4):
        tile = strip[:SIDE, start : start + SIDE]
        square = np.zeros((SIDE, SIDE), bool)
        square[20:60, 40:80] = True
        square[21:59, 41:79] = False
        np.testing.assert_array_equal(is_color(tile, TRUE), square)
    ring = np.zeros((SIDE, SIDE), bool)
    ring[19:61, 39:81] = True
    ring[20:60, 40:80] = False
    np.testing.assert_array_equal(is_color(strip[:SIDE, :SIDE], PREDICTED), ring)
    assert not is_color(strip[:SIDE, SIDE:], PREDICTED).any()
    assert is_color(strip[:SIDE, :SIDE], GREY)[70:].all()


def test_boxes_of_half_a_probability_or_else_the_best_one_are_drawn(tmp_path):
    corners = np.array([[[10, 10, 20, 30], [40, 40, 60, 60], [5, 50, 9, 60]]] * 2, np.float32)
    truth = Boxes(corners[:, :1], np.zeros((2, 1), int))
    scores = np.array([[0.9, 0.5, 0.4], [0.3, 0.2, 0.1]])
    predicted = Boxes(corners, np.array([[0, 0, 0], [0, 0, -1]]), scores)
    examples.draw_boxes(tmp_path / "a.png", grey(2), truth, predicted)
    strip = pixels_of(tmp_path / "a.png")
    first, second = strip[:SIDE, :SIDE], strip[:SIDE, SIDE + 4 :]
    for tile in (first, second):
        assert is_color(tile, TRUE)[20:60, [20, 39]].all()  # twice the corners
        assert is_color(tile, PREDICTED)[19:61, [19, 40]].all()
    assert is_color(first, PREDICTED)[79:121, 79].all()
    assert not is_color(second, PREDICTED)[79:121, 79].any()
    assert not is_color(first, PREDICTED)[99:121, 9].any()


def test_an_image_without_a_predicted_box_is_shown(tmp_path):
    none = Boxes(np.zeros((1, 2, 4), np.float32), np.full((1, 2), -1), np.zeros((1, 2)))
    truth = Boxes(np.array([[[1, 1, 9, 9]]], np.float32), np.zeros((1, 1), int))
    examples.draw_boxes(tmp_path / "a.png", grey(1, 32), truth, none)
    strip = pixels_of(tmp_path / "a.png")
    assert is_color(strip, TRUE).any()
    assert not is_color(strip, PREDICTED).any()


def test_heat_is_orange_where_a_place_raises_the_logit_and_blue_where_it_lowers_it(tmp_path):
    maps = np.array([[[9.0, 0.0], [0.0, -9.0]], [[0.0, 0.0], [0.0, 0.0]]])
    examples.draw_heat(tmp_path / "a.png", grey(2), maps, np.array([0.7, 0.2]), "Edema")
    strip = pixels_of(tmp_path / "a.png").astype(int)
    (red, _, blue), corner = strip[10, 10], strip[SIDE - 10, SIDE - 10]
    assert red > 140 > 70 > blue
    assert corner[2] > 140 > corner[0]
    assert is_color(strip[:SIDE, SIDE + 4 :], GREY).all()  # a place that does neither
    strip = examples.read(tmp_path / "a.png")
    assert strip.caption == "Class activation maps (2 x 2 places) and, below each image, P(Edema)"
    assert strip.orange == "raises P(Edema), against the mean image"


def test_a_strip_is_small_whatever_the_images(tmp_path):
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (6, 224, 224), np.uint8)  # noise: no radiograph is worse
    truth = np.zeros((6, 224, 224), bool)
    truth[:, 50:100, 50:100] = True
    examples.draw_masks(tmp_path / "a.png", images, truth, truth)
    assert (tmp_path / "a.png").stat().st_size < 80_000
    strip = examples.read(tmp_path / "a.png")
    assert (strip.blue, strip.orange) == ("true mask", "predicted mask")
    with Image.open(io.BytesIO(strip.png)) as image:
        assert image.size[0] == 6 * SIDE + 5 * 4


def test_no_image_makes_no_file_and_a_damaged_file_is_one_line(tmp_path):
    empty = np.zeros((0, 8, 8), bool)
    examples.draw_masks(tmp_path / "a.png", grey(0, 8), empty, empty)
    assert examples.read(tmp_path / "a.png") is None
    (tmp_path / "a.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    with pytest.raises(UserError, match=r"a.png: is no whole PNG: delete the file"):
        examples.read(tmp_path / "a.png")
