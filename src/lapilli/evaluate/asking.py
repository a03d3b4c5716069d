"""Questions to answers: pictures opened ahead in a few threads, each once, and the engine kept busy.

Questions about the same pictures are asked one behind the other, so that the engine encodes them once. A question that
can't be asked (a damaged picture, a prompt that is too long) is reported with its reason and costs nothing else.
"""

from __future__ import annotations

import os
import zlib
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import cast

import numpy as np

from lapilli.base.errors import DataError, ModelError
from lapilli.data.picture import ImageLimits, open_image
from lapilli.data.sample import Image
from lapilli.evaluate.task import Decoding, FollowUp, Question
from lapilli.generate import decoding as generation
from lapilli.generate.assistant import Assistant
from lapilli.generate.decoding import Answer
from lapilli.generate.processor import Processor, Prompt

AHEAD = 64
"""Groups of questions that are prepared before the engine takes them."""
_GROUP = 256
"""Questions of a group at most, so that what is prepared ahead is bounded."""

_STOP_TOKENS = 32
"""A stop string takes fewer."""

OnAnswer = Callable[[Question, Answer, str], None]
"""(question, its last answer, the text that counts)"""
OnMissing = Callable[[Question, str], None]
"""(question, why it has no answer)"""


def by_pictures(questions: Sequence[Question]) -> list[list[Question]]:
    """Questions in groups that have their pictures in common, in order of first appearance."""
    groups: dict[object, list[Question]] = {}
    for question in questions:
        # Bytes stand for themselves; a question without pictures is a group of its own.
        key = tuple(image.path or image.data for image in question.images) or id(question)
        groups.setdefault(key, []).append(question)
    return [group[i : i + _GROUP] for group in groups.values() for i in range(0, len(group), _GROUP)]


def ask(
    assistant: Assistant,
    groups: Sequence[Sequence[Question]],
    root: Path | None,
    decoding: Decoding,
    follow_up: FollowUp | None = None,
    *,
    batch_size: int,
    on_answer: OnAnswer,
    on_missing: OnMissing,
    stopped: Callable[[], bool] = lambda: False,
    threads: int | None = None,
    limits: ImageLimits | None = None,
) -> None:
    """Answer every question, in no certain order; `root` is where the pictures' paths start.

    Once `stopped` is true no more is begun, and what has not ended is given up.
    """
    source = _Source(assistant, groups, root, decoding, on_missing, stopped, limits, threads or _threads())
    firsts: dict[str, str] = {}
    with source:
        stream = assistant.engine.stream(source, batch_size=batch_size, cancelled=lambda _key: stopped())
        for name, answer in stream:
            question, prompt = source.asked.pop(name)
            if answer.finish == "cancelled":
                continue
            if follow_up is None:
                on_answer(question, answer, answer.text)
            elif name not in firsts:
                longer = continued(assistant, prompt, answer, follow_up.text)
                if source.put(question, longer, _decoding(question, decoding, follow_up.max_new_tokens)):
                    firsts[name] = answer.text
            else:
                on_answer(question, answer, firsts.pop(name) + follow_up.joined + answer.text)


def continued(assistant: Assistant, prompt: Prompt, answer: Answer, text: str) -> Prompt:
    """The prompt that goes on behind an answer with a text, in the model's own turn: its tokens, then the text's."""
    processor, ids = assistant.processor, list(answer.token_ids)
    while ids and ids[-1] in assistant.engine.end_ids:
        ids.pop()

    def whole(count: int) -> bool:
        return processor.decode(ids[:count]).rstrip().endswith(answer.text)

    count = next((n for n in range(len(ids), max(-1, len(ids) - _STOP_TOKENS), -1) if whole(n)), len(ids))
    while count and whole(count - 1):
        count -= 1  # blanks at the end, which no answer has
    more = _ids_behind(processor, answer.text, text)
    made = np.concatenate([prompt.input_ids, np.array([*ids[:count], *more], dtype=prompt.input_ids.dtype)])
    return Prompt(made, prompt.tiles, prompt.sizes, prompt.image_tokens, prompt.keys)


def _ids_behind(processor: Processor, before: str, text: str) -> list[int]:
    """Tokens of a text behind another one; alone it may have others (sentencepiece puts a blank in front)."""
    both, first, alone = (
        cast(list[int], processor.tokenizer(t, add_special_tokens=False)["input_ids"])
        for t in (before + text, before, text)
    )
    return both[len(first) :] if before and both[: len(first)] == first else alone


class _Source:
    """What the engine takes: prompts as they are ready, second rounds first. Ends, and goes on if one is put."""

    def __init__(
        self,
        assistant: Assistant,
        groups: Sequence[Sequence[Question]],
        root: Path | None,
        decoding: Decoding,
        on_missing: OnMissing,
        stopped: Callable[[], bool],
        limits: ImageLimits | None,
        threads: int,
    ) -> None:
        self.asked: dict[str, tuple[Question, Prompt]] = {}
        self._assistant, self._root, self._limits = assistant, root, limits
        self._decoding, self._on_missing, self._stopped = decoding, on_missing, stopped
        self._groups = iter(groups)
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="pictures")
        self._pending: deque[tuple[Sequence[Question], Future[list[Prompt | str]]]] = deque()
        self._ready: deque[tuple[Question, Prompt, generation.Decoding]] = deque()

    def __enter__(self) -> _Source:
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown(wait=True, cancel_futures=True)

    def __iter__(self) -> Iterator[tuple[str, Prompt, generation.Decoding]]:
        return self

    def __next__(self) -> tuple[str, Prompt, generation.Decoding]:
        while not self._ready:
            if self._stopped() or not self._take():
                raise StopIteration
        if self._stopped():
            raise StopIteration
        question, prompt, decoding = self._ready.popleft()
        self.asked[question.id] = question, prompt
        return question.id, prompt, decoding

    def put(self, question: Question, prompt: Prompt, decoding: generation.Decoding, first: bool = True) -> bool:
        """Let a prompt be asked, before the others if `first`; false, and reported, if the model can't take it."""
        try:
            self._assistant.engine.check(prompt)
        except ModelError as error:
            self._on_missing(question, str(error))
            return False
        (self._ready.appendleft if first else self._ready.append)((question, prompt, decoding))
        return True

    def _take(self) -> bool:
        """Make the next group ready; false if there is none."""
        while len(self._pending) < AHEAD and (group := next(self._groups, None)) is not None:
            future = self._pool.submit(prepare, self._assistant.processor, group, self._root, self._limits)
            self._pending.append((group, future))
        if not self._pending:
            return False
        group, future = self._pending.popleft()
        for question, made in zip(group, future.result(), strict=True):
            if isinstance(made, str):
                self._on_missing(question, made)
            else:
                self.put(question, made, _decoding(question, self._decoding), first=False)
        return True


def prepare(
    processor: Processor, group: Sequence[Question], root: Path | None, limits: ImageLimits | None = None
) -> list[Prompt | str]:
    """The prompts of questions about the same pictures, which are opened once; a reason where one can't be made."""
    try:
        pictures = [
            processor.picture(open_image(Image(image.path, image.data), root, limits, group[0].where))
            for image in group[0].images
        ]
    except DataError as error:
        return [str(error)] * len(group)
    made: list[Prompt | str] = []
    for question in group:
        try:
            made.append(processor.prompt(question.text, pictures))
        except DataError as error:
            made.append(f"{question.where}: {error}")
    return made


def _decoding(question: Question, decoding: Decoding, max_new_tokens: int | None = None) -> generation.Decoding:
    """A question's decoding; draws are seeded by its id, so that they depend on nothing else."""
    return generation.Decoding(
        max_new_tokens=max_new_tokens or decoding.max_new_tokens,
        temperature=decoding.temperature,
        top_p=decoding.top_p,
        num_beams=decoding.num_beams,
        seed=zlib.crc32(question.id.encode()) if decoding.temperature else None,
    )


def _threads() -> int:
    return max(1, min(4, len(os.sched_getaffinity(0))))
