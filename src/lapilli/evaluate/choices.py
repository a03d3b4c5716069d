"""How an answer to a question with choices is read: which letter it names.

Each benchmark has a rule of its own, and the original's differ from what the benchmarks' authors do; a rule is here
once, by name. What none of them reads counts as wrong and is counted aloud.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from lapilli.evaluate.own import LETTERS, read_choice
from lapilli.evaluate.task import Question

SINGLE_LETTER = "Answer with the option's letter from the given choices directly."
"""What the original writes behind a question with choices."""

LLAVA = "protocol llava: "
"""How notes begin that are true under that protocol only."""

_STATED = re.compile(r"The answer is ([A-Z]).")
_SAID = re.compile(r"[Aa]nswer(?: is|:) ?\(?([A-Z])\b")
_LONE = re.compile(r"(?<!\w)(?<!\w')([B-HJ-Z]|A(?!\s+(?!or\b|and\b)[a-z]))(?!\w|'\w)")  # not the words `A cat`, `I`
_PMC = tuple(re.compile(rule) for rule in (r"([A-Z]).", r"option ([A-Z]).", r" ([A-Z]):", r"'([A-Z])'", r"is ([A-Z])."))
_MARKS = str.maketrans(dict.fromkeys(".()[],:;!*#{}", " "))
_REFUSALS = (
    "Sorry, I can't help with images of people yet.",
    "I can't process this file.",
    "I'm sorry, but without the image provided",
    "Cannot determine the answer",
)


def stated(answer: str) -> str | None:
    """The letter of `The answer is X.`, if the answer says that exactly once (LLaVA, eval_science_qa_gpt4.py)."""
    found = _STATED.findall(answer)
    return found[0] if len(found) == 1 else None


def scienceqa(answer: str, letters: str = "ABCDE") -> str | None:
    """LLaVA's rule (eval_science_qa.py): `B`, `B. text`, or `The answer is B.` exactly once; `B.`, `(B)`, `b` are lost.

    The letter may be beyond the question's choices; it is wrong then.
    """
    if answer and answer in letters and len(answer) == 1:
        return answer
    if len(answer) >= 3 and answer[0] in letters and answer[1:3] == ". ":
        return answer[0]
    return stated(answer)


def pmc(answer: str, letters: str = "ABCD") -> str | None:
    """Quilt-LLaVA's rule (pmc_eval.py): `B`, `B:...`, `B....`, else the first of five patterns that fits exactly once.

    The first pattern is any capital before any character, so that `I think C` reads as `I`.
    """
    if len(answer) == 1 and answer in letters:
        return answer
    if len(answer) >= 3 and answer[0] in letters and answer[1] in ":.":
        return answer[0]
    for rule in _PMC:
        found = rule.findall(answer)
        if len(found) == 1:
            return found[0]
    return None


def mmbench(answer: str, choices: Sequence[str]) -> str | None:
    """MMBench's own rule before its judge (VLMEvalKit, `can_infer`): one letter among the last four words, else the one
    choice whose text is in an answer that is not long.

    VLMEvalKit gives what this does not read to ChatGPT; here it has no letter.
    """
    letters = LETTERS[: len(choices)]
    if any(refusal in answer for refusal in _REFUSALS):
        return None
    words = answer.translate(_MARKS).split()
    named = [letter for letter in letters if letter in words]
    if len(named) == 1 and words.index(named[0]) > len(words) - 5:
        return named[0]
    if not named and "Z" in words:
        return None
    text = answer.lower()
    if len(text) > 2 * sum(map(len, choices)):
        return None
    held = [letter for letter, choice in zip(letters, choices, strict=True) if choice.lower() in text]
    return held[0] if len(held) == 1 else None


def fixed(answer: str, choices: Sequence[str]) -> str | None:
    """The forms that answers really take: `... the answer is B`, else `B`, `b`, `(B)`, `B. a cat`, the choice's text,
    else the one choice's letter that stands alone in it, as in `I think C`.

    An answer that names two letters in the first way names none.
    """
    named = set(_SAID.findall(answer))
    if named:
        return named.pop() if len(named) == 1 and named <= set(LETTERS[: len(choices)]) else None
    letter = read_choice(answer, choices)
    lone = set(_LONE.findall(answer)) & set(LETTERS[: len(choices)])
    return lone.pop() if letter is None and len(lone) == 1 else letter


def unread_note(questions: Sequence[Question], letters: Mapping[str, str | None], llava: bool) -> tuple[str, ...]:
    """A note of how many answers name no choice; empty if all do."""
    lost = sum(not letters[question.id] for question in questions)
    said = f"{lost} of {len(questions)} answers name no choice; they count as wrong"
    return (f"{LLAVA}{said}" if llava else said,) if lost else ()
