"""`lapilli evaluate` as a user has it: killed, stopped and started again; on two processes; scored and compared."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
from tests.support.tiny import build_parrot, make_picture

from lapilli.cli.main import main

COMMAND = [sys.executable, "-m", "lapilli.cli"]
QUESTIONS = 36
TASK = """
name: mine
title: Mine
about: for a test
source: [here]
files: {questions: q.jsonl, images: pictures}
reader: own
scorer: contains
decoding: {max_new_tokens: 100}
"""


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("evaluate")
    build_parrot(root / "model", " one blue bird", endless=True)
    (root / "pictures").mkdir()
    for i in range(3):
        make_picture(root / "pictures" / f"{i}.png", seed=i)
    lines = (
        {"question_id": i, "text": f"What {i}?", "image": f"{i % 3}.png", "answer": "bird"} for i in range(QUESTIONS)
    )
    (root / "q.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (root / "mine.yaml").write_text(TASK)
    return root


def start(root, out, *arguments, **environment):
    command = [*COMMAND, "evaluate", "model", "--task", "mine.yaml", "--out", out, "--device", "cpu", *arguments]
    return subprocess.Popen(
        command, cwd=root, text=True, env=os.environ | environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )


def ids(file):
    """Question ids of the whole lines of an answers file."""
    text = file.read_text() if file.exists() else ""
    return [json.loads(line)["question_id"] for line in text[: text.rfind("\n") + 1].splitlines()]


def wait_for(file, count, process):
    until = time.monotonic() + 120
    while len(ids(file)) < count:
        assert time.monotonic() < until
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)


@pytest.mark.slow
def test_a_killed_and_a_stopped_evaluation_go_on_where_they_were(root):
    answers = root / "out" / "mine" / "answers.jsonl"
    killed = start(root, "out", "--batch-size", "2")
    wait_for(answers, 5, killed)
    killed.kill()
    killed.communicate()
    first = ids(answers)
    assert 5 <= len(first) < QUESTIONS

    stopped = start(root, "out", "--batch-size", "2")
    wait_for(answers, len(first) + 3, stopped)
    stopped.send_signal(signal.SIGTERM)
    _, said = stopped.communicate(timeout=60)
    second = ids(answers)
    assert stopped.returncode == 128 + signal.SIGTERM
    assert second[: len(first)] == first
    assert len(second) < QUESTIONS
    assert f"mine: stopped by SIGTERM after {len(second)} of {QUESTIONS} answers; the same command goes on" in said
    assert "cancelled" not in answers.read_text()

    shown, said = start(root, "out").communicate(timeout=120)
    assert f"{len(second)} questions are answered already; {QUESTIONS - len(second)} are left" in said
    assert ids(answers)[: len(second)] == second
    assert sorted(ids(answers)) == list(range(QUESTIONS))
    assert "100.00" in shown


@pytest.mark.slow
def test_two_processes_as_torchrun_starts_them(root):
    common = {"WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": "1", "TORCHELASTIC_RUN_ID": "t"}
    first, second = (start(root, "out-two", RANK=str(r), LOCAL_RANK=str(r), **common) for r in range(2))
    shown, said = first.communicate(timeout=120)
    assert (first.returncode, second.wait(60)) == (0, 0), (said, second.communicate())
    assert second.communicate()[0] == ""  # only the first has something to tell
    folder = root / "out-two" / "mine"
    both = ids(folder / "answers-00-of-02.jsonl"), ids(folder / "answers-01-of-02.jsonl")
    assert sorted(both[0] + both[1]) == list(range(QUESTIONS))
    assert min(map(len, both)) == 12  # three pictures with twelve questions each
    assert "100.00" in shown
    assert json.loads((folder / "results.json").read_text())["counts"]["answered"] == QUESTIONS


def test_scoring_and_comparing_from_the_command_line(root, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(root)
    for name, right in (("a", 12), ("b", 30)):
        lines = ({"question_id": i, "text": "a bird" if i < right else "a cat"} for i in range(QUESTIONS))
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        sys.argv = [
            "lapilli",
            "score",
            "mine.yaml",
            "--answers",
            f"{tmp_path}/{name}.jsonl",
            "--out",
            f"{tmp_path}/{name}",
        ]
        with pytest.raises(SystemExit) as ended:
            main()
        assert not ended.value.code
    assert "33.33" in capsys.readouterr().out
    sys.argv = ["lapilli", "compare", f"{tmp_path}/a", f"{tmp_path}/b", "--json"]
    with pytest.raises(SystemExit) as ended:
        main()
    (llava, _official) = json.loads(capsys.readouterr().out)
    assert llava["difference"]["value"] == pytest.approx(50)
    assert llava["difference"]["b_better"] == 18


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("evaluate", "model", "--task", "no-such", "--data", ".", "--out", "x"), 'unknown task "no-such"'),
        (("evaluate", "model", "--task", "mine.yaml,mine.yaml,./mine.yaml", "--out", "x"), "two tasks are called mine"),
        (("evaluate", "model", "--task", "mine.yaml", "--out", "x", "--protocol", "lava"), 'did you mean "llava"?'),
        (("evaluate", "nowhere", "--task", "mine.yaml", "--out", "x"), "nowhere: no such folder"),
        (("evaluate", "model", "--task", "mine.yaml", "--data", "nowhere", "--out", "x"), "nowhere: no such folder"),
        (("score", "mine.yaml", "--answers", "nowhere.jsonl"), "nowhere.jsonl: can't be read"),
        (("compare", "nowhere", "nowhere"), "nowhere: no results.json"),
        (("tasks", "no-such"), 'unknown task "no-such"'),
    ],
)
def test_what_is_wrong_on_the_command_line_is_one_message(root, capsys, monkeypatch, arguments, said):
    monkeypatch.chdir(root)
    monkeypatch.setattr(sys, "argv", ["lapilli", *arguments])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 1
    assert said in capsys.readouterr().err
    assert not (root / "x").exists()
