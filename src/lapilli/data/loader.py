"""From an indexed corpus to the steps of a run.

Which Samples a step has, and how they are split into micro-batches, is planned in the training process from lengths
alone; worker processes only carry the plan out: read, decode, tokenise, lay out. So a step is the same with any number
of workers, and a run is resumed by naming the step it goes on with.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, get_worker_info

from lapilli.base.errors import DataError, RecipeError
from lapilli.data.buckets import PaddedBatch, Shape, plan_shapes
from lapilli.data.corpus import Corpus
from lapilli.data.encode import Encoder
from lapilli.data.image import ImageLimits, ImageSpec, open_image, to_tiles
from lapilli.data.mixture import epoch_samples, epoch_size
from lapilli.data.order import epoch_order
from lapilli.data.pack import ExampleTooLong, pack
from lapilli.data.quarantine import BadRecord, Quarantine
from lapilli.data.ranks import deal, plan_consecutive, plan_ranks, sample_costs
from lapilli.data.rows import fill_rows
from lapilli.data.sample import Batch, Example, ImageSlot
from lapilli.data.steps import Step, StepPlan

PREFETCH = 4
"""Micro-batches that each worker holds ready."""


_DEATH = "DataLoader worker (pid"
"""How torch's message about a dead worker begins; it has no exception class of its own."""


class TrainLoader:
    """An iterable of the Steps `start_step` to `total_steps` - 1 of a run over a corpus.

    Step k is Samples [k * G, (k + 1) * G) of its epoch's order, G being `global_batch_size`; the last, shorter window
    of an epoch is a step of its own. An epoch visits each Sample as often as its source's entry in `weights` says
    (default: once). Micro-batches are packed by `tokens_per_micro_batch`, or are `micro_batch_size` consecutive
    Samples; with `shapes` they are padded to one of these, and a rank that has nothing left gets padding alone, so that
    all run as many. `ranks` loaders, of which this is number `rank`, share each step by cost: tokens, and
    `image_cost_tokens` for each picture. A Step is a pure function of (corpus, these settings, seed, k): not of
    `workers`, `start_step`, or any random state; its Samples are the same for any number of ranks.

    `workers` processes are forked (0: everything happens in this process).
    `encoder` serves all sources, or is one for each. With a `quarantine`, a Sample that can't be read leaves a hole in
    its batch; without one it is an error.

    Raises ExampleTooLong or RecipeError when made, DataError naming the record while iterating.
    """

    def __init__(
        self,
        corpus: Corpus,
        encoder: Encoder | Sequence[Encoder],
        spec: ImageSpec,
        *,
        global_batch_size: int,
        tokens_per_micro_batch: int | None = None,
        micro_batch_size: int | None = None,
        order: str = "shuffled",
        weights: Sequence[float] | None = None,
        seed: int = 42,
        workers: int = 0,
        start_step: int = 0,
        total_steps: int | None = None,
        limits: ImageLimits | None = None,
        quarantine: Quarantine | None = None,
        rank: int = 0,
        ranks: int = 1,
        image_cost_tokens: float = 0.0,
        shapes: Sequence[Shape] = (),
    ) -> None:
        if (tokens_per_micro_batch is None) == (micro_batch_size is None):
            raise ValueError("give one of tokens_per_micro_batch and micro_batch_size")
        if shapes and micro_batch_size is not None:
            raise ValueError("micro-batches of so many consecutive Samples have no fixed shapes")
        self.corpus, self.shapes = corpus, tuple(sorted(shapes))
        self.weights = weights
        self.samples_per_epoch = len(corpus) if weights is None else epoch_size(corpus.sources, weights)
        self.rank, self.ranks, self.image_cost_tokens = rank, ranks, image_cost_tokens
        self.global_batch_size = global_batch_size
        self.tokens_per_micro_batch = tokens_per_micro_batch
        self.micro_batch_size = micro_batch_size
        self.order = order
        self.seed = seed
        self.workers = workers
        self.start_step = start_step
        self.total_steps = self.steps_per_epoch if total_steps is None else total_steps
        self.quarantine = quarantine
        encoders = (encoder,) if isinstance(encoder, Encoder) else tuple(encoder)
        self._work = _Work(corpus, encoders, spec, limits or ImageLimits(), max(1, workers), quarantine)
        self._epoch_order = lru_cache(maxsize=2)(self._make_epoch_order)
        self._refuse_what_cannot_work()

    @property
    def steps_per_epoch(self) -> int:
        return -(-self.samples_per_epoch // self.global_batch_size)

    def __len__(self) -> int:
        return max(0, self.total_steps - self.start_step)

    def plan(self, step: int) -> StepPlan:
        """Say what step `step` (from 0, over all epochs) is made of, without reading anything."""
        epoch, place = divmod(step, self.steps_per_epoch)
        start = place * self.global_batch_size
        samples = self._epoch_order(epoch)[start : start + self.global_batch_size]
        if self.shapes:
            return self._plan_shapes(step, epoch, samples)
        if self.micro_batch_size is not None:
            bins = plan_consecutive(len(samples), self.micro_batch_size, self.ranks)
        else:
            assert self.tokens_per_micro_batch is not None
            lengths, pictures = self.corpus.index.lengths[samples], self.corpus.index.pictures[samples]
            costs = sample_costs(lengths, pictures, self.image_cost_tokens)
            bins = plan_ranks(lengths.tolist(), self.tokens_per_micro_batch, self.ranks, costs)
        numbers = samples.tolist()
        own = tuple(numbers[i] for i in sorted(i for b in bins[self.rank] for i in b))
        micro_batches = tuple(tuple(numbers[i] for i in b) for b in bins[self.rank])
        return StepPlan(step, epoch, tuple(numbers), own, micro_batches)

    def _plan_shapes(self, step: int, epoch: int, samples: np.ndarray) -> StepPlan:
        index, numbers = self.corpus.index, samples.tolist()
        lengths, pictures, supervised = (
            column[samples].tolist() for column in (index.lengths, index.pictures, index.supervised)
        )
        planned = plan_shapes(lengths, pictures, supervised, self.shapes)
        costs = [one.shape.tokens + self.image_cost_tokens * one.shape.pictures for one in planned]
        nothing = PaddedBatch((), self.shapes[0])
        mine = [nothing if i is None else planned[i] for i in deal(costs, self.ranks)[self.rank]]
        own = tuple(numbers[i] for i in sorted(i for one in mine for i in one.positions))
        micro_batches = tuple(tuple(numbers[i] for i in one.positions) for one in mine)
        return StepPlan(step, epoch, tuple(numbers), own, micro_batches, tuple(one.shape for one in mine))

    def __iter__(self) -> Iterator[Step]:
        batches = self._batches()
        for step in range(self.start_step, self.total_steps):
            plan = self.plan(step)
            started = time.perf_counter()
            made = [next(batches) for _ in plan.micro_batches]
            wait_seconds = time.perf_counter() - started
            names = {i: name for one in made for i, name in one.ids.items()}
            bad: list[BadRecord] = []
            if self.quarantine is not None:
                bad = self.quarantine.add(b for one in made for b in one.bad)
            filled = [one.batch for one in made if one.batch is not None]
            # Where there are other ranks, they may have samples left.
            if not any(batch.ids for batch in filled) and plan.own and self.ranks == 1:
                raise DataError(
                    f"step {step + 1}: none of its {len(plan.own)} samples can be read, among them "
                    f"{self.corpus.where(plan.own[0])}; `lapilli data check` lists what is wrong"
                )
            ids = tuple(names[i] for i in plan.own)
            yield Step(step, plan.epoch, plan.samples, ids, filled, wait_seconds, tuple(bad))

    def _batches(self) -> Iterator[_Made]:
        """Every micro-batch of every remaining step, in order, made by the workers."""
        loader: DataLoader[Any] = DataLoader(
            self._work,
            batch_size=None,
            sampler=_MicroBatches(self),
            num_workers=self.workers,
            collate_fn=_as_it_is,
            prefetch_factor=PREFETCH if self.workers else None,
            multiprocessing_context="fork" if self.workers else None,
            worker_init_fn=_start_worker,
            # A generator of its own: the run's random state must not depend on how often a loader was started.
            generator=torch.Generator(),
        )
        with _no_signal_handler():
            made = iter(loader)
        while True:
            try:
                item = next(made)
            except StopIteration:
                return
            except RuntimeError as error:
                if not str(error).startswith(_DEATH):
                    raise
                raise DataError(self._work.report_death(error)) from error
            except (EOFError, ConnectionError, FileNotFoundError) as error:
                # A batch's memory is handed over by the worker that made it, which is gone.
                raise DataError(self._work.report_death(error)) from error
            if isinstance(item, _Failure):
                raise DataError(item.message)
            yield item

    def _make_epoch_order(self, epoch: int) -> np.ndarray:
        """The Samples that an epoch visits, in order: the mixture's, laid out by `order`."""
        index = self.corpus.index
        visited = np.arange(len(self.corpus))
        if self.weights is not None:
            visited = epoch_samples(index.kept, self.corpus.sources, self.weights, self.seed, epoch)
        # LLaVA's order counts words and knows of micro-batches; the others go by tokens and whole steps.
        llava = self.order == "modality_groups_llava"
        batch_size = self.micro_batch_size if llava and self.micro_batch_size else self.global_batch_size
        order = epoch_order(
            len(visited),
            self.seed,
            epoch,
            self.order,
            lengths=(index.words if llava else index.lengths)[visited],
            pictures=index.pictures[visited],
            batch_size=batch_size,
            batches_per_step=-(-self.global_batch_size // batch_size),
        )
        return visited[order]

    def _refuse_what_cannot_work(self) -> None:
        index, budget = self.corpus.index, self.tokens_per_micro_batch
        if budget is not None and int(index.lengths.max()) > budget:
            longest = int(index.lengths.argmax())
            where = self.corpus.where(longest)
            raise ExampleTooLong(longest, int(index.lengths[longest]), budget, where)
        if self.order == "modality_groups_llava":
            if (index.words == 0).any():
                where = self.corpus.where(int((index.words == 0).argmax()))
                raise DataError(f"{where}: a conversation without words has no place in order modality_groups_llava")
            if self.micro_batch_size and self.global_batch_size % self.micro_batch_size:
                raise RecipeError(
                    f"order modality_groups_llava: global_batch_size {self.global_batch_size} is not a multiple of "
                    f"micro_batch_size {self.micro_batch_size}"
                )
        self._epoch_order(self.start_step // self.steps_per_epoch)


class _MicroBatches:
    """The sampler: the Samples of each micro-batch of the steps to come."""

    def __init__(self, loader: TrainLoader) -> None:
        self.loader = loader

    def __iter__(self) -> Iterator[tuple[tuple[int, ...], Shape | None]]:
        for step in range(self.loader.start_step, self.loader.total_steps):
            yield from self.loader.plan(step).orders()


@dataclass(frozen=True)
class _Failure:
    """What a worker sends instead of a Batch, so that the message arrives in order and without a traceback."""

    message: str


@dataclass(frozen=True)
class _Made:
    """What became of one micro-batch: None for its Batch if no Sample was left; ids of all Samples, by number."""

    batch: Batch | None
    ids: dict[int, str]
    bad: tuple[BadRecord, ...] = ()


class _Work(Dataset[Any]):
    """What a worker does: numbers of Samples, and perhaps a shape, in; one Batch out."""

    def __init__(
        self,
        corpus: Corpus,
        encoders: Sequence[Encoder],
        spec: ImageSpec,
        limits: ImageLimits,
        workers: int,
        quarantine: Quarantine | None,
    ) -> None:
        self.corpus, self.encoders, self.spec, self.limits, self.quarantine = corpus, encoders, spec, limits, quarantine
        # The Sample that each worker has in hand, -1 for none: all that is left of one that is killed.
        self._in_hand = torch.full((workers,), -1, dtype=torch.int64).share_memory_()

    def __getitem__(self, order: tuple[Sequence[int], Shape | None]) -> _Made | _Failure:
        info = get_worker_info()
        worker = 0 if info is None else info.id
        examples: list[Example] = []
        tiles: list[torch.Tensor] = []
        ids: dict[int, str] = {}
        bad: list[BadRecord] = []
        samples, shape = order
        for i in samples:
            self._in_hand[worker] = i
            known = None if self.quarantine is None else self.quarantine.found.get(i)
            if known is not None:
                ids[i] = self.corpus.name(i)
                continue
            try:
                example, pictures = self._read(i)
            except DataError as error:
                if self.quarantine is None:
                    return _Failure(str(error))
                ids[i] = self.corpus.name(i)
                bad.append(BadRecord(i, str(error)))
                continue
            ids[i] = example.id
            examples.append(example)
            tiles += pictures
        self._in_hand[worker] = -1
        return _Made(self._lay_out(examples, tiles, shape), ids, tuple(bad))

    def _lay_out(self, examples: list[Example], tiles: list[torch.Tensor], shape: Shape | None) -> Batch | None:
        if shape is None:
            return pack(examples, tiles) if examples else None
        layout = self.encoders[0].layout
        assert layout is not None
        return fill_rows(
            examples,
            tiles,
            shape,
            tile_size=(layout.tile_height, layout.tile_width),
            tokens_per_picture=layout.tokens_per_tile,
            padding_token=1 if self.encoders[0].image_token_id == 0 else 0,
        )

    def _read(self, i: int) -> tuple[Example, list[torch.Tensor]]:
        example, root = self.corpus.example(i, self.encoders), self.corpus.root(i)
        return example, [self._tiles(slot, root, example.where) for slot in example.images]

    def _tiles(self, slot: ImageSlot, root: str | None, where: str) -> torch.Tensor:
        layout = self.encoders[0].layout
        assert layout is not None
        picture = open_image(slot.image, root, self.limits, where)
        # Cerebras' prepared files do not say how large pictures are.
        if slot.width and picture.size != (slot.width, slot.height):
            raise DataError(
                f'{where}: image "{slot.image.path}" is {picture.size[0]} x {picture.size[1]} pixels, but was '
                f"{slot.width} x {slot.height} when the data were indexed; delete the index to make it again"
            )
        try:
            return to_tiles(picture, self.spec, layout)
        except DataError as error:
            raise DataError(f'{where}: image "{slot.image.path}": {error}') from error

    def report_death(self, error: Exception) -> str:
        """Word the death of a worker with the records that the workers had in hand."""
        held = [self.corpus.where(i) for i in self._in_hand.tolist() if i >= 0]
        records = ", ".join(held) if held else "no record"
        reason = (str(error) or type(error).__name__).splitlines()[0]
        return (
            f"a data worker died ({reason}); in hand were: {records}. If it was killed for want "
            "of memory, use fewer data.workers or a lower data.max_image_pixels"
        )


@contextmanager
def _no_signal_handler() -> Iterator[None]:
    """Undo the SIGCHLD handler that torch installs when a loader starts.

    It raises wherever the process happens to be, in the middle of a backward pass for one. Without it a dead worker is
    noticed within seconds where its batch is waited for, and can be reported with what it had in hand.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.getsignal(signal.SIGCHLD)
    try:
        yield
    finally:
        signal.signal(signal.SIGCHLD, before)


def _start_worker(_: int) -> None:
    # One text at a time gives the tokenizer nothing to share out, and it warns about the fork otherwise.
    os.environ["TOKENIZERS_PARALLELISM"] = "false"


def _as_it_is(item: Any) -> Any:
    return item
