"""Tokens per picture equal LLaVA-1.6's recorded numbers and transformers' processor."""

import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lapilli.base.errors import ModelError
from lapilli.base.layout import ImageLayout

REFERENCE = Path(__file__).parents[1] / "reference" / "images"
PINPOINTS = ((336, 672), (672, 336), (672, 672), (1008, 336), (336, 1008))
V16 = ImageLayout(mode="anyres", tile_height=336, tile_width=336, grid_height=24, grid_width=24, pinpoints=PINPOINTS)

GOLDEN = {
    (336, 336): ((336, 672), (1, 2), 1176),
    (640, 480): ((672, 672), (2, 2), 2340),
    (480, 640): ((672, 672), (2, 2), 2352),
    (1000, 300): ((1008, 336), (3, 1), 2182),
    (300, 1000): ((336, 1008), (1, 3), 2232),
    (1920, 1080): ((672, 672), (2, 2), 1948),
    (672, 672): ((672, 672), (2, 2), 2928),
    (100, 100): ((336, 672), (1, 2), 1176),
    (2000, 500): ((1008, 336), (3, 1), 1890),
}


@pytest.mark.parametrize("size", GOLDEN)
def test_llava_next_golden_vectors(size):
    assert (V16.best_canvas(*size), V16.tile_grid(*size), V16.tokens(*size)) == GOLDEN[size]


def test_grids_recorded_from_the_original():
    recorded = json.loads((REFERENCE / "images.json").read_text())
    layout = ImageLayout(
        mode="anyres",
        tile_height=56,
        tile_width=56,
        grid_height=4,
        grid_width=4,
        pinpoints=recorded["grid_pinpoints"],
    )
    for entry in recorded["images"]:
        assert layout.best_canvas(*entry["size"]) == tuple(entry["best_resolution"])
        assert layout.tile_grid(*entry["size"]) == tuple(entry["grid"])


@pytest.fixture(scope="module")
def processor():
    from transformers import LlavaNextImageProcessorPil, LlavaNextProcessor

    # Without a tokenizer: only the counting of tokens is asked.
    made = LlavaNextProcessor.__new__(LlavaNextProcessor)
    made.image_processor = LlavaNextImageProcessorPil(
        size={"shortest_edge": 336}, image_grid_pinpoints=[[height, width] for width, height in PINPOINTS]
    )
    made.patch_size, made.vision_feature_select_strategy, made.num_additional_image_tokens = 14, "default", 1
    return made


@settings(max_examples=300, deadline=None)
@given(st.integers(1, 3000), st.integers(1, 3000))
def test_tokens_equal_transformers(processor, width, height):
    # The processor counts the class token and takes it off later, for the strategy "default".
    assert V16.tokens(width, height) == processor._get_number_of_features(height, width, 336, 336) - 1


def test_where_the_original_loses_a_row_to_rounding():
    assert int(55 * (24 / 88)) == 14  # the true value is 15
    assert V16.unpadded_grid(88, 55) == (16, 32, 0, 24)


@settings(max_examples=200, deadline=None)
@given(st.integers(1, 5000), st.integers(1, 5000))
def test_tokens_are_those_of_the_kept_grid(width, height):
    top, bottom, left, right = V16.unpadded_grid(width, height)
    columns, rows = V16.tile_grid(width, height)
    assert 0 <= top <= bottom <= rows * 24
    assert 0 <= left <= right <= columns * 24
    assert V16.tokens(width, height) == 576 + (bottom - top) * (right - left + 1)
    assert V16.tiles(width, height) == 1 + columns * rows


@pytest.mark.parametrize("mode", ["square", "pad"])
def test_one_tile_modes_count_the_class_token(mode):
    layout = ImageLayout(mode=mode, tile_height=56, tile_width=28, grid_height=4, grid_width=2, extra_tokens=1)
    assert {layout.tokens(width, 7) for width in (1, 50, 1000)} == {9}
    assert layout.tiles(1000, 7) == 1


@pytest.mark.parametrize(
    ("changes", "word"),
    [({"pinpoints": ()}, "pinpoints"), ({"pinpoints": ((336, 500),)}, "336 x 500"), ({"extra_tokens": 1}, "class")],
)
def test_layouts_that_cannot_be_laid_out_are_refused(changes, word):
    with pytest.raises(ModelError, match=word):
        ImageLayout(**(V16.model_dump() | changes))
