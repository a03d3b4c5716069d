"""A mixture visits each sample as often as its source's weight says, the same number in every epoch."""

from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lapilli.base.errors import RecipeError
from lapilli.data.mixture import epoch_samples, epoch_size, source_sizes
from lapilli.data.order import epoch_order


@st.composite
def mixtures(draw):
    """(ids, sources, weights): distinct ids with gaps, sources in any order, weights in hundredths."""
    weights = draw(st.lists(st.integers(1, 400).map(lambda w: w / 100), min_size=1, max_size=5))
    n = draw(st.integers(0, 200))
    sources = np.array(draw(st.lists(st.integers(0, len(weights) - 1), min_size=n, max_size=n)), dtype=np.int32)
    ids = np.cumsum(draw(st.lists(st.integers(1, 4), min_size=n, max_size=n)), dtype=np.int64)
    return ids, sources, weights


@given(mixtures(), st.integers(0, 2**63), st.integers(0, 5))
def test_every_sample_comes_as_often_as_its_weight_says(mixture, seed, epoch):
    ids, sources, weights = mixture
    counts = np.bincount(sources, minlength=len(weights))
    if any(n and Fraction(str(w)) * int(n) < Fraction(1, 2) for w, n in zip(weights, counts, strict=True)):
        with pytest.raises(RecipeError, match="is less than one of them"):
            epoch_samples(ids, sources, weights, seed, epoch)
        return
    visited = epoch_samples(ids, sources, weights, seed, epoch)
    assert len(visited) == epoch_size(sources, weights)
    times = np.bincount(visited, minlength=len(ids))
    for source, (weight, n) in enumerate(zip(weights, counts, strict=True)):
        mine = times[sources == source]
        assert set(mine.tolist()) <= {int(weight), int(weight) + 1}
        assert abs(int(mine.sum()) - Fraction(str(weight)) * int(n)) <= Fraction(1, 2)


@given(st.integers(0, 300), st.integers(0, 2**63), st.integers(0, 9))
def test_at_weight_one_every_sample_comes_exactly_once(n, seed, epoch):
    sources = np.arange(n) % 3
    assert epoch_samples(np.arange(n), sources, [1.0, 1.0, 1.0], seed, epoch).tolist() == list(range(n))


def test_fractions_are_drawn_anew_by_seed_and_epoch_and_belong_to_the_id():
    ids, sources = np.arange(1000), np.zeros(1000, dtype=np.int32)
    first = epoch_samples(ids, sources, [0.3], 42, 0)
    assert len(first) == 300
    assert np.array_equal(first, epoch_samples(ids, sources, [0.3], 42, 0))
    for seed, epoch in ((42, 1), (43, 0)):
        shared = len(np.intersect1d(first, epoch_samples(ids, sources, [0.3], seed, epoch)))
        assert 60 < shared < 120, "about 0.3 of them, as chance has it"
    # Another source beside it, and samples in another order: the same ids are drawn.
    both = np.concatenate([np.arange(1000, 1500), ids[::-1]])
    where = np.repeat([1, 0], [500, 1000])
    again = epoch_samples(both, where, [0.3, 1.0], 42, 0)
    assert sorted(both[i] for i in again if where[i] == 0) == first.tolist()


def test_a_fraction_is_no_function_of_the_shuffle():
    """The draws must not be those that order the epoch, or a small weight would always come at its beginning."""
    ids = np.arange(4000)
    chosen = epoch_samples(ids, np.zeros(4000, dtype=np.int32), [0.25], 42, 0)
    places = np.argsort(epoch_order(4000, 42, 0))[chosen]
    assert 1850 < places.mean() < 2150


def test_the_draw_is_fixed_for_ever():
    # A resumed run relies on this across versions of numpy and of lapilli.
    assert epoch_samples(np.arange(10), np.zeros(10, dtype=np.int32), [1.4], 42, 0).tolist() == FIXED


FIXED = [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 0, 2, 6, 9]


def test_weights_are_taken_as_written():
    sources = np.zeros(100, dtype=np.int32)
    assert source_sizes(sources, [0.29]) == [(0, 29)]
    assert source_sizes(sources, [2.29]) == [(2, 29)]
    assert source_sizes(sources, [1.0, 0.001]) == [(1, 0), (0, 0)], "a source without samples has nothing to visit"
    with pytest.raises(RecipeError, match=r"data.train.0.weight: 0.004 of its 100 samples is less than one"):
        source_sizes(sources, [0.004])
