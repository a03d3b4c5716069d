"""Every task that lapilli lists, from files in their published formats, by one command of a user's."""

import json
from pathlib import Path

import openpyxl
import pytest
from tests.support.benchmark_files import COUNT, make_benchmarks
from tests.support.tiny import build_parrot
from typer.testing import CliRunner

from lapilli.cli.main import app
from lapilli.evaluate.catalogue import all_tasks, task_names

pytestmark = pytest.mark.slow

UNSCORED = {"llava-bench", "mm-vet", "qbench-test", "qbench-zh-test", "vizwiz", "vqav2", "vqav2-test"}
"""Those without public answers, or for a judge."""


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    """What `lapilli evaluate --task` with all names of `lapilli tasks` left, and what it printed."""
    root = tmp_path_factory.mktemp("every")
    build_parrot(root / "model", " B.", positions=4096)
    make_benchmarks(root / "data")
    command = ["evaluate", str(root / "model"), "--task", ",".join(task_names()), "--data", str(root / "data")]
    told = CliRunner().invoke(app, [*command, "--out", str(root / "out"), "--device", "cpu"])
    assert told.exception is None, told.output
    return root / "out"


def results(out):
    return {path.parent.name: json.loads(path.read_text()) for path in out.glob("*/results.json")}


def read(written, task):
    (path,) = written[task]
    return json.loads(Path(path).read_text())


def test_all_are_answered_and_scored_by_the_default_protocol(out):
    made = results(out)
    names = {name for name in made if not name.startswith("qbench-zh")}
    assert names == {name for name in task_names() if not name.startswith("qbench-zh")}
    assert {name for name in made if name.startswith("qbench-zh")} == {
        f"{name}-{protocol}" for name in ("qbench-zh", "qbench-zh-test") for protocol in ("llava", "official")
    }
    for name, one in made.items():
        assert one["counts"]["missing"] == 0, name
        assert one["counts"]["answered"] >= 1, name
        unscored = name.removesuffix("-llava").removesuffix("-official") in UNSCORED
        assert bool(one["protocols"]) != unscored, name
        for found in one["protocols"].values():
            assert one["headline"] in found["values"], name
            assert found["values"][one["headline"]] is not None, name
    assert made["scienceqa"]["protocols"]["official"]["values"]["accuracy"] == 100
    assert made["mmbench"]["protocols"]["official"]["values"]["single_accuracy"] == 100
    assert made["mmbench-circular"]["protocols"]["official"]["values"]["accuracy"] == 0
    assert made["scienceqa-lepa"]["counts"]["answered"] == COUNT


def test_every_submission_file_is_there_and_in_its_servers_form(out):
    written = {name: one["submissions"] for name, one in results(out).items() if one["submissions"]}
    wanted = {task.name for task in all_tasks() if task.submission}
    found = {name.removesuffix("-llava").removesuffix("-official") for name in written}
    assert found == wanted
    assert read(written, "vqav2")[-1] == {"question_id": COUNT, "answer": ""}  # of test2015, not asked
    assert read(written, "vizwiz")[0] == {"image": "VizWiz_test_0.jpg", "answer": "b"}
    sheet = openpyxl.load_workbook(written["mmbench"][0]).active
    rows = list(sheet.values)
    assert [row[rows[0].index("prediction")] for row in rows[1:]] == ["B."] * COUNT
    assert json.loads(Path(written["seed-bench"][0]).read_text().splitlines()[0]) == {
        "question_id": 0,
        "prediction": "B.",
    }
    assert read(written, "mm-vet") == {f"v1_{i}": "B." for i in range(COUNT)}
    assert read(written, "gqa")[0] == {"questionId": "20", "prediction": "b"}


def test_all_of_it_is_reported_with_pictures(out, tmp_path):
    told = CliRunner().invoke(
        app, ["report", str(out), "--json", str(tmp_path / "r.json"), "--html", str(tmp_path / "r.html")]
    )
    assert told.exception is None, told.output
    assert "not shown" not in told.output
    data = json.loads((tmp_path / "r.json").read_text())
    for task in data["tasks"]:
        assert task["notes"] == [], task["task"]
        assert task["shown"], task["task"]
        assert all(case["replies"][0]["text"] for case in task["shown"]), task["task"]
    assert (tmp_path / "r.html").read_text().count("<img ") > 50
    told = CliRunner().invoke(app, ["compare", str(out), str(out), "--json"])
    compared = json.loads(told.output)
    assert all(one["difference"]["value"] == 0 for one in compared if one["difference"])
    assert {one["task"] for one in compared} == {name for name, one in results(out).items() if one["protocols"]}
