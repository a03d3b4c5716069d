"""One protocol scored after the other: both are kept, unless they would be of different things."""

import json

import pytest
from tests.evaluate.conftest import SAYS

from lapilli.evaluate.results import read_items, read_results
from lapilli.evaluate.run import evaluate, score

MODEL = {"name": "parrot", "path": "x", "fingerprint": "1"}
APART = {"protocols": {"official": {"ignore_case": False}}}


def test_a_second_protocol_stands_beside_the_first(folder, parrot, tmp_path):
    out = tmp_path / "out"
    evaluate([folder.job(("llava",), **APART)], out, MODEL, lambda: parrot)
    (made,) = evaluate([folder.job(("official",), **APART)], out, MODEL, lambda: pytest.fail("all is answered"))
    assert list(made.protocols) == ["llava", "official"]
    assert made == read_results(out / "mine")
    (both,) = evaluate([folder.job(**APART)], out, MODEL, lambda: parrot)
    assert both.protocols == made.protocols
    (again,) = evaluate([folder.job(("llava",), **APART)], out, MODEL, lambda: parrot)
    assert again.protocols == both.protocols
    assert len(read_items(out / "mine", "official")) == 12


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"limit": 6}, "of other questions"),
        ({"scorer": "contains"}, "in another way"),
        ({"options": {}}, "in another way"),
    ],
)
def test_numbers_of_something_else_are_taken_out_and_that_is_said(folder, parrot, tmp_path, change, why):
    out = tmp_path / "out"
    evaluate([folder.job()], out, MODEL, lambda: parrot)
    (made,) = evaluate([folder.job(("llava",), **change)], out, MODEL, lambda: parrot)
    assert list(made.protocols) == ["llava"]
    assert "earlier score by protocol official is taken out" in made.notes[-1]
    assert why in made.notes[-1]
    assert not (out / "mine" / "items-official.jsonl").exists()


def test_other_answers_take_out_too(folder, tmp_path):
    for text, protocols in ((SAYS, ("llava", "official")), ("no", ("official",))):
        file = tmp_path / "a.jsonl"
        file.write_text("".join(json.dumps({"question_id": i, "text": text}) + "\n" for i in range(12)))
        made = score(folder.job(protocols), [file], tmp_path / "out")
    assert list(made.protocols) == ["official"]
    assert "its answers were others" in made.notes[-1]
