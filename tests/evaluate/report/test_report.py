"""Reports say what the results say, show what they claim to show, and load nothing."""

import base64
import hashlib
import json
import re
from html.parser import HTMLParser

import pytest
from tests.evaluate.conftest import SAYS
from tests.evaluate.report.conftest import HOSTILE
from tests.support.benchmark_files import mmbench_file
from tests.support.benchmark_files import mmbench_row as row
from tests.support.tiny import make_picture

from lapilli.base.errors import DataError
from lapilli.evaluate.answers import answer_line
from lapilli.evaluate.catalogue import load_task
from lapilli.evaluate.job import open_job
from lapilli.evaluate.report.choose import choose
from lapilli.evaluate.report.gather import gather, shown_truth
from lapilli.evaluate.report.write import write_report
from lapilli.evaluate.run import score
from lapilli.evaluate.task import Question


class Page(HTMLParser):
    """What a browser would load and run, and each card's facts."""

    def __init__(self, text):
        super().__init__()
        self.loads, self.scripts, self.cases, self.alts, self._in_script = [], [], [], [], False
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        given = dict(attributes)
        self.loads += [given[key] for key in ("src", "href", "data", "action") if key in given]
        self._in_script = tag == "script"
        if tag == "img":
            self.alts.append(given["alt"])
        if "data-case" in given:
            self.cases.append(json.loads(given["data-case"]))
        assert not [key for key in given if key.startswith("on")]

    def handle_data(self, data):
        if self._in_script:
            self.scripts.append(data)
        self._in_script = False


@pytest.fixture
def written(outs, tmp_path):
    paths = {"html": tmp_path / "r.html", "markdown": tmp_path / "r.md", "json": tmp_path / "r.json"}
    made = write_report(outs, **paths)
    return made, paths["html"].read_text(), paths["markdown"].read_text(), json.loads(paths["json"].read_text())


def test_models_stand_beside_each_other_with_values_intervals_and_differences(written):
    made, html, markdown, data = written
    assert data["models"] == ["a", "b"]
    (task,) = data["tasks"]
    low, high = task["results"]["a"]["protocols"]["llava"]["interval"]
    row = f"| mine | llava, official | accuracy | 66.67 \\[{low:.2f}, {high:.2f}\\] |"
    assert row in markdown
    assert f"66.67 [{low:.2f}, {high:.2f}]" in html
    assert {(d["protocol"], d["less a"]) for d in task["differences"]} == {("llava", "-33.33"), ("official", "-33.33")}
    assert "| first | 66.67 | 33.33 | 6 |" in markdown
    assert made.notes == ("mine: 12 of 12 questions are shown (12 of 12 that models answer differently)",)


def test_every_answer_stands_with_its_question_truth_score_and_pictures(written):
    _, html, markdown, data = written
    shown = {case["id"]: case for case in data["tasks"][0]["shown"]}
    first, second = shown["1"]["replies"]
    assert (first["text"], first["verdict"], first["scores"]) == (SAYS, "right", {"llava": 1.0, "official": 1.0})
    assert (second["text"], second["verdict"]) == ("no", "wrong")
    assert [r["verdict"] for r in shown["0"]["replies"]] == ["wrong", "right"]
    assert shown["7"]["expected"] == SAYS.upper()
    assert shown["7"]["images"] == ["1.png"]
    assert shown["7"]["groups"] == {"kind": "second"}
    page = Page(html)
    assert sorted(page.alts) == sorted(f"{i % 3}.png" for i in range(12))
    assert {tuple(case["verdicts"]) for case in page.cases} == {("right", "wrong"), ("wrong", "right")}
    assert "Picture: 1.png" in markdown


def test_the_page_loads_nothing_and_runs_only_its_own_script(written):
    _, html, markdown, _ = written
    page = Page(html)
    assert all(re.fullmatch(r"data:image/jpeg;base64,[A-Za-z0-9+/=]+", address) for address in page.loads)
    (script,) = page.scripts
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert f"script-src 'sha256-{digest}'" in html
    assert "default-src 'none'" in html
    assert HOSTILE not in html
    assert "&lt;script&gt;alert(" in html
    (line,) = [line for line in markdown.splitlines() if "alert" in line and line.startswith("| b ")]
    assert len(re.findall(r"(?<!\\)\|", line)) == 5  # four cells: what the answer holds of bars is escaped
    assert "\\<script\\>" in line


def test_pictures_are_bounded_and_the_rest_is_counted(outs, tmp_path):
    write_report(outs, html=tmp_path / "whole.html")
    one = len(base64.b64decode(Page((tmp_path / "whole.html").read_text()).loads[0].split(",")[1]))
    made = write_report(outs, html=tmp_path / "r.html", max_bytes=one * 3)
    shown = len(Page((tmp_path / "r.html").read_text()).alts)
    assert 1 <= shown <= 3
    assert f"{12 - shown} pictures are left out: --picture-mb is reached" in made.notes


def test_a_picture_that_cannot_be_opened_is_named(outs, folder, tmp_path):
    (folder.root / "pictures" / "2.png").write_bytes(b"no picture")
    made = write_report(outs, html=tmp_path / "r.html")
    assert len(Page((tmp_path / "r.html").read_text()).alts) == 8
    assert "2.png" in made.notes[-1]


def test_a_limit_takes_of_each_kind_alike_and_of_every_group(folder, tmp_path):
    file = tmp_path / "a.jsonl"
    file.write_text("".join(json.dumps({"question_id": i, "text": SAYS}) + "\n" for i in range(12)))
    score(folder.job(), [file], tmp_path / "a", name="a")
    (task,) = gather([tmp_path / "a"])
    made = choose(task, 6)
    assert made.found == {"wrong": 4, "right": 8}
    assert made.shown == {"wrong": 3, "right": 3}
    assert {case.groups["kind"] for case in made.cases if case.stratum == "right"} == {"first", "second"}
    assert choose(task, 10).shown == {"wrong": 4, "right": 6}
    assert choose(task, 0).cases == ()


def test_protocols_that_differ_have_rows_and_scores_of_their_own(folder, tmp_path):
    keys = {"protocols": {"official": {"ignore_case": False}}}
    job = open_job(folder.task(**keys), folder.root, ("llava", "official"))
    file = tmp_path / "a.jsonl"
    file.write_text("".join(json.dumps({"question_id": i, "text": SAYS}) + "\n" for i in range(12)))
    score(job, [file], tmp_path / "a", name="a")
    write_report([tmp_path / "a"], markdown=tmp_path / "r.md", html=tmp_path / "r.html")
    markdown = (tmp_path / "r.md").read_text()
    assert re.search(r"\| mine \| llava \| accuracy \| 66\.67 ", markdown)
    assert re.search(r"\| mine \| official \| accuracy \| 0\.00 ", markdown)
    assert "llava 1, official 0" in (tmp_path / "r.html").read_text()


@pytest.mark.parametrize("change", ["gone", "changed"])
def test_without_its_files_a_task_shows_its_answers_and_says_so(outs, folder, tmp_path, change):
    file = folder.root / "q.jsonl"
    if change == "gone":
        file.unlink()
    else:
        file.write_text(file.read_text().replace("What is it", "What was it"))
    made = write_report(outs, json=tmp_path / "r.json")
    said = "is not there any more" if change == "gone" else "has changed since the evaluation"
    assert said in made.notes[-1]
    (task,) = json.loads((tmp_path / "r.json").read_text())["tasks"]
    assert len(task["shown"]) == 12
    assert {case["expected"] for case in task["shown"]} == {""}
    assert task["shown"][0]["replies"][0]["text"] == SAYS


def test_the_rounds_of_a_question_stand_with_it_and_pictures_inside_data_files_are_shown(tmp_path):
    files = [make_picture(tmp_path / f"{seed}.png", seed=seed).read_bytes() for seed in range(2)]
    rows = [row(i, base64.b64encode(files[i % 2]).decode(), answer="AB"[i % 2]) for i in range(4)]
    job = open_job(load_task("mmbench-circular"), mmbench_file(tmp_path / "d", rows), ["llava"])
    lines = [answer_line(q, "A" if q.id.startswith("3") else q.truth, "m", {}) for q in job.questions]
    file = tmp_path / "a.jsonl"
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    score(job, [file], tmp_path / "a", name="a")
    write_report([tmp_path / "a"], json=tmp_path / "r.json", html=tmp_path / "r.html")
    (task,) = json.loads((tmp_path / "r.json").read_text())["tasks"]
    assert task["questions"] == {"wrong": 1, "right": 3}
    assert task["shown"][0]["replies"][0]["text"].splitlines() == [
        "A",
        "asked again: A (expected: A. two dogs)",
        "asked again: A (expected: C. two dogs)",
    ]
    assert len(Page((tmp_path / "r.html").read_text()).loads) == 4


def test_missing_and_unscored_answers_are_said(folder, tmp_path):
    job = folder.job(scorer=None)
    file = tmp_path / "a.jsonl"
    file.write_text("".join(json.dumps({"question_id": i, "text": SAYS}) + "\n" for i in range(11)))
    score(job, [file], tmp_path / "a", allow_missing=1, name="a")
    write_report([tmp_path / "a"], json=tmp_path / "r.json", markdown=tmp_path / "r.md")
    (task,) = json.loads((tmp_path / "r.json").read_text())["tasks"]
    assert task["questions"] == {"unscored": 11, "missing": 1}
    assert task["shown"][-1]["replies"][0]["reason"] == "no answer to it"
    assert "| mine | - | - | not scored |" in (tmp_path / "r.md").read_text()


def test_models_of_one_name_are_told_apart_and_a_folder_counts_once(outs, folder, tmp_path):
    score(folder.job(), [tmp_path / "a.jsonl"], tmp_path / "again", name="a")
    (task,) = gather([outs[0], tmp_path / "again"])
    assert [entry.model for entry in task.entries] == [f"a ({outs[0]})", f"a ({tmp_path / 'again'})"]
    with pytest.raises(DataError, match="named more than once"):
        gather([outs[0], outs[0] / "mine"])


@pytest.mark.parametrize(
    ("truth", "choices", "said"),
    [
        ("B", ("cat", "dog"), "B. dog"),
        (1, ("cat", "dog"), "B. dog"),
        ("b", (), "b"),
        (("red", "red", "dark red"), (), "red (2) / dark red"),
        ({"x": 1}, (), '{"x": 1}'),
        (None, (), ""),
    ],
)
def test_the_right_answer_is_shown_in_words(truth, choices, said):
    assert shown_truth(Question("1", "?", truth=truth, choices=choices)) == said
