"""Encoding many conversations at once: the Encoder's numbers at a fraction of its time.

A call into the tokenizer, and a dozen calls into NumPy, cost more than a short text does. So the texts of a batch are
tokenised with one call and labelled in one go, and a conversation without pictures is finished there. What is kept of
others is keyed by the text and its supervision; a text that is not there (a conversation cut shorter, one with
fractional weights, one that will be refused) goes the usual way.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from itertools import chain, pairwise
from typing import Any

import numpy as np

from lapilli.base.errors import DataError
from lapilli.data.encode import Chunk, Encoded, Encoder, Sizes
from lapilli.data.prepare.words import Tokens, WordTokens, whole_texts
from lapilli.data.sample import IGNORE, Example, Sample
from lapilli.data.template import Piece, Span, Template

Run = tuple[Span, ...]
"""The text between two pictures."""


class BatchEncoder(Encoder):
    """An Encoder that can be told what it will be asked for. It gives what `encoder` gives."""

    def __init__(self, encoder: Encoder) -> None:
        self.__dict__.update(encoder.__dict__)
        tokenizer: Any = encoder.tokenizer
        words = WordTokens.of(tokenizer.backend_tokenizer)
        self._tokens_of: Callable[[Sequence[str]], Tokens] = (
            partial(whole_texts, tokenizer.backend_tokenizer) if words is None else words.tokens
        )
        self._rendered = _Rendered(encoder.template)
        self.template: Any = self._rendered
        self._whole: dict[int, tuple[Sample, Example]] = {}
        """Finished Examples by the identity of their Samples, each with its Sample, so that it stays its own."""
        self._ready: dict[Run, Chunk] = {}

    def read_ahead(self, samples: Iterable[Sample]) -> None:
        """Tokenise what these Samples will ask for, and forget earlier ones.

        What is wrong with one is said when it is encoded.
        """
        owners: list[Sample] = []
        whole: list[tuple[Run, str]] = []
        others: dict[Run, str] = {}
        self._rendered.spans.clear()
        for sample in samples:
            try:
                pieces = self._rendered.render(sample)
            except DataError:
                continue
            runs = [(run, text) for run in _runs(pieces) if (text := _plain(run))]
            if len(runs) == 1 and len(runs[0][0]) == len(pieces):
                owners.append(sample)
                whole += runs
            else:
                others.update(runs)
        self._whole, self._ready = {}, {}
        if whole or others:
            self._tokenise(owners, [*whole, *others.items()])

    def encode_noted(self, sample: Sample, image_sizes: Sizes | None = None) -> Encoded:
        known = None if image_sizes else self._whole.get(id(sample))
        if known is None:
            return super().encode_noted(sample, image_sizes)
        return Encoded(known[1], self.template.notes(sample))

    def _tokenised(self, spans: Sequence[Span], where: str) -> list[Chunk]:
        found = self._ready.get(tuple(spans))
        return super()._tokenised(spans, where) if found is None else [found]

    def _tokenise(self, owners: Sequence[Sample], runs: Sequence[tuple[Run, str]]) -> None:
        """Compute all runs as one text of texts. The first ones are each all that one of `owners` consists of."""
        tokens = self._tokens_of([text for _, text in runs])
        labels = np.where(_supervised([run for run, _ in runs], tokens), tokens.ids, IGNORE)
        ends = np.cumsum(tokens.counts)
        starts = ends - tokens.counts
        # A text that holds the image token is refused, by name, when its turn comes.
        usable = np.ones(len(runs), dtype=bool)
        if self.image_token_id is not None:
            usable = _count(tokens.ids == self.image_token_id, starts, ends) == 0
        n = len(owners)
        finished = usable[:n] & self._finished(tokens.ids, labels, starts[:n], ends[:n])
        for sample, fine, ids, learnt in zip(
            owners, finished, *self._prefixed(tokens.ids, labels, ends[:n]), strict=True
        ):
            if fine:
                self._whole[id(sample)] = sample, Example(sample.id, ids, learnt, (), sample.where)
        usable[:n] &= ~finished
        for i in np.flatnonzero(usable).tolist():
            run, text = runs[i]
            at = slice(starts[i], ends[i])
            self._ready[run] = Chunk(tokens.ids[at], labels[at], text, tokens.offsets[at])

    def _finished(self, ids: np.ndarray, labels: np.ndarray, starts: np.ndarray, ends: np.ndarray) -> np.ndarray:
        """Which of some texts (n,) are, with the prefix in front, Examples that nothing is wrong with."""
        prefix, learnt = np.array(self.prefix, dtype=np.int64), labels != IGNORE
        fine = np.ones(len(starts), dtype=bool)
        if len(prefix):  # a text that writes it out does not get it again
            heads = np.append(ids, np.zeros_like(prefix))[starts[:, None] + np.arange(len(prefix))]
            fine = (heads != prefix).any(axis=1)
        else:  # the first position is never predicted
            learnt[starts[ends > starts]] = False
        if self.max_length is not None:
            fine &= ends - starts + len(prefix) <= self.max_length
        return fine & (_count(learnt, starts, ends) > 0)

    def _prefixed(
        self, ids: np.ndarray, labels: np.ndarray, ends: np.ndarray
    ) -> tuple[list[np.ndarray], list[np.ndarray]]:
        """Ids and labels of the texts that end at `ends`, each with the prefix in front."""
        prefix = np.array(self.prefix, dtype=np.int64)
        cuts = np.concatenate([[0], ends + len(prefix) * np.arange(1, len(ends) + 1)])
        heads = cuts[:-1, None] + np.arange(len(prefix))
        text = np.ones(cuts[-1], dtype=bool)
        text[heads] = False
        long_ids, long_labels = np.empty(len(text), dtype=np.int64), np.full(len(text), IGNORE, dtype=np.int64)
        long_ids[heads] = prefix
        long_ids[text], long_labels[text] = ids[: text.sum()], labels[: text.sum()]
        pairs = list(pairwise(cuts.tolist()))
        return [long_ids[a:b] for a, b in pairs], [long_labels[a:b] for a, b in pairs]


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


def _supervised(runs: Sequence[Run], tokens: Tokens) -> np.ndarray:
    """(all tokens,) bool: which overlap a supervised character. The rule is `encode._overlapping`'s, for all runs."""
    spans = list(chain.from_iterable(runs))
    learnt = np.repeat([span.supervised for span in spans], [len(span.text) for span in spans])
    before = np.concatenate([[0], np.cumsum(learnt, dtype=np.int64)])
    letters = np.array([sum([len(span.text) for span in run]) for run in runs], dtype=np.int64)
    first = np.repeat(np.cumsum(letters) - letters, tokens.counts)
    start, end = tokens.offsets[:, 0], tokens.offsets[:, 1]
    start = np.where(start == end, np.minimum(start, np.repeat(letters, tokens.counts) - 1), start)
    end = np.maximum(end, start + 1)
    return before[first + end] > before[first + start]


def _count(marked: np.ndarray, starts: np.ndarray, ends: np.ndarray) -> np.ndarray:
    """(n,) int64: how many of the positions from `starts` to `ends` are marked."""
    before = np.concatenate([[0], np.cumsum(marked, dtype=np.int64)])
    return before[ends] - before[starts]
