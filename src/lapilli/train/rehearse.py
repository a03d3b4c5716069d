"""A dry run: everything that a stage will do but its steps, without the memory for its weights.

Names, folders and data are checked as for the run itself; the model is built without weights, so that what freezes,
adapts and checkpoints is known to work; memory is planned; and the first micro-batch is made and shown as the model
would get it.
"""

from __future__ import annotations

import io
from collections.abc import Iterator
from itertools import pairwise
from typing import TextIO

from lapilli.data.sample import IGNORE, Batch
from lapilli.recipe.schema import Stage
from lapilli.train.parallel.world import World
from lapilli.train.plan.machine import here
from lapilli.train.plan.plan import plan_stage
from lapilli.train.plan.workload import planned
from lapilli.train.reading import Reading
from lapilli.train.setup import Say, Survey, describe_parts, survey

SHOWN_CHARACTERS = 600
"""Of the first conversation's text."""


def rehearse(stage: Stage, resume: str, say: Say, stream: TextIO | None, world: World) -> Survey:
    """Check a stage, and say what it would do. Raises LapilliError as the run itself would, and writes nothing.

    All processes call it together; the first one speaks of the first batch.
    """
    with world.together():
        found = survey(stage, resume, say, stream, write_index=False, world=world)
        world.from_first(lambda: _tell(stage, found, say, world))
    return found


def _tell(stage: Stage, found: Survey, say: Say, world: World) -> None:
    work = planned(stage, found.how, found.corpus, world.size, found.shapes)
    machine = here(stage.run.precision, cpu=found.device.name == "cpu")
    plan = plan_stage(stage, found.how, str(stage.model), work, machine, world.size, only_chosen=True)
    say(describe_parts(plan.parts))
    for line in plan.lines():
        say(line)
    loader = found.loader
    loader.workers, loader.total_steps = 0, loader.start_step + 1
    for step in loader:
        say(
            f"first step: {len(step.samples)} samples, of which process 0 learns {len(step.ids)} in "
            f"{len(step.batches)} micro-batches"
        )
        for batch in step.batches[:1]:
            for line in describe_batch(batch, found.how):
                say(line)


def describe_batch(batch: Batch, how: Reading) -> Iterator[str]:
    """Lines that say what a micro-batch holds, and how its first conversation begins, one with a picture if any is."""
    pictures = sum(len(pixels.tiles_per_image) for pixels in batch.images.values())
    ids = ", ".join(batch.ids[:5]) + (", ..." if len(batch.ids) > 5 else "")
    yield (
        f"first micro-batch: {len(batch.ids)} samples ({ids}), {batch.tokens:,} tokens, {batch.supervised:,} learned "
        f"({batch.supervised / max(1, batch.tokens):.0%}), {pictures} pictures"
    )
    for pixels in batch.images.values():
        shape = " x ".join(str(size) for size in pixels.tiles.shape)
        yield f"  pixels {shape} {str(pixels.tiles.dtype).removeprefix('torch.')}"
    image = how.spec.joined["image_token_id"]
    ends = batch.cu_seqlens.tolist()
    spans = list(pairwise(ends))
    shown = next((i for i, (start, end) in enumerate(spans) if (batch.input_ids[start:end] == image).any()), 0)
    start, end = spans[shown]
    yield f"  {batch.ids[shown]}, {end - start:,} tokens; what is learned stands in [brackets]:"
    text = _text(batch.input_ids[start:end].tolist(), batch.labels[start:end].tolist(), how)
    cut = text[:SHOWN_CHARACTERS] + (" ..." if len(text) > SHOWN_CHARACTERS else "")
    for line in io.StringIO(cut):
        yield f"    {line.rstrip()}"


def _text(ids: list[int], labels: list[int], how: Reading) -> str:
    """The tokens as text: runs of image tokens as one word, runs that are learned in brackets."""
    image = how.spec.joined["image_token_id"]
    runs: list[tuple[str, list[int]]] = []
    for token, label in zip(ids, labels, strict=True):
        kind = "picture" if token == image else "learned" if label != IGNORE else "given"
        if not runs or runs[-1][0] != kind:
            runs.append((kind, []))
        runs[-1][1].append(token)
    said = []
    for kind, tokens in runs:
        text = f"<picture: {len(tokens)} tokens>" if kind == "picture" else str(how.tokenizer.decode(tokens))
        said.append(f"[{text}]" if kind == "learned" else text)
    return "".join(said)
