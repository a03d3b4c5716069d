"""Drawn pictures show what their scene says."""

import numpy as np
import pytest

from lapilli.quickstart.scans import CELL_PIXELS, load_scans
from lapilli.quickstart.scenes import COLOURS, PICTURE_PIXELS, Digit, Scene, draw, random_scene


@pytest.fixture(scope="module")
def scans():
    return load_scans(0)[0]


@pytest.mark.parametrize("colour", COLOURS)
def test_digits_stand_in_their_columns_in_their_colours(scans, colour):
    other = "white" if colour != "white" else "red"
    scene = Scene((Digit(8, colour), Digit(0, other)))
    pictures = draw([scene] * 8, scans, np.random.default_rng(0)).astype(int)
    assert pictures.shape == (8, PICTURE_PIXELS, PICTURE_PIXELS, 3)
    for half, name in ((pictures[:, :, :CELL_PIXELS], colour), (pictures[:, :, CELL_PIXELS:], other)):
        brightest = half.reshape(8, -1, 3)[np.arange(8), half.sum(-1).reshape(8, -1).argmax(1)]
        distance = {c: np.abs(brightest - np.array(rgb)).sum(1).mean() for c, rgb in COLOURS.items()}
        assert min(distance, key=lambda c: distance[c]) == name


def test_captions():
    assert Scene((Digit(7, "red"), Digit(2, "blue"))).caption == "a red seven and a blue two"
    assert Scene((Digit(0, "white"),)).caption == "a white zero"


def test_random_scene_keeps_to_count_and_colours():
    rng = np.random.default_rng(0)
    scenes = [random_scene(rng, 2, ("red", "blue")) for _ in range(50)]
    assert {len(s.digits) for s in scenes} == {2}
    assert {d.colour for s in scenes for d in s.digits} == {"red", "blue"}
    assert {len(random_scene(rng).digits) for _ in range(50)} == {1, 2}
