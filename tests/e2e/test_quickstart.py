"""The whole quickstart at a fraction of its size: every command runs and everything it promises is written."""

import json
import re

import pytest

from lapilli.base.errors import RunError
from lapilli.quickstart.plan import Sizes
from lapilli.quickstart.run import Quickstart, quickstart

TINY = Sizes(
    language_steps=3,
    language_batch=4,
    vision_steps=3,
    vision_batch=16,
    captions=64,
    conversations=64,
    held_out=4,
    exams=12,
)


def test_a_folder_with_something_in_it_is_refused(tmp_path):
    (tmp_path / "mine.txt").write_text("keep me")
    with pytest.raises(RunError, match="exists already"):
        Quickstart(tmp_path, TINY, say=lambda _line: None)


@pytest.mark.slow
def test_tiny_quickstart_from_scans_to_report(tmp_path):
    lines = []
    out = tmp_path / "run"
    quickstart(out, lines.append, TINY, threads=1)

    metrics = json.loads((out / "metrics.json").read_text())
    assert metrics["held_out"]["questions"] == 12
    assert sum(kind["questions"] for kind in metrics["held_out"]["by_kind"]) == 12
    assert [c.split()[1] for c in metrics["commands"]] == ["build", "train", "train"]
    assert all(f"$ {command}" in lines for command in metrics["commands"])
    for stage, batch in (("align", 32), ("instruct", 16)):
        rows = [json.loads(line) for line in (out / stage / "metrics.jsonl").read_text().splitlines()]
        assert len(rows) == 64 / batch
        assert rows[-1]["validation_loss"] > 0
        assert (out / stage / "model" / "config.json").is_file()

    page = (out / "report.html").read_text()
    assert page.count("<svg") == 2
    assert page.count("data:image/png;base64,") >= 12
    assert not re.search(r'(src|href)="(?!data:)|@import|url\(', page), "the report needs nothing but itself"
