"""Order is a permutation, a pure function of its arguments, and LLaVA's where LLaVA's is asked for."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lapilli.base.errors import DataError, RecipeError
from lapilli.data.order import (
    ORDERS,
    WINDOW_STEPS,
    epoch_order,
    llava_length,
    llava_length_groups,
    llava_modality_groups,
)
from lapilli.data.sample import Image, Message, Sample, Text

RECORDED = [
    json.loads(line) for line in (Path(__file__).parents[1] / "reference" / "sampler.jsonl").read_text().splitlines()
]


@pytest.mark.parametrize("row", RECORDED, ids=lambda r: f"{r['seed']}")
def test_llava_sampler_is_repeated(row):
    group = llava_modality_groups if row["group_by_modality"] else llava_length_groups
    assert group(row["lengths"], row["batch_size"], row["world_size"], row["seed"]) == row["indices"]
    if row["group_by_modality"]:
        order = epoch_order(
            len(row["lengths"]),
            row["seed"],
            0,
            "modality_groups_llava",
            lengths=row["lengths"],
            batch_size=row["batch_size"],
            batches_per_step=row["world_size"],
        )
        assert order.tolist() == row["indices"]


@given(st.integers(0, 300), st.integers(0, 2**63), st.integers(0, 9), st.sampled_from(ORDERS))
def test_every_sample_comes_exactly_once(n, seed, epoch, name):
    lengths = [(-1) ** (i % 3) * (1 + i % 17) for i in range(n)]
    order = epoch_order(
        n,
        seed,
        epoch,
        name,
        lengths=lengths,
        pictures=[i % 3 for i in range(n)],
        batch_size=3,
        batches_per_step=2,
    )
    assert sorted(order.tolist()) == list(range(n))


def test_order_depends_on_seed_and_epoch_alone():
    first = epoch_order(500, 42, 3)
    np.random.seed(1)
    torch.manual_seed(1)
    torch.rand(7)
    np.random.rand(7)
    assert np.array_equal(first, epoch_order(500, 42, 3))
    assert not np.array_equal(first, epoch_order(500, 42, 4))
    assert not np.array_equal(first, epoch_order(500, 43, 3))
    state = torch.random.get_rng_state()
    epoch_order(500, 42, 1, "modality_groups_llava", lengths=[1, -1] * 250, batch_size=4)
    assert torch.equal(state, torch.random.get_rng_state())


def test_the_shuffle_is_fixed_for_ever():
    # A resumed run relies on this across versions of numpy and of lapilli.
    assert epoch_order(10, 42, 0).tolist() == FIXED


FIXED = [7, 1, 6, 4, 3, 5, 9, 0, 2, 8]


def test_shuffles_look_random():
    places = np.stack([epoch_order(20, seed, 0) for seed in range(2000)])
    counts = np.stack([np.bincount(places[:, i], minlength=20) for i in range(20)])
    assert counts.min() > 50
    assert counts.max() < 160


def test_sequential_is_the_file():
    assert epoch_order(5, 1, 7, "sequential").tolist() == [0, 1, 2, 3, 4]


def test_unknown_order_names_the_nearest():
    with pytest.raises(RecipeError, match='did you mean "shuffled"'):
        epoch_order(5, 1, 0, "shuffle")


def test_llava_length_counts_words_and_signs_modality():
    picture = Message("user", (Image(path="a.png"), Text("\nWhat is this?")))
    answer = Message("assistant", (Text("A cat."),))
    assert llava_length(Sample("a", (picture, answer))) == 6  # <image> is a word of its own
    assert llava_length(Sample("b", (answer, answer))) == -4
    with pytest.raises(DataError, match="no words"):
        llava_length(Sample("c", (Message("user", (Text(" "),)),)))


def steps_of(order, size):
    return [order[start : start + size] for start in range(0, len(order), size)]


def test_length_groups_put_similar_lengths_into_a_step():
    lengths = np.random.default_rng(0).integers(1, 2000, 16 * WINDOW_STEPS * 2 + 5)
    order = epoch_order(len(lengths), 42, 0, "length_groups", lengths=lengths, batch_size=4, batches_per_step=4)
    *steps, rest = steps_of(lengths[order], 16)
    assert len(rest) == 5
    assert all((np.diff(step) <= 0).all() for step in steps), "the longest first"
    assert np.mean([np.ptp(step) for step in steps]) < 2000 / WINDOW_STEPS * 2
    # The steps themselves come in no order of length.
    means = np.array([step.mean() for step in steps])
    assert abs(np.corrcoef(means[:-1], means[1:])[0, 1]) < 0.3
    again = epoch_order(len(lengths), 42, 1, "length_groups", lengths=lengths, batch_size=16)
    assert not np.array_equal(order, again)


@given(st.integers(0, 40), st.integers(0, 40), st.integers(1, 7), st.integers(0, 5))
def test_modality_groups_mix_one_step_at_most(with_pictures, without, size, epoch):
    pictures = np.array([2] * with_pictures + [0] * without, dtype=np.int64)
    n = len(pictures)
    order = epoch_order(n, 1, epoch, "modality_groups", lengths=np.arange(n), pictures=pictures, batch_size=size)
    mixed = [len(set((pictures[step] > 0).tolist())) > 1 for step in steps_of(order, size)]
    assert sum(mixed) <= 1
    assert not any(mixed[:-2])


def test_grouped_orders_are_fixed_for_ever():
    # A resumed run relies on this across versions of numpy and of lapilli.
    lengths, pictures = [5, 9, 1, 7, 3, 8, 2], [0, 1, 1, 0, 1, 1, 0]
    made = [
        epoch_order(7, 42, 1, name, lengths=lengths, pictures=pictures, batch_size=2).tolist()
        for name in ("length_groups", "modality_groups")
    ]
    assert made == GROUPED


GROUPED = [[1, 5, 4, 2, 3, 0, 6], [1, 5, 3, 0, 4, 2, 6]]


def test_grouped_orders_need_what_they_group_by():
    with pytest.raises(RecipeError, match="order length_groups needs the length of every sample"):
        epoch_order(3, 1, 0, "length_groups")
    with pytest.raises(RecipeError, match="needs the number of pictures of every sample"):
        epoch_order(3, 1, 0, "modality_groups", lengths=[1, 2, 3])
