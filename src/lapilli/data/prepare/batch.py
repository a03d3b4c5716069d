"""Encoding many conversations at once: the Encoder's numbers at a fraction of its time.

A call into the tokenizer, and a dozen calls into NumPy, cost more than a short text does. So the texts of a batch are
tokenised with one call and labelled in one go. What is kept is keyed by the text and its supervision; a text that is
not there (a conversation cut shorter, one with fractional weights, one that will be refused) goes the usual way.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import chain
from typing import Any

import numpy as np

from lapilli.base.errors import DataError
from lapilli.data.encode import Chunk, Encoder
from lapilli.data.sample import IGNORE, Sample
from lapilli.data.template import Piece, Span, Template

Run = tuple[Span, ...]
"""The text between two pictures."""


class BatchEncoder(Encoder):
    """An Encoder that can be told what it will be asked for. It gives what `encoder` gives."""

    def __init__(self, encoder: Encoder) -> None:
        self.__dict__.update(encoder.__dict__)
        self._rendered = _Rendered(encoder.template)
        self.template: Any = self._rendered
        self._ready: dict[Run, Chunk] = {}

    def read_ahead(self, samples: Iterable[Sample]) -> None:
        """Tokenise what these Samples will ask for, and forget earlier ones.

        What is wrong with one is said when it is encoded.
        """
        runs: dict[Run, str] = {}
        self._rendered.spans.clear()
        for sample in samples:
            try:
                pieces = self._rendered.render(sample)
            except DataError:
                continue
            runs.update((run, text) for run in _runs(pieces) if (text := _plain(run)))
        self._ready = dict(zip(runs, self._chunks_of(runs), strict=True))
        if self.image_token_id is not None:  # such a text is refused, by name, when its turn comes
            self._ready = {run: c for run, c in self._ready.items() if not (c.ids == self.image_token_id).any()}

    def _tokenised(self, spans: Sequence[Span], where: str) -> list[Chunk]:
        found = self._ready.get(tuple(spans))
        return super()._tokenised(spans, where) if found is None else [found]

    def _chunks_of(self, runs: dict[Run, str]) -> list[Chunk]:
        """The Chunk of each run, all computed as one text of texts."""
        tokenizer: Any = self.tokenizer
        found = tokenizer.backend_tokenizer.encode_batch(list(runs.values()), add_special_tokens=False)
        tokens = np.array([len(one) for one in found], dtype=np.int64)
        total = int(tokens.sum())
        ids = np.fromiter(chain.from_iterable(one.ids for one in found), np.int64, total)
        places = chain.from_iterable(chain.from_iterable(one.offsets for one in found))
        offsets = np.fromiter(places, np.int64, 2 * total).reshape(-1, 2)
        labels = np.where(_supervised(runs, offsets, tokens), ids, IGNORE)
        ends = np.cumsum(tokens).tolist()
        starts = [0, *ends[:-1]]
        return [
            Chunk(ids[a:b], labels[a:b], text, offsets[a:b])
            for text, a, b in zip(runs.values(), starts, ends, strict=True)
        ]


class _Rendered:
    """A template that has rendered some Samples already; all else is the template's own."""

    def __init__(self, template: Template) -> None:
        self._template = template
        self.spans: dict[int, tuple[Sample, list[Piece]]] = {}
        """By identity, with the Sample itself, so that the identity can't be another's meanwhile."""

    def render(self, sample: Sample) -> list[Piece]:
        pieces = self._template.training_spans(sample)
        self.spans[id(sample)] = sample, pieces
        return pieces

    def training_spans(self, sample: Sample) -> list[Piece]:
        known = self.spans.get(id(sample))
        return self._template.training_spans(sample) if known is None else known[1]

    def __getattr__(self, name: str) -> Any:
        return getattr(self._template, name)


def _runs(pieces: Sequence[Piece]) -> Iterable[Run]:
    run: list[Span] = []
    for piece in pieces:
        if isinstance(piece, Span):
            run.append(piece)
        elif run:
            yield tuple(run)
            run = []
    if run:
        yield tuple(run)


def _plain(run: Run) -> str | None:
    """The run's text, or None if it is for the Encoder alone: weights other than 0 and 1, or not encodable."""
    if any(span.supervised and span.weight != 1 for span in run):
        return None
    text = "".join(span.text for span in run)
    if not text.isascii():
        try:
            text.encode()
        except UnicodeEncodeError:
            return None
    return text


def _supervised(runs: Iterable[Run], offsets: np.ndarray, tokens: np.ndarray) -> np.ndarray:
    """(all tokens,) bool: which overlap a supervised character. The rule is `encode._overlapping`'s, for all runs."""
    spans = [span for run in runs for span in run]
    learnt = np.repeat([span.supervised for span in spans], [len(span.text) for span in spans])
    before = np.concatenate([[0], np.cumsum(learnt, dtype=np.int64)])
    letters = np.array([sum(len(span.text) for span in run) for run in runs], dtype=np.int64)
    first = np.repeat(np.cumsum(letters) - letters, tokens)
    start, end = offsets[:, 0], offsets[:, 1]
    start = np.where(start == end, np.minimum(start, np.repeat(letters, tokens) - 1), start)
    end = np.maximum(end, start + 1)
    return before[first + end] > before[first + start]
