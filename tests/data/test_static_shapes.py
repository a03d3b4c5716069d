"""With shapes, a step holds the Examples that it holds packed, each in a row of its own, and no other shape is made."""

import io

import numpy as np
import pytest
import torch

from lapilli.data.buckets import Shape, choose_shapes
from lapilli.data.check import index
from lapilli.data.loader import TrainLoader
from lapilli.data.pack import VISION
from lapilli.data.quarantine import Quarantine
from lapilli.data.rows import fill_rows
from lapilli.data.sample import IGNORE, Example, Image, ImageSlot


@pytest.fixture
def make_loaders(world, make_encoder, make_spec):
    """Loaders of the same corpus: packed, and with at most `count` shapes of 400 tokens."""

    def make(count=3, **options):
        corpus = index([world], make_encoder(), make_spec(), stream=io.StringIO())
        facts = corpus.index
        shapes = choose_shapes(facts.lengths, facts.pictures, facts.supervised, 400, count, multiple=8)
        given = {"global_batch_size": 7, "tokens_per_micro_batch": 400} | options
        loader = lambda **more: TrainLoader(corpus, make_encoder(), make_spec(), **given, **more)  # noqa: E731
        return loader(), loader(shapes=shapes), shapes

    return make


def measured(batch):
    """Every shape that a device sees of a Batch."""
    p = batch.places
    tensors = [batch.input_ids, batch.labels, batch.position_ids, batch.cu_seqlens]
    tensors += [p.features, p.states, p.targets, p.weights]
    tensors += [x for pixels in batch.images.values() for x in (pixels.tiles, pixels.tiles_per_image, pixels.sizes)]
    return tuple((t.shape, t.dtype) for t in tensors), p.rows


def rows(batch):
    """What each Example of a Batch says to a model: tokens, labels, positions."""
    found = {}
    columns = torch.stack([batch.input_ids, batch.labels, batch.position_ids])
    for i, name in enumerate(batch.ids):
        start, end = batch.cu_seqlens[i : i + 2].tolist()
        ids, labels, positions = columns[:, start:end].tolist()
        if batch.places is not None:
            n = max(positions) + 1
            assert set(labels[n:]) <= {IGNORE}
            assert not any(ids[n:])
            assert not any(positions[n:])
            ids, labels, positions = ids[:n], labels[:n], positions[:n]
        found[name] = (ids, labels, positions)
    return found


@pytest.mark.parametrize("options", [{}, {"workers": 2}, {"order": "modality_groups", "weights": [1.3]}])
def test_shapes_change_the_layout_of_a_step_and_nothing_else(make_loaders, options):
    packed, fixed, shapes = make_loaders(total_steps=8, **options)
    seen = set()
    for one, other in zip(packed, fixed, strict=True):
        assert (one.samples, sorted(one.ids)) == (other.samples, sorted(other.ids))
        mine, theirs = ({k: v for b in step.batches for k, v in rows(b).items()} for step in (one, other))
        assert mine == theirs
        for total in ("tokens", "supervised", "weight"):
            assert sum(getattr(b, total) for b in one.batches) == sum(getattr(b, total) for b in other.batches)
        seen |= {measured(batch) for batch in other.batches}
    assert 1 < len(seen) <= len(shapes) == 3


def test_lists_say_where_pictures_and_supervised_tokens_stand(make_loaders, make_encoder):
    packed, fixed, _ = make_loaders()
    image_token = make_encoder().image_token_id
    for one, other in zip(packed, fixed, strict=True):
        tiles = {}
        for batch in one.batches:
            if batch.images:
                of = [n for n in batch.ids for _ in range((1, 0, 2)[int(n[1:]) % 3])]
                for name, tile in zip(of, batch.images[VISION].tiles, strict=True):
                    tiles.setdefault(name, []).append(tile)
        for batch in other.batches:
            p, size = batch.places, len(batch.input_ids)
            real = p.features[p.features < size]
            assert real.tolist() == (batch.input_ids == image_token).nonzero().flatten().tolist()
            wanted = [tile for name in batch.ids for tile in tiles.get(name, [])]
            got = batch.images[VISION].tiles if batch.images else ()
            assert all(torch.equal(a, b) for a, b in zip(got, wanted, strict=False))
            assert len(real) == 4 * len(wanted)
            assert not any(tile.any() for tile in got[len(wanted) :])
            at = (batch.labels != IGNORE).nonzero().flatten()
            assert p.states[: len(at)].tolist() == (at - 1).tolist()
            assert torch.equal(p.targets[: len(at)], batch.labels[at])
            assert not p.weights[len(at) :].any()
            assert batch.weight == p.weights.sum() == len(at)


@pytest.mark.parametrize("ranks", [2, 3])
def test_ranks_share_the_batches_and_run_as_many(make_loaders, ranks):
    _, whole, shapes = make_loaders()
    loaders = [make_loaders(ranks=ranks, rank=rank, image_cost_tokens=9.0)[1] for rank in range(ranks)]
    padding = 0
    for alone, *parts in zip(whole, *loaders, strict=True):
        assert sorted(i for part in parts for i in part.ids) == sorted(alone.ids)
        assert len({len(part.batches) for part in parts}) == 1
        batches = [batch for part in parts for batch in part.batches]
        assert {rows_length(batch) for batch in batches} <= {(s.rows, s.length) for s in shapes}
        assert sum(batch.weight for batch in batches) == sum(batch.weight for batch in alone.batches)
        padding += sum(not batch.ids for batch in batches)
    assert padding


def rows_length(batch):
    return batch.places.rows, len(batch.input_ids) // batch.places.rows


def test_a_bad_record_leaves_an_empty_row(make_loaders, tmp_path):
    _, whole, _ = make_loaders(order="sequential")
    before = [measured(batch) for step in whole for batch in step.batches]
    _, fixed, _ = make_loaders(order="sequential", quarantine=Quarantine(23, 0.2))
    (tmp_path / "images/0_0.png").write_bytes(b"no picture")
    steps = list(fixed)
    assert [measured(batch) for step in steps for batch in step.batches] == before
    assert [bad.sample for step in steps for bad in step.bad] == [0]
    assert {f"r{i}" for i in range(1, 23)} == {name for step in steps for batch in step.batches for name in batch.ids}


def test_weights_go_with_their_tokens():
    weights = np.array([0.0, 0.0, 0.5, 2.0], dtype=np.float32)
    ids = np.array([5, 6, 7, 8])
    weighed = Example("a", ids, np.array([IGNORE, IGNORE, 7, 8]), weights=weights)
    plain = Example("b", ids, np.array([5, 6, IGNORE, IGNORE]))
    batch = fill_rows([weighed, plain], [], Shape(6, 3, 0, 5), tile_size=(8, 8), tokens_per_picture=4)
    states, targets, worth = batch.supervision()
    assert (states.tolist(), targets.tolist(), worth.tolist()) == ([1, 2, 6, 0, 0], [7, 8, 6, 0, 0], [0.5, 2, 1, 0, 0])
    assert batch.weight == 3.5
    assert batch.supervised == 3
    assert batch.tokens == 8
    assert batch.images == {}
    assert batch.weights.tolist() == [0, 0, 0.5, 2, 0, 0, 0, 1, *[0] * 10]


def test_padding_alone_weighs_nothing():
    batch = fill_rows([], [], Shape(6, 2, 2, 3), tile_size=(8, 8), tokens_per_picture=4)
    assert (batch.weight, batch.tokens, batch.supervised, batch.ids) == (0.0, 0, 0, ())
    assert batch.images[VISION].tiles.shape == (2, 3, 8, 8)
    assert batch.places.features.tolist() == [12] * 8


def test_what_does_not_fit_is_refused():
    slot = ImageSlot(Image(path="x"), 0, 4, 8, 8)
    one = Example("a", np.arange(5), np.arange(5), (slot,))
    tile = torch.zeros(1, 3, 8, 8, dtype=torch.uint8)
    given = {"tile_size": (8, 8), "tokens_per_picture": 4}
    with pytest.raises(ValueError, match="1 pictures, but room for 0"):
        fill_rows([one], [tile], Shape(6, 2, 0, 8), **given)
    with pytest.raises(ValueError, match="4 supervised tokens, but room for 3"):
        fill_rows([one], [tile], Shape(6, 2, 2, 3), **given)
