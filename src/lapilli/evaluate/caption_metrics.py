"""BLEU, ROUGE-L and CIDEr-D of captions as coco-caption computes them, from lists of words.

Definitions: Papineni et al. 2002 (BLEU, closest reference length), Lin 2004 (ROUGE-L, with coco-caption's beta),
Vedantam et al. 2015 (CIDEr-D: clipped counts, Gaussian length penalty, sigma 6, times 10). Where code and paper differ,
the numbers are the code's, since those are what papers report.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence

Words = Sequence[str]
Ngrams = Counter[tuple[str, ...]]

ORDERS = 4
"""Word sequences of one to four words are compared."""
BETA = 1.2
SIGMA = 6.0
_SMALL, _TINY = 1e-9, 1e-15
"""coco-caption's guards against division by nothing and scores of exactly 0."""


def ngrams(words: Words) -> list[Ngrams]:
    """How often each sequence of 1, 2, 3 and 4 words occurs."""
    return [Counter(zip(*(words[i:] for i in range(n)), strict=False)) for n in range(1, ORDERS + 1)]


def bleu(captions: Sequence[Words], references: Sequence[Sequence[Words]]) -> list[float]:
    """BLEU-1 to BLEU-4 of a whole set, each 0 to 1."""
    matched, possible = [0] * ORDERS, [0] * ORDERS
    length = closest = 0
    for words, known in zip(captions, references, strict=True):
        most = _most([ngrams(reference) for reference in known])
        for order, counts in enumerate(ngrams(words)):
            matched[order] += sum(min(count, most[order][ngram]) for ngram, count in counts.items())
            possible[order] += max(0, len(words) - order)
        length += len(words)
        closest += min((abs(len(reference) - len(words)), len(reference)) for reference in known)[1]
    ratio = (length + _TINY) / (closest + _SMALL)
    penalty = math.exp(1 - 1 / ratio) if ratio < 1 else 1.0
    made, product = [], 1.0
    for order in range(ORDERS):
        product *= (matched[order] + _TINY) / (possible[order] + _SMALL)
        made.append(penalty * product ** (1 / (order + 1)))
    return made


def rouge_l(words: Words, references: Sequence[Words]) -> float:
    """ROUGE-L of one caption, 0 to 1: from the best precision and the best recall over its references."""
    common = [longest_common(words, reference) for reference in references]
    precision = max(common) / len(words) if words else 0.0
    recall = max((c / len(r) for c, r in zip(common, references, strict=True) if r), default=0.0)
    if not precision or not recall:
        return 0.0
    return (1 + BETA**2) * precision * recall / (recall + BETA**2 * precision)


def longest_common(a: Words, b: Words) -> int:
    """Length of the longest sequence of words, not necessarily adjacent, that both have in this order."""
    row = [0] * (len(b) + 1)
    for word in a:
        before = 0
        for j, other in enumerate(b, 1):
            before, row[j] = row[j], before + 1 if word == other else max(row[j], row[j - 1])
    return row[-1]


def cider_d(captions: Sequence[Words], references: Sequence[Sequence[Words]]) -> list[float]:
    """CIDEr-D of every caption, 0 to 10; rareness of word sequences is counted over these references."""
    known = [[ngrams(reference) for reference in listed] for listed in references]
    documents: defaultdict[tuple[str, ...], int] = defaultdict(int)
    for listed in known:
        for ngram in {ngram for counts in listed for order in counts for ngram in order}:
            documents[ngram] += 1
    log_count = math.log(len(known)) if known else 0.0
    made = []
    for words, listed in zip(captions, known, strict=True):
        mine = _Vector(ngrams(words), documents, log_count)
        alike = [mine.similarity(_Vector(counts, documents, log_count)) for counts in listed]
        made.append(10 * sum(alike) / len(alike))
    return made


class _Vector:
    """A caption's word sequences by rareness (tf-idf), order by order."""

    def __init__(self, counts: Sequence[Ngrams], documents: Mapping[tuple[str, ...], int], log_count: float) -> None:
        self.weights = [
            {ngram: count * (log_count - math.log(max(1, documents.get(ngram, 0)))) for ngram, count in order.items()}
            for order in counts
        ]
        self.norms = [math.sqrt(sum(weight**2 for weight in order.values())) for order in self.weights]
        self.length = counts[1].total()  # coco-caption counts pairs of words, not words

    def similarity(self, reference: _Vector) -> float:
        """Mean over the orders of the clipped cosine, times the penalty for another length."""
        total = 0.0
        for order, theirs in enumerate(reference.weights):
            norm = self.norms[order] * reference.norms[order]
            mine = self.weights[order]
            product = sum(min(mine[ngram], weight) * weight for ngram, weight in theirs.items() if ngram in mine)
            total += product / norm if norm else product
        return total / ORDERS * math.exp(-((self.length - reference.length) ** 2) / (2 * SIGMA**2))


def _most(references: Sequence[Sequence[Ngrams]]) -> list[Ngrams]:
    """The highest count of each word sequence in any one reference, order by order."""
    made: list[Ngrams] = [Counter() for _ in range(ORDERS)]
    for reference in references:
        for order, counts in enumerate(reference):
            made[order] |= counts
    return made
