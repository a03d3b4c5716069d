"""A stage's model without its weights, and one micro-batch of it traced.

What is traced is what runs: the stage's own frozen set, adapters, precision and checkpointing, through the same module
that training calls.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from lapilli.assemble.skeleton import skeleton
from lapilli.assemble.source import open_model
from lapilli.data.buckets import Shape
from lapilli.data.rows import fill_rows
from lapilli.data.sample import IGNORE, Batch, Example, Image, ImageSlot, Pixels
from lapilli.model.freeze import PartCount
from lapilli.model.quiet import quiet
from lapilli.model.vlm import VisionLanguageModel
from lapilli.recipe.schema import Stage
from lapilli.train.loss import LossModule
from lapilli.train.plan.trace import Traced, Tracer, hollow
from lapilli.train.plan.workload import Portion
from lapilli.train.reading import Reading
from lapilli.train.setup import make_trainable


def empty_model(origin: str | Path, how: Reading) -> VisionLanguageModel:
    """The model of a folder on the meta device. Raises ModelError for a folder that can't be opened."""
    known = skeleton(origin, how.spec)
    if known is not None:
        return known
    opened = open_model(origin)
    with quiet(), torch.device("meta"):
        return VisionLanguageModel(copy.deepcopy(opened.config))


def trainable(model: VisionLanguageModel, stage: Stage, how: Reading) -> Sequence[PartCount]:
    """Freeze, adapt and store as the run would, whatever the folder stores; return what trains."""
    model.to(torch.float32)  # type: ignore[arg-type]
    parts = make_trainable(model, stage, how)
    if stage.run.precision == "bf16":
        for parameter in model.parameters():
            if not parameter.requires_grad:
                parameter.data = parameter.data.to(torch.bfloat16)
    return parts


def trace_micro_batch(
    model: VisionLanguageModel,
    stage: Stage,
    how: Reading,
    micro_batch: Sequence[Portion],
    shape: Shape | None = None,
) -> Traced:
    """Run one micro-batch, padded to `shape` if there is one, forward and backward over a model on the meta device.

    The model becomes hollow by it.
    """
    fake = FakeTensorMode()
    hollow(model, fake)
    module = LossModule(model, how.spec.image)
    tracer = Tracer(fake, model.config.text_config.get_text_config().vocab_size)
    tracer.ignore(model)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.register_post_accumulate_grad_hook(tracer.is_gradient)
    batch = _batch(micro_batch, how, model.config.image_token_id, fake, shape)
    autocast = torch.autocast("cpu", torch.bfloat16) if stage.run.precision == "bf16" else nullcontext()
    with quiet(), tracer:
        with autocast:
            loss = module(batch)
        loss = loss * (1 / batch.weight)
        if loss.requires_grad:
            loss.backward()
    tracer.seen.events = tuple(tracer.events)  # before the model goes, and its gradients with it
    return tracer.seen


def _batch(
    portions: Sequence[Portion], how: Reading, image_token: int, fake: FakeTensorMode, shape: Shape | None = None
) -> Batch:
    layout = how.layout
    ids, labels = [], []
    for portion in portions:
        row = torch.full((portion.length,), 1 if image_token == 0 else 0)
        row[: portion.pictures * layout.tokens(640, 480)] = image_token
        ids.append(row)
        target = torch.full((portion.length,), IGNORE)
        target[portion.length - min(portion.supervised, portion.length - 1) :] = 1
        labels.append(target)
    lengths = torch.tensor([portion.length for portion in portions])
    pictures = sum(portion.pictures for portion in portions) if shape is None else shape.pictures
    images = {}
    if pictures:
        with fake:
            tiles = torch.empty(pictures, 3, layout.tile_height, layout.tile_width, dtype=torch.uint8)
        sizes = torch.tensor([[640, 480]] * pictures)
        images = {"vision": Pixels(tiles, torch.ones(pictures, dtype=torch.int64), sizes)}
    if shape is not None:
        return _padded(ids, labels, portions, shape, layout.tokens(640, 480), images)
    return Batch(
        torch.cat(ids),
        torch.cat(labels),
        torch.cat([torch.arange(n) for n in lengths.tolist()]),
        torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)]).to(torch.int32),
        images,
        tuple(str(i) for i in range(len(portions))),
    )


def _padded(
    ids: Sequence[torch.Tensor],
    labels: Sequence[torch.Tensor],
    portions: Sequence[Portion],
    shape: Shape,
    tokens_per_picture: int,
    images: dict[str, Pixels],
) -> Batch:
    """The same rows padded as the run's are; pictures are put in afterwards, as they take no memory here."""
    slots = [
        tuple(ImageSlot(Image(""), n * tokens_per_picture, tokens_per_picture, 640, 480) for n in range(one.pictures))
        for one in portions
    ]
    examples = [
        Example(str(i), own.numpy(), target.numpy(), slots[i])
        for i, (own, target) in enumerate(zip(ids, labels, strict=True))
    ]
    nothing = [torch.zeros(1, 3, 1, 1, dtype=torch.uint8)] * sum(len(own) for own in slots)
    made = fill_rows(examples, nothing, shape, tile_size=(1, 1), tokens_per_picture=tokens_per_picture)
    made.images = images
    return made
