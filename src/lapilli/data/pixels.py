"""The two engines that make tiles of pictures: Pillow's own arithmetic, and torch's on uint8.

Both resize in two passes, across and then down, rounded to 8 bits in between. That allows leaving out most of the
padding of a square canvas without changing a pixel: rows of one colour stay so across, and beyond a filter's reach
the weights of one colour give that colour. Torch is imported when the first tile is made.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple, Protocol, TypeVar

import numpy as np
import PIL.Image

if TYPE_CHECKING:
    import torch

SUPPORT = {1: 3.0, 2: 1.0, 3: 2.0, 4: 0.5, 5: 1.0}
"""How far each of Pillow's filters reaches, in pixels of the smaller picture. Nearest (0) is no filter."""

V = TypeVar("V")


@dataclass(frozen=True)
class Frame:
    """A picture of (width, height) in the middle of a square canvas of `edge` pixels; it fills one of its sides."""

    width: int
    height: int

    @property
    def edge(self) -> int:
        return max(self.width, self.height)

    @property
    def offset(self) -> tuple[int, int]:
        """(left, top) of the picture on the canvas."""
        return (self.edge - self.width) // 2, (self.edge - self.height) // 2

    @property
    def is_wide(self) -> bool:
        return self.width > self.height

    def span(self, target: int, resample: int) -> Span:
        """What to compute along the padded side when the canvas is resized to `target` pixels."""
        start = self.offset[1] if self.is_wide else self.offset[0]
        return _span(self.edge, target, start, min(self.width, self.height), resample)


class Span(NamedTuple):
    """Canvas pixels [in_from, in_to) that become pixels [out_from, out_to) of the resized one; the rest is padding.

    Pixels [read_from, read_to) of the canvas are all that those depend on.
    """

    in_from: int
    in_to: int
    out_from: int
    out_to: int
    read_from: int
    read_to: int


def _span(edge: int, target: int, start: int, length: int, resample: int) -> Span:
    """The part of a resized side that a picture at [start, start + length) has any influence on.

    It is made of whole blocks, of which input and output both have a whole number, so that computing it alone samples
    at the same places as computing everything. A filter reaches a few pixels over the picture's ends; beyond that the
    weights of one colour give that colour.
    """
    blocks = math.gcd(edge, target)
    size_in, size_out = edge // blocks, target // blocks
    reach = math.ceil(SUPPORT[resample] * max(1.0, edge / target)) + 1
    first = max(0, (start - reach) // size_in)
    last = min(blocks, -(-(start + length + reach) // size_in))
    before, after = max(0, first * size_in - reach), min(edge, last * size_in + reach)
    return Span(
        first * size_in,
        last * size_in,
        first * size_out,
        last * size_out,
        before // size_in * size_in,
        min(edge, -(-after // size_in) * size_in),
    )


class Pixels(Protocol[V]):
    """The operations that tiles are made of; sizes are (width, height), offsets (left, top)."""

    def start(self, image: PIL.Image.Image) -> V: ...
    def resize(self, view: V, size: tuple[int, int], resample: int) -> V: ...
    def canvas(self, view: V, size: tuple[int, int], offset: tuple[int, int], colour: tuple[int, int, int]) -> V: ...
    def crop(self, view: V, offset: tuple[int, int], size: tuple[int, int]) -> V: ...
    def resize_padded(
        self, view: V, frame: Frame, size: tuple[int, int], resample: int, colour: tuple[int, int, int]
    ) -> V: ...
    def finish(self, view: V) -> torch.Tensor: ...


class Exact:
    """Pillow's own arithmetic."""

    def start(self, image: PIL.Image.Image) -> PIL.Image.Image:
        return image

    def resize(self, view: PIL.Image.Image, size: tuple[int, int], resample: int) -> PIL.Image.Image:
        return view if view.size == size else view.resize(size, PIL.Image.Resampling(resample))

    def canvas(
        self, view: PIL.Image.Image, size: tuple[int, int], offset: tuple[int, int], colour: tuple[int, int, int]
    ) -> PIL.Image.Image:
        made = PIL.Image.new("RGB", size, colour)
        made.paste(view, offset)
        return made

    def crop(self, view: PIL.Image.Image, offset: tuple[int, int], size: tuple[int, int]) -> PIL.Image.Image:
        # Pillow fills what lies outside the picture with black.
        return view.crop((*offset, offset[0] + size[0], offset[1] + size[1]))

    def resize_padded(
        self,
        view: PIL.Image.Image,
        frame: Frame,
        size: tuple[int, int],
        resample: int,
        colour: tuple[int, int, int],
    ) -> PIL.Image.Image:
        # Pillow resizes across first, then down, and rounds to 8 bits in between: so does this, leaving out padding.
        across, down = size
        edge, (left, top) = frame.edge, frame.offset
        span = frame.span(down if frame.is_wide else across, resample)
        method = PIL.Image.Resampling(resample)
        if frame.is_wide:
            narrow = self.resize(view, (across, frame.height), resample)
            canvas = self.canvas(narrow, (across, edge), (0, top), colour)
            box, made = (0, span.in_from, across, span.in_to), (across, span.out_to - span.out_from)
        else:
            canvas = self.canvas(view, (edge, edge), (left, 0), colour)
            box, made = (span.in_from, 0, span.in_to, edge), (span.out_to - span.out_from, down)
        middle = canvas.resize(made, method, box=box)
        if middle.size == size:
            return middle
        return self.canvas(middle, size, (0, span.out_from) if frame.is_wide else (span.out_from, 0), colour)

    def finish(self, view: PIL.Image.Image) -> torch.Tensor:
        import torch

        return torch.from_numpy(np.array(view)).permute(2, 0, 1)


class Fast:
    """Torch's antialiased resize on uint8, several times faster than Pillow's.

    Views are (1, 3, H, W) in channels-last order, as the picture lies in memory: in any other torch goes slower ways.
    They are never written to: the first one may be the picture's own bytes.
    """

    def start(self, image: PIL.Image.Image) -> torch.Tensor:
        import torch

        array = np.asarray(image)
        try:
            return _channels_last(torch.from_dlpack(array))
        except (BufferError, TypeError):  # a NumPy that does not lend what is read-only
            return _channels_last(torch.from_numpy(array.copy()))

    def resize(self, view: torch.Tensor, size: tuple[int, int], resample: int) -> torch.Tensor:
        from torch.nn import functional

        if (view.shape[3], view.shape[2]) == size:
            return view
        mode = "bicubic" if resample == 3 else "bilinear"
        return functional.interpolate(view, size=(size[1], size[0]), mode=mode, antialias=True)

    def canvas(
        self, view: torch.Tensor, size: tuple[int, int], offset: tuple[int, int], colour: tuple[int, int, int]
    ) -> torch.Tensor:
        import torch

        made = np.empty((size[1], size[0], 3), dtype=np.uint8)
        (left, top), height, width = offset, view.shape[2], view.shape[3]
        rows = made.reshape(size[1], -1)
        row = np.tile(np.array(colour, dtype=np.uint8), size[0])
        rows[:top], rows[top + height :] = row, row
        rows[top : top + height, : 3 * left] = row[: 3 * left]
        rows[top : top + height, 3 * (left + width) :] = row[3 * (left + width) :]
        made[top : top + height, left : left + width] = view[0].permute(1, 2, 0).numpy()
        return _channels_last(torch.from_numpy(made))

    def crop(self, view: torch.Tensor, offset: tuple[int, int], size: tuple[int, int]) -> torch.Tensor:
        left, top = offset
        inside = view[..., max(0, top) : max(0, top + size[1]), max(0, left) : max(0, left + size[0])]
        if (inside.shape[3], inside.shape[2]) == size:
            return inside
        return self.canvas(inside, size, (max(0, -left), max(0, -top)), (0, 0, 0))

    def resize_padded(
        self, view: torch.Tensor, frame: Frame, size: tuple[int, int], resample: int, colour: tuple[int, int, int]
    ) -> torch.Tensor:
        across, down = size
        (left, top), span = frame.offset, frame.span(down if frame.is_wide else across, resample)
        read = span.read_to - span.read_from
        if frame.is_wide:
            narrow = self.resize(view, (across, frame.height), resample)
            strip = self.canvas(narrow, (across, read), (0, top - span.read_from), colour)
            made = self.resize(strip, (across, read * down // frame.edge), resample)
            if read == frame.edge:
                return made
            begin = span.read_from * down // frame.edge
            middle = made[:, :, span.out_from - begin : span.out_to - begin]
            return self.canvas(middle, size, (0, span.out_from), colour)
        strip = self.canvas(view, (read, frame.edge), (left - span.read_from, 0), colour)
        made = self.resize(strip, (read * across // frame.edge, down), resample)
        if read == frame.edge:
            return made
        begin = span.read_from * across // frame.edge
        middle = made[..., span.out_from - begin : span.out_to - begin]
        return self.canvas(middle, size, (span.out_from, 0), colour)

    def finish(self, view: torch.Tensor) -> torch.Tensor:
        return view[0]


def _channels_last(tensor: torch.Tensor) -> torch.Tensor:
    """(H, W, 3) as (1, 3, H, W) without a copy, with the first stride that torch recognises the order by."""
    return tensor.view(1, *tensor.shape).permute(0, 3, 1, 2)
