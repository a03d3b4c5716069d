"""Several models of one process over one base: asked at the same time, each answers as it does alone."""

import base64
from concurrent.futures import ThreadPoolExecutor

import pytest
from openai import OpenAI
from tests.serve.conftest import KEY
from tests.support.adapters import make_adapter
from tests.support.server_process import serving

import lapilli

QUESTIONS = ["What is it?", "How many birds are there, and of which colour?", "사진 속 음식은?"]
NAMES = ("med", "base", "ko")


@pytest.fixture(scope="module")
def folders(models, tmp_path_factory):
    made = tmp_path_factory.mktemp("adapters")
    make_adapter(models / "tiny", made / "med", 1)
    make_adapter(models / "tiny", made / "ko", 2, r=8, alpha=4, target_modules=["q_proj", "down_proj"])
    return {"med": made / "med", "base": models / "tiny", "ko": made / "ko"}


@pytest.fixture(scope="module")
def server(folders):
    named = [f"{name}={folders[name]}" for name in NAMES]
    with serving(*named, "--base", str(folders["base"]), environment={"LAPILLI_API_KEY": KEY}) as made:
        yield made


def test_asked_at_the_same_time_each_answers_as_alone(server, folders, models):
    alone = {name: lapilli.load(folder) for name, folder in folders.items()}
    picture = models / "wide.jpg"

    def asked(question):
        return [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question}]}]

    expected = {
        (name, question): alone[name].generate(asked(question), [picture], max_new_tokens=12)
        for name in NAMES
        for question in QUESTIONS
    }
    assert len(set(expected.values())) > len(QUESTIONS)  # the adapters say other things than the base

    url = "data:image/jpeg;base64," + base64.b64encode(picture.read_bytes()).decode()

    def ask(wanted):
        name, question = wanted
        content = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": question}]
        made = client.chat.completions.create(
            model=name, messages=[{"role": "user", "content": content}], max_tokens=12, temperature=0
        )
        return made.choices[0].message.content.strip()

    with OpenAI(base_url=server.url, api_key=KEY, max_retries=0, timeout=60) as client, ThreadPoolExecutor(9) as pool:
        assert sorted(m.id for m in client.models.list()) == sorted(NAMES)
        for _ in range(3):
            assert dict(zip(expected, pool.map(ask, expected), strict=True)) == expected


def test_what_is_shared_is_said(server):
    assert any("med, base, ko share weights of " in line and "held once" in line for line in server.lines)
