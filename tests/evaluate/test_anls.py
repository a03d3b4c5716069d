"""ANLS against values made by hand and an edit distance of another kind."""

from functools import cache

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lapilli.base.errors import DataError
from lapilli.evaluate import anls
from lapilli.evaluate.scorers import SCORERS
from lapilli.evaluate.task import Question

TEXT = st.text(alphabet="ab c", max_size=6)


@given(TEXT, TEXT)
def test_edit_distance_is_that_of_its_recursion(a, b):
    @cache
    def distance(i, j):
        if not i or not j:
            return i + j
        return min(distance(i - 1, j) + 1, distance(i, j - 1) + 1, distance(i - 1, j - 1) + (a[i - 1] != b[j - 1]))

    assert anls.edit_distance(a, b) == distance(len(a), len(b))


@pytest.mark.parametrize(
    ("answer", "truth", "value"),
    [("Lapilli", "lapilli", 1), ("lapili", "lapilli", 6 / 7), ("ab", "ac", 0.5), ("a", "xyz", 0), ("a  b", "A B", 1)],
)
def test_known_values(answer, truth, value):
    assert anls.similarity(answer, truth) == pytest.approx(value)


def test_the_best_of_several_truths_counts():
    asked = [Question(id="1", text="", truth=("invoice", "bill")), Question(id="2", text="", truth=("12",))]
    scores = anls.score(asked, {"1": "bil", "2": "99"}, {})
    assert scores.items == {"1": pytest.approx(0.75), "2": 0}
    assert scores.values == {"anls": pytest.approx(37.5)}
    assert anls.score(asked, {"1": "bil", "2": "99"}, {"threshold": 0.8}).values == {"anls": 0}
    with pytest.raises(DataError, match=r"options.threshold must be a number from 0 to 1"):
        anls.score(asked, {"1": "", "2": ""}, {"threshold": 50})


@pytest.mark.parametrize(
    ("scorer", "headline", "value"), [("anls", "anls", 100 * 2 / 3), ("vqa", "accuracy", 60), ("captions", "cider", 0)]
)
def test_tasks_of_ones_own_can_be_scored_so(folder, scorer, headline, value):
    """Ten people's answers to two questions about no picture."""
    folder.questions(
        {"question_id": i, "text": "What is it?", "answer": ["rad"] * 2 + ["blue"] * 8, "kind": "first"}
        for i in range(2)
    )
    job = folder.job(scorer=scorer, headline=headline, optional=["images"])
    scores = SCORERS[scorer].call(
        job.questions, {q.id: "rod" if scorer == "anls" else "rad" for q in job.questions}, {}
    )
    assert scores.values[headline] == pytest.approx(value)
