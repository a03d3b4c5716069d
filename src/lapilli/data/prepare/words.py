"""Tokenising many texts word by word, each word once, where that provably gives what the whole texts give.

A tokenizer of Llama's or Vicuna's kind merges letters of the whole text, which costs more than all else that a short
record needs. But none of its merges joins the end of a word to the space before the next one, so words are
independent, and there are few of them. Which tokenizers are of that kind is decided by `WordTokens.of` from all that
such a tokenizer says about itself; every other one is asked for whole texts.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from itertools import chain
from typing import Any, NamedTuple

import numpy as np

SPACE = "\u2581"
"""What SentencePiece writes for a space."""
MOST_LETTERS = 2_000_000
"""Letters of all words that are kept; beyond it they are forgotten. Texts without spaces are words as a whole."""
_WORD = re.compile(f"[ {SPACE}]*[^ {SPACE}]+|[ {SPACE}]+")
_NORMALIZER = {
    "type": "Sequence",
    "normalizers": [
        {"type": "Prepend", "prepend": SPACE},
        {"type": "Replace", "pattern": {"String": " "}, "content": SPACE},
    ],
}


class Tokens(NamedTuple):
    """Some texts as tokens: `counts` (n,) of each, `ids` (all tokens,) and `offsets` (all tokens, 2), all int64.

    `offsets` are the characters of each token in its own text.
    """

    counts: np.ndarray
    ids: np.ndarray
    offsets: np.ndarray


def whole_texts(backend: Any, texts: Sequence[str]) -> Tokens:
    """The tokens that a `tokenizers.Tokenizer` gives, without special tokens around them."""
    found = backend.encode_batch(texts, add_special_tokens=False)
    ids = [one.ids for one in found]
    counts = np.array([len(one) for one in ids], dtype=np.int64)
    total = int(counts.sum())
    places = chain.from_iterable(chain.from_iterable(one.offsets for one in found))
    offsets = np.fromiter(places, np.int64, 2 * total).reshape(-1, 2)
    return Tokens(counts, np.fromiter(chain.from_iterable(ids), np.int64, total), offsets)


class WordTokens:
    """A tokenizer that keeps words. `tokens` gives what `whole_texts` gives."""

    def __init__(self, backend: Any, inside: Any, added: Sequence[str]) -> None:
        self._backend, self._inside = backend, inside
        """`inside` tokenises what does not stand at the beginning of a section: nothing is put before it."""
        longest_first = sorted(added, key=len, reverse=True)
        self._added = re.compile(f"({'|'.join(map(re.escape, longest_first))})") if added else None
        self._forget()

    def _forget(self) -> None:
        self._first: dict[str, int] = {}
        """Numbers of the words that a section begins with, and of added tokens."""
        self._later: dict[str, int] = {}
        """Numbers of the words after a space; the key lacks it."""
        self._words = _Column(3)
        """Of each word: its first token among all that are kept, how many it has, its letters with the space."""
        self._tokens = _Column(3)
        """Id, start and end in its word."""

    @classmethod
    def of(cls, backend: Any) -> WordTokens | None:
        """This `tokenizers.Tokenizer` word by word, or None where that could give other tokens.

        It must be BPE on the text with spaces made visible, one put before each section, and no merge may join a
        letter to a space after it. Then what is merged on one side of such a place never depends on the other side.
        Added tokens must be cut out of the text as it is written, exactly.
        """
        said = json.loads(backend.to_str())
        model, added = said["model"], said["added_tokens"]
        exact = not any(t["normalized"] or t["lstrip"] or t["rstrip"] or t["single_word"] for t in added)
        if said["normalizer"] != _NORMALIZER or said["pre_tokenizer"] is not None or not exact:
            return None
        if said["truncation"] or said["padding"] or backend.encode_special_tokens or not _merges_within_words(model):
            return None
        inside = type(backend).from_str(json.dumps({**said, "normalizer": _NORMALIZER["normalizers"][1]}))
        return cls(backend, inside, [t["content"] for t in added if t["content"]])

    def tokens(self, texts: Sequence[str]) -> Tokens:
        """The tokens of each text."""
        if int(self._words.rows[:, 2].sum()) > MOST_LETTERS:
            self._forget()
        split = [self._split(text) for text in texts]
        self._learn(split)
        first, later = self._first, self._later
        words: list[int] = []
        held = []
        for sections in split:
            before = len(words)
            for section in sections:
                words.append(first[section[0]])
                words.extend(map(later.__getitem__, section[1:]))
            held.append(len(words) - before)
        return self._joined(np.array(words, dtype=np.int64), np.array(held, dtype=np.int64))

    def _split(self, text: str) -> list[list[str]]:
        """The words of each section of a text, without the space before all but the first; an added token is a section
        of its own."""
        sections = [text] if self._added is None else self._added.split(text)
        return [_words(section) for section in sections if section]

    def _learn(self, split: Iterable[list[list[str]]]) -> None:
        """Tokenise the words that are new."""
        firsts, laters = set[str](), set[str]()
        for section in chain.from_iterable(split):
            firsts.add(section[0])
            laters.update(section[1:])
        self._ask(self._backend, sorted(firsts - self._first.keys()), "", self._first)
        self._ask(self._inside, sorted(laters - self._later.keys()), " ", self._later)

    def _ask(self, tokenizer: Any, words: list[str], before: str, numbers: dict[str, int]) -> None:
        if not words:
            return
        counts, ids, offsets = whole_texts(tokenizer, [before + word for word in words])
        known = len(self._words.rows)
        numbers.update(zip(words, range(known, known + len(words)), strict=True))
        firsts = np.cumsum(counts) - counts + len(self._tokens.rows)
        self._words.append(np.column_stack([firsts, counts, [len(before) + len(word) for word in words]]))
        self._tokens.append(np.column_stack([ids, offsets]))

    def _joined(self, words: np.ndarray, held: np.ndarray) -> Tokens:
        """Words, by number, end to end; the i-th text has the next `held[i]` of them."""
        firsts, counts, letters = self._words.rows[words].T
        tokens_before, letters_before = _sums(counts), _sums(letters)
        tokens = self._tokens.rows[np.repeat(firsts - tokens_before[:-1], counts) + np.arange(tokens_before[-1])]
        last = np.cumsum(held)
        starts = letters_before[:-1] - np.repeat(letters_before[last - held], held)
        offsets = tokens[:, 1:] + np.repeat(starts, counts)[:, None]
        return Tokens(np.diff(tokens_before[last], prepend=0), np.ascontiguousarray(tokens[:, 0]), offsets)


class _Column:
    """Rows of int64 that grow: `rows` (n, width)."""

    def __init__(self, width: int) -> None:
        self._held, self._used = np.empty((1024, width), dtype=np.int64), 0

    @property
    def rows(self) -> np.ndarray:
        return self._held[: self._used]

    def append(self, rows: np.ndarray) -> None:
        used = self._used + len(rows)
        if used > len(self._held):
            held = np.empty((max(used, 2 * len(self._held)), self._held.shape[1]), dtype=np.int64)
            held[: self._used] = self.rows
            self._held = held
        self._held[self._used : used] = rows
        self._used = used


def _words(section: str) -> list[str]:
    if SPACE not in section:
        words = section.split(" ")
        if all(words):
            return words
    first, *later = _WORD.findall(section)
    return [first, *(word[1:] for word in later)]


def _merges_within_words(model: dict[str, Any]) -> bool:
    """Whether this is BPE without chance, and no merge begins before a space and ends after it."""
    plain = not (model.get("dropout") or model.get("continuing_subword_prefix") or model.get("end_of_word_suffix"))
    if model["type"] != "BPE" or not plain or model.get("ignore_merges") or SPACE not in model["vocab"]:
        return False
    pairs = (pair.split(" ") if isinstance(pair, str) else pair for pair in model["merges"])
    return all(left.endswith(SPACE) or not right.startswith(SPACE) for left, right in pairs)


def _sums(values: np.ndarray) -> np.ndarray:
    """(n + 1,) sums of the first 0, 1, 2 ... values."""
    return np.concatenate([[0], np.cumsum(values)])
