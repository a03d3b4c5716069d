"""Tasks followed while a model learns: scored when due, by the model as it is, and learning goes on unchanged."""

import json
import os
import re
import signal
from pathlib import Path

import pytest
import yaml
from tests.support.tiny import make_picture

import lapilli
from lapilli.assemble.build import BuildOptions, build
from lapilli.base.errors import LapilliError
from lapilli.evaluate.results import read_results
from lapilli.generate.decoding import Decoding
from lapilli.recipe.load import load_recipe
from lapilli.run.evaluation import follow
from lapilli.run.stages import run_recipe
from lapilli.train.run import train_stage

REFERENCE = Path(__file__).parents[1] / "reference"


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("parts") / "base"
    parts = REFERENCE / "checkpoints"
    build(BuildOptions(str(parts / "vision-tower"), str(parts / "llama-base"), dtype="float32"), folder)
    return folder


@pytest.fixture
def recipe(base, tmp_path):
    """Four steps of two records; the task beside it has six questions and the pictures they are about."""
    records = json.loads((REFERENCE / "training/instruct.json").read_text())[:8]
    (tmp_path / "instruct.json").write_text(json.dumps(records))
    task = {
        "name": "mine",
        "title": "Mine",
        "about": "for a test",
        "source": ["here"],
        "files": {"questions": "q.jsonl", "images": "."},
        "reader": "own",
        "scorer": "contains",
        "decoding": {"max_new_tokens": 6},
    }
    (tmp_path / "task").mkdir()
    (tmp_path / "task/mine.yaml").write_text(yaml.safe_dump(task))
    for i in range(2):
        make_picture(tmp_path / f"task/{i}.png", seed=i)
    questions(tmp_path / "task", ["?"] * 6)
    (tmp_path / "r.yaml").write_text(f"""\
model: {base}
out: run
data: {{train: instruct.json, images: {REFERENCE / "training/images"}, workers: 0}}
train: {{global_batch_size: 2, learning_rate: 1e-2, warmup_ratio: 0, evaluate: [{{task: task/mine.yaml, every: 2}}]}}
run: {{precision: fp32, device: cpu, threads: 1}}
""")
    return tmp_path / "r.yaml"


def questions(folder, answers):
    lines = [
        {"question_id": i, "text": f"What is it, no. {i}?", "image": f"{i % 2}.png", "answer": answer}
        for i, answer in enumerate(answers)
    ]
    (folder / "q.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def run(path, *overrides, **options):
    said = []
    with open(os.devnull, "w") as stream:
        run_recipe(load_recipe(str(path), list(overrides)), say=said.append, stream=stream, **options)
    return said


def rows(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def texts(folder):
    lines = (folder / "answers.jsonl").read_text().splitlines()
    return {str(line["question_id"]): line["text"] for line in map(json.loads, lines)}


@pytest.mark.parametrize(
    "more",
    [
        [],
        pytest.param(["train.lora={r: 4, dropout: 0.5}", "train.gradient_checkpointing=full"], marks=pytest.mark.slow),
        pytest.param(["run.precision=bf16", "train.freeze=projector"], marks=pytest.mark.slow),
        pytest.param(["run.precision=bf16", "train.freeze=full"], marks=pytest.mark.slow),
    ],
)
def test_scores_are_kept_when_due_and_change_nothing_that_is_learned(recipe, tmp_path, more):
    (said,) = [line for line in run(recipe, *more) if "is evaluated on" in line]
    assert said == "stage train is evaluated on mine: 6 questions, every 2 steps, and after the last"
    run(recipe, *more, "train.evaluate=[]", f"out={tmp_path / 'plain'}")
    followed, plain = rows(tmp_path / "run"), rows(tmp_path / "plain")
    assert [(r["loss"], r["grad_norm"]) for r in followed] == [(r["loss"], r["grad_norm"]) for r in plain]
    assert [r["step"] for r in followed if "evaluation" in r] == [2, 4]
    made = read_results(tmp_path / "run/evaluation/step-000004/mine")
    assert followed[-1]["evaluation"] == {"mine": made.protocols["llava"].values["accuracy"]}
    assert (made.counts.answered, made.model["step"]) == (6, 4)
    assert "Evaluation" in (tmp_path / "run/report.html").read_text()


def test_the_model_that_is_asked_is_the_model_that_is_exported(recipe, tmp_path):
    run(recipe)
    last = texts(tmp_path / "run/evaluation/step-000004/mine")
    model = lapilli.load(tmp_path / "run")
    asked = [model.answer(f"What is it, no. {i}?", [tmp_path / f"task/{i % 2}.png"], Decoding(6)) for i in range(6)]
    assert last == {str(i): answer.text for i, answer in enumerate(asked)}
    assert last != texts(tmp_path / "run/evaluation/step-000002/mine")  # else nothing was learned that shows


def test_a_score_is_of_the_answers(recipe, tmp_path):
    run(recipe, "train.max_steps=1")
    said = texts(tmp_path / "run/evaluation/step-000001/mine")
    questions(tmp_path / "task", [said[str(i)] if i < 3 and said[str(i)] else "never said" for i in range(6)])
    run(recipe, "train.max_steps=1", f"out={tmp_path / 'again'}")
    right = sum(bool(said[str(i)]) for i in range(3))
    assert right
    (row,) = rows(tmp_path / "again")
    assert row["evaluation"] == {"mine": pytest.approx(100 * right / 6)}


def test_a_question_that_cannot_be_asked_is_counted_and_stops_nothing(recipe, tmp_path):
    picture = tmp_path / "task/1.png"
    picture.write_bytes(picture.read_bytes()[:-100])
    run(recipe, "train.max_steps=1")
    made = read_results(tmp_path / "run/evaluation/step-000001/mine")
    assert (made.counts.answered, made.counts.missing) == (3, 3)
    assert (tmp_path / "run/model").is_dir()


def test_a_stop_during_an_evaluation_saves_the_step_and_keeps_no_half_score(recipe, tmp_path):
    task = tmp_path / "task/mine.yaml"
    loaded = load_recipe(str(recipe), [f"train.evaluate=[{{task: {task}, every: 1}}]"])
    (stage,) = loaded.recipe.stages
    follower = follow(stage)

    def stopped_at_once(*arguments):
        os.kill(os.getpid(), signal.SIGTERM)
        return follower(*arguments)

    with open(os.devnull, "w") as stream:
        outcome = train_stage(stage, loaded.stage_origins("train"), stream=stream, evaluate=stopped_at_once)
    assert (outcome.step, outcome.stopped_by) == (1, "SIGTERM")
    assert not (tmp_path / "run/evaluation/step-000001/mine").exists()
    run(recipe)
    assert [r["step"] for r in rows(tmp_path / "run") if "evaluation" in r] == [2, 4]


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("[{task: mine.yaml, evry: 2}]", r'evry.*did you mean "every"'),
        ("[{task: vqav22, data: .}]", 'unknown task "vqav22"'),
        ("[{task: pope}]", "pope: data: name its folder"),
        ("[{task: task/mine.yaml}, {task: task/mine.yaml}]", "mine is named twice"),
        ("[{task: task/mine.yaml, data: nowhere}]", "nowhere: no such folder"),
        ("[{task: task/judged.yaml}]", "judged is scored by a judge, whom training does not ask"),
    ],
)
def test_what_cannot_be_evaluated_is_told_before_anything_is_written(recipe, tmp_path, monkeypatch, value, message):
    monkeypatch.chdir(tmp_path)
    task = (tmp_path / "task/mine.yaml").read_text().replace("mine", "judged").replace("contains", "judge")
    (tmp_path / "task/judged.yaml").write_text(task)
    with pytest.raises(LapilliError, match=re.compile(message, re.DOTALL)):
        run(recipe, f"train.evaluate={value}")
    assert not (tmp_path / "run").exists()


def test_missing_pictures_and_unknown_truth_are_told_before_anything_is_written(recipe, tmp_path):
    (tmp_path / "task/1.png").unlink()
    with pytest.raises(LapilliError, match="3 of 6 questions lack their picture"):
        run(recipe)
    make_picture(tmp_path / "task/1.png", seed=1)
    lines = [json.loads(line) for line in (tmp_path / "task/q.jsonl").read_text().splitlines()]
    (tmp_path / "task/q.jsonl").write_text(
        "".join(json.dumps({k: v for k, v in line.items() if k != "answer"}) + "\n" for line in lines)
    )
    with pytest.raises(LapilliError, match="right answers are not public"):
        run(recipe)
    assert not (tmp_path / "run").exists()
