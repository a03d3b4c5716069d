"""A step depends on seed and number alone; every sample comes once per epoch; a bad record is named."""

import io
import json
import os
import signal
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import torch

from lapilli.base.errors import DataError, RecipeError
from lapilli.data.check import index
from lapilli.data.corpus import Corpus
from lapilli.data.image import to_tiles
from lapilli.data.loader import TrainLoader
from lapilli.data.order import ORDERS
from lapilli.data.pack import VISION, ExampleTooLong
from lapilli.data.quarantine import BadRecord, Quarantine


@pytest.fixture
def make_loader(world, make_encoder, make_spec):
    def make(mode="pad", corpus: Corpus | None = None, **options):
        encoder, spec = make_encoder(mode), make_spec(mode)
        corpus = corpus or index([world], encoder, spec, stream=io.StringIO())
        if "micro_batch_size" not in options:
            options.setdefault("tokens_per_micro_batch", 700)
        return TrainLoader(corpus, encoder, spec, **({"global_batch_size": 5} | options))

    return make


def flat(step):
    """A Step as comparable plain values, waiting time left out."""
    batches = []
    for b in step.batches:
        pixels = [(k, p.tiles.tolist(), p.tiles_per_image.tolist(), p.sizes.tolist()) for k, p in b.images.items()]
        batches.append((b.ids, b.input_ids.tolist(), b.labels.tolist(), b.cu_seqlens.tolist(), pixels))
    return step.step, step.epoch, step.samples, step.ids, batches


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"mode": "anyres"},
        {"order": "modality_groups_llava", "global_batch_size": 6, "micro_batch_size": 2},
        {"micro_batch_size": 2},
        {"order": "length_groups", "weights": [1.3]},
        {"order": "modality_groups", "weights": [0.5]},
        {"ranks": 2, "rank": 1, "image_cost_tokens": 9.0},
    ],
)
def test_a_step_is_the_same_from_any_start_with_any_workers(make_loader, options):
    whole = [flat(step) for step in make_loader(total_steps=11, **options)]
    assert [step[0] for step in whole] == list(range(11))
    for workers, start in ((0, 3), (1, 5), (2, 0)):
        torch.manual_seed(workers)
        loader = make_loader(total_steps=11, workers=workers, start_step=start, **options)
        assert len(loader) == 11 - start
        assert [flat(step) for step in loader] == whole[start:]


@pytest.mark.parametrize("order", ORDERS)
def test_every_epoch_has_every_sample_once(make_loader, order):
    loader = make_loader(order=order, total_steps=10)
    assert loader.steps_per_epoch == 5
    for epoch in range(2):
        plans = [loader.plan(step) for step in range(epoch * 5, epoch * 5 + 5)]
        assert [len(plan.samples) for plan in plans] == [5, 5, 5, 5, 3]
        assert {plan.epoch for plan in plans} == {epoch}
        assert sorted(i for plan in plans for i in plan.samples) == list(range(23))
        assert all(sorted(i for b in plan.micro_batches for i in b) == sorted(plan.samples) for plan in plans)


def test_a_step_does_not_depend_on_the_token_budget(make_loader):
    small, large = make_loader(tokens_per_micro_batch=400), make_loader(tokens_per_micro_batch=100_000)
    for step in range(5):
        assert small.plan(step).samples == large.plan(step).samples
        assert len(large.plan(step).micro_batches) == 1
    for step in small:
        assert all(batch.tokens <= 400 for batch in step.batches)
        assert sorted(i for batch in step.batches for i in batch.ids) == sorted(step.ids)


def test_batches_hold_the_records_own_pictures(make_loader, world, make_encoder, make_spec):
    loader = make_loader(workers=1)
    for step in loader:
        for batch in step.batches:
            sizes, tiles = [], []
            for name in batch.ids:
                record = int(name[1:])
                for k in range((1, 0, 2)[record % 3]):
                    picture = PIL.Image.open(Path(world.images) / f"{record}_{k}.png")
                    sizes.append(list(picture.size))
                    tiles.append(to_tiles(picture, make_spec(), make_encoder().layout))
            if not sizes:
                assert batch.images == {}
                continue
            assert batch.images[VISION].sizes.tolist() == sizes
            assert torch.equal(batch.images[VISION].tiles, torch.cat(tiles))
            assert int((batch.input_ids == make_encoder().image_token_id).sum()) == 4 * len(sizes)


@pytest.mark.parametrize("workers", [0, 2])
def test_iterating_leaves_the_random_state_alone(make_loader, workers):
    torch.manual_seed(1)
    np.random.seed(1)
    before = torch.random.get_rng_state(), np.random.get_state()[1].copy()
    list(make_loader(workers=workers))
    assert torch.equal(before[0], torch.random.get_rng_state())
    assert np.array_equal(before[1], np.random.get_state()[1])


def half(path: Path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def other_size(path: Path):
    PIL.Image.new("RGB", (61, 61)).save(path)


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize(
    ("damage", "word"), [(half, "truncated"), (other_size, "61 x 61"), (Path.unlink, "there is no file")]
)
def test_a_picture_that_goes_bad_later_stops_the_run_with_its_record(make_loader, world, workers, damage, word):
    PIL.Image.effect_noise((50, 50), 90).convert("RGB").save(Path(world.images) / "12_0.png")
    loader = make_loader(workers=workers, order="sequential")
    damage(Path(world.images) / "12_0.png")
    seen = []
    with pytest.raises(DataError, match=rf"record 13 \(id r12\): image \"12_0.png\".*{word}"):
        seen.extend(step.step for step in loader)
    assert seen == [0, 1]


def test_a_worker_that_is_killed_is_reported_with_its_record(make_loader, world, monkeypatch):
    from lapilli.data import loader as module

    real = module.open_image

    def deadly(image, *rest):
        if image.path == "12_0.png":
            os.kill(os.getpid(), signal.SIGKILL)
        return real(image, *rest)

    loader = make_loader(workers=1, order="sequential")
    monkeypatch.setattr(module, "open_image", deadly)
    handler = signal.getsignal(signal.SIGCHLD)
    with pytest.raises(DataError, match=r"data worker died.*in hand were: \S+chat.json: record 13 \(id r12\)"):
        list(loader)
    assert signal.getsignal(signal.SIGCHLD) == handler


def test_what_cannot_work_is_refused_before_the_first_step(make_loader):
    corpus = make_loader().corpus
    longest = corpus.samples[int(corpus.index.lengths.argmax())].sample.where
    with pytest.raises(ExampleTooLong, match="tokens_per_micro_batch 100") as caught:
        make_loader(tokens_per_micro_batch=100)
    assert longest in str(caught.value)
    with pytest.raises(RecipeError, match="not a multiple"):
        make_loader(order="modality_groups_llava", micro_batch_size=2)
    with pytest.raises(RecipeError, match="did you mean"):
        make_loader(order="shufled")


def test_waiting_is_measured(make_loader):
    assert all(step.wait_seconds > 0 for step in make_loader())


@pytest.mark.parametrize("workers", [0, 2])
def test_a_bad_picture_leaves_a_hole_and_nothing_moves(make_loader, world, workers):
    whole = list(make_loader(order="sequential", total_steps=10))
    quarantine = Quarantine(23, 0.1)
    loader = make_loader(workers=workers, order="sequential", total_steps=10, quarantine=quarantine)
    half(Path(world.images) / "12_0.png")
    steps = list(loader)
    assert [step.samples for step in steps] == [step.samples for step in whole]
    assert [step.ids for step in steps] == [step.ids for step in whole]
    trained = [{i for batch in step.batches for i in batch.ids} for step in steps]
    assert trained == [set(step.ids) - {"r12"} for step in whole]
    assert [[bad.sample for bad in step.bad] for step in steps] == [[], [], [12], *[[]] * 7], (
        "said once, not each epoch"
    )
    assert "record 13 (id r12)" in quarantine.found[12].reason


def test_a_resumed_run_leaves_out_what_it_left_out_before(make_loader, world):
    known = Quarantine(23, 0.1, {12: BadRecord(12, "was unreadable")})
    steps = list(make_loader(order="sequential", start_step=1, quarantine=known))
    assert "r12" not in {i for step in steps for batch in step.batches for i in batch.ids}
    assert not any(step.bad for step in steps)


def test_more_bad_pictures_than_allowed_stop_the_run(make_loader, world):
    loader = make_loader(order="sequential", quarantine=Quarantine(23, 0.1))
    for name in ("3_0", "6_0", "12_0"):
        half(Path(world.images) / f"{name}.png")
    seen = []
    with pytest.raises(
        DataError, match=r"3 of 23 records are bad, more than data.max_bad_ratio 0.1 allows \(2\)"
    ) as told:
        seen.extend(step.step for step in loader)
    assert seen == [0, 1]
    assert "id r12" in str(told.value)


def test_an_epoch_of_a_mixture(make_encoder, make_spec, world, tmp_path):
    records = json.loads(Path(world.path).read_text())
    (tmp_path / "more.json").write_text(json.dumps(records[:10]))
    sources = [world, world.model_copy(update={"path": str(tmp_path / "more.json")})]
    encoder, spec = make_encoder("pad"), make_spec("pad")
    corpus = index(sources, encoder, spec, stream=io.StringIO())

    def loader(**options):
        options = {"global_batch_size": 5, "tokens_per_micro_batch": 700, "weights": [1.0, 2.5]} | options
        return TrainLoader(corpus, encoder, spec, **options)

    one = loader()
    assert (one.samples_per_epoch, one.steps_per_epoch) == (23 + 25, 10)
    epochs = []
    for epoch in range(2):
        plans = [one.plan(step) for step in range(10 * epoch, 10 * epoch + 10)]
        assert [len(plan.samples) for plan in plans] == [5] * 9 + [3]
        times = np.bincount([i for plan in plans for i in plan.samples], minlength=33)
        assert (times[:23] == 1).all()
        assert sorted(times[23:].tolist()) == [2] * 5 + [3] * 5
        epochs.append(times.tolist())
    assert epochs[0] != epochs[1], "another half of the second source"
    steps = list(loader(total_steps=10))
    assert sorted(i for step in steps for b in step.batches for i in b.ids) == sorted(i for s in steps for i in s.ids)
    assert sum(len(step.ids) for step in steps) == 48
    with pytest.raises(RecipeError, match=r"data.train.1.weight: 0.01 of its 10 samples is less than one"):
        loader(weights=[1.0, 0.01])


@pytest.mark.parametrize("options", [{}, {"micro_batch_size": 2}, {"weights": [1.5], "order": "length_groups"}])
def test_ranks_share_the_steps_of_one(make_loader, options):
    """A run that goes on with other numbers of ranks and workers continues the same sequence of steps."""
    alone = make_loader(total_steps=9, **options)
    whole = {step.step: sorted(i for b in step.batches for i in b.ids) for step in alone}
    for ranks, start, workers in ((2, 3, 0), (3, 5, 1), (7, 8, 0)):
        shared = [
            list(make_loader(total_steps=9, start_step=start, workers=workers, ranks=ranks, rank=rank, **options))
            for rank in range(ranks)
        ]
        for k, step in enumerate(range(start, 9)):
            mine = [made[k] for made in shared]
            assert {(one.step, one.samples) for one in mine} == {(step, mine[0].samples)}
            assert sorted(i for one in mine for b in one.batches for i in b.ids) == whole[step]
            assert sorted(i for one in mine for i in one.ids) == whole[step]


def test_grouped_orders_go_by_tokens(make_loader):
    loader = make_loader(order="length_groups", global_batch_size=4)
    lengths = loader.corpus.index.lengths
    steps = [lengths[list(loader.plan(step).samples)] for step in range(5)]
    assert np.mean([np.ptp(step) for step in steps]) < np.ptp(lengths) / 3
    loader = make_loader(order="modality_groups", global_batch_size=4)
    pictures = loader.corpus.index.pictures
    kinds = [len(set((pictures[list(loader.plan(step).samples)] > 0).tolist())) for step in range(6)]
    assert sum(kind == 2 for kind in kinds) <= 1
