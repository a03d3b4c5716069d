"""The numbers of the examination, and that its wrong pictures are wrong."""

import numpy as np
import pytest

from lapilli.quickstart.examine import Result, other_pictures
from lapilli.quickstart.records import Exam

EXAMS = [
    *(Exam((f"{i}.png",), "digit", "<image>\nWhich digit is it?", str(i % 3)) for i in range(9)),
    *(Exam((f"{i}a.png", f"{i}b.png"), "pair", "<image>\n<image>\nWhich?", "the first") for i in range(3)),
]


@pytest.mark.parametrize("seed", range(5))
def test_every_exam_gets_another_ones_pictures(seed):
    wrong = other_pictures(EXAMS, np.random.default_rng(seed))
    assert all(pictures != exam.images for pictures, exam in zip(wrong, EXAMS, strict=True))
    assert [len(p) for p in wrong] == [len(e.images) for e in EXAMS]
    assert sorted(wrong) == sorted(e.images for e in EXAMS)


def test_numbers():
    answers = ["0", "1", "2", "0", "1", "2", "0", "1", "wrong", "the first", "the second", "the first"]
    result = Result(tuple(EXAMS), tuple(answers), ("0",) * 12)
    assert result.exact_match == pytest.approx(10 / 12)
    assert result.wrong_picture == pytest.approx(3 / 12)
    assert result.most_frequent[1] == pytest.approx(3 / 12)
    assert result.by_kind() == [
        ("digit", 9, pytest.approx(8 / 9), pytest.approx(3 / 9)),
        ("pair", 3, pytest.approx(2 / 3), 0.0),
    ]
