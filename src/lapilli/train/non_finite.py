"""What a run does about a step whose loss or gradient is not finite; the weights never see one.

`stop` ends the run with the samples of the step; `skip` goes on without the step, up to a ceiling; `bisect` ends it
too, but first computes parts of the step again, halving what is broken, until single samples are left, and names them.
A resumed run skips the same steps: which they were is part of its state.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch

from lapilli.base.errors import RunError
from lapilli.data.sample import Batch, Pixels
from lapilli.data.steps import Step
from lapilli.model.vlm import VisionLanguageModel
from lapilli.train.setup import Prepared, Say
from lapilli.train.state import SkippedStep
from lapilli.train.step import NonFinite, StepResult, StepTotals, accumulate, train_step

_NAMED = 10


class Guard:
    """Makes a run's steps, and decides about those that are not finite. `skipped` holds those that were left out."""

    def __init__(self, ready: Prepared, skipped: Sequence[SkippedStep] = ()) -> None:
        self._ready = ready
        self.skipped = list(skipped)

    def was_skipped(self, step: int) -> bool:
        return bool(self.skipped) and self.skipped[-1].step == step

    def step(self, step: Step, whole: StepTotals, say: Say) -> StepResult:
        """Learn from one step, which is `whole` on all processes. A skipped one has a loss of NaN.

        All processes call it, and end alike. Raises RunError where the recipe says so, with the random states as they
        were before the step.
        """
        ready, where = self._ready, f"step {step.step + 1}"
        before, of_device = torch.get_rng_state(), ready.device.random_state()
        try:
            return train_step(
                ready.engine,
                ready.optimizer,
                step.batches,
                ready.stage.train,
                ready.device.device,
                autocast=ready.device.autocast(ready.stage.run.precision),
                where=where,
                whole=whole,
                cut=ready.device.cut_graph,
            )
        except NonFinite as error:
            ready.engine.clear(ready.optimizer)
            wanted = ready.stage.train.non_finite
            if wanted == "skip" and len(self.skipped) < ready.stage.train.max_skipped_steps:
                self._skip(step, error, say)
                return StepResult(math.nan, math.nan, whole.tokens, whole.supervised, whole.samples)
            found = "" if wanted != "bisect" else _describe(self._bisect(step, whole, say), whole.samples)
            torch.set_rng_state(before)
            ready.device.set_random_state(of_device)
            if found:
                raise RunError(f"{where}: {error.what} (no weight was changed); {found}") from error
            if wanted == "skip":
                raise RunError(
                    f"{error}; {len(self.skipped)} steps were skipped before, as many as train.max_skipped_steps allows"
                ) from error
            raise RunError(
                f"{error}; train.non_finite=bisect finds out which of them, train.non_finite=skip goes on without the "
                "step"
            ) from error

    def _skip(self, step: Step, error: NonFinite, say: Say) -> None:
        self.skipped.append(SkippedStep(step.step + 1, error.what))
        ceiling = self._ready.stage.train.max_skipped_steps
        say(f"{error}; skipped, {len(self.skipped)} of at most {ceiling} steps")

    def _bisect(self, step: Step, whole: StepTotals, say: Say) -> list[list[str]]:
        """The samples that are not finite by themselves, and groups of which only all together are."""
        ready, world = self._ready, self._ready.engine.world
        say(f"step {step.step + 1} is not finite: computing parts of it again, to find the samples")

        def broken(batches: list[Batch]) -> bool:
            """Whether a part of one process's samples is broken; the others give none, and keep it company."""
            engine = ready.engine
            engine.clear(ready.optimizer)
            autocast = ready.device.autocast(ready.stage.run.precision)
            with engine.passing():
                losses = accumulate(
                    engine, batches, ready.stage.train.loss_reduction, ready.device.device, autocast, whole
                )
            fine = all(math.isfinite(loss) for loss in losses) and engine.finite_gradients(ready.optimizer)
            engine.clear(ready.optimizer)
            return not all(world.exchange(fine))

        def mine_broken(part: Batch) -> bool:
            world.exchange(True)
            return broken([part])

        found: list[list[str]] = []
        for rank in range(world.size):
            if rank == world.rank:
                mine = [one for batch in step.batches for one in _search(batch, ready.loaded.model, mine_broken)]
                world.exchange(False)
            else:
                mine = []
                while world.exchange(None)[rank]:
                    broken([])
            found += world.exchange(mine)[rank]
        return found


def _search(batch: Batch, model: VisionLanguageModel, broken: Callable[[Batch], bool]) -> list[list[str]]:
    """Halve what is broken of a Batch until single Examples are left, or until neither half is broken alone."""

    def within(group: list[int]) -> list[list[int]]:
        if len(group) == 1:
            return [group]
        middle = len(group) // 2
        halves = [half for half in (group[:middle], group[middle:]) if broken(part_of(batch, half, model))]
        return [one for half in halves for one in within(half)] or [group]

    everything = list(range(len(batch.ids)))
    if not everything or not broken(part_of(batch, everything, model)):
        return []
    return [[batch.ids[i] for i in group] for group in within(everything)]


def part_of(batch: Batch, chosen: Sequence[int], model: VisionLanguageModel) -> Batch:
    """Return a Batch of some of the Examples of another, by their numbers, with their pictures, in the same order.

    Of a Batch of a fixed shape they keep the padding behind them, which nothing of theirs attends to.
    """
    bounds = batch.cu_seqlens.tolist()
    spans = [slice(bounds[i], bounds[i + 1]) for i in chosen]

    def cut(whole: torch.Tensor) -> torch.Tensor:
        return torch.cat([whole[span] for span in spans])

    lengths = torch.tensor([0, *(span.stop - span.start for span in spans)])
    return Batch(
        cut(batch.input_ids),
        cut(batch.labels),
        cut(batch.position_ids),
        lengths.cumsum(0).to(batch.cu_seqlens),
        _pictures_of(batch, set(chosen), model),
        tuple(batch.ids[i] for i in chosen),
        None if batch.weights is None else cut(batch.weights),
    )


def _pictures_of(batch: Batch, chosen: set[int], model: VisionLanguageModel) -> dict[str, Pixels]:
    """The pictures of some Examples. Whose a picture is follows from how many image tokens each Example has."""
    if not batch.images:
        return {}
    ((encoder, pixels),) = batch.images.items()
    is_image = batch.input_ids == model.config.image_token_id
    bounds = batch.cu_seqlens.tolist()
    ends = torch.cumsum(is_image, 0)
    # An Example's last image token is number `until` of the whole Batch.
    until = [int(ends[end - 1]) if end else 0 for end in bounds[1 : len(batch.ids) + 1]]
    tokens, owner, owners = 0, 0, []
    for width, height in pixels.sizes.tolist():
        while owner < len(until) and until[owner] <= tokens:
            owner += 1
        owners.append(owner)  # beyond the last one: padding
        tokens += model.layout.tokens(width, height)
    wanted = [number for number, owner in enumerate(owners) if owner in chosen]
    if not wanted:
        return {}
    tiles = pixels.tiles.split(pixels.tiles_per_image.tolist())
    return {
        encoder: Pixels(torch.cat([tiles[i] for i in wanted]), pixels.tiles_per_image[wanted], pixels.sizes[wanted])
    }


def _describe(found: list[list[str]], samples: int) -> str:
    alone = [group[0] for group in found if len(group) == 1]
    if len(alone) == samples:
        return (
            f"each of its {samples} samples gives it by itself: look at the learning rate and weights, not at the data"
        )
    said = []
    if alone:
        more = f" and {len(alone) - _NAMED} more" if len(alone) > _NAMED else ""
        said.append(f"by themselves these samples give it: {', '.join(alone[:_NAMED])}{more}")
    said += [f"only together these give it: {', '.join(group)}" for group in found if len(group) > 1]
    return "; ".join(said) or "no micro-batch gives it by itself, only the sum of all of them"
