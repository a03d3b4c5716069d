"""The scorers that task files name: questions and answers to numbers."""

from lapilli.evaluate import anls, captions, gqa, mmbench, mme, own, pmc, pope, quilt, scienceqa, seed, vqa
from lapilli.evaluate.judge import options
from lapilli.evaluate.judge import scorer as judging
from lapilli.evaluate.registry import Entry
from lapilli.evaluate.task import Scorer

SCORERS: dict[str, Entry[Scorer]] = {
    "exact": Entry(own.score_exact, own.EXACT_OPTIONS),
    "contains": Entry(own.score_contains, own.CONTAINS_OPTIONS),
    "choice": Entry(own.score_choice),
    "scienceqa": Entry(scienceqa.score, scienceqa.SCORE_OPTIONS),
    "vqa": Entry(vqa.score, vqa.OPTIONS),
    "gqa": Entry(gqa.score),
    "pope": Entry(pope.score),
    "mme": Entry(mme.score),
    "captions": Entry(captions.score),
    "anls": Entry(anls.score, anls.OPTIONS),
    "mmbench": Entry(mmbench.score),
    "seed": Entry(seed.score, seed.SCORE_OPTIONS),
    "quilt": Entry(quilt.score, quilt.SCORE_OPTIONS),
    "pmc": Entry(pmc.score, pmc.SCORE_OPTIONS),
    "judge": Entry(judging.score, judging.OPTIONS, options.faults, judging.before, needs_truth=False),
}
