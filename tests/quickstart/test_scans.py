"""The split of the real scans, on which every held-out number of the quickstart rests."""

import numpy as np
import pytest

from lapilli.quickstart.scans import CELL_PIXELS, HELD_OUT_SCANS, VARIANTS, load_scans


@pytest.mark.parametrize("seed", [0, 1])
def test_split_is_disjoint_and_complete(seed):
    train, held_out = load_scans(seed)
    assert len(held_out.ids) == HELD_OUT_SCANS
    assert not set(train.ids) & set(held_out.ids)
    assert set(train.ids) | set(held_out.ids) == set(range(1797))
    for part in (train, held_out):
        assert set(part.values) == set(range(10))
        assert part.cells.shape == (len(part.ids), VARIANTS, CELL_PIXELS, CELL_PIXELS)


def test_no_held_out_scan_is_a_copy_of_a_train_scan():
    """Equal ids are excluded above; this excludes equal pixels under different ids."""
    from sklearn.datasets import load_digits

    images = load_digits()["images"]
    train, held_out = load_scans(0)
    seen = {images[i].tobytes() for i in train.ids}
    assert not any(images[i].tobytes() in seen for i in held_out.ids)


def test_same_seed_same_split_and_cells():
    (first, _), (second, _) = load_scans(3), load_scans(3)
    assert np.array_equal(first.ids, second.ids)
    assert np.array_equal(first.cells, second.cells)


def test_pick_returns_rows_of_the_digits_asked_for():
    train, _ = load_scans(0)
    values = np.array([3, 0, 9, 3])
    assert np.array_equal(train.values[train.pick(values, np.random.default_rng(0))], values)
