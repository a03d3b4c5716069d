"""Thoughts told apart wherever a stream is cut."""

import pytest

from lapilli.generate.text import without_thinking
from lapilli.serve.reply import Thoughts

TEXTS = [
    "<think>a < b, so\nyes</think>\n\nYes.",
    "<think>never finished </th",
    "<think></think>Yes.",
    "<thin ice",
    "<",
    "Yes, <think> is a mark.",
    "<think>only thought</think>",
]


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("size", [1, 2, 3, 7, 100])
def test_thoughts(text, size):
    split = Thoughts()
    made = [split.add(text[i : i + size]) for i in range(0, len(text), size)] + [split.rest()]
    thought, answer = "".join(t for t, _ in made), "".join(a for _, a in made)
    assert (thought.strip(), answer) == without_thinking(text)
