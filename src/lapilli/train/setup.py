"""Everything that happens before the first step, in a numbered order; nothing after it can fail for want of input.

Cheap checks come first: names, the folder, the data, then the weights. Nothing but
the index of the data is written before all of them have passed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

import torch

from lapilli.assemble.load import Loaded
from lapilli.base.errors import RunError
from lapilli.data.buckets import Shape
from lapilli.data.corpus import Corpus
from lapilli.data.loader import TrainLoader
from lapilli.data.quarantine import Quarantine
from lapilli.model.adapter import add_lora
from lapilli.model.freeze import PartCount, apply_freeze, table, total
from lapilli.model.vlm import VisionLanguageModel
from lapilli.recipe.files import check_files
from lapilli.recipe.schema import Source, Stage
from lapilli.train.device.choose import Device, choose_device
from lapilli.train.folder import RunFolder, open_folder
from lapilli.train.loss import LossModule
from lapilli.train.monitor import compact
from lapilli.train.optimizer import check_optimizer
from lapilli.train.parallel.choose import check_engine, engine_name, make_engine
from lapilli.train.parallel.single import Single
from lapilli.train.parallel.world import ALONE, World
from lapilli.train.precision import settle
from lapilli.train.reading import Reading, limits, read_corpus, read_description, reading
from lapilli.train.recompute import check_compile, compile_layers, keep_for_backward
from lapilli.train.shapes import describe_shapes, fixed_shapes
from lapilli.train.trackers import check_trackers
from lapilli.train.weights import check_weights, load_weights, refuse_whole_quantised

Say = Callable[[str], None]

NAMED_RECORDS = 3
"""Records that a line of what was left out names; `left_out.jsonl` names all of them."""


@dataclass(frozen=True)
class Survey:
    """What is known of a run before its weights are read."""

    folder: RunFolder
    device: Device
    engine: str
    how: Reading
    corpus: Corpus
    validation: Corpus | None
    loader: TrainLoader
    total_steps: int
    shapes: tuple[Shape, ...]


@dataclass
class Prepared:
    """A run that is ready for its next step."""

    stage: Stage
    folder: RunFolder
    device: Device
    how: Reading
    loaded: Loaded
    corpus: Corpus
    validation: Corpus | None
    loader: TrainLoader
    engine: Single
    optimizer: torch.optim.Optimizer
    parts: Sequence[PartCount]
    total_steps: int
    shapes: tuple[Shape, ...] = ()
    """Of all batches, where the device compiles a program for each."""


def prepare(
    stage: Stage,
    resume: str,
    say: Say,
    stream: TextIO | None = None,
    *,
    write_index: bool = True,
    world: World = ALONE,
) -> Prepared:
    """Set a stage up. Raises LapilliError for whatever would stop it later, before anything is written.

    The processes of `world` do so together, inside `world.together()`; the first one decides about the folder and
    makes the index.
    """
    found = survey(stage, resume, say, stream, write_index=write_index, world=world)
    device, how = found.device, found.how
    # 6. The weights; which of them train, at which precision, where.
    loaded = load_weights(stage, device)
    make_trainable(loaded.model, stage, how)
    settle(loaded.model, stage.run, device, say)
    if stage.run.compile:
        say(f"compiled when they first run: {compile_layers(loaded.model, device)} layers")
    parts = table(loaded.model)
    say(describe_parts(parts))
    # 7. What drives the training, as soon as every process has come so far: the engine sends weights.
    world.exchange(None)
    engine = make_engine(found.engine, LossModule(loaded.model, how.spec.image), world, stage.run, device.device)
    if not world.first:  # after new weights were drawn, the same everywhere: dropout differs
        device.seed(stage.run.seed + world.rank)
    optimizer = engine.optimizer(stage.train)
    return Prepared(
        stage, found.folder, device, how, loaded, found.corpus, found.validation, found.loader, engine, optimizer,
        parts, found.total_steps, found.shapes,
    )  # fmt: skip


def survey(
    stage: Stage,
    resume: str,
    say: Say,
    stream: TextIO | None = None,
    *,
    write_index: bool = True,
    world: World = ALONE,
) -> Survey:
    """Find out and check all that needs no weights; `prepare` goes on from there, a rehearsal stops there."""
    # 1. The folder: new, or an interrupted run of this very recipe; and that the files it names are there.
    folder = _agreed_folder(stage, resume, world)
    check_files([stage])
    check_trackers(stage.run.trackers)
    # 2. The engine; the device, its threads and seeds.
    engine_wanted = engine_name(stage.run.engine, world)
    check_compile(stage, engine_wanted)
    device = choose_device(stage.run.device, world.local_rank, stage.run.hpu_mode)
    for line in check_engine(engine_wanted, stage, world, device.device):
        say(line)
    check_optimizer(stage.train, engine_wanted, device.device)
    check_weights(stage, engine_wanted, device.device)
    settle_process(stage, device)
    # 3. Names and shapes that the model's folder gives: template, image mode, tokenizer.
    how = reading(stage, *read_description(str(stage.model)))
    # 4. All data, every record of it; what is found is kept for the next run that reads them so.
    corpus = agreed_corpus(stage.data.train, stage, how, write_index, stream, world)
    say(describe_corpus("training data", corpus))
    validation = None
    if stage.data.validation:
        validation = agreed_corpus(stage.data.validation, stage, how, write_index, stream, world)
        say(describe_corpus("validation data", validation))
    # 5. What each step is made of.
    shapes = fixed_shapes(stage, device, [corpus] if validation is None else [corpus, validation])
    if shapes:
        say(describe_shapes(shapes, corpus, stage.train.global_batch_size))
    loader = training_loader(stage, how, corpus, stage.data.train, world=world, shapes=shapes)
    loader.total_steps = total_steps = count_steps(stage, loader.steps_per_epoch)
    return Survey(folder, device, engine_wanted, how, corpus, validation, loader, total_steps, shapes)


def _agreed_folder(stage: Stage, resume: str, world: World) -> RunFolder:
    """The folder as the first process finds it; the others may look when it has begun to write."""

    def found() -> str | None:
        start = open_folder(stage, resume).resume_from
        return None if start is None else str(start)

    start = world.from_first(found)
    return RunFolder(Path(str(stage.out)), None if start is None else Path(start))


def agreed_corpus(
    sources: Sequence[Source],
    stage: Stage,
    how: Reading,
    write_index: bool,
    stream: TextIO | None,
    world: World,
) -> Corpus:
    """The corpus, indexed by the first process; the others open what it kept.

    Raises RunError where they then see other data, as on machines whose folders differ.
    """
    corpus = read_corpus(sources, stage, how, write_index, stream) if world.first else None
    world.exchange(None)
    if corpus is None:
        corpus = read_corpus(sources, stage, how, False, stream)
    stamps = world.exchange(corpus.index.stamp)
    other = next((rank for rank, stamp in enumerate(stamps) if stamp != stamps[0]), None)
    if other is not None:
        raise RunError(f"process {other} sees other data in {sources[0].path} than process 0; share the same folders")
    return corpus


def training_loader(
    stage: Stage,
    how: Reading,
    corpus: Corpus,
    sources: Sequence[Source],
    *,
    order: str | None = None,
    world: World = ALONE,
    shapes: Sequence[Shape] = (),
) -> TrainLoader:
    """Return the loader of a corpus read from `sources`; with `order` sequential, that of held-out data.

    A validation loss is over the same records every time, so a record that goes bad there is always an error.
    """
    train, data = stage.train, stage.data
    leave_out = data.bad_records == "quarantine" and order is None
    quarantine = Quarantine(len(corpus), data.max_bad_ratio) if leave_out else None
    by_samples = train.loss_reduction == "microbatch_mean" and order is None
    return TrainLoader(
        corpus,
        how.encoders(stage, sources),
        how.spec.image,
        global_batch_size=train.global_batch_size,
        tokens_per_micro_batch=None if by_samples else max(train.tokens_per_micro_batch, _longest(corpus, order)),
        micro_batch_size=train.micro_batch_size if by_samples else None,
        order=order or data.order,
        # Held-out data are read once each, whatever a source weighs.
        weights=None if order else [source.weight for source in sources],
        seed=stage.run.seed,
        workers=stage.data.workers,
        limits=limits(stage),
        quarantine=quarantine,
        rank=world.rank,
        ranks=world.size,
        shapes=shapes,
    )


def _longest(corpus: Corpus, order: str | None) -> int:
    # Held-out data need no gradients: a conversation of any length fits where a training micro-batch does.
    return int(corpus.index.lengths.max()) if order else 0


def count_steps(stage: Stage, steps_per_epoch: int) -> int:
    """Optimiser steps of the whole run."""
    return stage.train.max_steps or math.ceil(stage.train.epochs * steps_per_epoch)


def settle_process(stage: Stage, device: Device) -> None:
    """Set threads, determinism and seeds as the stage asks for."""
    if stage.run.threads is not None:
        torch.set_num_threads(stage.run.threads)
    torch.use_deterministic_algorithms(False)
    if stage.run.deterministic:
        device.be_deterministic()
    device.seed(stage.run.seed)


def make_trainable(model: VisionLanguageModel, stage: Stage, how: Reading) -> Sequence[PartCount]:
    """Add adapters, freeze, and return the table of what trains; needs names and shapes only, no weights.

    Raises RecipeError for names that the model does not have, and where nothing would train.
    """
    train = stage.train
    if train.lora is not None:
        add_lora(
            model,
            r=train.lora.r,
            alpha=train.lora.alpha,
            dropout=train.lora.dropout,
            bias=train.lora.bias,
            target_modules=train.lora.target_modules,
            vision=train.lora.vision,
        )
    adapted = [p for p in model.language_model.parameters() if p.requires_grad] if train.lora else []
    vision_too = train.lora is not None and train.lora.vision
    apply_freeze(model, train.freeze, lora=train.lora is not None, lora_vision=vision_too)
    refuse_whole_quantised(model, train)
    for parameter in adapted:  # the adapters, and the biases that `lora.bias` asks for
        parameter.requires_grad_(True)
    model.layout = how.layout
    model.config.layout = how.spec.joined["layout"]
    training_mode(model)
    keep_for_backward(model, train.gradient_checkpointing)
    return table(model)


def training_mode(model: VisionLanguageModel) -> None:
    """Switch dropout on, but in a frozen vision encoder, whose features shall be those it gives in use."""
    model.train()
    if not any(p.requires_grad for p in model.vision_encoder.parameters()):
        model.vision_encoder.eval()


def describe_corpus(what: str, corpus: Corpus) -> str:
    """One line of what was found, and one for each kind of thing that was left out."""
    facts = corpus.index.summary()
    lines = [
        f"{what}: {facts['samples']:,} conversations, {facts['pictures']:,} pictures, {facts['tokens']:,} tokens "
        f"({facts['supervised_tokens']:,} supervised), longest {facts['longest_tokens']:,}"
    ]
    if corpus.kept:
        lines.append(f"  data index: {corpus.kept}")
    if facts["dropped"]:
        lines.append(f"  {facts['dropped']:,} of {facts['records']:,} records dropped")
    for kind, count in corpus.index.note_counts().items():
        named = [] if count == facts["records"] else _short(corpus.index.noted(kind))
        more = ", ..." if len(named) > NAMED_RECORDS else ""
        said = f": {', '.join(named[:NAMED_RECORDS])}{more}" if named else ""
        lines.append(f"  {count:,} x {kind}{said}")
    return "\n".join(lines)


def _short(records: list[str]) -> list[str]:
    """Leave the file out where all of them are in one; the line before has just read it."""
    files = {record.partition(": record ")[0] for record in records}
    return records if len(files) > 1 else [record.removeprefix(f"{min(files)}: ") for record in records]


def describe_parts(parts: Sequence[PartCount]) -> str:
    """The table of what trains, and of the memory that weights take, where they are there."""
    rows = [("part", "trains", "frozen", "never run", "memory", "held in")]
    for p in [*parts, total(parts)]:
        held = ", ".join(f"{kind} {compact(count)}" for kind, count in p.held.items())
        numbers = (compact(p.trainable), compact(p.frozen), compact(p.unused), f"{compact(p.held_bytes, 1024)}B")
        rows.append((p.part, *numbers, held))
    there = any(p.held_bytes for p in parts)
    return "\n".join(f"  {a:<16}{b:>8}{c:>8}{d:>11}" + (f"{e:>10}  {f}" if there else "") for a, b, c, d, e, f in rows)
