"""Parts of a file neither overlap nor leave a record out, and a wrong one is refused with the remedy."""

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lapilli.recipe.subset import parse_subset


@pytest.mark.parametrize(
    ("text", "total", "bounds"),
    [
        ("0:1000", 5000, (0, 1000)),
        ("0:1000", 10, (0, 10)),
        ("20:30", 10, (10, 10)),
        (":7", 10, (0, 7)),
        ("7:", 10, (7, 10)),
        ("0.0-0.5", 11, (0, 5)),
        ("0.5-1.0", 11, (5, 11)),
        ("0-1", 11, (0, 11)),
        (".9-1", 1000, (900, 1000)),
    ],
)
def test_bounds(text, total, bounds):
    subset = parse_subset(text)
    assert subset.bounds(total) == bounds
    assert subset.needs_total == ("-" in text)


@given(st.integers(0, 10**7), st.lists(st.integers(1, 999), unique=True, max_size=8))
def test_neighbouring_shares_are_the_whole_file(total, cuts):
    edges = ["0", *(f"0.{cut:03}" for cut in sorted(cuts)), "1"]
    bounds = [parse_subset(f"{a}-{b}").bounds(total) for a, b in pairwise(edges)]
    assert bounds[0][0] == 0
    assert bounds[-1][1] == total
    assert all(before[1] == after[0] for before, after in pairwise(bounds))


@pytest.mark.parametrize("text", ["", ":", "half", "0.5", "5", "-1:3", "1-2-3", "0:0.5", "0.2-1.5", "7:7", "0.5-0.5"])
def test_what_is_no_part_of_a_file_is_refused(text):
    with pytest.raises(ValueError, match=r"give record numbers|holds no record"):
        parse_subset(text)
