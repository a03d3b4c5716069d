"""Pictures of one or two coloured digits, and what is true of them.

A scene is the truth; the picture is drawn from it with a random scan of each digit, and a random place, shade and
background, so that the same scene hardly ever looks the same twice.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from lapilli.quickstart.scans import CELL_PIXELS, VARIANTS, Scans

PICTURE_PIXELS = 2 * CELL_PIXELS
"""A picture is two by two cells, one of which a digit stands in."""
NUMBERS = (
    *("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"),
    *("eleven", "twelve", "thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen"),
)
COLOURS = {
    "red": (225, 50, 45),
    "green": (50, 185, 70),
    "blue": (60, 100, 240),
    "yellow": (235, 205, 50),
    "purple": (175, 70, 215),
    "white": (240, 240, 240),
}
COLOUR_NAMES = tuple(COLOURS)


@dataclass(frozen=True)
class Digit:
    value: int
    colour: str

    @property
    def name(self) -> str:
        return NUMBERS[self.value]

    @property
    def caption(self) -> str:
        return f"a {self.colour} {self.name}"


@dataclass(frozen=True)
class Scene:
    """One digit, or two from left to right."""

    digits: tuple[Digit, ...]

    @property
    def caption(self) -> str:
        return " and ".join(d.caption for d in self.digits)


def random_scene(rng: np.random.Generator, digits: int | None = None, colours: Sequence[str] = COLOUR_NAMES) -> Scene:
    """Draw a scene of `digits` digits (None: one scene in four has one digit, the others two)."""
    count = digits or (1 if rng.random() < 0.25 else 2)
    return Scene(tuple(Digit(int(rng.integers(10)), colours[int(rng.integers(len(colours)))]) for _ in range(count)))


def draw(scenes: Sequence[Scene], scans: Scans, rng: np.random.Generator) -> np.ndarray:
    """Draw each scene with random scans of `scans`: (scenes, PICTURE_PIXELS, PICTURE_PIXELS, 3) uint8.

    One digit stands in any of the four cells, two stand side by side in either row.
    """
    size = (len(scenes), PICTURE_PIXELS, PICTURE_PIXELS, 3)
    canvas = rng.uniform(0, 50, size=(len(scenes), 1, 1, 3)) + 4 * rng.standard_normal(size, dtype=np.float32)
    rows = scans.pick(np.array([d.value for s in scenes for d in s.digits]), rng)
    inks = scans.cells[rows, rng.integers(VARIANTS, size=len(rows))][..., None]
    shades = np.array([COLOURS[d.colour] for s in scenes for d in s.digits]) * rng.uniform(0.85, 1.05, (len(rows), 1))
    shades = np.clip(shades + 8 * rng.standard_normal(shades.shape), 0, 255)
    digit = 0
    for picture, scene in zip(canvas, scenes, strict=True):
        top = int(rng.integers(2)) * CELL_PIXELS
        columns = (0, 1) if len(scene.digits) == 2 else (int(rng.integers(2)),)
        for column in columns:
            left = column * CELL_PIXELS
            cell = picture[top : top + CELL_PIXELS, left : left + CELL_PIXELS]
            cell += inks[digit] * (shades[digit] - cell)
            digit += 1
    return np.clip(np.round(canvas), 0, 255).astype(np.uint8)
