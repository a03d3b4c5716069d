"""Ranks share a step without loss or split, keep the budget, and wait little for each other."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lapilli.data.order import epoch_order
from lapilli.data.pack import ExampleTooLong
from lapilli.data.ranks import deal, imbalance, plan_consecutive, plan_ranks, sample_costs


@st.composite
def steps(draw):
    budget = draw(st.integers(1, 5000))
    return draw(st.lists(st.integers(1, budget), max_size=200)), budget


def positions(plan):
    return sorted(i for mine in plan for micro_batch in mine for i in micro_batch)


@settings(max_examples=300)
@given(steps(), st.integers(1, 9), st.randoms(use_true_random=False))
def test_ranks_share_everything_within_the_budget(step, ranks, random):
    lengths, budget = step
    costs = [random.choice([0.0, random.random() * 1000]) for _ in lengths]
    for plan in (plan_ranks(lengths, budget, ranks), plan_ranks(lengths, budget, ranks, costs)):
        assert len(plan) == ranks
        assert len({len(mine) for mine in plan}) == 1, "every rank runs as many micro-batches"
        assert positions(plan) == list(range(len(lengths)))
        assert all(sum(lengths[i] for i in b) <= budget for mine in plan for b in mine)
        cells = len(plan[0]) * ranks
        assert sum(bool(b) for mine in plan for b in mine) == min(cells, len(lengths)), "no rank idles without need"
        assert len(plan[0]) <= -(-max(1, 2 * -(-sum(lengths) // budget)) // ranks)


@given(st.integers(0, 100), st.integers(1, 9), st.integers(1, 9))
def test_consecutive_micro_batches_are_dealt_in_turn(n, size, ranks):
    plan = plan_consecutive(n, size, ranks)
    assert len({len(mine) for mine in plan}) == 1
    in_turn = [i for cells in zip(*plan, strict=True) for b in cells for i in b]
    assert in_turn == list(range(n))


def llava_like(n: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """One picture of 576 tokens each, a long tail of conversations, 6 % text-only."""
    rng = np.random.default_rng(seed)
    pictures = (rng.random(n) >= 0.06).astype(int)
    with_picture = 616 + np.minimum(rng.lognormal(4.7, 0.9, n), 1432)
    text_only = 40 + np.minimum(rng.lognormal(6.6, 0.8, n), 2008)
    return np.where(pictures > 0, with_picture, text_only).astype(int), pictures


@pytest.mark.parametrize("image_cost", [0.0, 10.0, 130.0])
def test_ranks_wait_at_most_three_percent(image_cost):
    lengths, pictures = llava_like(128 * 40, 3)
    order = epoch_order(len(lengths), 42, 0)
    lost = []
    for start in range(0, len(order), 128):
        step = order[start : start + 128]
        costs = sample_costs(lengths[step], pictures[step], image_cost)
        lost.append(imbalance(plan_ranks(lengths[step].tolist(), 8192, 8, costs), costs))
    assert np.mean(lost) < 0.005
    assert max(lost) <= 0.03


def test_pictures_count_in_the_balance():
    """Eight text-only samples as long as eight with a picture: by length alone one rank would have all pictures."""
    costs = sample_costs([100] * 16, [1] * 8 + [0] * 8, 50.0)
    assert costs == [150.0] * 8 + [100.0] * 8
    plan = plan_ranks([100] * 16, 1000, 2, costs)
    assert [sum(i < 8 for b in mine for i in b) for mine in plan] == [4, 4]


def test_imbalance_is_one_minus_mean_over_max():
    assert imbalance([[[0], [1]], [[2], []]], [4.0, 4.0, 4.0]) == pytest.approx(1 - 3 / 4)
    assert imbalance([[[0, 1]], [[2]]], [1, 1, 2]) == 0.0
    assert imbalance([[], []], []) == 0.0


def test_neighbours_in_cost_run_side_by_side():
    dealt = deal([5.0, 9.0, 1.0, 7.0, 3.0], 2)
    assert dealt == [[1, 4, 2], [3, 0, None]]


def test_a_sample_over_the_budget_is_named():
    with pytest.raises(ExampleTooLong, match="example 1 of the step: 31 tokens"):
        plan_ranks([3, 31], 30, 4)


@given(st.integers(1, 60), st.integers(1, 12), st.integers(0, 100), st.lists(st.integers(1, 6), min_size=1, max_size=5))
def test_a_run_goes_on_with_any_number_of_ranks(n, size, begin, changes):
    """However often the number of ranks changes, the steps have the samples that they have on one rank."""
    lengths = 1 + np.arange(n) * 7 % 50

    def step(k):
        epoch, place = divmod(k, -(-n // size))
        return epoch_order(n, 1, epoch)[place * size : place * size + size]

    for k, ranks in zip(itertools.count(begin), changes, strict=False):
        samples = step(k)
        plan = plan_ranks(lengths[samples].tolist(), 64, ranks)
        seen = [samples[i] for mine in plan for b in mine for i in b]
        assert sorted(seen) == sorted(samples)
