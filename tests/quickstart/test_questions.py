"""The truth of every answer, by hand for known scenes and by reading the caption for random ones."""

import numpy as np

from lapilli.quickstart.questions import ONE_DIGIT, TWO_DIGITS, pair_question, questions, text_question
from lapilli.quickstart.scenes import NUMBERS, Digit, Scene, random_scene

RED_SEVEN, BLUE_TWO = Digit(7, "red"), Digit(2, "blue")


def answers(scene, rounds=40):
    rng = np.random.default_rng(0)
    return {q.text: q.answer for _ in range(rounds) for q in questions(scene, rng, 20)}


def test_two_digits():
    asked = answers(Scene((RED_SEVEN, BLUE_TWO)))
    assert asked == {
        "What is on the left?": "a red seven",
        "What is on the right?": "a blue two",
        "Which digit is larger?": "seven",
        "How many digits are there?": "two",
        "Describe the picture.": "a red seven and a blue two",
    }


def test_one_digit():
    assert answers(Scene((BLUE_TWO,))) == {
        "Which digit is it?": "two",
        "What colour is the digit?": "blue",
        "How many digits are there?": "one",
        "Describe the picture.": "a blue two",
    }


def test_a_question_without_one_answer_is_not_asked():
    assert "Which digit is larger?" not in answers(Scene((Digit(4, "red"), Digit(4, "blue"))))


def test_pair_questions_hold_for_both_pictures():
    rng = np.random.default_rng(0)
    asked = {q.text: q.answer for q in (pair_question(Scene((RED_SEVEN,)), Scene((BLUE_TWO,)), rng) for _ in range(60))}
    assert asked == {
        "Which digit is larger?": "seven",
        "Describe the pictures.": "a red seven and a blue two",
    }


def test_text_questions_are_true():
    rng = np.random.default_rng(0)
    for _ in range(200):
        question = text_question(rng)
        named = [NUMBERS.index(word.strip("?,")) for word in question.text.split() if word.strip("?,") in NUMBERS]
        expected = {"plus": sum(named), "larger,": max(named), "after": named[0] + 1}
        [truth] = [value for word, value in expected.items() if word in question.text.split()]
        assert question.answer == NUMBERS[truth]


def test_questions_are_different_and_limited():
    rng = np.random.default_rng(0)
    for _ in range(50):
        asked = questions(random_scene(rng), rng, 4)
        assert len({q.text for q in asked}) == len(asked)
        assert 3 <= len(asked) <= 4
    assert len(ONE_DIGIT) < len(TWO_DIGITS)
