"""`lapilli convert` from the command line, and its folders as software without lapilli sees them."""

import json
import re
import shutil

import pytest
import torch
from tests.support.hf_process import transformers_alone
from tests.support.llava import REFERENCE, expected, restore
from typer.testing import CliRunner

import lapilli
from lapilli.base.errors import LapilliError
from lapilli.cli.main import app

PICTURE = REFERENCE / "images" / "1_120x80_RGB.png"
NAMES = ("tiny-llava-v1.5", "tiny-llava-v1.6-anyres", "tiny-llava-gqa")
PROMPT = "USER: <image>\nwhat is in the picture? ASSISTANT:"


def _run(*words):
    return CliRunner().invoke(app, ["convert", *(str(word) for word in words)])


def test_list_says_what_each_format_holds():
    shown = _run("--list")
    assert shown.exit_code == 0
    for word in ("llava", "hf", "lapilli", "cerebras", "mlp2x_gelu"):
        assert word in shown.output


def test_the_report_is_printed(tmp_path):
    source = restore(NAMES[0], tmp_path)
    done = _run(source, tmp_path / "out", "--to", "hf", "--template", "vicuna_v1")
    assert done.exit_code == 0, done.output
    assert re.search(r"converted +llava to hf: 0\.00 GB", done.output)
    assert re.search(r"tensors +80 of 80 equal bit for bit", done.output)
    assert re.search(r"logits +largest difference 0\.0e\+00", done.output)
    assert lapilli.load(tmp_path / "out").spec.stored_as == "transformers"


@pytest.mark.parametrize(
    ("words", "environment", "message"),
    [
        (["a", "b"], {}, "name a source, a destination and a format"),
        (["a", "b", "--to", "hf", "--push-to-hub", "x/y/z"], {}, "x/y/z: no name of a repository"),
        (["a", "b", "--to", "hf", "--push-to-hub", "x/y"], {}, "no Hugging Face token here"),
        (["a", "b", "--to", "hf", "--push-to-hub", "x/y"], {"HF_HUB_OFFLINE": "1"}, "HF_HUB_OFFLINE is set"),
    ],
)
def test_refused_before_anything_is_opened(words, environment, message, monkeypatch, tmp_path):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "none"))
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", bool(environment))
    done = _run(*words)
    assert isinstance(done.exception, LapilliError)
    assert message in str(done.exception)


@pytest.mark.slow
def test_transformers_alone_answers_from_the_folder_alone(tmp_path):
    """Equal logits and greedy tokens, after source and vision tower are gone and the folder was renamed and moved."""
    before, moved = {}, {}
    for name in NAMES:
        source = restore(name, tmp_path / "sources")
        ours = lapilli.load(source, template="vicuna_v1")
        inputs = ours.processor(text=PROMPT, images=[PICTURE], return_tensors="pt")
        with torch.no_grad():
            before[name] = inputs["input_ids"][0].tolist(), ours.model(**inputs).logits[0]
        done = _run(source, tmp_path / f"{name}-converted", "--to", "hf", "--template", "vicuna_v1")
        assert done.exit_code == 0, done.output
        place = tmp_path / "elsewhere" / f"mpt-{len(moved)}"
        place.parent.mkdir(exist_ok=True)
        moved[name] = (tmp_path / f"{name}-converted").rename(place)
    shutil.rmtree(tmp_path / "sources")
    for folder in moved.values():
        for file in [*folder.rglob("*.json"), *folder.rglob("*.jinja")]:
            assert str(tmp_path) not in file.read_text(encoding="utf-8"), file
        assert json.loads((folder / "generation_config.json").read_text())["suppress_tokens"] == [2000]
        assert (folder / "chat_template.jinja").is_file()
    alone = transformers_alone(list(moved.values()), PICTURE, PROMPT, 12, out=tmp_path / "answers.pt")
    for name, folder in moved.items():
        theirs, (ids, logits) = alone[str(folder)], before[name]
        assert theirs.ids == ids
        assert torch.allclose(theirs.logits[:, :2000], logits, atol=1e-5)
        prompt = expected(name)[0][0]
        assert prompt["prompt"] == PROMPT
        assert prompt["images"] == [PICTURE.name]
        wanted = prompt["greedy"][1:]
        assert theirs.tokens[: len(wanted)] == wanted[: len(theirs.tokens)]
