# pyright: reportArgumentType=false, reportCallIssue=false, reportReturnType=false, reportIndexIssue=false
"""The real images: scikit-learn's 1,797 handwritten digits, scanned at 8x8 pixels.

They are the only real pictures that come with an ordinary Python package, so they need no download. They are split
before anything is drawn, so that no held-out picture shows a scan that any part or stage was trained on.
"""

from dataclasses import dataclass

import numpy as np
from PIL import Image

from lapilli.base.errors import RunError

HELD_OUT_SCANS = 300
SCAN_LEVELS = 16
"""The scans count black dots in 4x4 blocks: 0 to 16."""
CELL_PIXELS = 16
"""Side of the square that an enlarged scan stands in."""
VARIANTS = 6
"""Sizes and places that each scan is prepared in."""


@dataclass(frozen=True)
class Scans:
    """Some of the scans, enlarged.

    `cells` (n, VARIANTS, CELL_PIXELS, CELL_PIXELS) float32 ink in 0..1, `values` (n,) the digit, `ids` (n,)
    scikit-learn's index of the scan.
    """

    cells: np.ndarray
    values: np.ndarray
    ids: np.ndarray

    def pick(self, values: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """Draw one row of this set for each digit in `values`."""
        rows = [np.flatnonzero(self.values == digit) for digit in range(10)]
        return np.array([rng.choice(rows[value]) for value in values])


def enlarge(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Enlarge one scan to 14 to 16 pixels a side and put it at a random place of its cell."""
    width, height = (int(side) for side in rng.integers(CELL_PIXELS - 2, CELL_PIXELS + 1, size=2))
    left, top = int(rng.integers(CELL_PIXELS - width + 1)), int(rng.integers(CELL_PIXELS - height + 1))
    cell = np.zeros((CELL_PIXELS, CELL_PIXELS), dtype=np.float32)
    ink = np.asarray(Image.fromarray(image).resize((width, height), Image.Resampling.BICUBIC))
    cell[top : top + height, left : left + width] = np.clip(ink, 0, 1)
    return cell


def load_scans(seed: int, held_out: int = HELD_OUT_SCANS) -> tuple[Scans, Scans]:
    """Return (train, held-out) scans, disjoint and together all of them.

    Raises RunError when scikit-learn is not installed.
    """
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise RunError(
            'the quickstart takes its pictures from scikit-learn: pip install "lapilli[quickstart]"'
        ) from error
    digits = load_digits()
    images = np.asarray(digits["images"], dtype=np.float32) / SCAN_LEVELS
    values = np.asarray(digits["target"], dtype=np.int64)
    rng = np.random.default_rng(seed)
    order = rng.permutation(len(values))
    cells = np.stack([[enlarge(image, rng) for _ in range(VARIANTS)] for image in images])

    def take(ids: np.ndarray) -> Scans:
        return Scans(cells[ids], values[ids], ids)

    return take(np.sort(order[held_out:])), take(np.sort(order[:held_out]))
