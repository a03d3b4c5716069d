import subprocess
import sys

import pytest

import lapilli
from lapilli.base.errors import ModelError


def test_load_gives_an_assistant(tiny, models):
    assert isinstance(tiny, lapilli.Assistant)
    assert tiny.template.name == "vicuna_v1"
    other = lapilli.load(models / "tiny", template="llava_llama_2")
    assert other.template.name == "llava_llama_2"
    assert other.processor.prompt("a").input_ids.tolist() != tiny.processor.prompt("a").input_ids.tolist()


def test_a_device_that_is_not_there_is_named(models, tiny):
    for device in ("cuda:99", "warp"):
        with pytest.raises(ModelError, match=f"device {device}"):
            lapilli.load(models / "tiny", device=device)


def test_forms_of_the_same_conversation_give_the_same_answer(tiny, picture):
    expected = tiny.generate("What is it?", images=[picture], max_new_tokens=6)
    image = {"type": "image", "image": str(picture)}
    text = {"type": "text", "text": "\nWhat is it?"}
    for form in (
        ("<image>\nWhat is it?", [picture]),
        ([{"role": "user", "content": "What is it?"}], [picture.read_bytes()]),
        ([{"role": "user", "content": [image, text]}], None),
    ):
        assert tiny.generate(*form, max_new_tokens=6) == expected
    assert tiny.generate("What is it?", max_new_tokens=6) != expected


def test_importing_the_package_is_instant():
    code = "import sys, lapilli; sys.exit(any(m in sys.modules for m in ('torch', 'transformers', 'PIL', 'pydantic')))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
