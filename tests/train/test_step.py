"""A step's loss and gradients: what they are, and what they may not depend on."""

from contextlib import nullcontext
from dataclasses import replace

import numpy as np
import pytest
import torch

from lapilli.base.errors import RunError
from lapilli.data.sample import IGNORE
from lapilli.recipe.schema import Train
from lapilli.train import loss as loss_room
from lapilli.train.loss import LossModule
from lapilli.train.optimizer import build_optimizer, parameter_groups
from lapilli.train.parallel.single import Single
from lapilli.train.step import accumulate, loss_weights, train_step

CPU = torch.device("cpu")


def gradients(model, image_spec, batches, reduction="tokens"):
    model.zero_grad()
    losses = accumulate(Single(LossModule(model, image_spec)), batches, reduction, CPU, nullcontext())
    return sum(losses), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def test_loss_is_that_of_each_conversation_alone(tiny_model, tiny_step, split, image_spec):
    model, (examples, tiles) = tiny_model(), tiny_step(6)
    loss, _ = gradients(model, image_spec, split(examples, tiles, 1))
    total, count = 0.0, 0
    for example, pictures in zip(examples, tiles, strict=True):
        (batch,) = split([example], [pictures], 1)
        pixels = (torch.cat(pictures).float() / 255 - 0.5) / 0.5 if pictures else None
        logits = model(input_ids=batch.input_ids[None], pixel_values=pixels).logits[0]
        logits[:, model.config.image_token_id] = -torch.inf  # training never lets the image token be an answer
        targets = batch.labels[1:]
        total += torch.nn.functional.cross_entropy(logits[:-1], targets, ignore_index=IGNORE, reduction="sum").item()
        count += int((targets != IGNORE).sum())
    assert loss == pytest.approx(total / count, rel=1e-5)


@pytest.mark.parametrize("parts", [2, 8])
def test_loss_and_gradients_do_not_depend_on_the_split(tiny_model, tiny_step, split, image_spec, parts):
    model, (examples, tiles) = tiny_model(), tiny_step(8)
    loss, whole = gradients(model, image_spec, split(examples, tiles, 1))
    split_loss, parts_grads = gradients(model, image_spec, split(examples, tiles, parts))
    assert split_loss == pytest.approx(loss, rel=1e-5)
    assert whole.keys() == parts_grads.keys()
    for name, gradient in whole.items():
        assert (parts_grads[name] - gradient).norm() <= 1e-5 * gradient.norm() + 1e-9, name


def test_logits_in_pieces_give_the_same_gradients(tiny_model, tiny_step, split, image_spec, monkeypatch):
    model, batches = tiny_model(), split(*tiny_step(8), 1)
    loss, whole = gradients(model, image_spec, batches)
    monkeypatch.setattr(loss_room, "LOGITS_AT_ONCE", 97 * 5)
    pieces_loss, pieces = gradients(model, image_spec, batches)
    assert pieces_loss == pytest.approx(loss, rel=1e-6)
    for name, gradient in whole.items():
        torch.testing.assert_close(pieces[name], gradient, rtol=1e-4, atol=1e-7)


def test_a_label_counts_as_much_as_it_weighs(tiny_model, tiny_step, split, image_spec, monkeypatch):
    model, (examples, tiles) = tiny_model(), tiny_step(4)

    def weighted(first, rest):
        return [
            replace(e, weights=np.where(e.labels == IGNORE, 0, first if i == 0 else rest).astype(np.float32))
            for i, e in enumerate(examples)
        ]

    loss, _ = gradients(model, image_spec, split(examples, tiles, 1))
    same, _ = gradients(model, image_spec, split(weighted(0.5, 0.5), tiles, 1))
    assert same == pytest.approx(loss, rel=1e-6)
    # Weight 0 is as if the conversation had no answer; with weight 3 it is as if it were there three times.
    for first, picked in ((0, [1, 2, 3]), (3, [0, 0, 0, 1, 2, 3])):
        chosen = split([examples[i] for i in picked], [tiles[i] for i in picked], 1)
        expected, wanted = gradients(model, image_spec, chosen)
        found, got = gradients(model, image_spec, split(weighted(first, 1), tiles, 2))
        assert found == pytest.approx(expected, rel=1e-5)
        for name, gradient in wanted.items():
            assert (got[name] - gradient).norm() <= 1e-5 * gradient.norm() + 1e-9, name
    monkeypatch.setattr(loss_room, "LOGITS_AT_ONCE", 97 * 5)
    pieces, _ = gradients(model, image_spec, split(weighted(3, 1), tiles, 2))
    assert pieces == pytest.approx(found, rel=1e-6)


def test_weights_of_micro_batches():
    assert loss_weights([3, 0, 1], "tokens") == [0.25] * 3
    assert loss_weights([3, 0, 1], "microbatch_mean") == pytest.approx([1 / 9, 0, 1 / 3])
    assert loss_weights([0], "tokens") == [0]


def test_a_part_that_saw_nothing_still_moves_with_adams_momentum(tiny_model, tiny_step, split, image_spec):
    model, (examples, tiles) = tiny_model(), tiny_step(12)
    train = Train(learning_rate=1e-2)
    optimizer = build_optimizer(parameter_groups(model.named_parameters(), train), train)
    engine = Single(LossModule(model, image_spec))
    with_pictures = [i for i, t in enumerate(tiles) if t]
    text_only = [i for i, t in enumerate(tiles) if not t]
    for members in (with_pictures, text_only):
        before = model.projector[0].weight.clone()
        batches = split([examples[i] for i in members], [tiles[i] for i in members], 1)
        train_step(engine, optimizer, batches, train, CPU, autocast=nullcontext())
        assert not torch.equal(before, model.projector[0].weight)
    assert not model.projector[0].weight.grad.any()


def test_nothing_is_learned_from_a_non_finite_step(tiny_model, tiny_step, split, image_spec):
    model, batches = tiny_model(), split(*tiny_step(4), 2)
    train = Train(learning_rate=1e-2)
    optimizer = build_optimizer(parameter_groups(model.named_parameters(), train), train)
    with torch.no_grad():
        model.projector[2].bias[0] = float("nan")
    before = {n: p.clone() for n, p in model.named_parameters()}
    with pytest.raises(RunError, match=r"the loss is nan \(no weight was changed\); samples: s"):
        train_step(Single(LossModule(model, image_spec)), optimizer, batches, train, CPU, autocast=nullcontext())
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter.nan_to_num(), before[name].nan_to_num())
