"""LLaVA's own checkpoints: the original's numbers, every way their files may lie, and what is refused."""

import json
import logging
import pickle
from pathlib import Path
from typing import Any

import PIL.Image
import pytest
import torch
from safetensors.torch import save_file
from tests.support.llava import NAMES, REFERENCE, VISION, edit_config, expected, restore, tensors_of
from transformers import MistralConfig, MistralForCausalLM

import lapilli
from lapilli.assemble.save import save
from lapilli.base.errors import ModelError

PICTURES = REFERENCE / "images"
ANYRES, IM_START_END = "tiny-llava-v1.6-anyres", "tiny-llava-v1-im-start-end"


@pytest.fixture
def folder(tmp_path):
    return restore("tiny-llava-v1.5", tmp_path)


def _ask(assistant, prompt):
    return assistant.processor(text=prompt["prompt"], images=[PICTURES / name for name in prompt["images"]])


@torch.no_grad()
def _logits(assistant, name=ANYRES):
    return assistant.model(**_ask(assistant, expected(name)[0][0])).logits


def _collapsed(ids, assistant, images):
    """Ids with each picture's run of image tokens as the one -200 that the original writes."""
    counts = iter([assistant.layout.tokens(*PIL.Image.open(PICTURES / name).size) for name in images])
    made, i = [], 0
    while i < len(ids):
        is_image = ids[i] == assistant.model.config.image_token_id
        made.append(-200 if is_image else ids[i])
        run = next(counts) if is_image else 1
        assert len(set(ids[i : i + run])) == 1
        i += run
    return made


@pytest.mark.parametrize("name", NAMES)
def test_answers_as_the_original(name, tmp_path):
    assistant = lapilli.load(restore(name, tmp_path), template="vicuna_v1")
    prompts, rows = expected(name)
    for prompt in prompts:
        inputs = _ask(assistant, prompt)
        assert _collapsed(inputs["input_ids"][0].tolist(), assistant, prompt["images"]) == prompt["input_ids"]
        with torch.no_grad():
            logits = assistant.model(**inputs).logits[0]
        assert list(logits.shape) == prompt["logits_shape"]
        assert torch.allclose(logits[-1, rows], torch.tensor(prompt["last_logits"]), atol=1e-4)
        # The original's list begins with the BOS that its generate puts before new tokens.
        wanted = prompt["greedy"][1:]
        made = assistant.model.generate(**inputs, max_new_tokens=len(wanted), do_sample=False)
        assert made[0].tolist() == wanted


def test_a_folder_s_name_decides_nothing(tmp_path):
    first = lapilli.load(restore(ANYRES, tmp_path))
    again = lapilli.load((tmp_path / ANYRES).rename(tmp_path / "mpt-lora-mistral-checkpoint-3"))
    assert torch.equal(_logits(first), _logits(again))
    assert again.spec == first.spec


@pytest.mark.parametrize("name", [ANYRES, IM_START_END])
def test_saved_as_our_own_and_loaded_again(name, tmp_path):
    first = lapilli.load(restore(name, tmp_path), template="llava_v1")
    save(first.model, first.tokenizer, first.spec, tmp_path / "saved")
    again = lapilli.load(tmp_path / "saved")
    assert torch.equal(_logits(first, name), _logits(again, name))
    assert again.template == first.template
    assert again.spec.im_start_end == (name == IM_START_END)


@pytest.mark.parametrize("kind", ["safetensors", "bin"])
def test_shards(folder, kind):
    before = _logits(lapilli.load(folder))
    _shard(folder, kind)
    assert torch.equal(_logits(lapilli.load(folder)), before)


def _shard(folder, kind):
    (folder / "model.safetensors").unlink()
    names, tensors = {}, sorted(tensors_of("tiny-llava-v1.5").items())
    stem = "model" if kind == "safetensors" else "pytorch_model"
    for i in (1, 2):
        part, file = dict(tensors[i - 1 :: 2]), f"{stem}-0000{i}-of-00002.{kind}"
        save_file(part, folder / file) if kind == "safetensors" else torch.save(part, folder / file)
        names |= dict.fromkeys(part, file)
    (folder / f"{stem}.{kind}.index.json").write_text(json.dumps({"weight_map": names}))


def _write(folder, tensors):
    save_file({name: t.contiguous() for name, t in tensors.items()}, folder / "model.safetensors")


def test_layout_goes_by_fields_where_model_type_can_t_tell(tmp_path):
    folder = restore(ANYRES, tmp_path)
    before = _logits(lapilli.load(folder))
    pinpoints = json.loads((folder / "config.json").read_text())["image_grid_pinpoints"]
    edit_config(folder, model_type="llava", image_grid_pinpoints=str(pinpoints))
    assert torch.equal(_logits(lapilli.load(folder)), before)


def test_trained_encoder_is_the_checkpoint_s(folder, caplog):
    caplog.set_level(logging.INFO)
    beside = _logits(lapilli.load(folder))
    tensors = {
        name.replace("vision_model.", ""): t * 1.5 if name.startswith(VISION) else t
        for name, t in tensors_of("tiny-llava-v1.5").items()
    }
    _write(folder, tensors)
    assert torch.equal(_logits(lapilli.load(folder)), beside)
    assert "55 tensors of it in the checkpoint are not read" in caplog.text
    edit_config(folder, unfreeze_mm_vision_tower=True)
    trained = lapilli.load(folder)
    assert not torch.allclose(_logits(trained), beside)
    name = "embeddings.class_embedding"
    assert torch.equal(trained.model.vision_encoder.state_dict()[name], tensors[VISION + name])


def test_encoder_without_weights_of_its_own(folder, caplog):
    before = _logits(lapilli.load(folder))
    (folder.parent / "vision-tower" / "pytorch_model.bin").unlink()
    assert torch.equal(_logits(lapilli.load(folder)), before)
    assert "the 55 tensors in" in caplog.text


def test_untrained_encoder_may_lie_elsewhere_only(folder, caplog):
    before = _logits(lapilli.load(folder))
    _write(folder, {n: t for n, t in tensors_of("tiny-llava-v1.5").items() if not n.startswith(VISION)})
    edit_config(folder, unfreeze_mm_vision_tower=True)
    assert torch.equal(_logits(lapilli.load(folder)), before)
    assert "does not hold it" in caplog.text


def test_mistral(folder):
    own = {n: t for n, t in tensors_of("tiny-llava-v1.5").items() if "mm_projector" not in n and VISION not in n}
    edit_config(folder, model_type="llava_mistral", architectures=["LlavaMistralForCausalLM"], sliding_window=8)
    assistant = lapilli.load(folder)
    fields = json.loads((folder / "config.json").read_text())
    names = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    config = MistralConfig(**{n: fields[n] for n in names}, num_key_value_heads=4, sliding_window=8, rms_norm_eps=1e-6)
    alone = MistralForCausalLM(config).eval()
    alone.load_state_dict(own)
    ids = torch.tensor([expected("tiny-llava-v1.5")[0][1]["input_ids"]])
    with torch.no_grad():
        assert torch.allclose(assistant.model(input_ids=ids).logits, alone(input_ids=ids).logits, atol=1e-5)


def test_old_config_has_the_original_s_defaults(tmp_path):
    folder = restore(IM_START_END, tmp_path)
    absent = "mm_projector_type mm_vision_select_feature mm_patch_merge_type mm_use_im_patch_token image_aspect_ratio"
    edit_config(folder, **dict.fromkeys(absent.split(), ...), num_key_value_heads=..., mm_resampler_type=None)
    config = lapilli.load(folder).model.config
    assert (config.projector, config.feature_select, config.layout["mode"]) == ("linear", "patch", "square")
    assert config.text_config.vocab_size == 2002


def test_im_patch_row_is_kept(tmp_path):
    folder = restore(IM_START_END, tmp_path)
    edit_config(folder, mm_use_im_patch_token=True)
    with pytest.raises(ModelError, match=r"mm_use_im_patch_token, but the tokenizer has no <im_patch>"):
        lapilli.load(folder)
    for file in folder.glob("*token*.json"):
        file.write_text(file.read_text().replace("<im_start>", "<im_patch>").replace("<im_end>", "<im_start>"))
    with pytest.raises(ModelError, match=r"mm_use_im_start_end, but the tokenizer has no <im_end>"):
        lapilli.load(folder)
    edit_config(folder, mm_use_im_start_end=False)
    assistant = lapilli.load(folder)
    assert assistant.tokenizer.convert_tokens_to_ids("<im_patch>") == 2000
    table: Any = assistant.model.get_input_embeddings()
    assert assistant.model.config.image_token_id == table.weight.shape[0] == 2002


def test_newline_without_a_use_is_said(folder, caplog):
    _write(folder, tensors_of("tiny-llava-v1.5") | {"model.image_newline": torch.zeros(64)})
    assert not lapilli.load(folder).model.config.image_newline
    assert "model.image_newline is left out" in caplog.text


def test_tables_that_old_versions_saved_are_computed(folder, caplog):
    caplog.set_level(logging.INFO)
    before = _logits(lapilli.load(folder))
    old = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.zeros(8)}
    old |= {VISION + "vision_model.embeddings.position_ids": torch.zeros(1, 17, dtype=torch.int64)}
    _write(folder, tensors_of("tiny-llava-v1.5") | old)
    assert torch.equal(_logits(lapilli.load(folder)), before)
    assert "2 tables of positions are computed" in caplog.text


def test_template_is_the_user_s_or_a_warning(folder, caplog):
    assert lapilli.load(folder, template="llava_llama_2").template.name == "llava_llama_2"
    assert not caplog.records
    assert lapilli.load(folder).template.name == "vicuna_v1"
    assert "vicuna_v1 is taken" in caplog.text
    assert "--template" in caplog.text


def test_answers_end_where_the_folder_says(folder):
    (folder / "generation_config.json").write_text('{"eos_token_id": [7, 2], "temperature": 0.9, "top_p": 0.6}')
    made = lapilli.load(folder).model.language_model.generation_config
    assert made.eos_token_id == [7, 2]
    assert not made.do_sample


def test_in_half_precision(folder):
    model = lapilli.load(folder, dtype=torch.bfloat16).model
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "llava_qwen"}, r'unknown LLaVA model "llava_qwen"'),
        ({"mm_vision_tower": ...}, "mm_vision_tower is missing"),
        ({"mm_vision_tower": "/no/such/tower"}, r"/no/such/tower can't be found \(no such folder\); write"),
        ({"mm_vision_select_layer": ...}, "mm_vision_select_layer is missing"),
        ({"mm_vision_select_layer": "-2"}, "mm_vision_select_layer must be of type int, not '-2'"),
        ({"mm_vision_select_layer": -9}, "feature layer -9 does not exist"),
        ({"mm_vision_select_feature": "cls"}, r'mm_vision_select_feature "cls" \(did you mean "cls_patch"'),
        ({"mm_projector_type": "mlp2x_gelo"}, 'did you mean "mlp2x_gelu"'),
        ({"mm_projector_type": "mlp3x_gelu"}, r"tensors of the projector are missing: 4\.bias, 4\.weight"),
        ({"mm_projector_type": "linear"}, r"4 tensors have no place in the projector: 0\.bias"),
        ({"mm_patch_merge_type": "spatial"}, 'mm_patch_merge_type "spatial"'),
        ({"image_aspect_ratio": "anyres_max_9"}, 'image_aspect_ratio "anyres_max_9"'),
        ({"image_aspect_ratio": "anyres"}, "with mm_patch_merge_type spatial_unpad only"),
        ({"mm_resampler_type": "qformer"}, "mm_resampler_type: 'qformer' is not supported"),
        ({"s2": True}, "s2: True is not supported"),
        ({"hidden_size": "wide"}, "not a llama configuration"),
        ({"vocab_size": 1999}, r"lm_head\.weight has shape \(2000, 64\), config\.json asks for \(1999, 64\)"),
        ({"num_hidden_layers": 3}, r"9 tensors of the llama are missing: model\.layers\.2"),
        ({"num_hidden_layers": 1}, r"9 tensors have no place in the llama: model\.layers\.1"),
    ],
)
def test_refused_by_its_config(folder, changes, message):
    edit_config(folder, **changes)
    with pytest.raises(ModelError, match=message):
        lapilli.load(folder)


@pytest.mark.parametrize("value", ["[[56, 112", "(1x1),...,(6x6)", [[56]], [["a", 1]], [], None])
def test_pinpoints_that_can_t_be_read(tmp_path, value):
    folder = restore(ANYRES, tmp_path)
    edit_config(folder, image_grid_pinpoints=value)
    with pytest.raises(ModelError, match=r"image_grid_pinpoints must be a list of \[width, height\]"):
        lapilli.load(folder)


def test_anyres_without_its_newline(tmp_path):
    folder = restore(ANYRES, tmp_path)
    _write(folder, {n: t for n, t in tensors_of(ANYRES).items() if n != "model.image_newline"})
    with pytest.raises(ModelError, match=r"anyres needs a model\.image_newline"):
        lapilli.load(folder)


def test_unknown_tensors_are_named(folder):
    _write(folder, tensors_of("tiny-llava-v1.5") | {"model.vision_resampler.query": torch.zeros(1)})
    with pytest.raises(ModelError, match=r"1 tensors have no place in the llama: model\.vision_resampler\.query"):
        lapilli.load(folder)


def test_broken_weight_files(folder):
    _shard(folder, "bin")
    shard, index = folder / "pytorch_model-00002-of-00002.bin", folder / "pytorch_model.bin.index.json"
    names = json.loads(index.read_text())["weight_map"]
    whole = shard.read_bytes()
    shard.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ModelError, match=f"{shard.name}: can't be read"):
        lapilli.load(folder)
    shard.write_bytes(pickle.dumps({"weights": Path("/")}, protocol=2))
    with pytest.raises(ModelError, match=f"{shard.name}: can't be read safely"):
        lapilli.load(folder)
    shard.unlink()
    with pytest.raises(ModelError, match=f"{shard.name}: this shard is missing"):
        lapilli.load(folder)
    shard.write_bytes(whole)
    index.write_text(json.dumps({"weight_map": {n: f for n, f in names.items() if n != "model.norm.weight"}}))
    with pytest.raises(ModelError, match=r"holds other tensors than listed: model\.norm\.weight"):
        lapilli.load(folder)
    index.write_text(json.dumps({"weight_map": dict.fromkeys(names, "../elsewhere.bin")}))
    with pytest.raises(ModelError, match="must name a file of this folder"):
        lapilli.load(folder)
    index.unlink()
    with pytest.raises(ModelError, match="no weights here"):
        lapilli.load(folder)
