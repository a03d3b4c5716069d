"""VQA accuracy: answers made comparable, and counted against what ten people said.

Two ways to make an answer comparable, which differ in small things that show in the second decimal: the one LLaVA
submits and scores with (its `EvalAIAnswerProcessor`), and that of the VQA evaluation itself.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from typing import Any

from lapilli.base.errors import DataError, unknown
from lapilli.evaluate.own import mean_scores
from lapilli.evaluate.task import Question, Scores

OPTIONS = frozenset({"normalisation", "people"})
NORMALISATIONS = ("llava", "official")

FEWEST_PEOPLE = 4
"""With fewer answers no answer can get the full score."""

_NUMBERS = {
    "none": "0", "zero": "0", "one": "1", "two": "2", "three": "3", "four": "4", "five": "5", "six": "6", "seven": "7",
    "eight": "8", "nine": "9", "ten": "10",
}  # fmt: skip
_ARTICLES = frozenset({"a", "an", "the"})
_PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
_DIGITS_COMMA = re.compile(r"\d,\d")
# Published as (?!<=\d)(\.)(?!\d): the first group, meant to look behind, looks ahead and always holds.
_PERIOD = re.compile(r"\.(?!\d)")
_PERIODS = 32
"""Only so many are removed: `re.UNICODE` stands where the count belongs."""

# The table of the VQA evaluation, less its entries that change nothing: those with capitals are never met, as words are
# lower case by then. `somebody'd` loses its apostrophe there.
_CONTRACTION_PAIRS = """
aint>ain't arent>aren't cant>can't couldve>could've couldnt>couldn't couldn'tve>couldn't've couldnt've>couldn't've
didnt>didn't doesnt>doesn't dont>don't hadnt>hadn't hadnt've>hadn't've hadn'tve>hadn't've hasnt>hasn't havent>haven't
hed>he'd hed've>he'd've he'dve>he'd've hes>he's howd>how'd howll>how'll hows>how's isnt>isn't itd>it'd itd've>it'd've
it'dve>it'd've itll>it'll maam>ma'am mightnt>mightn't mightnt've>mightn't've mightn'tve>mightn't've mightve>might've
mustnt>mustn't mustve>must've neednt>needn't notve>not've oclock>o'clock oughtnt>oughtn't ow's'at>'ow's'at
'ows'at>'ow's'at 'ow'sat>'ow's'at shant>shan't shed've>she'd've she'dve>she'd've shouldve>should've shouldnt>shouldn't
shouldnt've>shouldn't've shouldn'tve>shouldn't've somebody'd>somebodyd somebodyd've>somebody'd've
somebody'dve>somebody'd've somebodyll>somebody'll somebodys>somebody's someoned>someone'd someoned've>someone'd've
someone'dve>someone'd've someonell>someone'll someones>someone's somethingd>something'd somethingd've>something'd've
something'dve>something'd've somethingll>something'll thats>that's thered>there'd thered've>there'd've
there'dve>there'd've therere>there're theres>there's theyd>they'd theyd've>they'd've they'dve>they'd've theyll>they'll
theyre>they're theyve>they've twas>'twas wasnt>wasn't wed've>we'd've we'dve>we'd've weve>we've werent>weren't
whatll>what'll whatre>what're whats>what's whatve>what've whens>when's whered>where'd wheres>where's whereve>where've
whod>who'd whod've>who'd've who'dve>who'd've wholl>who'll whos>who's whove>who've whyll>why'll whyre>why're whys>why's
wont>won't wouldve>would've wouldnt>wouldn't wouldnt've>wouldn't've wouldn'tve>wouldn't've yall>y'all yall'll>y'all'll
y'allll>y'all'll yall'd've>y'all'd've y'alld've>y'all'd've y'all'dve>y'all'd've youd>you'd youd've>you'd've
you'dve>you'd've youll>you'll youre>you're youve>you've
"""
_CONTRACTIONS = {wrong: right for wrong, _, right in (pair.partition(">") for pair in _CONTRACTION_PAIRS.split())}


def normalise_llava(text: str) -> str:
    """An answer as LLaVA submits it: its `EvalAIAnswerProcessor` (llava/eval/m4c_evaluator.py), quirks included.

    Before what the VQA evaluation does, commas and question marks go and `'s` becomes a word of its own.
    """
    text = text.lower().replace(",", "").replace("?", "").replace("'s", " 's").strip()
    return normalise_official(_one_line(text))


def normalise_official(text: str) -> str:
    """An answer as the VQA evaluation compares it (GT-Vision-Lab/VQA, vqaEval.py of 2021-03-11).

    Punctuation goes, or becomes a blank where it stood between letters; lower case; numbers to ten as digits; no
    articles; apostrophes put back. Its pattern for periods is kept as published: also `3.` loses its period.
    """
    words = _without_punctuation(text).lower().split()
    words = [_NUMBERS.get(word, word) for word in words]
    return " ".join(_CONTRACTIONS.get(word, word) for word in words if word not in _ARTICLES)


def leave_one_out(matches: int, people: int) -> float:
    """Accuracy 0 to 1 of an answer that `matches` of `people` gave: the mean over everybody of min(1, others / 3)."""
    given = matches * min(1.0, (matches - 1) / 3) if matches else 0.0
    return (given + (people - matches) * min(1.0, matches / 3)) / people


def accuracy_llava(answer: str, truths: Sequence[str], normalise: Callable[[str], str] = normalise_llava) -> float:
    """Accuracy 0 to 1 as LLaVA's TextVQA evaluator counts it: answer and truths all normalised."""
    made = normalise(answer)
    return leave_one_out(sum(normalise(truth) == made for truth in truths), len(truths))


def accuracy_official(
    answer: str, truths: Sequence[str], normalise: Callable[[str], str] = normalise_official
) -> float:
    """Accuracy 0 to 1 as the VQA evaluation counts a submitted answer.

    Where all people say the same nothing is normalised: the answer must be theirs to the letter.
    """
    answer, truths = _one_line(answer), [_one_line(truth) for truth in truths]
    if len(set(truths)) > 1:
        answer, truths = normalise(answer), [normalise(truth) for truth in truths]
    return leave_one_out(truths.count(answer), len(truths))


def score(questions: Sequence[Question], answers: Mapping[str, str], options: Mapping[str, Any]) -> Scores:
    """VQA accuracy; a question's truth is everybody's answer, texts.

    `normalisation: llava` normalises both sides as LLaVA does; `official` gives what the VQA evaluation says of the
    answers as they are submitted, that is as LLaVA normalises them. `people`: how many answers every question must
    have. Raises DataError for another number of them.
    """
    kind = str(options.get("normalisation", "llava"))
    if kind not in NORMALISATIONS:
        raise DataError(f"options.normalisation: {unknown('normalisation', kind, NORMALISATIONS)}")
    people = options.get("people")
    llava, official = lru_cache(maxsize=200_000)(normalise_llava), lru_cache(maxsize=200_000)(normalise_official)
    items: dict[str, float] = {}
    parsed: dict[str, str] = {}
    for question in questions:
        truths = _people(question, people)
        parsed[question.id] = submitted = llava(answers[question.id])
        if kind == "official":
            items[question.id] = accuracy_official(submitted, truths, official)
        else:
            items[question.id] = accuracy_llava(answers[question.id], truths, llava)
    return mean_scores(questions, items, parsed)


def _people(question: Question, wanted: int | None) -> Sequence[str]:
    truths = (question.truth,) if isinstance(question.truth, str) else question.truth
    if truths is None:
        raise DataError(f"{question.where}: question {question.id} has no answer to compare with")
    if wanted is not None and len(truths) != wanted:
        raise DataError(
            f"{question.where}: {len(truths)} answers to question {question.id}; {wanted} people were asked"
        )
    if len(truths) < FEWEST_PEOPLE:
        raise DataError(
            f"{question.where}: {len(truths)} answers to question {question.id}; VQA accuracy compares with several "
            f"people's, {FEWEST_PEOPLE} at least; score it as exact"
        )
    return truths


def _one_line(text: str) -> str:
    return text.replace("\n", " ").replace("\t", " ").strip()


def _without_punctuation(text: str) -> str:
    number = _DIGITS_COMMA.search(text) is not None  # one such comma anywhere, and no mark becomes a blank
    marks = {m: "" if number or f"{m} " in text or f" {m}" in text else " " for m in _PUNCTUATION if m in text}
    return _PERIOD.sub("", text.translate(str.maketrans(marks)), count=_PERIODS)
