"""What is read out of replies: the original's quirks exactly, and ours."""

import pytest

from lapilli.evaluate.judge.reading import Unreadable, parse_llava, read_grade, read_pair


@pytest.mark.parametrize(
    ("reply", "scores"),
    [
        ("8 7\nx", [8, 7]),
        ("8,7", [8, 7]),
        ("8.5 9", [8.5, 9]),
        ("8, 7", [-1, -1]),
        ("8 7 ", [-1, -1]),
        ("(8, 7)", [-1, -1]),
        ("Assistant 1: 8", [-1, -1]),
        ("\n8 7", [-1, -1]),
        ("", [-1, -1]),
    ],
)
def test_the_originals_reading_with_its_quirks(reply, scores):
    assert parse_llava(reply) == scores


@pytest.mark.parametrize(
    ("reply", "scores"),
    [
        ("8 7\nx", (8, 7)),
        ("8, 7 \nBecause of 3 things and 4 more.", (8, 7)),
        ("\n\n(8, 7)\n", (8, 7)),
        ("**8.5** **9**", (8.5, 9)),
        ("8/10 7/10", (8, 7)),
        ("10/10, 10/10", (10, 10)),
        ("8-7", (8, 7)),
        ("Scores: 8 and 7", (8, 7)),
        ("Assistant 1: 8, Assistant 2: 7", (8, 7)),
        ("Assistant 2: 7\nAssistant 1: 8", Unreadable("no two scores")),
        ("Assistant 2: 7, Assistant 1: 8", (8, 7)),
        ("Assistant 1: 8/10\nAssistant 2: 7/10\nBoth are good.", (8, 7)),
        ("First I solve it: 3 + 4 = 7.\n\nBoth found 7.\n(9, 5)\nThe second left out a step.", (9, 5)),
        ("Let me think.\nScores: 9 5", (9, 5)),
        ("0 0", (0, 0)),
        ("<think>\nMaybe 3 and 4?\n(1, 2)\n</think>\n\n8 7\nx", (8, 7)),
        ("```\n8 7\n```", (8, 7)),
    ],
)
def test_scores_are_read_where_a_person_would(reply, scores):
    assert read_pair(reply) == scores


@pytest.mark.parametrize(
    ("reply", "reason"),
    [
        ("", "empty"),
        ("  \n ", "empty"),
        ("Assistant 1 names 3 things and Assistant 2 names 5.", "no two scores"),
        ("I can't rate these answers.", "no two scores"),
        ("8", "no two scores"),
        ("8 7 6", "no two scores"),
        ("80% 70%", "no two scores"),
        ("85 70", "outside"),
        ("-1 -1", "outside"),
        ("The box is at\n0.37, 0.58", "no two scores"),
        ("Well.\n(9, 5)\n(5, 9)", "several"),
    ],
)
def test_what_holds_no_scores_has_a_reason(reply, reason):
    found = read_pair(reply)
    assert isinstance(found, Unreadable)
    assert reason in found.reason


def test_a_grade_is_one_number_from_0_to_1():
    assert [read_grade(reply) for reply in ("0.7\nx", "Grade is", "Score: 1.0", "\n0")][0::2] == [0.7, 1.0]
    for reply, reason in (("7", "outside"), ("", "empty"), ("0.5 0.6", "single"), ("The 2 dogs are right", "single")):
        found = read_grade(reply)
        assert isinstance(found, Unreadable)
        assert reason in found.reason
