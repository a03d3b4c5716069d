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
from lapilli.data.check import Corpus
from lapilli.data.encode import Encoder
from lapilli.data.image import ImageLimits, ImageSpec, open_image, to_tiles
from lapilli.data.order import epoch_order
from lapilli.data.pack import ExampleTooLong, consecutive, pack, plan_step
from lapilli.data.sample import Batch, Example, ImageSlot

PREFETCH = 4
"""Micro-batches that each worker holds ready."""


_DEATH = "DataLoader worker (pid"
"""How torch's message about a dead worker begins; it has no exception class of its own."""


@dataclass(frozen=True)
class StepPlan:
    """What a step is made of: `samples` in order, and the micro-batches as groups of them (numbers in the corpus)."""

    step: int
    epoch: int
    samples: tuple[int, ...]
    micro_batches: tuple[tuple[int, ...], ...]


@dataclass(frozen=True)
class Step:
    """One optimiser step's data. `wait_seconds` is how long the consumer waited for it."""

    step: int
    epoch: int
    samples: tuple[int, ...]
    ids: tuple[str, ...]
    batches: list[Batch]
    wait_seconds: float


class TrainLoader:
    """An iterable of the Steps `start_step` to `total_steps` - 1 of a run over a corpus.

    Step k is Samples [k * G, (k + 1) * G) of its epoch's order, G being `global_batch_size`; the last, shorter window
    of an epoch is a step of its own. Micro-batches are packed by `tokens_per_micro_batch`, or are `micro_batch_size`
    consecutive Samples. A Step is a pure function of (corpus, these settings, seed, k): not of `workers`,
    `start_step`, or any random state. `workers` processes are forked (0: everything happens in this process).

    Raises ExampleTooLong or RecipeError when made, DataError naming the record while iterating.
    """

    def __init__(
        self,
        corpus: Corpus,
        encoder: Encoder,
        spec: ImageSpec,
        *,
        global_batch_size: int,
        tokens_per_micro_batch: int | None = None,
        micro_batch_size: int | None = None,
        order: str = "shuffled",
        seed: int = 42,
        workers: int = 0,
        start_step: int = 0,
        total_steps: int | None = None,
        limits: ImageLimits | None = None,
    ) -> None:
        if (tokens_per_micro_batch is None) == (micro_batch_size is None):
            raise ValueError("give one of tokens_per_micro_batch and micro_batch_size")
        self.corpus = corpus
        self.global_batch_size = global_batch_size
        self.tokens_per_micro_batch = tokens_per_micro_batch
        self.micro_batch_size = micro_batch_size
        self.order = order
        self.seed = seed
        self.workers = workers
        self.start_step = start_step
        self.total_steps = self.steps_per_epoch if total_steps is None else total_steps
        self._work = _Work(corpus, encoder, spec, limits or ImageLimits(), max(1, workers))
        self._epoch_order = lru_cache(maxsize=2)(self._make_epoch_order)
        self._refuse_what_cannot_work()

    @property
    def steps_per_epoch(self) -> int:
        return -(-len(self.corpus) // self.global_batch_size)

    def __len__(self) -> int:
        return max(0, self.total_steps - self.start_step)

    def plan(self, step: int) -> StepPlan:
        """Say what step `step` (from 0, over all epochs) is made of, without reading anything."""
        epoch, place = divmod(step, self.steps_per_epoch)
        start = place * self.global_batch_size
        samples = self._epoch_order(epoch)[start : start + self.global_batch_size]
        if self.micro_batch_size is not None:
            bins = consecutive(len(samples), self.micro_batch_size)
        else:
            assert self.tokens_per_micro_batch is not None
            bins = plan_step(self.corpus.index.lengths[samples].tolist(), self.tokens_per_micro_batch)
        micro_batches = tuple(tuple(int(samples[i]) for i in b) for b in bins)
        return StepPlan(step, epoch, tuple(int(i) for i in samples), micro_batches)

    def __iter__(self) -> Iterator[Step]:
        batches = self._batches()
        for step in range(self.start_step, self.total_steps):
            plan = self.plan(step)
            started = time.perf_counter()
            made = [next(batches) for _ in plan.micro_batches]
            wait_seconds = time.perf_counter() - started
            names: dict[int, str] = {}
            for members, batch in zip(plan.micro_batches, made, strict=True):
                names.update(zip(members, batch.ids, strict=True))
            ids = tuple(names[i] for i in plan.samples)
            yield Step(step, plan.epoch, plan.samples, ids, made, wait_seconds)

    def _batches(self) -> Iterator[Batch]:
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
        batch_size = self.micro_batch_size or self.global_batch_size
        return epoch_order(
            len(self.corpus),
            self.seed,
            epoch,
            self.order,
            lengths=self.corpus.index.words.tolist() if self.order == "modality_groups_llava" else None,
            batch_size=batch_size,
            batches_per_step=-(-self.global_batch_size // batch_size),
        )

    def _refuse_what_cannot_work(self) -> None:
        index, budget = self.corpus.index, self.tokens_per_micro_batch
        if budget is not None and int(index.lengths.max()) > budget:
            longest = int(index.lengths.argmax())
            where = self.corpus.samples[longest].sample.where
            raise ExampleTooLong(longest, int(index.lengths[longest]), budget, where)
        if self.order == "modality_groups_llava":
            if (index.words == 0).any():
                where = self.corpus.samples[int((index.words == 0).argmax())].sample.where
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

    def __iter__(self) -> Iterator[tuple[int, ...]]:
        for step in range(self.loader.start_step, self.loader.total_steps):
            yield from self.loader.plan(step).micro_batches


@dataclass(frozen=True)
class _Failure:
    """What a worker sends instead of a Batch, so that the message arrives in order and without a traceback."""

    message: str


class _Work(Dataset[Any]):
    """What a worker does: numbers of Samples in, one Batch out."""

    def __init__(self, corpus: Corpus, encoder: Encoder, spec: ImageSpec, limits: ImageLimits, workers: int) -> None:
        self.corpus, self.encoder, self.spec, self.limits = corpus, encoder, spec, limits
        # The Sample that each worker has in hand, -1 for none: all that is left of one that is killed.
        self._in_hand = torch.full((workers,), -1, dtype=torch.int64).share_memory_()

    def __getitem__(self, samples: Sequence[int]) -> Batch | _Failure:
        info = get_worker_info()
        worker = 0 if info is None else info.id
        examples: list[Example] = []
        tiles: list[torch.Tensor] = []
        try:
            for i in samples:
                self._in_hand[worker] = i
                example, pictures = self._read(i)
                examples.append(example)
                tiles += pictures
        except DataError as error:
            return _Failure(str(error))
        self._in_hand[worker] = -1
        return pack(examples, tiles)

    def _read(self, i: int) -> tuple[Example, list[torch.Tensor]]:
        placed, index = self.corpus.samples[i], self.corpus.index
        example = self.encoder.encode(placed.sample, index.image_sizes(i))
        if example is None or example.length != index.lengths[i]:
            raise DataError(f"{placed.sample.where}: the record gives other tokens than when it was indexed")
        return example, [self._tiles(slot, placed.root, example.where) for slot in example.images]

    def _tiles(self, slot: ImageSlot, root: str | None, where: str) -> torch.Tensor:
        assert self.encoder.layout is not None
        picture = open_image(slot.image, root, self.limits, where)
        if picture.size != (slot.width, slot.height):
            raise DataError(
                f'{where}: image "{slot.image.path}" is {picture.size[0]} x {picture.size[1]} pixels, but was '
                f"{slot.width} x {slot.height} when the data were indexed; delete the index to make it again"
            )
        try:
            return to_tiles(picture, self.spec, self.encoder.layout)
        except DataError as error:
            raise DataError(f'{where}: image "{slot.image.path}": {error}') from error

    def report_death(self, error: Exception) -> str:
        """Word the death of a worker with the records that the workers had in hand."""
        held = [self.corpus.samples[i].sample.where for i in self._in_hand.tolist() if i >= 0]
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
