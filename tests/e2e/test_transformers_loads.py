"""A built folder is an ordinary transformers model: same ids, pixels, logits and greedy tokens without lapilli."""

import pytest
import torch
from tests.support.hf_process import transformers_alone
from tests.support.tiny import build_parrot, build_tiny, make_picture

import lapilli
from lapilli.generate.decoding import Decoding

QUESTION = "What is in the picture?"


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    return {
        "pad": build_tiny(root / "pad"),
        "square": build_tiny(root / "square", image_mode="square", feature_select="cls_patch"),
        "ends": build_parrot(root / "ends", says=" a red dog"),
    }


@pytest.fixture(scope="module")
def picture(tmp_path_factory):
    return make_picture(tmp_path_factory.mktemp("pictures") / "wide.jpg", 93, 57)


@pytest.fixture(scope="module")
def prompt(folders):
    """The rendered conversation; the three folders share their template."""
    messages = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "\n" + QUESTION}]}]
    tokenizer = lapilli.load(folders["pad"]).tokenizer
    return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)


@pytest.fixture(scope="module")
def alone(folders, picture, prompt, tmp_path_factory):
    out = tmp_path_factory.mktemp("out") / "answers.pt"
    return transformers_alone(list(folders.values()), picture, prompt, 12, out=out)


@pytest.mark.parametrize("name", ["pad", "square", "ends"])
def test_transformers_alone_gives_what_lapilli_gives(name, folders, picture, prompt, alone):
    theirs = alone[str(folders[name])]
    ours = lapilli.load(folders[name])
    inputs = ours.processor(text=prompt, images=[picture], return_tensors="pt")
    assert inputs["input_ids"][0].tolist() == theirs.ids
    assert torch.allclose(inputs["pixel_values"], theirs.pixels, atol=1e-5)
    with torch.no_grad():
        logits = ours.model(**inputs).logits[0]
    assert torch.allclose(logits, theirs.logits, atol=1e-4)
    answer = ours.answer(QUESTION, [picture], Decoding(max_new_tokens=12))
    assert list(answer.token_ids) == theirs.tokens
    assert answer.prompt_tokens == len(theirs.ids)
    if name == "ends":
        assert (answer.text, answer.finish) == ("a red dog", "stop")
