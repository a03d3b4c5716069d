"""Opening model folders: every spelling of every layout gives the same tensors, and what is wrong is named."""

import json
import logging
import shutil
from typing import Any

import pytest
import torch
import transformers as hf
from safetensors.torch import load_file, save_file
from tests.support.llava import REFERENCE, VISION, edit_config, restore, tensors_of
from tests.support.parts import make_language, make_vision
from tests.support.tiny import build_tiny

from lapilli.assemble.adapter import base_of, save_adapter
from lapilli.assemble.build import BuildOptions, build
from lapilli.assemble.load import load
from lapilli.assemble.source import materialise, open_model
from lapilli.base.errors import ModelError
from lapilli.model.adapter import add_lora

CHECKPOINTS = REFERENCE / "checkpoints"
V15, ANYRES, MARKS = "tiny-llava-v1.5", "tiny-llava-v1.6-anyres", "tiny-llava-v1-im-start-end"


def _same(one, two):
    assert set(one.tensors) == set(two.tensors)
    for name, tensor in one.tensors.items():
        assert torch.equal(tensor.read(), two.tensors[name].read()), name


@torch.no_grad()
def _logits(loaded, seed=0):
    model = loaded.model
    pixels = torch.rand(1, 3, *loaded.spec.image.tile_size, generator=torch.Generator().manual_seed(seed))
    ids = [1, 5, *[model.config.image_token_id] * model.layout.tokens_per_tile, 7, 9]
    return model(input_ids=torch.tensor([ids]), pixel_values=pixels).logits


# ---- transformers' layout, and ours -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    return build_tiny(tmp_path_factory.mktemp("built") / "m")


def _spelled(folder, out, rename):
    shutil.copytree(folder, out)
    save_file(
        {rename(name): t for name, t in load_file(folder / "model.safetensors").items()}, out / "model.safetensors"
    )
    return out


def _as_4_52(name):
    """`model.` before everything, and the language model without its own level."""
    if name.startswith("language_model.lm_head"):
        return name.removeprefix("language_model.")
    return "model." + name.replace("language_model.model.", "language_model.")


def _as_5(name):
    """Without the vision model's own level, which we write as the first released folders have it."""
    assert "vision_tower." not in name or "vision_tower.vision_model." in name
    return name.replace("vision_tower.vision_model.", "vision_tower.")


@pytest.mark.parametrize("rename", [_as_5, _as_4_52, lambda name: _as_4_52(_as_5(name))])
def test_every_spelling_of_transformers(built, tmp_path, rename):
    _same(open_model(built), open_model(_spelled(built, tmp_path / "m", rename)))
    (tmp_path / "m" / "lapilli.json").unlink()
    bare = open_model(tmp_path / "m")
    _same(open_model(built), bare)
    assert bare.spec.joined == open_model(built).spec.joined


def test_one_tensor_under_two_names(built, tmp_path):
    folder = shutil.copytree(built, tmp_path / "m")
    tensors = load_file(folder / "model.safetensors")
    name = "multi_modal_projector.linear_1.bias"
    save_file(tensors | {f"model.{name}": tensors[name].clone()}, folder / "model.safetensors")
    with pytest.raises(ModelError, match=rf"model\.safetensors: {name}: the same tensor as .*model\.{name}"):
        open_model(folder)


@pytest.mark.parametrize(
    ("vision", "language"), [("clip", "gpt_neox"), ("siglip", "qwen2"), ("siglip2", "mpt"), ("dinov2", "gemma")]
)
def test_what_build_makes_opens_and_is_the_same_model(tmp_path, vision, language):
    parts = (str(make_vision(vision, tmp_path / "v")), str(make_language(language, tmp_path / "l")))
    build(BuildOptions(*parts), tmp_path / "m")
    opened = open_model(tmp_path / "m")
    assert opened.format == ("lapilli" if opened.spec.stored_as == "lapilli" else "hf")
    before = hf.AutoModelForCausalLM.from_pretrained(parts[1])
    after = materialise(opened, torch.float32)
    rows = before.config.vocab_size
    for name, value in before.state_dict().items():
        made = after.language_model.state_dict()[name]
        assert torch.equal(made[:rows] if made.shape != value.shape else made, value), name
    encoder = hf.AutoModel.from_pretrained(parts[0]).state_dict()
    assert all(torch.equal(after.vision_encoder.state_dict()[name], value) for name, value in encoder.items())
    answer = after.language_model.generation_config
    assert answer.suppress_tokens == [opened.config.image_token_id]


def test_nothing_is_read_until_it_is_asked_for(built, monkeypatch):
    opened = open_model(built)
    read = []
    name = "projector.0.weight"
    opened.tensors[name] = opened.tensors[name].then(lambda value: read.append(name) or value)
    assert not read
    materialise(opened, torch.float32)
    assert read == [name]


# ---- LLaVA's layout in all its forms ----------------------------------------------------------------------------


def _mpt_folder(root, *, head):
    """LLaVA-Lightning-MPT in small: no reference exists, so that transformers' own MPT is the measure."""
    shutil.copytree(CHECKPOINTS / "vision-tower", root / "vision-tower")
    folder = root / "llava-mpt"
    language = make_language("mpt", folder)
    model = hf.AutoModelForCausalLM.from_pretrained(language)
    own = {name: t for name, t in model.state_dict().items() if name != "lm_head.weight"}
    if head is not None:
        own["lm_head.weight"] = head(own["transformer.wte.weight"])
    projector = torch.nn.Linear(32, 64).state_dict()
    tensors = own | {f"transformer.mm_projector.{name}": value for name, value in projector.items()}
    save_file({name: t.contiguous().clone() for name, t in tensors.items()}, folder / "model.safetensors")
    fields = json.loads((folder / "config.json").read_text())
    fields |= {
        "architectures": ["LlavaMPTForCausalLM"], "model_type": "llava_mpt", "mm_vision_tower": "../vision-tower",
        "mm_vision_select_layer": -2, "mm_hidden_size": 32, "use_mm_proj": True, "verbose": 0,
        "init_config": {"name": "kaiming_normal_"}, "norm_type": "low_precision_layernorm",
    }  # fmt: skip
    fields.pop("tie_word_embeddings", None)
    (folder / "config.json").write_text(json.dumps(fields))
    return folder, model


@pytest.mark.parametrize("head", [None, lambda table: table, lambda table: 2 * table])
def test_llava_mpt(tmp_path, head, caplog):
    folder, model = _mpt_folder(tmp_path, head=head)
    loaded = load(folder)
    ids = torch.tensor([[1, 9, 33, 70]])
    with torch.no_grad():
        wanted = model(input_ids=ids).logits * (2 if head and head(1) == 2 else 1)
        assert torch.allclose(loaded.model(input_ids=ids).logits, wanted, atol=1e-5)
    assert loaded.template.name == "mpt"
    assert "mpt is taken" in caplog.text
    assert ("both are kept" in caplog.text) == (head is not None and head(1) == 2)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("attn_config", {"alibi": False}, "attn_config.alibi: False"),
        ("attn_config", {"alibi": True, "qk_ln": True}, "attn_config.qk_ln: True"),
        ("logit_scale", "inv_sqrt_d_model", "logit_scale: 'inv_sqrt_d_model'"),
        ("norm_type", "rmsnorm", "norm_type: 'rmsnorm'"),
    ],
)
def test_variants_of_mpt_that_no_class_computes(tmp_path, key, value, message):
    folder, _ = _mpt_folder(tmp_path, head=None)
    edit_config(folder, **{key: value})
    with pytest.raises(ModelError, match=message):
        open_model(folder)


def test_version_0_has_three_rows_more_and_its_language_model_s_type(tmp_path):
    folder = restore(MARKS, tmp_path)
    tensors = tensors_of(MARKS)
    wide = {n: torch.cat([t, t[-1:]]) if "embed" in n or "lm_head" in n else t for n, t in tensors.items()}
    (folder / "pytorch_model.bin").unlink()
    torch.save({n: t for n, t in wide.items() if VISION not in n}, folder / "pytorch_model.bin")
    edit_config(
        folder, model_type="llama", architectures=["LlamaForCausalLM"], vocab_size=2003, mm_use_im_patch_token=...,
        mm_projector_type=..., mm_patch_merge_type=..., sep_image_conv_front=False,
    )  # fmt: skip
    added = {"<im_patch>": 2000, "<im_start>": 2001, "<im_end>": 2002}
    (folder / "added_tokens.json").write_text(json.dumps(added))
    config = json.loads((folder / "tokenizer_config.json").read_text())
    config["added_tokens_decoder"] = {
        key: value for key, value in config["added_tokens_decoder"].items() if int(key) < 2000
    } | {str(i): {"content": token, "special": True} for token, i in added.items()}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    opened = open_model(folder)
    assert (opened.trained_rows, opened.config.image_token_id, opened.config.projector) == (2003, 2003, "linear")
    assert opened.tokenizer.convert_tokens_to_ids(list(added)) == list(added.values())
    assert opened.spec.im_start_end
    assert opened.settings["model_type"] == "llama"


@pytest.mark.parametrize(
    ("changes", "kind"),
    [
        ({"model_type": "llava_custom", "architectures": ["LlavaMistralForCausalLM"], "mm_im_patches": 16}, "mistral"),
        ({"model_type": "llava_custom", "architectures": ...}, "mistral"),
        ({"model_type": "llava", "architectures": ["LlavaLlamaForCausalLM"], "sliding_window": 4096}, "llama"),
        ({"model_type": "llava", "image_grid_pinpoints": None, "mm_patch_merge_type": ...}, "llama"),
    ],
)
def test_types_of_gaudi_kollava_and_quilt(tmp_path, changes, kind):
    folder = restore(V15, tmp_path)
    before = open_model(folder)
    edit_config(folder, **changes)
    after = open_model(folder)
    assert after.config.text_config.model_type == kind
    _same(before, after)


def test_an_encoder_by_its_hub_name(tmp_path, monkeypatch, caplog):
    """Quilt-LLaVA names a whole CLIP, `wisdomik/QuiltNet-B-32`; here it lies in the Hub's cache."""
    folder = restore(V15, tmp_path)
    before = open_model(folder)
    inner = json.loads((CHECKPOINTS / "vision-tower" / "config.json").read_text())
    text = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 50}
    clip = hf.CLIPModel(hf.CLIPConfig(vision_config=inner, text_config=text))
    own = {n.removeprefix("vision."): t.read() for n, t in before.tensors.items() if n.startswith("vision.")}
    clip.vision_model.load_state_dict(own)
    repository = tmp_path / "hub" / "models--wisdomik--QuiltNet-B-32"
    snapshot = repository / "snapshots" / "0123"
    clip.save_pretrained(snapshot)
    shutil.copyfile(CHECKPOINTS / "vision-tower" / "preprocessor_config.json", snapshot / "preprocessor_config.json")
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("0123")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("transformers.utils.hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"), raising=False)
    edit_config(folder, mm_vision_tower="wisdomik/QuiltNet-B-32")
    caplog.set_level(logging.INFO)
    after = open_model(folder)
    _same(before, after)
    assert after.places["vision"] == "wisdomik/QuiltNet-B-32"
    assert "tensors beside the vision encoder are not read" in caplog.text


# ---- adapters ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def adapted(tmp_path_factory):
    """A folder with a base and, beside it, an adapter of ours; and what the two answer together."""
    root = tmp_path_factory.mktemp("adapted")
    loaded = load(build_tiny(root / "base"))
    add_lora(loaded.model, r=4, alpha=8, dropout=0.0)
    with torch.no_grad():
        for name, parameter in loaded.model.named_parameters():
            if ".lora_B" in name or name.startswith("projector"):
                parameter.normal_(std=0.1)
    save_adapter(loaded.model, loaded.tokenizer, loaded.spec, root / "base", root / "run" / "model")
    return root, _logits(loaded)


@pytest.fixture
def moved(adapted, tmp_path):
    return shutil.copytree(adapted[0], tmp_path / "moved")


def test_adapters_and_base_move_together(adapted, moved):
    assert json.loads((moved / "run" / "model" / "base.json").read_text())["base"] == "../../base"
    loaded = load(moved / "run")
    assert torch.allclose(_logits(loaded), adapted[1], atol=1e-5)
    assert (base_of(moved / "run" / "model") or moved).resolve() == moved / "base"
    opened = open_model(moved / "run")
    assert (opened.format, opened.places["language"]) == ("lapilli-adapter", str(base_of(moved / "run" / "model")))
    (moved / "base").rename(moved / "other")
    with pytest.raises(ModelError, match="give the model it was trained on as its base"):
        open_model(moved / "run")
    assert torch.allclose(_logits(load(moved / "run", moved / "other")), adapted[1], atol=1e-5)


def test_an_adapter_knows_its_base(moved, caplog):
    tensors = load_file(moved / "base" / "model.safetensors")
    tensors["language_model.model.layers.0.mlp.up_proj.weight"] += 1e-3
    save_file(tensors, moved / "base" / "model.safetensors")
    with pytest.raises(ModelError, match=r"was trained on another model than .*base"):
        load(moved / "run")
    load(moved / "run", moved / "base")
    assert "the two are joined because this base was asked for" in caplog.text
    note = moved / "run" / "model" / "base.json"
    note.write_text(json.dumps({"base": str(moved / "base")}))  # as folders older than the hash have it
    load(moved / "run")
    note.write_text(json.dumps({"base": 7}))
    with pytest.raises(ModelError, match=r"base\.json: base and sha256 must be text"):
        load(moved / "run")


def test_a_base_that_has_gone_costs_no_result(adapted, tmp_path, caplog):
    loaded = load(adapted[0] / "base")
    add_lora(loaded.model, r=4, alpha=8, dropout=0.0)
    gone = shutil.copytree(adapted[0] / "base", tmp_path / "base")
    (gone / "model.safetensors").write_bytes(b"")
    save_adapter(loaded.model, loaded.tokenizer, loaded.spec, gone, tmp_path / "adapter")
    assert "can't be hashed" in caplog.text
    assert json.loads((tmp_path / "adapter" / "base.json").read_text()) == {"base": "../base"}


def test_a_run_continues_from_an_adapter(adapted):
    loaded = load(adapted[0] / "run")
    assert add_lora(loaded.model, r=2, alpha=2, dropout=0.0)
    assert torch.allclose(_logits(loaded), adapted[1], atol=1e-5)


def test_peft_s_adapters_of_transformers_models(built, tmp_path):
    from peft import LoraConfig, get_peft_model

    model = hf.LlavaForConditionalGeneration.from_pretrained(built, dtype=torch.float32)
    wrapped: Any = get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj", "v_proj"], lora_alpha=8))
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
    wrapped.save_pretrained(tmp_path / "adapter")
    wrapped.merge_and_unload().save_pretrained(tmp_path / "merged")
    opened = open_model(tmp_path / "adapter", built, merged_as=torch.float32)
    assert opened.format == "hf-lora"
    for name, value in load_file(tmp_path / "merged" / "model.safetensors").items():
        ours = name.replace("vision_tower.vision_model.", "vision.").replace("language_model.", "language.")
        ours = ours.replace("multi_modal_projector.linear_1", "projector.0")
        made = opened.tensors[ours.replace("multi_modal_projector.linear_2", "projector.2")].read()
        assert torch.allclose(made.float(), value, atol=1e-6), name
    # The encoder has adapters too: its layers share the names.
    before = open_model(built).tensors["vision.encoder.layers.0.self_attn.q_proj.weight"].read()
    assert not torch.equal(before, opened.tensors["vision.encoder.layers.0.self_attn.q_proj.weight"].read())
    _rewrite(tmp_path / "adapter" / "adapter_config.json", base_model_name_or_path="someone/llava")
    with pytest.raises(ModelError, match="give the model it was trained on as its base"):
        open_model(tmp_path / "adapter")


def _rewrite(file, **changes):
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
