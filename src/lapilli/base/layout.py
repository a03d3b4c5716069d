"""How many tokens a picture becomes, and where its tiles and newlines stand.

The layout is decided once, when a model is built, and read by data preparation, the processor, generation and
serving, so that the number of places in the text always equals the number of features. It needs no torch.
"""

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from lapilli.base.errors import ModelError

ImageMode = Literal["square", "pad", "anyres"]


class ImageLayout(BaseModel):
    """Tokens of one picture as a function of its size in pixels.

    `square` and `pad` give one tile, so every picture has the same number of tokens. `anyres` (LLaVA-1.6) gives one
    overview tile and a grid of tiles; the grid's features are cut back to the picture's own aspect ratio, and one
    newline token ends each row of features.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    mode: ImageMode = "square"
    tile_height: int = Field(gt=0)
    """Pixels the vision encoder sees, vertically."""
    tile_width: int = Field(gt=0)
    grid_height: int = Field(gt=0)
    """Feature patches per tile, vertically."""
    grid_width: int = Field(gt=0)
    extra_tokens: int = Field(default=0, ge=0)
    """Kept tokens per tile beside the patches: 1 when the class token is kept (`cls_patch`), else 0."""
    pinpoints: tuple[tuple[int, int], ...] = ()
    """anyres only: allowed canvas sizes as (width, height) in pixels, in order of preference. LLaVA-1.6 writes them so;
    transformers' `image_grid_pinpoints` are (height, width)."""

    @model_validator(mode="after")
    def _tiles_fill_every_canvas(self) -> "ImageLayout":
        if self.mode != "anyres":
            return self
        if not self.pinpoints:
            raise ModelError("image layout: anyres needs `pinpoints`, a list of canvas sizes [width, height]")
        for width, height in self.pinpoints:
            if width % self.tile_width or height % self.tile_height or min(width, height) < 1:
                raise ModelError(
                    f"image layout: pinpoint {width} x {height} is not a whole number of tiles of "
                    f"{self.tile_width} x {self.tile_height} pixels"
                )
        if self.extra_tokens:
            raise ModelError("image layout: anyres lays patches out as a grid, so the class token can't be kept")
        return self

    @property
    def tokens_per_tile(self) -> int:
        return self.grid_height * self.grid_width + self.extra_tokens

    def best_canvas(self, width: int, height: int) -> tuple[int, int]:
        """Return the anyres canvas (width, height) that keeps most of the picture, then wastes least.

        Ties go to the earlier pinpoint, as in LLaVA-1.6.
        """
        best, best_fit = self.pinpoints[0], (-1, 0)
        for canvas_width, canvas_height in self.pinpoints:
            scale = min(canvas_width / width, canvas_height / height)
            fitted = int(width * scale) * int(height * scale)
            effective = min(fitted, width * height)
            fit = (effective, -(canvas_width * canvas_height - effective))
            if fit > best_fit:
                best, best_fit = (canvas_width, canvas_height), fit
        return best

    def tile_grid(self, width: int, height: int) -> tuple[int, int]:
        """Return how many tiles (columns, rows) the picture's canvas has; (1, 1) outside anyres."""
        if self.mode != "anyres":
            return 1, 1
        canvas_width, canvas_height = self.best_canvas(width, height)
        return canvas_width // self.tile_width, canvas_height // self.tile_height

    def tiles(self, width: int, height: int) -> int:
        """Number of tiles the encoder sees for one picture; anyres has the overview tile beside the grid."""
        if self.mode != "anyres":
            return 1
        columns, rows = self.tile_grid(width, height)
        return 1 + columns * rows

    def unpadded_grid(self, width: int, height: int) -> tuple[int, int, int, int]:
        """Return (top, bottom, left, right): the part of the anyres feature grid that the picture covers.

        Rows [top, bottom) and columns [left, right) of the grid are kept; the rest shows padding only. As transformers
        does, the product is rounded to 7 places before it is cut: LLaVA-1.6 itself loses a row of features where a
        whole number comes out as 14.999999999999998 (88 x 55 pixels, and 4 sizes in 100,000).
        """
        columns, rows = self.tile_grid(width, height)
        grid_width, grid_height = columns * self.grid_width, rows * self.grid_height
        if width / height > grid_width / grid_height:
            kept = int(round(height * (grid_width / width), 7))
            cut = (grid_height - kept) // 2
            return cut, grid_height - cut, 0, grid_width
        kept = int(round(width * (grid_height / height), 7))
        cut = (grid_width - kept) // 2
        return 0, grid_height, cut, grid_width - cut

    def tokens(self, width: int, height: int) -> int:
        """Number of text places one picture of this size takes."""
        if self.mode != "anyres":
            return self.tokens_per_tile
        top, bottom, left, right = self.unpadded_grid(width, height)
        return self.tokens_per_tile + (bottom - top) * (right - left + 1)
