"""Pieces of models joined with their base: LLaVA's LoRA folders and projectors, PEFT's adapters, and ours."""

import json
import logging
import shutil

import pytest
import torch
from safetensors.torch import save_file
from tests.support.llava import REFERENCE, VISION, edit_config, expected, restore_piece, tensors_of

import lapilli
from lapilli.assemble.source import open_model
from lapilli.base.errors import ModelError

PICTURES = REFERENCE / "images"
LORA, PRETRAIN, BASE = "tiny-llava-lora", "tiny-llava-pretrain", "tiny-llava-v1.5"


@pytest.fixture
def lora(tmp_path):
    return restore_piece(LORA, tmp_path)


@pytest.fixture
def pretrain(tmp_path):
    return restore_piece(PRETRAIN, tmp_path)


def _edit(file, **changes):
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def _language_only(folder, tensors=None):
    """The language model of the tiny checkpoint as a plain Llama folder."""
    shutil.copytree(REFERENCE / "checkpoints" / "llama-base", folder)
    tensors = tensors or {n: t for n, t in tensors_of(BASE).items() if VISION not in n and "mm_projector" not in n}
    save_file(tensors, folder / "model.safetensors")
    return folder


@torch.no_grad()
def _last(assistant, prompt):
    inputs = assistant.processor(text=prompt["prompt"], images=[PICTURES / name for name in prompt["images"]])
    return assistant.model(**inputs).logits[0, -1], inputs


# ---- LLaVA's ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("named", [False, True])
def test_lora_answers_as_the_original(lora, named):
    base = lora.parent / BASE if named else None
    prompt = json.loads((lora / "expected.json").read_text())
    logits, _ = _last(lapilli.load(lora, base, template="vicuna_v1"), prompt)
    _, rows = expected(BASE)
    assert torch.allclose(logits[rows], torch.tensor(prompt["last_logits"])[rows], atol=1e-4)


def test_lora_over_a_language_model_alone(lora, tmp_path):
    plain = _language_only(tmp_path / "plain")
    whole, alone = open_model(lora), open_model(lora, plain)
    assert set(whole.tensors) == set(alone.tensors)
    for name, tensor in whole.tensors.items():
        assert torch.equal(tensor.read(), alone.tensors[name].read()), name
    assert (alone.format, alone.places["language"]) == ("llava-lora", str(plain))


@pytest.mark.parametrize("language_alone", [False, True])
def test_projector_answers_as_the_model_it_was_taken_from(pretrain, tmp_path, language_alone):
    base = _language_only(tmp_path / "plain") if language_alone else None
    assistant = lapilli.load(pretrain, base, template="vicuna_v1")
    prompts, rows = expected(BASE)
    for prompt in prompts[:2]:
        logits, inputs = _last(assistant, prompt)
        assert torch.allclose(logits[rows], torch.tensor(prompt["last_logits"]), atol=1e-4)
        wanted = prompt["greedy"][1:]
        made = assistant.model.generate(**inputs, max_new_tokens=len(wanted), do_sample=False)
        assert made[0].tolist() == wanted


def test_adapters_of_the_encoder_are_merged_or_are_nothing(lora, caplog):
    opened = open_model(lora)
    assert opened.settings["unfreeze_mm_vision_tower"]
    assert any("9 adapters of the vision encoder change it" in note for note in opened.notes)
    tensors = torch.load(lora / "adapter_model.bin", weights_only=True)
    zero = {n: torch.zeros_like(t) if "vision_tower" in n and "lora_B" in n else t for n, t in tensors.items()}
    torch.save(zero, lora / "adapter_model.bin")
    caplog.set_level(logging.INFO)
    opened = open_model(lora)
    assert "unfreeze_mm_vision_tower" not in opened.settings
    assert "9 adapters of the vision encoder are zero" in caplog.text


def _im_start_end(pretrain, table=None):
    """The projector's folder as a run with <im_start> and <im_end> leaves it."""
    edit_config(pretrain, mm_use_im_start_end=True, vocab_size=2002)
    tensors = torch.load(pretrain / "mm_projector.bin", weights_only=True)
    if table is not None:
        tensors["model.embed_tokens.weight"] = table
    torch.save(tensors, pretrain / "mm_projector.bin")


@pytest.mark.parametrize("rows", [2, 2002, 0])
def test_rows_of_image_marks(pretrain, tmp_path, rows):
    table = torch.randn(rows, 64) if rows else None
    _im_start_end(pretrain, table)
    opened = open_model(pretrain, _language_only(tmp_path / "plain"))
    before = tensors_of(BASE)
    embedding = opened.tensors["language.model.embed_tokens.weight"].read()
    output = opened.tensors["language.lm_head.weight"].read()
    assert opened.tokenizer.convert_tokens_to_ids(["<im_start>", "<im_end>"]) == [2000, 2001]
    old = before["model.embed_tokens.weight"]
    mean = old.mean(0).expand(2, -1)
    assert torch.allclose(embedding[2000:], mean if table is None else table[-2:], atol=1e-6)
    assert torch.equal(embedding[:2000], table[:2000] if table is not None and rows == 2002 else old)
    assert torch.allclose(output[2000:], before["lm_head.weight"].mean(0).expand(2, -1), atol=1e-6)
    assert any("are the mean of the others" in note for note in opened.notes)


def test_what_pieces_lack_is_said(lora, pretrain, tmp_path):
    (lora / "non_lora_trainables.bin").unlink()
    with pytest.raises(ModelError, match=r"non_lora_trainables\.bin is missing.*run wrote at its end"):
        open_model(lora)
    (lora / "config.json").unlink()
    with pytest.raises(ModelError, match=r"config\.json is missing beside the adapters.*run wrote at its end"):
        open_model(lora)
    (pretrain.parent / BASE).rename(tmp_path / "elsewhere")
    with pytest.raises(
        ModelError, match=r"give the model it was trained on as its base \(it was \.\./tiny-llava-v1\.5"
    ):
        open_model(pretrain)
    with pytest.raises(ModelError, match=r"base .*nowhere is no folder"):
        open_model(pretrain, tmp_path / "nowhere")
    with pytest.raises(ModelError, match="takes no base"):
        open_model(tmp_path / "elsewhere", pretrain)


def test_a_base_of_another_size(lora, pretrain, tmp_path):
    own = {n: t for n, t in tensors_of(BASE).items() if VISION not in n and "mm_projector" not in n}
    wide = {n: t[: 3 * len(t) // 4].contiguous() if "lm_head" in n or "embed" in n else t for n, t in own.items()}
    smaller = _language_only(tmp_path / "smaller", wide)
    with pytest.raises(
        ModelError, match=r"smaller/model\.safetensors: model\.embed_tokens.*has 1500 rows.*asks for 2000"
    ):
        open_model(pretrain, smaller)
    short = {n: t[:-8].contiguous() if "q_proj" in n else t for n, t in own.items()}
    with pytest.raises(
        ModelError, match=r"adapter_model\.bin: .*q_proj.*trained on a weight of shape \(64, 64\).*\(56, 64\)"
    ):
        open_model(lora, _language_only(tmp_path / "short", short))
    shallow = {n: t for n, t in own.items() if "layers.1" not in n}
    with pytest.raises(ModelError, match=r"adapter_model\.bin: .*the base has no model\.layers\.1"):
        open_model(lora, _language_only(tmp_path / "shallow", shallow))
    with pytest.raises(ModelError, match=r"9 tensors of the llama are missing: model\.layers\.1"):
        open_model(pretrain, tmp_path / "shallow")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"use_dora": True}, "use_dora: True is not supported; merge"),
        ({"lora_bias": True}, "lora_bias: True is not supported"),
        ({"layer_replication": [[0, 2]]}, "layer_replication"),
        ({"init_lora_weights": "pissa_niter_4"}, "'pissa_niter_4' changed the base's own weights"),
        ({"peft_type": "IA3"}, "peft_type is 'IA3'"),
        ({"r": 4}, r"q_proj\.lora_A.*has rank 8, adapter_config\.json says 4"),
        ({"lora_alpha": "much"}, "lora_alpha must be a positive number"),
    ],
)
def test_adapters_that_are_not_plain_lora_are_refused(lora, changes, message):
    _edit(lora / "adapter_config.json", **changes)
    with pytest.raises(ModelError, match=message):
        open_model(lora)


def test_scales_biases_and_layers_trained_in_full(lora):
    name = "language.model.layers.0.self_attn.q_proj.weight"
    base = tensors_of(BASE)
    plain = open_model(lora).tensors[name].read() - base[name.removeprefix("language.")]
    _edit(lora / "adapter_config.json", use_rslora=True)
    assert torch.allclose(
        open_model(lora).tensors[name].read() - base[name.removeprefix("language.")], plain * 8**0.5, atol=1e-5
    )
    _edit(lora / "adapter_config.json", use_rslora=False, alpha_pattern={r"layers\.0\.self_attn\.q_proj": 32})
    assert torch.allclose(
        open_model(lora).tensors[name].read() - base[name.removeprefix("language.")], plain * 2, atol=1e-5
    )
    tensors = torch.load(lora / "adapter_model.bin", weights_only=True)
    head = torch.randn(2000, 64)
    torch.save(tensors | {"base_model.model.lm_head.weight": head}, lora / "adapter_model.bin")
    assert torch.equal(open_model(lora).tensors["language.lm_head.weight"].read(), head)
    torch.save(tensors | {"base_model.model.model.norm.bias": head[0]}, lora / "adapter_model.bin")
    with pytest.raises(ModelError, match=r"adapter_model\.bin: .*the base has no model\.norm\.bias"):
        open_model(lora)
    torch.save({n: t for n, t in tensors.items() if "0.self_attn.q_proj.lora_B" not in n}, lora / "adapter_model.bin")
    with pytest.raises(ModelError, match=r"q_proj\.lora_B is missing"):
        open_model(lora)
