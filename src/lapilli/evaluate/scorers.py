"""The scorers that task files name: questions and answers to numbers."""

from lapilli.evaluate import own
from lapilli.evaluate.registry import Entry
from lapilli.evaluate.task import Scorer

SCORERS: dict[str, Entry[Scorer]] = {
    "exact": Entry(own.score_exact, own.EXACT_OPTIONS),
    "contains": Entry(own.score_contains, own.CONTAINS_OPTIONS),
    "choice": Entry(own.score_choice),
}
