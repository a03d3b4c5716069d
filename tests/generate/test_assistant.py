import subprocess
import sys

import pytest

import lapilli
from lapilli.assemble.quantise import quantise
from lapilli.base.errors import ModelError
from lapilli.model.held import held_as


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


@pytest.mark.parametrize(("held", "bits"), [("int8", 8), ("nf4", 4)])
def test_held_in_fewer_bits_it_answers_as_the_folder_that_quantise_writes(tiny, models, tmp_path, picture, held, bits):
    pytest.importorskip("bitsandbytes", reason="the extra `quantise` is not installed")
    quantise(models / "tiny", tmp_path / "small", bits)
    written = lapilli.load(tmp_path / "small")
    model = lapilli.load(models / "tiny", quantise=held)
    prompt = model.processor.prompt("What is it?", [picture])
    ids = list(range(5, 15))
    expected, made = (one.engine.score(prompt, [ids])[0] for one in (written, model))
    # The folder's int8 layers also round what goes into them.
    assert made == pytest.approx(expected, abs=3e-3)
    assert held in {held_as(p) for p in model.model.language_model.parameters()}
    assert held_as(model.model.vision_encoder.embeddings.patch_embedding.weight) == "fp32"
    with pytest.raises(ModelError, match="quantised already"):
        lapilli.load(tmp_path / "small", quantise=held)


def test_importing_the_package_is_instant():
    code = "import sys, lapilli; sys.exit(any(m in sys.modules for m in ('torch', 'transformers', 'PIL', 'pydantic')))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
