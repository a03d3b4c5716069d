"""From a conversation to numbers: `Sample` in, `Example` out.

Text is tokenised chunk by chunk between pictures, each chunk as the start of a string, with what the tokenizer puts
before a text (one BOS, or nothing) in front of the whole: so every LLaVA was trained. A token is supervised if it
overlaps a supervised character; there is no counting and nothing that depends on one vocabulary.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

import numpy as np

from lapilli.base.errors import DataError, ModelError
from lapilli.base.layout import ImageLayout
from lapilli.data.sample import IGNORE, Example, Image, ImageSlot, Message, Sample
from lapilli.data.template import Marks, Piece, Span, Template

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_MARK = re.compile(r"<\|\w+\|>|</?s>|<im_(?:start|end)>|<(?:start|end)_of_turn>")

UNEXPANDED = -200
"""What LLaVA's files put in place of a picture. Only shown and compared with, never given to a model."""

TooLong = Literal["error", "drop", "truncate_turns"]
Sizes = Sequence[tuple[int, int]]


class TooLongError(DataError):
    """A conversation is longer than `max_length`; with `too_long: drop` the caller counts it and goes on."""


@dataclass(frozen=True, slots=True)
class Encoded:
    """An Example and what was left out of it, one reason each. `example` is None if the whole Sample was dropped."""

    example: Example | None
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Chunk:
    """A run of text between pictures: ids and labels (T,), the text, and each token's characters in it (T, 2).

    `weights` (T,) float32 as in Example; None where each label counts 1.
    """

    ids: np.ndarray
    labels: np.ndarray
    text: str
    offsets: np.ndarray
    weights: np.ndarray | None = None


class Encoder:
    """Turns Samples into Examples for one tokenizer, template and image layout. Cheap to copy to worker processes.

    `layout` may be None, and `image_token` too, where only unexpanded ids are asked for. `im_start_end` wraps every
    picture in `<im_start>` and `<im_end>`. Raises ModelError for a tokenizer without offsets, or an image token that
    it does not hold.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        template: Template,
        layout: ImageLayout | None,
        image_token: str | None,
        *,
        max_length: int | None = None,
        too_long: TooLong = "error",
        im_start_end: bool = False,
    ) -> None:
        if not tokenizer.is_fast:
            raise ModelError(f"tokenizer {type(tokenizer).__name__} gives no character offsets; use its fast version")
        template = template.bind(tokenizer)
        self.tokenizer = tokenizer
        self.template = template.with_image_marks() if im_start_end else template
        self.layout = layout
        self.max_length = max_length
        self.too_long: TooLong = too_long
        self.image_token_id = None if image_token is None else _token_id(tokenizer, image_token)
        self.prefix = _text_prefix(tokenizer)

    @property
    def untokenised_marks(self) -> tuple[str, ...]:
        """Marks of the template that look like special tokens and are ordinary text to this tokenizer.

        Training works, but each mark is several tokens; callers say so.
        """
        template = self.template
        marks = [template.image_prefix, template.image_suffix]
        for form in (template, template.training or template):
            marks += [v for name in Marks.model_fields if isinstance(v := getattr(form, name), str)]
        found = dict.fromkeys(_MARK.findall("\n".join(marks)))
        known = self.tokenizer.get_vocab()
        return tuple(mark for mark in found if mark not in known)

    def encode(self, sample: Sample, image_sizes: Sizes | None = None) -> Example | None:
        """Return the Example, or None if the Sample is too long and the policy leaves nothing of it.

        `image_sizes`: (width, height) of each picture in order; may be left out where the layout does not depend on
        it. Raises DataError naming the record: nothing to learn, wrong turns, or TooLongError.
        """
        return self.encode_noted(sample, image_sizes).example

    def encode_noted(self, sample: Sample, image_sizes: Sizes | None = None) -> Encoded:
        """`encode`, with the reasons for what was left out. Callers that show or count use this."""
        sizes = self._sizes(sample.images, image_sizes, sample.where)
        notes = self.template.notes(sample)
        example = self._example(sample, sizes)
        if self.max_length is None or example.length <= self.max_length:
            return Encoded(example, notes)
        problem = (
            f"{sample.where or sample.id}: {example.length} tokens ({sum(s.tokens for s in example.images)} of them "
            f"for pictures), but max_length is {self.max_length}"
        )
        if self.too_long == "truncate_turns":
            cut = self._truncated(sample, sizes)
            if cut is None:
                return Encoded(None, (*notes, "dropped: even the first exchange is longer than max_length"))
            kept, dropped = cut
            return Encoded(kept, (*notes, f"last {dropped} turns dropped: longer than max_length"))
        if self.too_long == "drop":
            return Encoded(None, (*notes, "dropped: longer than max_length"))
        raise TooLongError(f"{problem}; raise data.max_length or set data.too_long to drop or truncate_turns")

    def encode_unexpanded(self, sample: Sample) -> tuple[np.ndarray, np.ndarray]:
        """(input_ids, labels) with one entry -200 per picture, as LLaVA's own files have them."""
        parts = [_run(UNEXPANDED, 1) if isinstance(c, Image) else (c.ids, c.labels) for c in self.chunks(sample)]
        return _concatenate(parts)

    def chunks(self, sample: Sample) -> list[Chunk | Image]:
        """Text and pictures of one conversation in order, before pictures are expanded: what `data show` draws.

        Raises DataError for wrong turns, or if nothing is supervised.
        """
        chunks = self._chunks(self.template.training_spans(sample), sample.where)
        labels = [np.zeros(0), *(c.labels for c in chunks if isinstance(c, Chunk))]
        first = isinstance(chunks[0], Chunk) if chunks else False
        if not (np.concatenate(labels)[1 if first else 0 :] != IGNORE).any():
            raise DataError(
                f"{sample.where or sample.id}: nothing to learn from this record with template {self.template.name}: "
                "no answer is supervised; leave it out"
            )
        return chunks

    def encode_prompt(
        self, messages: Sequence[Message], image_sizes: Sizes | None = None
    ) -> tuple[np.ndarray, tuple[ImageSlot, ...]]:
        """(input_ids (T,), picture slots) of a prompt that ends where the model's answer begins."""
        pictures = tuple(p for m in messages for p in m.parts if isinstance(p, Image))
        sizes = self._sizes(pictures, image_sizes, "prompt")
        chunks = self._chunks(self.template.prompt_spans(messages), "prompt")
        ids, _, slots = self._expand(chunks, sizes)
        return ids, slots

    def _example(self, sample: Sample, sizes: Sizes) -> Example:
        chunks = self.chunks(sample)
        ids, labels, slots = self._expand(chunks, sizes)
        return Example(sample.id, ids, labels, slots, sample.where, _weights(chunks, slots))

    def _truncated(self, sample: Sample, sizes: Sizes) -> tuple[Example, int] | None:
        """Longest head of whole exchanges that fits, and how many turns it lacks; None if not even one fits."""
        assert self.max_length is not None
        ends = [i + 1 for i, m in enumerate(sample.messages) if m.role == "assistant"]
        if self.template.opening_answer == "drop" and sample.messages[ends[0] - 1] is _first_turn(sample):
            ends = ends[1:]
        ends = [e for e in ends if e < len(sample.messages)]
        best: tuple[Example, int] | None = None
        low, high = 0, len(ends)
        while low < high:  # lengths grow with the number of exchanges
            middle = (low + high) // 2
            head = replace(sample, messages=sample.messages[: ends[middle]])
            example = self._example(head, sizes[: len(head.images)])
            if example.length <= self.max_length:
                best, low = (example, len(sample.messages) - ends[middle]), middle + 1
            else:
                high = middle
        return best

    def _sizes(self, pictures: Sequence[Image], sizes: Sizes | None, where: str) -> Sizes:
        if sizes is not None and len(sizes) != len(pictures):
            raise ValueError(f"{where}: {len(sizes)} image sizes for {len(pictures)} pictures")
        if sizes is None and pictures and self.layout is not None and self.layout.mode == "anyres":
            raise ValueError(f"{where}: image mode anyres needs the pictures' sizes")
        return sizes if sizes is not None else [(0, 0)] * len(pictures)

    def _chunks(self, pieces: Sequence[Piece], where: str) -> list[Chunk | Image]:
        chunks: list[Chunk | Image] = []
        run: list[Span] = []
        for piece in pieces:
            if isinstance(piece, Span):
                run.append(piece)
                continue
            chunks += self._tokenised(run, where)
            chunks.append(piece)
            run = []
        chunks += self._tokenised(run, where)
        first = chunks[0] if chunks else None
        has_prefix = isinstance(first, Chunk) and first.ids[: len(self.prefix)].tolist() == self.prefix
        if self.prefix and not has_prefix:
            none = np.zeros((len(self.prefix), 2), dtype=np.int64)
            chunks.insert(0, Chunk(np.array(self.prefix), np.full(len(self.prefix), IGNORE), "", none))
        return chunks

    def _tokenised(self, spans: Sequence[Span], where: str) -> list[Chunk]:
        """One run of text between pictures as tokens, each with its label."""
        text = "".join(s.text for s in spans)
        if not text:
            return []
        encoding = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        ids = np.array(encoding["input_ids"], dtype=np.int64)
        if self.image_token_id is not None and (ids == self.image_token_id).any():
            token = self.tokenizer.convert_ids_to_tokens(self.image_token_id)
            raise DataError(f"{where}: the text itself contains the image token {token}; take it out of the text")
        letters = [len(s.text) for s in spans]
        learnt = np.repeat([s.supervised for s in spans], letters)
        offsets = np.array(encoding["offset_mapping"], dtype=np.int64).reshape(-1, 2)
        labels = np.where(_overlapping(offsets, learnt), ids, IGNORE)
        if all(s.weight == 1 for s in spans if s.supervised):
            return [Chunk(ids, labels, text, offsets)]
        worth = np.repeat([s.weight if s.supervised else 0.0 for s in spans], letters)
        return [Chunk(ids, labels, text, offsets, _heaviest(offsets, worth))]

    def _expand(
        self, chunks: Sequence[Chunk | Image], sizes: Sizes
    ) -> tuple[np.ndarray, np.ndarray, tuple[ImageSlot, ...]]:
        slots: list[ImageSlot] = []
        parts: list[tuple[np.ndarray, np.ndarray]] = []
        position = 0
        for chunk in chunks:
            if isinstance(chunk, Image):
                if self.layout is None or self.image_token_id is None:
                    raise ValueError("an Encoder without a layout and an image token gives unexpanded ids only")
                width, height = sizes[len(slots)]
                tokens = self.layout.tokens(width, height)
                slots.append(ImageSlot(chunk, position, tokens, width, height))
                parts.append(_run(self.image_token_id, tokens))
            else:
                parts.append((chunk.ids, chunk.labels))
            position += len(parts[-1][0])
        return *_concatenate(parts), tuple(slots)


def _overlapping(offsets: np.ndarray, learnt: np.ndarray) -> np.ndarray:
    """Which tokens (T,) overlap a supervised character, from offsets (T, 2) and the status of each character.

    A token without characters of its own (a dummy prefix, a space that the tokenizer trims from its offsets) takes
    the status of the character it stands before, at the end of the text that of the last one.
    """
    before = np.concatenate([[0], np.cumsum(learnt)])
    start, end = _characters(offsets, len(learnt))
    return before[end] > before[start]


def _heaviest(offsets: np.ndarray, worth: np.ndarray) -> np.ndarray:
    """The greatest weight (T,) float32 among each token's characters, found as `_overlapping` does."""
    start, end = _characters(offsets, len(worth))
    return np.array([worth[a:b].max() for a, b in zip(start, end, strict=True)], dtype=np.float32)


def _characters(offsets: np.ndarray, letters: int) -> tuple[np.ndarray, np.ndarray]:
    start, end = offsets[:, 0], offsets[:, 1]
    start = np.where(start == end, np.minimum(start, letters - 1), start)
    return start, np.maximum(end, start + 1)


def _weights(chunks: Sequence[Chunk | Image], slots: Sequence[ImageSlot]) -> np.ndarray | None:
    """Weights (T,) of the expanded chunks, None if every label counts 1."""
    if all(isinstance(c, Image) or c.weights is None for c in chunks):
        return None
    tokens = iter(slot.tokens for slot in slots)
    parts = []
    for chunk in chunks:
        if isinstance(chunk, Image):
            parts.append(np.zeros(next(tokens)))
        else:
            parts.append(chunk.labels != IGNORE if chunk.weights is None else chunk.weights)
    return np.concatenate(parts).astype(np.float32)


def _run(token_id: int, tokens: int) -> tuple[np.ndarray, np.ndarray]:
    return np.full(tokens, token_id, dtype=np.int64), np.full(tokens, IGNORE, dtype=np.int64)


def _concatenate(parts: Sequence[tuple[np.ndarray, np.ndarray]]) -> tuple[np.ndarray, np.ndarray]:
    parts = parts or [_run(0, 0)]
    ids, labels = (np.concatenate(column) for column in zip(*parts, strict=True))
    return ids.astype(np.int64), labels.astype(np.int64)


def _first_turn(sample: Sample) -> Message | None:
    return next((m for m in sample.messages if m.role != "system"), None)


def _token_id(tokenizer: PreTrainedTokenizerBase, token: str) -> int:
    ids = tokenizer.get_vocab()
    if token not in ids:
        raise ModelError(f'the tokenizer does not hold the image token "{token}"; `lapilli build` adds it')
    return ids[token]


def _text_prefix(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Ids that the tokenizer puts before a text by itself: its BOS, or nothing."""
    bare = tokenizer("a", add_special_tokens=False)["input_ids"]
    whole = tokenizer("a")["input_ids"]
    for start in range(len(whole) - len(bare) + 1):
        if whole[start : start + len(bare)] == bare:
            return list(whole[:start])
    raise ModelError(f"tokenizer {type(tokenizer).__name__}: can't tell what it puts before a text")
