"""Intervals and tests against closed forms and tables."""

from fractions import Fraction
from math import comb

import numpy as np
import pytest

from lapilli.evaluate import statistics
from lapilli.evaluate.statistics import (
    binomial_p,
    draws,
    interval,
    mean_percent,
    paired,
    paired_ratios,
    paired_resamples,
    ratio_percent,
    resampled,
)


def test_a_means_interval_is_that_of_the_normal_approximation():
    items = np.array([1.0] * 300 + [0.0] * 100)
    low, high = interval(resampled(len(items), mean_percent(items)))
    half = 1.96 * 100 * np.sqrt(0.75 * 0.25 / 400)
    assert low == pytest.approx(75 - half, abs=0.6)
    assert high == pytest.approx(75 + half, abs=0.6)
    assert (low, high) == interval(resampled(len(items), mean_percent(items)))


def test_values_that_are_not_numbers_are_left_out_of_an_interval():
    assert interval(np.array([1.0, np.nan, 1.0, np.inf])) == (1.0, 1.0)
    assert all(np.isnan(interval(np.array([np.nan]))))


@pytest.mark.parametrize(("a", "b"), [(0, 0), (0, 1), (0, 5), (3, 9), (10, 10), (40, 60), (200, 260)])
def test_the_exact_test_is_the_binomial_distributions(a, b):
    n = a + b
    tail = sum(Fraction(comb(n, k), 2**n) for k in range(min(a, b) + 1))
    assert binomial_p(a, b) == pytest.approx(float(min(Fraction(1), 2 * tail)), rel=1e-9)


def test_paired_scores_are_surer_than_two_separate_ones():
    generator = np.random.default_rng(1)
    a = (generator.random(400) < 0.5).astype(float)
    b = a.copy()
    b[np.flatnonzero(a == 0)[:15]] = 1  # fifteen more right, none lost
    found = paired(a, b)
    assert found.value == pytest.approx(3.75)
    assert (found.a_better, found.b_better, found.test) == (0, 15, "McNemar, exact")
    assert found.p == pytest.approx(2 / 2**15)
    assert found.low > 0
    assert found.high - found.low < 4.5  # two separate samples of 400 would be sure to 14 points
    same = paired(a, a)
    assert (same.value, same.p) == (0, 1)


def test_scores_in_between_get_the_sign_test():
    found = paired(np.array([0.3, 0.6, 1.0, 0.0]), np.array([0.6, 0.9, 1.0, 0.3]))
    assert (found.test, found.b_better) == ("sign test", 3)
    assert found.p == pytest.approx(0.25)


def test_resampled_headlines_pair_by_resample():
    generator = np.random.default_rng(0)
    items = generator.random(50)
    a, b = (resampled(50, mean_percent(x)) for x in (items, items + 0.01))
    found = paired_resamples(50.0, 51.0, a, b, 50)
    assert found.low == pytest.approx(1.0)  # every resample differs by the same point
    assert found.high == pytest.approx(1.0)
    assert found.p == pytest.approx(1 / 1001)
    assert paired_resamples(50.0, 50.0, a, a, 50).p == 1


def test_blocks_change_no_draw(monkeypatch):
    whole = np.stack(list(draws(7)))
    monkeypatch.setattr(statistics, "_BLOCK", 50)
    assert (np.stack(list(draws(7))) == whole).all()
    one_by_one = np.random.default_rng(statistics.SEED)
    assert all((row == one_by_one.integers(0, 7, 7)).all() for row in whole)


def test_ratios_of_sums_are_compared_on_the_same_questions():
    rng = np.random.default_rng(0)
    below = rng.uniform(5, 10, 80)
    a = np.stack([below * rng.uniform(0.4, 0.8, 80), below], axis=1)
    b = a + np.array([1.0, 0.0])
    found = paired_ratios(a, b)
    assert found.value == pytest.approx(100 * 80 / below.sum())
    assert found.low < found.value < found.high
    assert found.p <= 2 / 1001
    assert paired_ratios(a, a).p == 1
    assert np.isnan(ratio_percent(np.zeros((2, 2)))(np.array([0, 1])))
