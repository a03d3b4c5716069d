"""Validation loss: the mean over all supervised tokens of held-out data, whatever the training loss's arithmetic.

A run computes it of the weights that it trains; `validate_stage` computes it of any model folder or checkpoint, in any
number of processes, with the same loader and the same module.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

import torch

from lapilli.assemble.load import load
from lapilli.base.errors import DataError, RecipeError, RunError
from lapilli.base.interrupt import StopWish
from lapilli.base.progress import Progress
from lapilli.data.corpus import Corpus
from lapilli.data.loader import TrainLoader
from lapilli.data.sample import Batch
from lapilli.data.steps import Step
from lapilli.model.vlm import VisionLanguageModel
from lapilli.recipe.files import check_files
from lapilli.recipe.schema import Stage
from lapilli.train.device.choose import Device, choose_device
from lapilli.train.loss import LossModule
from lapilli.train.parallel.asked import AskedTogether
from lapilli.train.parallel.ddp import Ddp
from lapilli.train.parallel.single import Single
from lapilli.train.parallel.world import ALONE, World
from lapilli.train.precision import settle
from lapilli.train.reading import Reading, read_description, reading
from lapilli.train.setup import (
    Prepared,
    Say,
    agreed_corpus,
    describe_corpus,
    make_trainable,
    settle_process,
    training_loader,
    training_mode,
)
from lapilli.train.shapes import fixed_shapes
from lapilli.train.state import read_state
from lapilli.train.tensors import Saved
from lapilli.train.weights import load_weights


@dataclass(frozen=True)
class Validation:
    """The loss of a model over held-out data."""

    model: str
    loss: float
    perplexity: float
    """exp(loss); infinite where that can't be held."""
    supervised_tokens: int
    samples: int
    precision: str
    processes: int
    step: int | None = None
    """The step that a checkpoint was saved after."""


def validation_loss(ready: Prepared, wish: StopWish) -> float | None:
    """Return the loss per supervised token over the whole of `ready.validation`; the model trains on as before.

    The processes of a run share the data. None, in all of them, if it was given up because one was asked to stop.
    """
    assert ready.validation is not None
    engine, world, sources = ready.engine, ready.engine.world, ready.stage.data.validation
    ready.loaded.model.eval()
    with world.together():
        loader = training_loader(
            ready.stage, ready.how, ready.validation, sources, order="sequential", world=world, shapes=ready.shapes
        )
    sums = _sums(loader, engine, ready.device, ready.stage.run.precision, wish=wish)
    training_mode(ready.loaded.model)
    engine.resting()
    return None if sums is None else _mean(world, *sums)


@torch.no_grad()
def _sums(
    loader: TrainLoader,
    engine: Single,
    device: Device,
    precision: str,
    progress: Progress | None = None,
    wish: StopWish | None = None,
) -> tuple[float, float] | None:
    """This process's sum of losses, and of the weights of their tokens; None where a wish to stop came first."""
    total, count, cut_short = 0.0, 0.0, False
    asked = AskedTogether(engine.world, wish) if wish is not None else None
    with engine.world.together():
        steps = iter(loader)
    for number in range(len(loader)):
        with engine.world.together():
            batches = None if cut_short else _next(steps, wish)
            cut_short = batches is None
            passes = engine.level(batches or ())
        with engine.passing():
            for batch, pictures in passes:
                with device.autocast(precision):
                    loss = engine.module(batch.to(device.device), pictures)
                device.cut_graph()
                total += float(loss)
                count += batch.weight
        if progress is not None:
            progress.update(number + 1, f"loss {total / count:.4f}" if count else "")
        if asked is not None and number + 1 < len(loader) and asked.after_a_piece():
            return None
    if wish is not None and any(engine.world.exchange(cut_short)):
        return None
    return total, count


def _next(steps: Iterator[Step], wish: StopWish | None) -> Sequence[Batch] | None:
    """The next step's. A signal to the whole process group ends the data's workers too: None, and no error, then."""
    try:
        return next(steps).batches
    except DataError:
        if wish is None or wish.signal is None:
            raise
        return None


def _mean(world: World, total: float, count: float) -> float:
    parts = world.exchange([total, count])
    total, count = (sum(column) for column in zip(*parts, strict=True))
    return total / count if count else 0.0


def validate_stage(
    stage: Stage, model: str, *, say: Say = lambda _line: None, stream: TextIO | None = None, world: World = ALONE
) -> Validation:
    """Return the loss of `model` over the stage's `data.validation`; nothing is written but the index of the data.

    `model` is a model folder, a run folder with its model, or a checkpoint (`checkpoints/step-...`) of a run of this
    stage, whose other weights come from `stage.model`. Every process holds the whole model, whatever `run.engine`.
    Raises RecipeError without held-out data, and LapilliError for what can't be read.
    """
    if not stage.data.validation:
        raise RecipeError(
            f"stage {stage.name}: data.validation names nothing; give it, as in data.validation=held.json"
        )
    saved = (Path(model) / "state.json").is_file()
    read = stage.model_copy(update={"model": stage.model if saved else model})
    with world.together():
        check_files([stage])
        device = choose_device(stage.run.device, world.local_rank, stage.run.hpu_mode)
        settle_process(stage, device)
        how = reading(read, *read_description(str(read.model)))
        corpus = agreed_corpus(stage.data.validation, read, how, True, stream, world)
        say(describe_corpus("validation data", corpus))
        engine = _whole(read, model if saved else None, how, device, world, say)
        shapes = fixed_shapes(stage, device, [corpus])
        loader = training_loader(
            stage, how, corpus, stage.data.validation, order="sequential", world=world, shapes=shapes
        )
    with Progress("validating: step", len(loader), stream=stream) as progress:
        sums = _sums(loader, engine, device, stage.run.precision, progress)
        assert sums is not None  # nobody was asked to stop
    return _outcome(stage, model, corpus, _mean(world, *sums), world, saved)


def _whole(stage: Stage, checkpoint: str | None, how: Reading, device: Device, world: World, say: Say) -> Single:
    """The model in this process, as its folder has it, or with a checkpoint's weights in it."""
    whole = stage.model_copy(update={"run": stage.run.model_copy(update={"engine": "auto"})})
    loaded = load(str(stage.model), dtype=torch.float32) if checkpoint is None else load_weights(stage, device)
    model: VisionLanguageModel = loaded.model
    if checkpoint is None:
        model.requires_grad_(False)
    else:
        make_trainable(model, stage, how)
    settle(model, whole.run, device, say)
    model.eval()
    made = LossModule(model, how.spec.image)
    engine = Single(made, world) if world.size == 1 else Ddp(made, world)
    if checkpoint is not None:
        engine.load_weights(Saved(Path(checkpoint)))
    return engine


def _outcome(stage: Stage, model: str, corpus: Corpus, loss: float, world: World, saved: bool) -> Validation:
    if not math.isfinite(loss):
        raise RunError(f"{model}: the validation loss is {loss}; look at the model's weights and run.precision")
    sequence: Sequence[int] = corpus.index.supervised.tolist()
    return Validation(
        model=model,
        loss=loss,
        perplexity=math.exp(loss) if loss < 700 else math.inf,
        supervised_tokens=sum(sequence),
        samples=len(corpus),
        precision=stage.run.precision,
        processes=world.size,
        step=read_state(Path(model)).step if saved else None,
    )
