"""What a judge's reply says in numbers: the original's reading with its quirks, and one that reads what is meant.

A reply that can't be read has a reason instead of scores; it is never a score of -1.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

LOWEST, HIGHEST = 0.0, 10.0
"""Scores of a pair are asked for from 1 to 10; judges give 0 for an empty answer."""

_NUMBER = re.compile(r"(?<![\w.])[-\u2212]?\d+(?:\.\d+)?(?![\w%])")
_OF_TEN = re.compile(r"(?<=\d)\s*(?:/|out of|of)\s*10(?:\.0+)?(?![\w.])", re.IGNORECASE)
_LABEL = re.compile(r"\b(?:assistant|answer|response|model)\s*#?\s*([12])\b(?:['\u2019]s)?", re.IGNORECASE)
_SCORE_WORD = re.compile(r"\b(?:scores?|ratings?|points?|pts)\b", re.IGNORECASE)
_FILLER = re.compile(
    r"\b(?:scores?|ratings?|points?|pts|overall|final|for|and|is|are|the|of|to|vs|respectively)\b", re.IGNORECASE
)
_THOUGHTS = re.compile(r"\A\s*<think>.*?</think>", re.DOTALL)
_MARKS = re.compile(r"[\s,;:|()\[\]{}*_`#=&.>\-\u2013\u2014\u2212\"']*")


@dataclass(frozen=True, slots=True)
class Unreadable:
    """Why a reply has no scores."""

    reason: str


def parse_llava(reply: str) -> list[float]:
    """The original's `parse_score` (llava/eval/eval_gpt_review.py): two numbers in the first line, else [-1, -1].

    Its quirks are kept: `8, 7`, a space behind the second number, or an empty first line are not read.
    """
    parts = reply.split("\n", 1)[0].replace(",", " ").split(" ")
    if len(parts) != 2:
        return [-1.0, -1.0]
    try:
        return [float(parts[0]), float(parts[1])]
    except ValueError:
        return [-1.0, -1.0]


def read_pair(reply: str) -> tuple[float, float] | Unreadable:
    """The two scores that a reply gives, in its own order of answers.

    They stand in the first line that is not empty (`8 7`, `8, 7`, `(8, 7)`, `**8/10 7/10**`, `Assistant 1: 8,
    Assistant 2: 7`), in the first two lines with a label each, or, in a reply that reasons first, in lines that hold
    nothing but two scores; these must then all say the same.
    """
    lines = _lines(reply)
    if not lines:
        return Unreadable("empty reply")
    found = _line_pair(lines[0], alone=True)
    if found is None and len(lines) > 1 and _label_order(lines[0]) == ["1"] and _label_order(lines[1]) == ["2"]:
        found = _line_pair(f"{lines[0]} {lines[1]}", alone=True)
    if found is None:
        others = {pair for line in lines[1:] if (pair := _line_pair(line, alone=False)) is not None}
        if len(others) > 1:
            return Unreadable("several pairs of scores")
        found = next(iter(others), None)
    if found is None:
        return Unreadable("no two scores")
    if not all(LOWEST <= score <= HIGHEST for score in found):
        return Unreadable(f"scores outside {LOWEST:g} to {HIGHEST:g}")
    return found


def read_grade(reply: str) -> float | Unreadable:
    """One score from 0 to 1: the only number in the first line that is not empty."""
    lines = _lines(reply)
    if not lines:
        return Unreadable("empty reply")
    line = lines[0]
    numbers = _NUMBER.findall(line)
    if len(numbers) != 1 or not _only_filler(_NUMBER.sub(" ", line)):
        return Unreadable("no single score in the first line")
    score = float(numbers[0].replace("\u2212", "-"))
    return score if 0.0 <= score <= 1.0 else Unreadable("a score outside 0 to 1")


def _lines(reply: str) -> list[str]:
    """Lines with a letter or digit in them, behind the thoughts that a model may have written down first."""
    return [line.strip() for line in _THOUGHTS.sub("", reply).splitlines() if any(map(str.isalnum, line))]


def _line_pair(line: str, alone: bool) -> tuple[float, float] | None:
    """The two numbers of a line that holds nothing else but labels, marks and words such as `scores`.

    Away from the first line (not `alone`) a mark of a score is wanted too: brackets, a word, labels, or `of 10`.
    """
    labels = _label_order(line)
    rest = _OF_TEN.sub(" ", _LABEL.sub(" ", line))
    numbers = _NUMBER.findall(rest)
    if len(numbers) != 2 or not _only_filler(_NUMBER.sub(" ", rest)):
        return None
    if not alone:
        marked = re.search(r"[(\[]\s*[\d.]+\s*,\s*[\d.]+\s*[)\]]", line) or _SCORE_WORD.search(line)
        if not (marked or labels or _OF_TEN.search(line)):
            return None
    first, second = (float(number.replace("\u2212", "-")) for number in numbers)
    return (second, first) if labels == ["2", "1"] else (first, second)


def _label_order(line: str) -> list[str]:
    return _LABEL.findall(line)


def _only_filler(text: str) -> bool:
    return _MARKS.fullmatch(_FILLER.sub(" ", text)) is not None
