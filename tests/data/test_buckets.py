"""Batches of few shapes hold every sample, and no cheaper choice of shapes or plan exists where all can be tried."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lapilli.base.errors import DataError, RecipeError
from lapilli.data.buckets import Shape, choose_shapes, padding, plan_shapes

samples = st.lists(
    st.tuples(st.integers(1, 500), st.integers(0, 4), st.floats(0, 1)).map(lambda s: (s[0], s[1], int(s[0] * s[2]))),
    min_size=1,
    max_size=80,
)


@settings(max_examples=200)
@given(samples, st.integers(1, 6), st.integers(1, 70), st.integers(512, 4000))
def test_every_sample_has_a_row_in_one_of_few_shapes(given_samples, count, multiple, budget):
    columns = lengths, pictures, supervised = [list(column) for column in zip(*given_samples, strict=True)]
    budget = max(budget, -(-max(lengths) // multiple) * multiple)
    shapes = choose_shapes(*columns, budget, count, multiple=multiple)
    assert 1 <= len(shapes) <= count
    assert all(shape.length % multiple == 0 and shape.tokens <= budget for shape in shapes)
    assert all(1 <= shape.targets <= shape.tokens for shape in shapes)
    batches = plan_shapes(*columns, shapes)
    assert sorted(i for batch in batches for i in batch.positions) == list(range(len(lengths)))
    assert len({batch.shape for batch in batches}) <= count
    for batch in batches:
        assert 1 <= len(batch.positions) <= batch.shape.rows
        assert max(lengths[i] for i in batch.positions) <= batch.shape.length
        assert sum(pictures[i] for i in batch.positions) <= batch.shape.pictures
        assert sum(supervised[i] for i in batch.positions) <= batch.shape.targets
    assert plan_shapes(*columns, shapes) == batches
    assert 0 <= padding(lengths, batches) < 1


@given(st.lists(st.integers(1, 40), min_size=1, max_size=12), st.integers(1, 4))
def test_no_other_lengths_pad_less(lengths, count):
    none = [0] * len(lengths)
    shapes = choose_shapes(lengths, none, none, 40, count, multiple=1)
    assert {shape.pictures for shape in shapes} == {0}

    def padded(ends):
        return sum(min(end for end in ends if end >= length) for length in lengths)

    others = itertools.combinations(sorted(set(lengths) - {max(lengths)}), min(count, len(set(lengths))) - 1)
    assert padded([shape.length for shape in shapes]) == min(padded([*ends, max(lengths)]) for ends in others)


@given(st.lists(st.integers(1, 20), min_size=1, max_size=6))
def test_no_other_plan_computes_less(lengths):
    shapes, ones = [Shape(8, 3, 3, 3), Shape(20, 2, 2, 2)], [1] * len(lengths)
    computed = sum(batch.shape.tokens for batch in plan_shapes(lengths, ones, ones, shapes))

    def cheapest(rest):
        if not rest:
            return 0
        first, others = rest[0], rest[1:]
        return min(
            shape.tokens + cheapest([o for o in others if o not in beside])
            for shape in shapes
            for k in range(shape.rows)
            for beside in itertools.combinations(others, k)
            if all(lengths[i] <= shape.length for i in (first, *beside))
        )

    assert computed == cheapest(list(range(len(lengths))))


def test_more_shapes_pad_less():
    rng = np.random.default_rng(0)
    lengths = (616 + np.minimum(rng.lognormal(4.7, 0.9, 128), 1432)).astype(int).tolist()
    ones = [1] * 128
    given = lengths, ones, [length - 606 for length in lengths]
    shares = [padding(lengths, plan_shapes(*given, choose_shapes(*given, 8192, k))) for k in (1, 2, 4, 8)]
    assert shares == sorted(shares, reverse=True)
    assert shares[-1] < 0.15


def test_what_fits_no_shape_is_refused():
    with pytest.raises(RecipeError, match="the longest sample has 990 tokens, 1,024 as a multiple of 64"):
        choose_shapes([3, 990], [0, 0], [1, 1], 1000, 2)
    for length, targets in ((99, 3), (50, 64)):
        said = f"example 1 of the step: {length} tokens, 0 pictures and {targets} supervised tokens fit no shape"
        with pytest.raises(DataError, match=said):
            plan_shapes([3, length], [0, 0], [1, targets], [Shape(64, 2, 2, 32)])
    assert choose_shapes([], [], [], 1000, 2) == ()
    assert plan_shapes([], [], [], []) == []


def test_a_shape_whose_samples_have_no_pictures_has_no_room_for_any():
    shapes = choose_shapes([60, 60, 600], [1, 2, 0], [4, 4, 500], 1024, 2)
    assert [(shape.length, shape.pictures) for shape in shapes] == [(64, 16), (640, 0)]
    assert [shape.targets for shape in shapes] == [128, 640]
