"""8 and 4 bits: what transformers itself writes, from the folder alone, and the same answers through lapilli."""

import json
import warnings

import pytest
import torch
from safetensors.torch import load_file
from tests.support.tiny import build_tiny
from transformers import AutoModelForImageTextToText, BitsAndBytesConfig, LlavaForConditionalGeneration
from typer.testing import CliRunner

import lapilli
from lapilli.assemble import quantise as room
from lapilli.assemble.load import load
from lapilli.assemble.quantise import quantise
from lapilli.assemble.source import open_model
from lapilli.base.errors import LapilliError, ModelError, RunError
from lapilli.checkpoint.stream import open_folder
from lapilli.cli.quantise import app

pytest.importorskip("bitsandbytes", reason="the extra `quantise` is not installed")
pytestmark = pytest.mark.filterwarnings("ignore:MatMul8bitLt")

THEIRS = {
    8: {"load_in_8bit": True},
    4: {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True},
}
CLOSE = {8: 0.02, 4: 0.2}
"""Deviation of the difference of logits, in deviations of the logits; 0.007 and 0.09 as measured."""


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return build_tiny(tmp_path_factory.mktemp("quantise") / "model", dtype="float16")


@pytest.fixture(scope="module", params=[8, 4])
def both(request, model, tmp_path_factory):
    """Bits, our folder, and the one that transformers writes."""
    root = tmp_path_factory.mktemp("bits")
    quantise(model, root / "ours", request.param)
    skip = json.loads((root / "ours" / "config.json").read_text())["quantization_config"]["llm_int8_skip_modules"]
    settings = BitsAndBytesConfig(**THEIRS[request.param], llm_int8_skip_modules=skip)
    theirs = LlavaForConditionalGeneration.from_pretrained(model, quantization_config=settings, dtype=torch.float16)
    theirs.save_pretrained(root / "theirs")
    return request.param, root / "ours", root / "theirs"


def bare(name: str) -> str:
    """A name without the levels that differ between transformers' versions."""
    return name.replace("vision_model.", "").replace("language_model.", "").removeprefix("model.")


def test_tensors_are_those_that_transformers_writes(both):
    bits, ours, theirs = both
    made = {bare(name): tensor.read() for name, tensor in open_folder(ours).items()}
    wanted = {bare(name): value for name, value in load_file(theirs / "model.safetensors").items()}
    assert set(made) == set(wanted)
    for name, value in wanted.items():
        got = made[name]
        if name.endswith("bitsandbytes__nf4"):  # JSON, which we fill up with blanks
            assert json.loads(bytes(got.tolist())) == json.loads(bytes(value.tolist()))
        else:
            assert torch.equal(got, value), name
    kinds = {tensor.dtype for name, tensor in made.items() if "q_proj.weight" in name and "vision" not in name}
    assert (torch.int8 if bits == 8 else torch.uint8) in kinds
    kept = [name for name in made if "vision_tower" in name or "projector" in name or "lm_head" in name]
    assert kept
    assert {made[name].dtype for name in kept} == {torch.float16}


def test_it_loads_in_transformers_and_here_with_close_logits(both, model):
    bits, ours, _ = both
    ids = torch.arange(3, 40)[None]
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        exact = load(model).model(input_ids=ids).logits
        loaded = load(ours).model
        here = loaded(input_ids=ids).logits
        hf, info = AutoModelForImageTextToText.from_pretrained(ours, dtype=torch.float32, output_loading_info=True)
        there = hf(input_ids=ids).logits
    assert not any(info.values())
    assert torch.allclose(here, there, atol=1e-4)
    assert type(loaded.language_model.model.layers[0].mlp.up_proj).__module__.startswith("bitsandbytes")
    assert type(loaded.projector[0]) is torch.nn.Linear
    apart = (here - exact).std() / exact.std()
    assert 0 < apart < CLOSE[bits]


def test_an_assistant_answers_and_our_own_type_loads_too(tmp_path):
    model = build_tiny(tmp_path / "model", projector="linear", dtype="bfloat16")
    report = quantise(model, tmp_path / "small", 4)
    assert "lapilli loads it" in report.notes[0]
    assert report.quantised == 14
    assistant = lapilli.load(tmp_path / "small")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert isinstance(assistant.generate("Hello", max_new_tokens=3), str)


def test_what_needs_full_weights_refuses_a_quantised_folder(both, tmp_path):
    _, ours, _ = both
    with pytest.raises(ModelError, match="its weights are quantised"):
        open_model(ours)
    with pytest.raises(ModelError, match="its weights are quantised"):
        quantise(ours, tmp_path / "again", 4)
    with pytest.raises(RunError, match="exists already"):
        quantise(ours, ours, 4)
    wrong = CliRunner().invoke(app, [str(ours), str(tmp_path / "x"), "--bits", "3"])
    assert isinstance(wrong.exception, LapilliError)
    (tmp_path / "gptq").mkdir()
    fields = json.loads((ours / "config.json").read_text()) | {"quantization_config": {"quant_method": "gptq"}}
    (tmp_path / "gptq" / "config.json").write_text(json.dumps(fields))
    with pytest.raises(ModelError, match="gptq: quantised by gptq"):
        load(tmp_path / "gptq")


def test_without_bitsandbytes_the_extra_is_named(both, model, tmp_path, monkeypatch):
    _, ours, _ = both
    find = room.importlib.util.find_spec
    monkeypatch.setattr(room.importlib.util, "find_spec", lambda name: None if name == "bitsandbytes" else find(name))
    with pytest.raises(ModelError, match=r"pip install 'lapilli\[quantise\]'"):
        quantise(model, tmp_path / "x", 8)
    with pytest.raises(ModelError, match=r"bitsandbytes.* pip install 'lapilli\[quantise\]'"):
        load(ours)
