# pyright: reportArgumentType=false, reportCallIssue=false, reportReturnType=false, reportIndexIssue=false
"""Questions about scenes with one right answer each, sums and words without a picture, and the language model's texts.

Every answer is a word or a caption, so that an exact match means what it says. A question that has no one answer for
a scene (which digit is red, when both are) is not asked of it.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from lapilli.quickstart.scenes import COLOUR_NAMES, NUMBERS, Digit, Scene, random_scene

DESCRIBE = "Describe the picture."


@dataclass(frozen=True)
class Question:
    """`kind` groups questions in the accuracy table."""

    kind: str
    text: str
    answer: str


Asker = Callable[[Scene, np.random.Generator], Question | None]


def _what_is_on(place: int, word: str) -> Asker:
    text = f"What is on the {word}?"
    return lambda scene, _rng: Question(f"on the {word}", text, scene.digits[place].caption)


def _larger(scene: Scene, _rng: np.random.Generator) -> Question | None:
    left, right = scene.digits
    if left.value == right.value:
        return None
    return Question("larger digit", "Which digit is larger?", max(scene.digits, key=lambda d: d.value).name)


def _digit(scene: Scene, _rng: np.random.Generator) -> Question:
    return Question("one digit", "Which digit is it?", scene.digits[0].name)


def _colour(scene: Scene, _rng: np.random.Generator) -> Question:
    return Question("one colour", "What colour is the digit?", scene.digits[0].colour)


def _count(scene: Scene, _rng: np.random.Generator) -> Question:
    return Question("how many", "How many digits are there?", NUMBERS[len(scene.digits)])


def describe(scene: Scene, _rng: np.random.Generator) -> Question:
    return Question("describe", DESCRIBE, scene.caption)


ONE_DIGIT: tuple[Asker, ...] = (_digit, _colour, _count, describe)
TWO_DIGITS: tuple[Asker, ...] = (_what_is_on(0, "left"), _what_is_on(1, "right"), _larger, _count, describe)


def questions(scene: Scene, rng: np.random.Generator, count: int) -> list[Question]:
    """Ask up to `count` different questions about one scene, in random order."""
    askers = ONE_DIGIT if len(scene.digits) == 1 else TWO_DIGITS
    asked = (askers[i](scene, rng) for i in rng.permutation(len(askers)))
    return [q for q in asked if q is not None][:count]


def pair_question(first: Scene, second: Scene, rng: np.random.Generator) -> Question:
    """Ask something about two pictures of one digit each that takes both of them."""
    a, b = first.digits[0], second.digits[0]
    if a.value != b.value and rng.random() < 0.4:
        return Question("two pictures", "Which digit is larger?", max(a, b, key=lambda d: d.value).name)
    return Question("two pictures", "Describe the pictures.", f"{a.caption} and {b.caption}")


def text_question(rng: np.random.Generator) -> Question:
    """Ask something that needs no picture: a sum, the larger of two numbers, or the next number."""
    a, b = (int(n) for n in rng.integers(10, size=2))
    form = rng.integers(3)
    if form == 0 or (form == 1 and a == b):
        return Question("text only", f"What is {NUMBERS[a]} plus {NUMBERS[b]}?", NUMBERS[a + b])
    if form == 1:
        return Question("text only", f"Which is larger, {NUMBERS[a]} or {NUMBERS[b]}?", NUMBERS[max(a, b)])
    return Question("text only", f"Which number comes after {NUMBERS[a]}?", NUMBERS[a + 1])


def lead(pictures: Sequence[str]) -> str:
    """What goes before a question: one picture on a line of its own, two by name. Each is a caption or `<image>`."""
    names = ("First: ", "Second: ") if len(pictures) == 2 else ("",)
    return "".join(f"{name}{picture}\n" for name, picture in zip(names, pictures, strict=False))


@dataclass(frozen=True)
class Dialogue:
    """Questions and answers in words alone; `lead` stands in the first question where a picture would."""

    lead: str
    asked: tuple[Question, ...]

    def turns(self) -> list[tuple[str, str]]:
        """Return (what is given, what is to be answered) of each turn, as text."""
        leads = (self.lead, *("" for _ in self.asked[1:]))
        pairs = zip(leads, self.asked, strict=True)
        return [(f"USER: {lead}{q.text} ASSISTANT:", f" {q.answer}") for lead, q in pairs]


def random_dialogue(rng: np.random.Generator) -> Dialogue:
    """Draw what the language model is made from: a described picture, or two, or none, and questions."""
    kind = rng.choice(3, p=(0.70, 0.20, 0.10))
    if kind == 0:
        scene = random_scene(rng)
        return Dialogue(lead([scene.caption]), tuple(questions(scene, rng, 8)))
    if kind == 1:
        pair = random_scene(rng, 1), random_scene(rng, 1)
        return Dialogue(lead([p.caption for p in pair]), tuple(pair_question(*pair, rng) for _ in range(4)))
    return Dialogue("", tuple(text_question(rng) for _ in range(6)))


def all_words() -> list[str]:
    """Every caption word in both of its places in a sentence, so that the tokenizer knows each as one token."""
    digits = [Digit(value, colour).caption for value in range(10) for colour in COLOUR_NAMES]
    return [*digits, *(f" {word}" for word in (*NUMBERS, *COLOUR_NAMES))]
