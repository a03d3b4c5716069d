"""Any parts: every pair of architectures builds, trains, generates, is saved and loads again, packed or not."""

import json
import subprocess
import sys

import numpy as np
import PIL.Image
import pytest
import torch
from tests.support.parts import LANGUAGE, VISION, make_language, make_vision

import lapilli
from lapilli.assemble.build import BuildOptions, build
from lapilli.assemble.load import load
from lapilli.assemble.save import save
from lapilli.data.image import to_tiles
from lapilli.data.pack import pack
from lapilli.data.sample import Image, Message, Sample, Text
from lapilli.model.freeze import apply_freeze
from lapilli.train.loss import LossModule

pytestmark = pytest.mark.slow

PAIRS = [(v, language) for v in VISION for language in LANGUAGE]
HELD = [(v, language) for v, language in PAIRS if v != "siglip2" and language != "mpt"]
PROMPT = "USER: <image>\nwhat is it? ASSISTANT:"


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    """Every part, saved once."""
    root = tmp_path_factory.mktemp("parts")
    vision = {name: make_vision(name, root / name) for name in VISION}
    return vision, {name: make_language(name, root / name) for name in LANGUAGE}


@pytest.fixture(scope="module")
def folders(parts, tmp_path_factory):
    """Model folders, built when they are first asked for."""
    root = tmp_path_factory.mktemp("models")
    vision, language = parts
    made: dict[tuple[str, str], str] = {}

    def get(pair: tuple[str, str]) -> str:
        if pair not in made:
            options = BuildOptions(vision_encoder=str(vision[pair[0]]), language_model=str(language[pair[1]]))
            made[pair] = str(root / "-".join(pair))
            build(options, made[pair])
        return made[pair]

    return get


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """A non-square JPEG and its path."""
    path = tmp_path_factory.mktemp("pictures") / "a.jpg"
    rng = np.random.default_rng(0)
    PIL.Image.fromarray(rng.integers(0, 256, (57, 93, 3), dtype=np.uint8)).save(path, quality=95)
    return path


def samples() -> list[Sample]:
    """Conversations of different lengths with none, one, two and three pictures, at any place."""
    picture = Image(path="a.jpg")
    user = lambda *parts: Message("user", parts)  # noqa: E731
    answer = lambda text: Message("assistant", (Text(text),))  # noqa: E731
    return [
        Sample("0", (user(picture, Text("\nwhat is it?")), answer("a cat"))),
        Sample("1", (user(Text("How many?")), answer("Three, in all."))),
        Sample(
            "2", (user(Text("is "), picture, Text(" like "), picture), answer("0"), user(Text("why?")), answer("1"))
        ),
        Sample("3", (user(Text("what is this?"), picture), answer("a blue bird and a red dog " * 4))),
        Sample("4", (user(Text("hm")), answer("so"), user(picture, picture, picture), answer("three"))),
        Sample("5", (user(Text("and now?")), answer("nothing at all"))),
        Sample("6", (user(picture), answer("a dog"))),
        Sample("7", (user(Text("사진")), answer("음식"))),
    ]


def batches(loaded, path, parts: int):
    """The samples in `parts` micro-batches."""
    encoder = loaded.encoder()
    picture = PIL.Image.open(path)
    examples = [encoder.encode(s, [picture.size] * len(s.images)) for s in samples()]
    tiles = to_tiles(picture, loaded.image_spec, loaded.layout)
    size = -(-len(examples) // parts)
    cuts = [examples[i : i + size] for i in range(0, len(examples), size)]
    return [pack(cut, [tiles for e in cut for _ in e.images]) for cut in cuts]


def gradients(loaded, batch_list):
    """Loss and gradients of all trainable parameters, normalised by the supervised tokens of all batches."""
    module = LossModule(loaded.model, loaded.image_spec)
    loaded.model.zero_grad()
    count = sum(b.supervised for b in batch_list)
    total = 0.0
    for batch in batch_list:
        loss = module(batch)
        (loss / count).backward()
        total += float(loss.detach()) / count
    named = loaded.model.named_parameters()
    return total, {n: p.grad.clone() for n, p in named if p.requires_grad and p.grad is not None}


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).norm() / b.norm().clamp_min(1e-12))


@pytest.mark.parametrize("pair", PAIRS, ids="-".join)
def test_a_pair_trains_generates_and_survives_saving(pair, folders, pictures, tmp_path):
    loaded = load(folders(pair))
    assert (loaded.spec.stored_as == "transformers") == (pair in HELD)

    apply_freeze(loaded.model, "freeze_vision")
    loss, packed = gradients(loaded, batches(loaded, pictures, 1))
    assert np.isfinite(loss)
    alone, unpacked = gradients(loaded, batches(loaded, pictures, len(samples())))
    halves, halved = gradients(loaded, batches(loaded, pictures, 2))
    assert alone == pytest.approx(loss, rel=1e-5)
    assert halves == pytest.approx(loss, rel=1e-5)
    assert packed.keys() == unpacked.keys() == halved.keys()
    whole = torch.cat([g.flatten() for g in packed.values()])
    for other in (unpacked, halved):
        assert relative(torch.cat([other[n].flatten() for n in packed]), whole) < 1e-5
    assert not any(n.startswith("vision_encoder") for n in packed)
    assert {n for n, p in loaded.model.named_parameters() if p.requires_grad} == packed.keys()
    assert all(float(g.norm()) > 0 for n, g in packed.items() if n.startswith("projector"))

    apply_freeze(loaded.model, "projector")
    _, only = gradients(loaded, batches(loaded, pictures, 1))
    assert only.keys() == {n for n, _ in loaded.model.named_parameters() if n.startswith("projector")}
    for name, gradient in only.items():
        assert relative(gradient, packed[name]) < 1e-5

    apply_freeze(loaded.model, "full")
    _, full = gradients(loaded, batches(loaded, pictures, 1))
    assert any(n.startswith("vision_encoder") and float(g.norm()) > 0 for n, g in full.items())

    with torch.no_grad():
        for parameter in loaded.model.projector.parameters():
            parameter += 0.01
    save(loaded.model.eval(), loaded.tokenizer, loaded.spec, tmp_path / "again")
    before, after = lapilli.load(folders(pair)), lapilli.load(tmp_path / "again")
    inputs = after.processor(text=PROMPT, images=[pictures], return_tensors="pt")
    with torch.no_grad():
        expected = loaded.model(**inputs).logits
        assert torch.equal(after.model(**inputs).logits, expected)
        assert not torch.equal(before.model(**inputs).logits, expected)
    text = after.generate("what is it?", images=[pictures], max_new_tokens=4)
    assert isinstance(text, str)


_ALONE = """
import json, sys, torch
from transformers import AutoModelForImageTextToText, AutoProcessor
answers = {}
for folder in json.loads(sys.argv[1]):
    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).eval()
    processor = AutoProcessor.from_pretrained(folder)
    from PIL import Image
    inputs = processor(images=Image.open(sys.argv[2]), text=sys.argv[3], return_tensors="pt")
    with torch.no_grad():
        logits = model(**inputs).logits[0, -1].tolist()
        tokens = model.generate(**inputs, max_new_tokens=6)[0, inputs["input_ids"].shape[1]:].tolist()
    answers[folder] = [inputs["input_ids"][0].tolist(), logits, tokens]
assert "lapilli" not in sys.modules
print(json.dumps(answers))
"""


def test_transformers_alone_gives_the_same_logits_and_tokens(folders, pictures):
    """28 of the 40 pairs, in a process that never imports lapilli, from a non-square JPEG and a text."""
    assert len(HELD) == 28
    paths = {pair: folders(pair) for pair in HELD}
    done = subprocess.run(
        [sys.executable, "-c", _ALONE, json.dumps(list(paths.values())), str(pictures), PROMPT],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    answers = json.loads(done.stdout.splitlines()[-1])
    for path in paths.values():
        ids, logits, tokens = answers[path]
        ours = lapilli.load(path)
        inputs = ours.processor(text=PROMPT, images=[pictures], return_tensors="pt")
        assert inputs["input_ids"][0].tolist() == ids, path
        with torch.no_grad():
            mine = ours.model(**inputs).logits[0, -1]
            generated = ours.model.generate(**inputs, max_new_tokens=6)[0].tolist()
        assert torch.allclose(mine, torch.tensor(logits), atol=1e-4), path
        assert generated == tokens, path
