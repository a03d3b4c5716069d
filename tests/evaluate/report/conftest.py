"""Two models' answers to the twelve questions of `folder`, scored: no model is needed to report on answers."""

import json

import pytest
from tests.evaluate.conftest import SAYS

from lapilli.evaluate.run import score

HOSTILE = '<script>alert("x")</script> | `b` <img src="http://evil.test/x.png">'


@pytest.fixture
def outs(folder, tmp_path):
    """Model `a` says what is right for eight questions; `b` says `no`, right for the other four, and worse to no. 5."""
    job = folder.job()
    made = []
    for name, says in (("a", lambda _: SAYS), ("b", lambda i: HOSTILE if i == 5 else "no")):
        file = tmp_path / f"{name}.jsonl"
        file.write_text("".join(json.dumps({"question_id": i, "text": says(i)}) + "\n" for i in range(12)))
        score(job, [file], tmp_path / name, name=name)
        made.append(tmp_path / name)
    return made
