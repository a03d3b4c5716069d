"""What vLLM and SGLang are given to render conversations with gives the token ids that models here are trained on."""

import pytest
from tests.support.tiny import build_tiny, make_picture

import lapilli
from lapilli.serve.upstream.folder import loadable

TEMPLATES = ("vicuna_v1", "llava_llama_2", "mistral_instruct", "chatml_direct")


def part(words):
    return {"type": "text", "text": words}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return build_tiny(tmp_path_factory.mktemp("engine") / "tiny")


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    root = tmp_path_factory.mktemp("pictures")
    return [make_picture(root / "a.png"), make_picture(root / "b.png", 40, 71, seed=3)]


@pytest.mark.parametrize("template", TEMPLATES)
def test_the_engines_prompt_is_ours(template, folder, pictures):
    from transformers import AutoProcessor

    picture = {"type": "image"}
    chats = (
        [{"role": "user", "content": [part("What is it?")]}],
        [
            {"role": "system", "content": [part("Be brief.")]},
            {"role": "user", "content": [part("First "), picture, part(" then "), picture, part(" differ?")]},
            {"role": "assistant", "content": [part("Yes.")]},
            {"role": "user", "content": [part("Why?")]},
        ],
    )
    ours = lapilli.load(folder, template=template)
    processor = AutoProcessor.from_pretrained(folder, backend="pil")
    jinja = loadable(folder, "vllm", template).chat_template
    for chat in chats:
        files = [p for p in pictures if any(one["type"] == "image" for turn in chat for one in turn["content"])]
        wanted = ours.processor.prompt(chat, files).input_ids.tolist()
        text = processor.apply_chat_template(chat, chat_template=jinja, add_generation_prompt=True)
        loaded = [lapilli.generate.conversation.open_picture(f) for f in files] or None
        made = processor(text=text, images=loaded, add_special_tokens=False)
        assert list(made["input_ids"][0]) == wanted
