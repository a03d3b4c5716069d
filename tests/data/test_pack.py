"""Packing loses, splits and moves nothing; bins keep the budget, are few and balanced; tensors are laid end to end."""

import time

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lapilli.data.pack import VISION, ExampleTooLong, consecutive, pack, plan_step
from lapilli.data.sample import IGNORE, Example, Image, ImageSlot


@st.composite
def steps(draw):
    budget = draw(st.integers(1, 5000))
    return draw(st.lists(st.integers(1, budget), max_size=200)), budget


@settings(max_examples=300)
@given(steps())
def test_plans_keep_everything_within_the_budget(step):
    lengths, budget = step
    bins = plan_step(lengths, budget)
    assert sorted(i for b in bins for i in b) == list(range(len(lengths)))
    assert all(b and b == sorted(b) for b in bins)
    assert all(sum(lengths[i] for i in b) <= budget for b in bins)
    assert plan_step(lengths, budget) == bins
    # Any two bins of a plan that wastes most of its room would fit together.
    assert len(bins) <= max(1, 2 * -(-sum(lengths) // budget))


@given(st.lists(st.integers(1, 300), max_size=300), st.integers(1, 40), st.integers(300, 2000), st.integers(1, 4))
def test_a_stream_is_packed_without_loss_split_or_reorder_beyond_the_look_ahead(lengths, look_ahead, budget, multiple):
    """The look-ahead is the step: nothing that comes later is packed before it is complete."""
    packed: list[int] = []
    for start in range(0, len(lengths), look_ahead):
        window = lengths[start : start + look_ahead]
        bins = plan_step(window, budget, multiple=multiple)
        assert len(bins) % multiple == 0
        assert sum(map(bool, bins)) == min(len(bins), len(window))
        packed += [start + i for b in bins for i in b]
    assert sorted(packed) == list(range(len(lengths)))
    assert all(place // look_ahead == i // look_ahead for place, i in enumerate(packed))


@given(steps(), st.randoms(use_true_random=False))
def test_costs_never_break_the_budget(step, random):
    lengths, budget = step
    bins = plan_step(lengths, budget, costs=[random.random() * 1000 for _ in lengths])
    assert sorted(i for b in bins for i in b) == list(range(len(lengths)))
    assert all(sum(lengths[i] for i in b) <= budget for b in bins)


def llava_like(n: int, seed: int) -> list[int]:
    rng = np.random.default_rng(seed)
    text = np.minimum(rng.lognormal(4.9, 0.8, n), 1400).astype(int) + 20
    return (text + 576 * (rng.random(n) > 0.06)).tolist()


def test_bins_are_few_and_balanced():
    for seed in range(10):
        lengths = llava_like(128, seed)
        bins = plan_step(lengths, 8192)
        loads = [sum(lengths[i] for i in b) for b in bins]
        assert len(bins) <= -(-sum(lengths) // 8192) + 1
        assert 1 - np.mean(loads) / max(loads) < 0.02


@pytest.mark.parametrize(("n", "budget"), [(128, 8192), (128, 2048), (512, 100_000), (4096, 8192)])
def test_planning_costs_under_20_microseconds_per_sample(n, budget):
    lengths = llava_like(n, 0)
    seconds = []
    for _ in range(5):
        start = time.process_time()
        plan_step(lengths, budget)
        seconds.append(time.process_time() - start)
    assert min(seconds) / n < 20e-6


def test_one_example_over_the_budget_is_named():
    with pytest.raises(ExampleTooLong, match="31 tokens are more than tokens_per_micro_batch 30") as caught:
        plan_step([3, 31], 30)
    assert caught.value.position == 1


def test_consecutive_micro_batches_are_never_rebinned():
    assert consecutive(7, 3) == [[0, 1, 2], [3, 4, 5], [6]]
    assert consecutive(0, 3) == []


def example(name: str, length: int, slots: list[tuple[int, int, int, int]] = ()) -> Example:
    ids = np.arange(length) + 10 * len(name)
    labels = np.where(ids % 3 == 0, ids, IGNORE)
    images = tuple(ImageSlot(Image(path=f"{name}{s}.png"), *slot) for s, slot in enumerate(slots))
    return Example(name, ids, labels, images)


@given(st.lists(st.integers(1, 30), min_size=1, max_size=8))
def test_batches_are_examples_end_to_end(lengths):
    examples = [example("x" * (i + 1), n) for i, n in enumerate(lengths)]
    batch = pack(examples)
    assert batch.cu_seqlens.dtype == torch.int32
    assert batch.tokens == sum(lengths)
    assert batch.ids == tuple(e.id for e in examples)
    assert batch.images == {}
    for one, start, stop in zip(examples, batch.cu_seqlens[:-1], batch.cu_seqlens[1:], strict=True):
        assert batch.input_ids[start:stop].tolist() == one.input_ids.tolist()
        assert batch.position_ids[start:stop].tolist() == list(range(one.length))
        assert batch.labels[start] == IGNORE
        assert batch.labels[start + 1 : stop].tolist() == one.labels[1:].tolist()
    assert batch.supervised == sum(e.supervised for e in examples)
    # Examples stay as they were.
    assert all((e.labels == np.where(e.input_ids % 3 == 0, e.input_ids, IGNORE)).all() for e in examples)


def test_pictures_stand_in_slot_order():
    examples = [example("a", 9, [(1, 2, 30, 20), (4, 4, 50, 60)]), example("b", 3), example("c", 5, [(0, 2, 7, 8)])]
    tiles = [torch.full((n, 3, 2, 2), v, dtype=torch.uint8) for n, v in ((1, 10), (2, 20), (1, 30))]
    pixels = pack(examples, tiles).images[VISION]
    assert pixels.tiles[:, 0, 0, 0].tolist() == [10, 20, 20, 30]
    assert pixels.tiles_per_image.tolist() == [1, 2, 1]
    assert pixels.sizes.tolist() == [[30, 20], [50, 60], [7, 8]]
    with pytest.raises(ValueError, match="3 image slots and 2 pictures"):
        pack(examples, tiles[:2])
