"""Pictures: from a file to uint8 tiles, and from tiles to what the vision encoder sees.

There is one image function for training, evaluation, chat and serving. What it does is an `ImageSpec`, stored in the
model folder. Tiles stay uint8 until they are on the device; `normalise` finishes them there. Files are opened through
`lapilli.data.picture`. Torch is imported when the first tile is made, so that reading a spec stays cheap.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import PIL.Image
from pydantic import BaseModel, ConfigDict, Field, model_validator

from lapilli.base.errors import DataError, ModelError
from lapilli.base.layout import ImageLayout, ImageMode
from lapilli.data.picture import ImageLimits, image_size, open_image, to_rgb
from lapilli.data.pixels import SUPPORT, Exact, Fast, Frame, Pixels

if TYPE_CHECKING:
    from pathlib import Path

    import torch

    from lapilli.data.sample import Image

__all__ = ["ImageLimits", "ImageSpec", "image_size", "normalise", "open_image", "to_rgb", "to_tiles", "usable_size"]

MAX_WORKING_PIXELS = 2**28
"""Largest canvas or resized picture made on the way to a tile; 1 x 50,000 pixels padded to a square would be more."""

Resample = Literal[0, 1, 2, 3, 4, 5]


class ImageSpec(BaseModel):
    """What happens to a picture's pixels: resize, then crop from the centre, then scale and normalise.

    At most one of `shortest_edge` and `size` is set. `pad` and `anyres` place the picture on canvases first. The EXIF
    orientation is ignored, as every LLaVA was trained. Raises ModelError when tiles would differ in size.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    backend: Literal["exact", "fast"] = "exact"
    """`exact`: Pillow's numbers. `fast`: torch's antialiased uint8 resize, within 2/255 of them."""
    mode: ImageMode = "square"
    shortest_edge: int | None = Field(default=None, gt=0)
    """Resize so that the shorter side has this many pixels, the other in proportion (rounded down)."""
    size: tuple[int, int] | None = None
    """Resize to exactly (height, width)."""
    resample: Resample = 3
    """Pillow's numbers: 0 nearest, 1 lanczos, 2 bilinear, 3 bicubic, 4 box, 5 hamming."""
    crop: tuple[int, int] | None = None
    """Centre crop (height, width); a smaller picture gets black borders."""
    rescale: float = 1 / 255
    mean: tuple[float, float, float] = (0.0, 0.0, 0.0)
    std: tuple[float, float, float] = (1.0, 1.0, 1.0)

    @model_validator(mode="after")
    def _one_tile_size(self) -> ImageSpec:
        if self.shortest_edge is not None and self.size is not None:
            raise ModelError("image spec: `shortest_edge` and `size` exclude each other")
        if self.crop is None and self.size is None and (self.shortest_edge is None or self.mode == "square"):
            raise ModelError(
                f"image spec: mode {self.mode} without `crop` or an exact `size` gives tiles of different sizes; "
                "set one of them, or use mode pad with `shortest_edge`"
            )
        if self.backend == "fast" and self.resample not in (2, 3):
            raise ModelError(f"image spec: backend fast has resample 2 and 3 only, not {self.resample}; use exact")
        if min(self.std) <= 0:
            raise ModelError(f"image spec: std must be positive, not {self.std}")
        return self

    @property
    def tile_size(self) -> tuple[int, int]:
        """(height, width) of every tile in pixels."""
        if self.crop is not None:
            return self.crop
        if self.size is not None:
            return self.size
        assert self.shortest_edge is not None  # _one_tile_size
        return self.shortest_edge, self.shortest_edge

    @property
    def pad_colour(self) -> tuple[int, int, int]:
        """Canvas colour of mode pad: the mean the encoder was trained with, rounded down to uint8."""
        red, green, blue = (min(255, max(0, int(m * 255))) for m in self.mean)
        return red, green, blue

    def processor_config(self) -> dict[str, Any]:
        """The settings of transformers' image processors that make one tile so; `from_processor_config` reads them."""
        height, width = self.tile_size
        made: dict[str, Any] = {
            "do_resize": self.size is not None or self.shortest_edge is not None,
            "resample": self.resample,
            "do_center_crop": self.crop is not None,
            "crop_size": {"height": height, "width": width},
            "do_rescale": True,
            "rescale_factor": self.rescale,
            "do_normalize": True,
            "image_mean": list(self.mean),
            "image_std": list(self.std),
            "do_convert_rgb": True,
        }
        if self.size is not None:
            made["size"] = {"height": self.size[0], "width": self.size[1]}
        elif self.shortest_edge is not None:
            made["size"] = {"shortest_edge": self.shortest_edge}
        return made

    @classmethod
    def from_processor_config(
        cls, config: Mapping[str, Any], mode: ImageMode, backend: Literal["exact", "fast"] = "exact"
    ) -> ImageSpec:
        """Read the settings of a Hugging Face `preprocessor_config.json`, whatever class wrote it.

        Old files leave out what their class fills in; pass `AutoImageProcessor.from_pretrained(...).to_dict()` where
        a ModelError says that a key is missing. A bare number as `size` means the shortest edge where the file asks
        for a centre crop and an exact square where it does not, which is how CLIP's and ViT's old files differ.
        """
        cropped = bool(config.get("do_center_crop", "crop_size" in config))
        values: dict[str, Any] = {"mode": mode, "backend": backend}
        if config.get("do_resize", True):
            values |= _read_size(config, cropped)
            values["resample"] = int(_required(config, "resample"))
        if cropped:
            crop = _read_pair(_required(config, "crop_size"))
            if crop is None:
                raise ModelError(f"image processor: can't read crop_size {config['crop_size']!r}")
            values["crop"] = crop
        values["rescale"] = float(config.get("rescale_factor", 1 / 255)) if config.get("do_rescale", True) else 1.0
        if config.get("do_normalize", True):
            values["mean"] = _read_channels(config, "image_mean")
            values["std"] = _read_channels(config, "image_std")
        return cls(**values)

    def resized(self, width: int, height: int) -> tuple[int, int]:
        """(width, height) after the resize and before the crop, for a view of this size."""
        if self.size is not None:
            return self.size[1], self.size[0]
        if self.shortest_edge is None:
            return width, height
        if width <= height:
            return self.shortest_edge, int(self.shortest_edge * height / width)
        return int(self.shortest_edge * width / height), self.shortest_edge

    def check_size(self, width: int, height: int) -> None:
        """Raise DataError if a picture of this size needs an unreasonably large canvas on its way to a tile."""
        view = (max(width, height),) * 2 if self.mode == "pad" else (width, height)
        need = view[0] * view[1] if self.mode == "pad" else 0
        if self.mode != "anyres":
            resized = self.resized(*view)
            need = max(need, resized[0] * resized[1])
        if need > MAX_WORKING_PIXELS:
            raise DataError(
                f"a {width} x {height} picture is too long and thin: image mode {self.mode} would need "
                f"{need:,} pixels; crop it or leave the record out"
            )


def usable_size(
    image: Image, root: str | Path | None, spec: ImageSpec, limits: ImageLimits, where: str
) -> tuple[int, int]:
    """`image_size` of a picture that `spec` can take. Raises DataError as it does, and for one too long and thin."""
    size = image_size(image, root, limits, where)
    try:
        spec.check_size(*size)
    except DataError as error:
        raise DataError(f'{where}: image "{image.path}": {error}') from error
    return size


def _required(config: Mapping[str, Any], key: str) -> Any:
    value = config.get(key)
    if value is None:
        raise ModelError(
            f"image processor: `{key}` is missing; load the file with transformers' AutoImageProcessor, "
            "which fills in what its class leaves out, and save it again"
        )
    return value


def _read_pair(value: Any) -> tuple[int, int] | None:
    """(height, width) from a number, a pair or `{"height", "width"}`; None for anything else."""
    if isinstance(value, int):
        return value, value
    if isinstance(value, Mapping) and value.get("height") and value.get("width"):
        return int(value["height"]), int(value["width"])
    if isinstance(value, list | tuple) and len(value) == 2:
        return int(value[0]), int(value[1])
    return None


def _read_size(config: Mapping[str, Any], cropped: bool) -> dict[str, Any]:
    size = config.get("size")
    if size is None and config.get("max_num_patches") and config.get("patch_size"):
        # SigLIP2's processor for pictures of any shape: the largest square grid within its number of patches.
        edge = math.isqrt(int(config["max_num_patches"])) * int(config["patch_size"])
        return {"size": (edge, edge)}
    size = _required(config, "size")
    if isinstance(size, Mapping):
        edges = {k: v for k, v in size.items() if v is not None}
        if set(edges) == {"shortest_edge"}:
            return {"shortest_edge": int(edges["shortest_edge"])}
        if set(edges) != {"height", "width"}:
            raise ModelError(f"image processor: size {dict(size)} is not supported; use shortest_edge or height, width")
    if isinstance(size, int) and cropped:
        return {"shortest_edge": size}
    pair = _read_pair(size)
    if pair is None:
        raise ModelError(f"image processor: can't read size {size!r}")
    return {"size": pair}


def _read_channels(config: Mapping[str, Any], key: str) -> tuple[float, float, float]:
    value = _required(config, key)
    if isinstance(value, int | float):
        value = [value] * 3
    if len(value) != 3:
        raise ModelError(f"image processor: `{key}` has {len(value)} channels; lapilli's pictures have 3")
    return float(value[0]), float(value[1]), float(value[2])


V = TypeVar("V")


def to_tiles(image: PIL.Image.Image, spec: ImageSpec, layout: ImageLayout) -> torch.Tensor:
    """Turn a picture of any mode and size into (tiles, 3, H, W) uint8, not normalised.

    `square` and `pad` give one tile; `anyres` the whole picture squeezed into one tile, then its grid of tiles row by
    row. Raises DataError for a picture that can't be used, ModelError if `spec` and `layout` don't belong together.
    """
    if spec.mode != layout.mode or spec.tile_size != (layout.tile_height, layout.tile_width):
        raise ModelError(
            f"image spec gives {spec.mode} tiles of {spec.tile_size}, the layout expects {layout.mode} tiles of "
            f"{(layout.tile_height, layout.tile_width)} (height, width); both are written together by `lapilli build`"
        )
    image = to_rgb(image)
    spec.check_size(*image.size)
    if spec.backend == "exact":
        return _tiles(image, spec, layout, Exact())
    return _tiles(image, spec, layout, Fast())


def _tiles(image: PIL.Image.Image, spec: ImageSpec, layout: ImageLayout, pixels: Pixels[V]) -> torch.Tensor:
    import torch

    start = pixels.start(image)
    if spec.mode == "pad":
        return pixels.finish(_padded(start, image.size, spec, pixels))[None]
    if spec.mode == "square":
        return pixels.finish(_process(start, image.size, spec, pixels))[None]
    views = _anyres_views(start, image.size, spec, layout, pixels)
    return torch.stack([pixels.finish(_process(view, size, spec, pixels)) for view, size in views])


def _process(view: V, size: tuple[int, int], spec: ImageSpec, pixels: Pixels[V]) -> V:
    """Resize and centre crop: what the Hugging Face processor does before it rescales."""
    resized = spec.resized(*size)
    return _cropped(pixels.resize(view, resized, spec.resample), resized, spec, pixels)


def _cropped(view: V, size: tuple[int, int], spec: ImageSpec, pixels: Pixels[V]) -> V:
    width, height = size
    if spec.crop is None or (height, width) == spec.crop:
        return view
    crop_height, crop_width = spec.crop
    return pixels.crop(view, ((width - crop_width) // 2, (height - crop_height) // 2), (crop_width, crop_height))


def _padded(start: V, size: tuple[int, int], spec: ImageSpec, pixels: Pixels[V]) -> V:
    """Centre the picture on a square canvas of the encoder's mean colour, and process that.

    Where a filter resizes the canvas, only what the picture has influence on is computed.
    """
    frame = Frame(*size)
    if frame.width == frame.height:
        return _process(start, size, spec, pixels)
    canvas = (frame.edge, frame.edge)
    resized = spec.resized(*canvas)
    if spec.resample not in SUPPORT or frame.edge in resized:
        return _process(pixels.canvas(start, canvas, frame.offset, spec.pad_colour), canvas, spec, pixels)
    view = pixels.resize_padded(start, frame, resized, spec.resample, spec.pad_colour)
    return _cropped(view, resized, spec, pixels)


def _anyres_views(
    start: V, size: tuple[int, int], spec: ImageSpec, layout: ImageLayout, pixels: Pixels[V]
) -> list[tuple[V, tuple[int, int]]]:
    """LLaVA-1.6: the overview, then the tiles of the best canvas, on which the picture is fitted and centred."""
    tile = (layout.tile_width, layout.tile_height)
    edge = spec.shortest_edge
    overview = tile if edge is None else (edge, edge)
    views = [(pixels.resize(start, overview, spec.resample), overview)]
    canvas = layout.best_canvas(*size)
    fitted = _fit(size, canvas)
    offset = ((canvas[0] - fitted[0]) // 2, (canvas[1] - fitted[1]) // 2)
    grid = pixels.canvas(pixels.resize(start, fitted, spec.resample), canvas, offset, (0, 0, 0))
    for top in range(0, canvas[1], tile[1]):
        for left in range(0, canvas[0], tile[0]):
            views.append((pixels.crop(grid, (left, top), tile), tile))
    return views


def _fit(size: tuple[int, int], canvas: tuple[int, int]) -> tuple[int, int]:
    """Largest (width, height) of the same shape that fits the canvas, rounded up."""
    (width, height), (canvas_width, canvas_height) = size, canvas
    across, down = canvas_width / width, canvas_height / height
    if across < down:
        return canvas_width, min(math.ceil(height * across), canvas_height)
    return min(math.ceil(width * down), canvas_width), canvas_height


def normalise(tiles: torch.Tensor, spec: ImageSpec, dtype: torch.dtype | None = None) -> torch.Tensor:
    """Return `(tiles * rescale - mean) / std` for uint8 (tiles, 3, H, W), on the tiles' own device.

    The arithmetic is float32 whatever `dtype` the result has (None: float32).
    """
    import torch

    mean = torch.tensor(spec.mean, device=tiles.device).view(3, 1, 1)
    std = torch.tensor(spec.std, device=tiles.device).view(3, 1, 1)
    # One memory order whatever the tiles had: kernels may round differently for another.
    scaled = tiles.contiguous().to(torch.float32)
    return scaled.mul_(spec.rescale / std).sub_(mean / std).to(dtype or torch.float32)
