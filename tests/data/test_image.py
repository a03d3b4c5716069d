"""Pixels equal the originals' and transformers'; files are contained, measured and refused with a reason."""

import contextlib
import io
import json
import os
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lapilli.base.errors import DataError, ModelError
from lapilli.base.layout import ImageLayout
from lapilli.data.image import ImageLimits, ImageSpec, image_size, normalise, open_image, to_rgb, to_tiles
from lapilli.data.sample import Image

REFERENCE = Path(__file__).parents[1] / "reference" / "images"
RECORDED = json.loads((REFERENCE / "images.json").read_text())
CLIP = {
    "do_resize": True,
    "size": {"shortest_edge": 56},
    "do_center_crop": True,
    "crop_size": {"height": 56, "width": 56},
    "resample": 3,
    "image_mean": [0.48145466, 0.4578275, 0.40821073],
    "image_std": [0.26862954, 0.26130258, 0.27577711],
}


def layout_for(spec: ImageSpec, pinpoints=()) -> ImageLayout:
    height, width = spec.tile_size
    return ImageLayout(
        mode=spec.mode, tile_height=height, tile_width=width, grid_height=4, grid_width=4, pinpoints=pinpoints
    )


def random_picture(width: int, height: int, seed: int = 0, mode: str = "RGB") -> PIL.Image.Image:
    """Smooth structure plus noise, so that resampling has something to do."""
    rng = np.random.default_rng(seed)
    small = PIL.Image.fromarray(rng.integers(0, 256, (5, 7, 3), dtype=np.uint8)).resize((width, height), 2)
    noise = rng.integers(-20, 20, (height, width, 3))
    return PIL.Image.fromarray(np.clip(np.asarray(small) + noise, 0, 255).astype(np.uint8)).convert(mode)


@pytest.mark.parametrize("mode", ["square", "pad", "anyres"])
@pytest.mark.parametrize("entry", RECORDED["images"], ids=lambda e: e["file"])
def test_pixels_equal_the_original(entry, mode):
    spec = ImageSpec.from_processor_config(CLIP, mode)
    pinpoints = tuple(map(tuple, RECORDED["grid_pinpoints"])) if mode == "anyres" else ()
    layout = layout_for(spec, pinpoints)
    picture = open_image(Image(path=entry["file"]), REFERENCE)
    tiles = to_tiles(picture, spec, layout)
    assert tiles.dtype == torch.uint8
    assert len(tiles) == layout.tiles(*entry["size"])
    expected = np.load(REFERENCE / "expected.npz")[f"{entry['index']}_{mode}"]
    expected = expected[0] if mode == "anyres" else expected
    np.testing.assert_allclose(normalise(tiles, spec).numpy(), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("mode", ["square", "pad", "anyres"])
def test_fast_backend_is_within_two_levels_of_exact(mode):
    pinpoints = ((56, 112), (112, 56), (112, 112)) if mode == "anyres" else ()
    for index, size in enumerate([(640, 480), (97, 131), (33, 20), (300, 57), (56, 56), (57, 400)]):
        picture = random_picture(*size, seed=index)
        tiles = {}
        for backend in ("exact", "fast"):
            spec = ImageSpec.from_processor_config(CLIP, mode, backend)
            tiles[backend] = to_tiles(picture, spec, layout_for(spec, pinpoints)).int()
        assert (tiles["exact"] - tiles["fast"]).abs().max() <= 2


@settings(max_examples=150, deadline=None)
@given(st.integers(1, 150), st.integers(1, 150), st.integers(1, 40), st.sampled_from([0, 1, 2, 3, 4, 5]))
def test_padding_that_is_not_computed_changes_no_pixel(width, height, target, resample):
    """Against the plain way: paint the canvas, resize all of it with Pillow."""
    colour = (200, 120, 3)
    spec = ImageSpec(mode="pad", size=(target, target), resample=resample, mean=tuple(c / 255 + 0.001 for c in colour))
    assert spec.pad_colour == colour
    picture = random_picture(width, height, seed=width)
    edge = max(width, height)
    canvas = PIL.Image.new("RGB", (edge, edge), colour)
    canvas.paste(picture, ((edge - width) // 2, (edge - height) // 2))
    expected = np.asarray(canvas.resize((target, target), PIL.Image.Resampling(resample)))
    got = to_tiles(picture, spec, layout_for(spec))[0].permute(1, 2, 0).numpy()
    assert np.array_equal(got, expected)


@pytest.mark.parametrize("size", [(640, 480), (480, 640), (640, 427), (375, 500), (500, 333), (1024, 300), (200, 150)])
def test_padding_is_exact_and_fast_is_close_at_the_size_of_llava(size):
    config = CLIP | {"size": {"shortest_edge": 336}, "crop_size": 336}
    picture = random_picture(*size)
    tiles = {}
    for backend in ("exact", "fast"):
        spec = ImageSpec.from_processor_config(config, "pad", backend)
        tiles[backend] = to_tiles(picture, spec, layout_for(spec))[0].permute(1, 2, 0).numpy().astype(int)
    edge = max(size)
    canvas = PIL.Image.new("RGB", (edge, edge), spec.pad_colour)
    canvas.paste(picture, ((edge - size[0]) // 2, (edge - size[1]) // 2))
    assert np.array_equal(tiles["exact"], np.asarray(canvas.resize((336, 336), PIL.Image.Resampling.BICUBIC)))
    apart = np.abs(tiles["exact"] - tiles["fast"])
    assert apart.max() <= 2
    assert apart.mean() <= 0.01


def test_normalised_tiles_have_one_memory_order():
    for backend in ("exact", "fast"):
        spec = ImageSpec.from_processor_config(CLIP, "pad", backend)
        assert normalise(to_tiles(random_picture(90, 70), spec, layout_for(spec)), spec).is_contiguous()


PROCESSORS = {
    "CLIPImageProcessorPil": {"size": {"shortest_edge": 30}, "crop_size": {"height": 24, "width": 28}},
    "SiglipImageProcessorPil": {"size": {"height": 40, "width": 32}},
    "BitImageProcessorPil": {"size": {"shortest_edge": 37}, "crop_size": {"height": 32, "width": 32}},
    "ViTImageProcessorPil": {"size": {"height": 24, "width": 24}},
    "LlavaImageProcessorPil": {"size": {"shortest_edge": 31}, "crop_size": {"height": 31, "width": 31}},
}


@pytest.mark.parametrize(
    ("name", "changes"),
    [(name, changes) for name in PROCESSORS for changes in ({}, {"do_normalize": False})]
    + [(name, {"do_resize": False}) for name, kwargs in PROCESSORS.items() if "crop_size" in kwargs],
)
@pytest.mark.parametrize("size", [(64, 48), (33, 101), (20, 17), (300, 24)])
def test_square_equals_transformers(name, changes, size):
    import transformers

    processor = getattr(transformers, name)(**PROCESSORS[name], **changes)
    picture = random_picture(*size)
    expected = processor(picture, return_tensors="np")["pixel_values"]
    spec = ImageSpec.from_processor_config(processor.to_dict(), "square")
    got = normalise(to_tiles(picture, spec, layout_for(spec)), spec).numpy()
    np.testing.assert_allclose(got, expected, atol=1e-5, rtol=0)


def test_llava_next_processor_agrees():
    import transformers

    pinpoints = ((24, 48), (48, 24), (48, 48), (72, 24), (24, 72))
    # transformers writes its pinpoints (height, width), LLaVA-1.6 and lapilli (width, height).
    processor = transformers.LlavaNextImageProcessorPil(
        size={"shortest_edge": 24},
        crop_size={"height": 24, "width": 24},
        image_grid_pinpoints=[[height, width] for width, height in pinpoints],
    )
    spec = ImageSpec.from_processor_config(processor.to_dict(), "anyres")
    layout = layout_for(spec, pinpoints)
    for index, size in enumerate([(100, 60), (60, 100), (31, 31), (200, 40), (25, 77)]):
        picture = random_picture(*size, seed=index)
        expected = processor(picture, return_tensors="np")["pixel_values"][0]
        got = normalise(to_tiles(picture, spec, layout), spec).numpy()
        np.testing.assert_allclose(got, expected, atol=1e-5, rtol=0)


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 90), st.integers(1, 90), st.sampled_from(["square", "pad", "anyres"]), st.booleans())
def test_every_size_gives_the_tiles_its_layout_announces(width, height, mode, fast):
    pinpoints = ((16, 32), (32, 16), (32, 32)) if mode == "anyres" else ()
    config = CLIP | {"size": {"shortest_edge": 16}, "crop_size": 16}
    spec = ImageSpec.from_processor_config(config, mode, "fast" if fast else "exact")
    layout = layout_for(spec, pinpoints)
    tiles = to_tiles(PIL.Image.new("RGB", (width, height), (7, 8, 9)), spec, layout)
    assert tiles.shape == (layout.tiles(width, height), 3, 16, 16)


def test_old_processor_files_are_read_by_their_keys():
    old = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3, "resample": 2}
    assert ImageSpec.from_processor_config({**old, "size": 24}, "square").size == (24, 24)
    clip = ImageSpec.from_processor_config({**old, "size": 24, "crop_size": 20, "do_center_crop": True}, "square")
    assert (clip.shortest_edge, clip.crop, clip.size) == (24, (20, 20), None)
    naflex = ImageSpec.from_processor_config({**old, "patch_size": 16, "max_num_patches": 256}, "square")
    assert naflex.tile_size == (256, 256)
    assert ImageSpec.from_processor_config({**old, "size": 24, "do_rescale": False}, "square").rescale == 1.0


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"size": {"longest_edge": 5}}, "longest_edge"),
        ({"image_mean": None}, "image_mean"),
        ({"image_mean": [0.5]}, "channels"),
        ({"resample": None}, "resample"),
        ({"do_center_crop": False}, "different sizes"),
    ],
)
def test_processor_files_that_say_too_little_are_refused(changes, word):
    with pytest.raises(ModelError, match=word):
        ImageSpec.from_processor_config(CLIP | changes, "square")


def test_spec_and_layout_must_belong_together():
    spec = ImageSpec.from_processor_config(CLIP, "square")
    with pytest.raises(ModelError, match="layout"):
        to_tiles(random_picture(20, 20), spec, layout_for(ImageSpec.from_processor_config(CLIP, "pad")))


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "CMYK", "1", "LA", "YCbCr"])
def test_modes_become_rgb_as_pillow_does(mode):
    picture = random_picture(20, 30).convert(mode)
    assert np.array_equal(np.asarray(to_rgb(picture)), np.asarray(picture.convert("RGB")))


def test_sixteen_bit_grey_keeps_its_high_byte(tmp_path):
    values = np.linspace(0, 65535, 256, dtype=np.uint16).reshape(16, 16)
    PIL.Image.fromarray(values).save(tmp_path / "deep.png")
    rgb = np.asarray(open_image(Image(path="deep.png"), tmp_path))
    assert np.abs(rgb[..., 0].astype(int) - (values >> 8)).max() <= 1


def test_a_transparent_palette_warns_nobody(tmp_path, recwarn):
    picture = random_picture(8, 8).convert("P")
    picture.save(tmp_path / "p.png", transparency=bytes(range(256)))
    assert open_image(Image(path="p.png"), tmp_path).mode == "RGB"
    assert not recwarn.list


def test_first_frame_of_an_animation(tmp_path):
    frames = [PIL.Image.new("RGB", (4, 4), colour) for colour in ("red", "blue")]
    frames[0].save(tmp_path / "a.gif", save_all=True, append_images=frames[1:])
    assert open_image(Image(path="a.gif"), tmp_path).getpixel((0, 0)) == (255, 0, 0)


# --- files -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def root(tmp_path):
    folder = tmp_path / "root"
    (folder / "sub").mkdir(parents=True)
    random_picture(40, 30).save(folder / "a.jpg")
    random_picture(10, 20).save(folder / "sub" / "b.png")
    random_picture(10, 20).save(tmp_path / "secret.png")
    (tmp_path / "root2").mkdir()
    random_picture(10, 20).save(tmp_path / "root2" / "c.png")
    os.symlink(tmp_path / "secret.png", folder / "link.png")
    os.symlink(folder / "a.jpg", folder / "inner.jpg")
    os.symlink(tmp_path, folder / "up")
    return folder


def test_paths_inside_the_root_open(root):
    for path in ("a.jpg", "sub/b.png", "sub/../a.jpg", "inner.jpg", str(root / "a.jpg")):
        picture = open_image(Image(path=path), root)
        assert picture.size == image_size(Image(path=path), root)


@pytest.mark.parametrize(
    "path", ["../secret.png", "link.png", "up/secret.png", "../root2/c.png", "sub/../../secret.png", "/etc/hostname"]
)
def test_paths_that_leave_the_root_are_refused(root, path):
    for opener in (open_image, image_size):
        with pytest.raises(DataError, match=r"chat\.json: record 3.*leaves the image folder"):
            opener(Image(path=path), root, where="chat.json: record 3")


def test_bytes_need_no_root(root):
    assert image_size(Image(data=(root / "a.jpg").read_bytes()), None) == (40, 30)


def test_files_that_are_no_pictures_are_refused(root):
    (root / "text.jpg").write_text("not a picture")
    (root / "empty.jpg").write_bytes(b"")
    (root / "script.eps").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n")
    os.mkfifo(root / "pipe.png")
    for path, word in [
        ("none.jpg", "no file"),
        ("sub", "not a file"),
        ("pipe.png", "not a file"),
        ("text.jpg", "known format"),
        ("empty.jpg", "empty"),
        ("script.eps", "known format"),
        ("", "not a file name"),
    ]:
        with pytest.raises(DataError, match=f"record 3.*{word}"):
            image_size(Image(path=path), root, where="record 3")


@pytest.mark.parametrize("suffix", ["jpg", "png", "webp", "gif", "bmp", "tiff"])
def test_half_a_file_is_never_a_picture(tmp_path, suffix):
    random_picture(200, 100).save(tmp_path / f"x.{suffix}")
    data = (tmp_path / f"x.{suffix}").read_bytes()
    for part in (0.02, 0.3, 0.6, 0.9):
        with pytest.raises(DataError, match="image bytes"):
            open_image(Image(data=data[: int(len(data) * part)]), None)
        with pytest.raises(DataError, match="image bytes"):  # before training, not in the middle of it
            image_size(Image(data=data[: int(len(data) * part)]), None)
    assert image_size(Image(data=data), None) == (200, 100)
    assert image_size(Image(data=data + b"appended by a camera"), None) == (200, 100)


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_damaged_files_end_in_a_reason(data):
    """Any byte changed anywhere: a picture or a DataError, never another exception."""
    stream = io.BytesIO()
    random_picture(24, 16).save(stream, data.draw(st.sampled_from(["PNG", "JPEG", "GIF", "TIFF", "BMP", "WEBP"])))
    raw = bytearray(stream.getvalue())
    for _ in range(data.draw(st.integers(1, 4))):
        raw[data.draw(st.integers(0, len(raw) - 1))] = data.draw(st.integers(0, 255))
    with contextlib.suppress(DataError):
        image_size(Image(data=bytes(raw)), None)
    with contextlib.suppress(DataError):
        assert open_image(Image(data=bytes(raw)), None).mode == "RGB"


def test_budgets_are_kept_before_decoding(root, recwarn):
    with pytest.raises(DataError, match="40 x 30 is more than 1,199 pixels"):
        open_image(Image(path="a.jpg"), root, ImageLimits(max_pixels=1199))
    with pytest.raises(DataError, match="bytes are more than 100"):
        open_image(Image(path="a.jpg"), root, ImageLimits(max_bytes=100))
    PIL.Image.new("1", (14000, 14000)).save(root / "bomb.png")
    PIL.Image.new("1", (9600, 9600)).save(root / "wide.png")
    for path in ("bomb.png", "wide.png"):
        with pytest.raises(DataError, match="pixels"):
            open_image(Image(path=path), root)
    assert not recwarn.list


def test_a_thread_of_a_picture_is_refused_before_its_canvas_is_made():
    spec = ImageSpec.from_processor_config(CLIP, "pad")
    with pytest.raises(DataError, match="long and thin"):
        to_tiles(PIL.Image.new("RGB", (40_000, 2)), spec, layout_for(spec))
