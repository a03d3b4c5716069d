"""lmms-eval itself runs a lapilli model, offline, on tasks in its own format."""

import json
import os
import subprocess
import sys
from importlib.util import find_spec

import pytest
import torch
from tests.evaluate.conftest import SAYS
from tests.support.tiny import make_picture

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        find_spec("lmms_eval") is None, reason="lmms-eval is not installed: pip install --no-deps lmms-eval"
    ),
]

UTILS = """
from PIL import Image


def picture(doc):
    return [Image.open(doc["picture"])]


def question(doc, lmms_eval_specific_kwargs=None):
    return doc["question"]


def choices(doc):
    return doc["choices"]


def said(doc, results):
    return {"same": float(results[0] == doc["answer"])}


def mean(values):
    return sum(values) / len(values)
"""

TASK = """
task: {task}
dataset_path: json
dataset_kwargs:
  data_files: {{test: {folder}/questions.jsonl}}
test_split: test
output_type: {kind}
doc_to_visual: !function utils.picture
doc_to_text: !function utils.question
doc_to_target: {target}
"""

WORDS = """
generation_kwargs: {until: ["음"], max_new_tokens: 16, temperature: 0, do_sample: false, use_cache: true}
process_results: !function utils.said
metric_list:
  - {metric: same, aggregation: !function utils.mean, higher_is_better: true}
"""

CHOICE = """
doc_to_choice: !function utils.choices
metric_list:
  - {metric: acc, aggregation: mean, higher_is_better: true}
"""


@pytest.fixture
def tasks(tmp_path):
    folder = tmp_path / "tasks"
    folder.mkdir()
    records = [
        {
            "question": f"What is it, no. {i}?",
            "picture": str(make_picture(folder / f"{i}.png", 60 + i, 50, seed=i)),
            "answer": "a red dog" if i < 3 else "no",
            "choices": ["a blue cat", SAYS] if i % 2 else [SAYS, "a blue cat"],
            "right": i % 2 if i < 3 else 1 - i % 2,
        }
        for i in range(4)
    ]
    (folder / "questions.jsonl").write_text("".join(json.dumps(r, ensure_ascii=False) + "\n" for r in records))
    (folder / "utils.py").write_text(UTILS)
    words = TASK.format(task="tiny_words", folder=folder, kind="generate_until", target="answer")
    choice = TASK.format(task="tiny_choice", folder=folder, kind="multiple_choice", target="right")
    (folder / "tiny_words.yaml").write_text(words + WORDS)
    (folder / "tiny_choice.yaml").write_text(choice + CHOICE)
    return folder


def test_lmms_eval_runs_a_model_of_ours_on_its_own_tasks(parrot, models, tasks, tmp_path):
    command = [
        sys.executable,
        "-m",
        "lmms_eval",
        "--model",
        "lapilli",
        "--model_args",
        f"pretrained={models / 'parrot'}",
    ]
    command += ["--tasks", "tiny_words,tiny_choice", "--include_path", str(tasks), "--batch_size", "3"]
    command += ["--device", "cpu", "--output_path", str(tmp_path / "out"), "--log_samples"]
    offline = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_HOME": str(tmp_path / "hf")}
    made = subprocess.run(
        command, env={**os.environ, **offline}, capture_output=True, text=True, timeout=500, check=False
    )
    found = list((tmp_path / "out").rglob("*_results.json"))
    assert len(found) == 1, made.stderr[-4000:]  # it ends with 0 after errors too
    results = found[0]
    found = json.loads(results.read_text())["results"]
    assert found["tiny_words"]["same,none"] == 0.75
    assert found["tiny_choice"]["acc,none"] == 0.75
    (samples,) = (tmp_path / "out").rglob("*samples_tiny_words.jsonl")
    lines = [json.loads(line) for line in samples.read_text().splitlines()]
    assert [line["filtered_resps"] for line in lines] == ["a red dog"] * 4
    assert "use_cache is not followed (4 requests)" in made.stderr + made.stdout


def test_a_choice_costs_what_training_would_compute(tiny, models, tasks):
    from lmms_eval.api.instance import Instance
    from PIL import Image

    from lapilli.data.sample import Image as Place
    from lapilli.data.sample import Message, Sample, Text
    from lapilli.evaluate.lmms_model import Lapilli
    from lapilli.generate.processor import collate

    model = Lapilli(pretrained=str(models / "tiny"))
    picture = Image.open(tasks / "0.png")
    model.task_dict = {"t": {"test": [{"picture": picture}]}}
    where = {"task": "t", "doc_id": 0, "repeats": 1}
    requests = [
        Instance("loglikelihood", ("What is it?", f" {text}", lambda doc: [doc["picture"]], 0, "t", "test"), i, where)
        for i, text in enumerate(("a red dog", "no"))
    ]
    losses = [found.text for found in model.loglikelihood(requests)]
    for (loss, says), text in zip(losses, ("a red dog", "no"), strict=True):
        asked = Message("user", (Place(), Text("\nWhat is it?")))
        sample = Sample("1", (asked, Message("assistant", (Text(text),))))
        example = tiny.encoder().encode(sample, [picture.size])
        prompt = tiny.processor.prompt("What is it?", [picture])
        inputs = collate([prompt], tiny.processor)
        inputs["input_ids"] = torch.as_tensor(example.input_ids)[None]
        inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
        with torch.no_grad():
            logits = tiny.model(**inputs).logits[0, :-1].float()
        logits[:, tiny.model.config.image_token_id] = float("-inf")  # which is never said
        labels = torch.as_tensor(example.labels)[1:]
        expected = torch.nn.functional.cross_entropy(logits, labels, ignore_index=-100)
        assert loss == pytest.approx(float(expected), abs=1e-4)
        learnt = labels != -100
        assert says == bool((logits.argmax(-1)[learnt] == labels[learnt]).all())


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"pretrained": "x", "tempalte": "vicuna_v1"}, 'did you mean "template"'),
        ({}, "pretrained=DIR"),
        ({"pretrained": "x", "batch_size": "auto"}, "a whole number, not auto"),
        ({"pretrained": "x", "dtype": "float31"}, "float32"),
    ],
)
def test_wrong_model_arguments_are_named(given, message):
    from lapilli.base.errors import ModelError
    from lapilli.evaluate.lmms_model import Lapilli

    with pytest.raises(ModelError, match=message):
        Lapilli(**given)
