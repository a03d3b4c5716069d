"""Results on disk: headlines that are no mean, values that are not defined, and comparing both kinds."""

import json
import math

import numpy as np
import pytest

from lapilli.base.errors import DataError
from lapilli.evaluate.compare import compare, only_in
from lapilli.evaluate.results import Counts, Results, outcome, read_results, result_folders, write_items, write_results
from lapilli.evaluate.task import Scores, Task

TASK = Task(name="t", title="T", about="t", source=("t",), files={}, reader="own", headline="f1")


def f1(right, predicted):
    """Scores whose headline is the F1 of yes-or-no answers; `right`, `predicted` are booleans (n,)."""
    right, predicted = np.array(right), np.array(predicted)

    def value(indices):
        r, p = right[indices], predicted[indices]
        both = (r & p).sum()
        return 100 * 2 * both / (r.sum() + p.sum()) if both else math.nan

    names = tuple(str(i) for i in range(len(right)))
    return Scores({"f1": value(np.arange(len(right))), "recall": math.nan}, again=value, order=names)


def write(folder, scores, name="t", sha="1"):
    folder.mkdir(parents=True)
    made, resamples = outcome(scores, TASK)
    write_items(folder, "official", scores, resamples)
    counts = Counts(in_files=1, asked=1, answered=1, missing=0)
    files = {"questions": {"path": "q", "sha256": sha}}
    results = Results(
        task=name, title="T", headline="f1", higher_is_better=True, protocols={"official": made}, model={"name": "m"},
        decoding=None, counts=counts, files=files, answers={},
    )  # fmt: skip
    write_results(folder, results)
    return results


@pytest.fixture
def truth():
    return np.arange(200) % 2 == 0


def test_a_headline_that_is_no_mean_has_an_interval_from_its_own_resamples(tmp_path, truth):
    made = write(tmp_path / "a", f1(truth, truth ^ (np.arange(200) % 10 == 0)))
    found = made.protocols["official"]
    assert found.values["recall"] is None  # not defined, and JSON says null
    assert found.interval[0] < found.values["f1"] < found.interval[1]
    assert found.interval[1] - found.interval[0] < 15
    assert found.scored == 200
    assert read_results(tmp_path / "a") == made
    assert "NaN" not in (tmp_path / "a" / "results.json").read_text()


def test_such_headlines_are_compared_by_shared_resamples(tmp_path, truth):
    wrong = np.arange(200) % 10 == 0
    write(tmp_path / "a" / "t", f1(truth, truth ^ wrong))
    write(tmp_path / "b" / "t", f1(truth, truth ^ (wrong & (np.arange(200) < 40))), sha="2")
    (made,) = compare(tmp_path / "a", tmp_path / "b")
    assert made.difference.test == "bootstrap"
    assert made.difference.value == pytest.approx(made.b - made.a)
    assert 0 < made.difference.low < made.difference.value < made.difference.high
    assert made.difference.p < 0.05
    assert made.note == "the files of questions differ"
    write(tmp_path / "c" / "t", f1(truth[:100], truth[:100]))
    (other,) = compare(tmp_path / "a", tmp_path / "c")
    assert other.difference is None
    assert "not the same questions" in other.note


def test_tasks_on_one_side_only_are_named_and_nothing_in_common_is_refused(tmp_path, truth):
    write(tmp_path / "a" / "t", f1(truth, truth))
    write(tmp_path / "a" / "u", f1(truth, truth), "u")
    write(tmp_path / "b" / "u", f1(truth, truth), "u")
    assert only_in(tmp_path / "a", tmp_path / "b") == (["t"], [])
    with pytest.raises(DataError, match="no task in common"):
        compare(tmp_path / "a" / "t", tmp_path / "b")
    assert result_folders(tmp_path / "a") == {"t": tmp_path / "a" / "t", "u": tmp_path / "a" / "u"}


def test_a_scorer_without_the_tasks_headline_is_a_mistake_in_the_task():
    with pytest.raises(DataError, match='its headline "f1" is none of its scores'):
        outcome(Scores({"accuracy": 1.0}, {"1": 1.0}), TASK)


def test_results_that_are_not_ours_are_refused(tmp_path):
    (tmp_path / "results.json").write_text(json.dumps({"task": "t"}))
    with pytest.raises(DataError, match="not results of lapilli evaluate"):
        read_results(tmp_path)
