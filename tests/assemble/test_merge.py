"""Adapters merged a tensor at a time: PEFT's numbers, in the base's format."""

import json
import shutil

import pytest
import torch
from peft import PeftModel
from tests.support.llava import restore, restore_piece
from tests.support.tiny import build_tiny

from lapilli.assemble.adapter import save_adapter
from lapilli.assemble.load import load
from lapilli.assemble.merge import merge
from lapilli.assemble.source import materialise, open_model
from lapilli.base.errors import ModelError, RunError
from lapilli.checkpoint.stream import open_folder
from lapilli.model.adapter import add_lora


def trained(base, folder, **lora):
    """An adapter of ours on `base` with random weights."""
    loaded = load(base)
    add_lora(loaded.model, **({"r": 4, "alpha": 8, "dropout": 0.0} | lora))
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in loaded.model.named_parameters():
            if "lora_" in name or name.startswith("projector"):
                parameter.normal_(std=0.1)
    save_adapter(loaded.model, loaded.tokenizer, loaded.spec, base, folder)
    return loaded.model.projector.state_dict()


@pytest.mark.parametrize(
    ("projector", "form"),
    [("mlp2x_gelu", "hf"), ("linear", "lapilli")],  # transformers' class can't hold the second
)
def test_ours_merge_as_peft_merges(tmp_path, projector, form):
    base = build_tiny(tmp_path / "model", projector=projector, dtype="float32")
    projector = trained(base, tmp_path / "adapter", target_modules=["q_proj", "down_proj"])
    report = merge(tmp_path / "adapter", tmp_path / "merged")
    assert report.conversion.target == form
    assert not report.verification.problems
    made = load(tmp_path / "merged").model
    peft = PeftModel.from_pretrained(load(base).model.language_model, str(tmp_path / "adapter")).merge_and_unload()
    wanted, got = peft.state_dict(), made.language_model.state_dict()
    assert set(wanted) == set(got)
    for name, value in wanted.items():
        assert torch.allclose(got[name], value, atol=1e-5, rtol=0), name
    changed = "model.layers.0.self_attn.q_proj.weight"
    assert not torch.allclose(got[changed], load(base).model.language_model.state_dict()[changed], atol=1e-3)
    assert all(torch.equal(made.projector.state_dict()[name], value) for name, value in projector.items())


def test_merging_rounds_once_to_the_bases_own_type(tmp_path):
    """float16 stays float16, and is the nearest to the exact sum."""
    base = build_tiny(tmp_path / "model", dtype="float16")
    trained(base, tmp_path / "adapter")
    merge(tmp_path / "adapter", tmp_path / "merged", verify="none")
    exact = materialise(open_model(tmp_path / "adapter"), torch.float32).language_model.state_dict()
    for name, tensor in open_model(tmp_path / "merged").part("language.").items():
        assert tensor.dtype == torch.float16
        assert torch.equal(tensor.read(), exact[name].half()), name


def test_llavas_lora_becomes_a_llava_checkpoint_that_answers_the_same(tmp_path):
    lora = restore_piece("tiny-llava-lora", tmp_path)
    report = merge(lora, tmp_path / "merged", tmp_path / "tiny-llava-v1.5", template="vicuna_v1", shard_size="300KB")
    assert report.conversion.target == "llava"
    names = set(open_folder(tmp_path / "merged"))
    assert {"model.mm_projector.2.weight", "model.layers.1.mlp.up_proj.weight", "lm_head.weight"} <= names
    assert not any("lora" in name for name in names)
    fields = json.loads((tmp_path / "merged" / "config.json").read_text())
    assert fields["model_type"] == "llava_llama"
    ids = torch.tensor([[1, 5, 7, 9]])
    one = load(lora, template="vicuna_v1").model(input_ids=ids).logits
    other = load(tmp_path / "merged", template="vicuna_v1").model(input_ids=ids).logits
    assert torch.allclose(one, other, atol=1e-6)


def test_what_can_not_be_merged_is_refused(tmp_path):
    base = build_tiny(tmp_path / "model", dtype="float32")
    trained(base, tmp_path / "adapter")

    def refused(words: str, *places, kind=ModelError) -> None:
        with pytest.raises(kind, match=words):
            merge(*places)
        assert not (tmp_path / "merged").exists()

    refused("no adapter but a folder of format hf", base, tmp_path / "merged")
    refused("exists already", tmp_path / "adapter", base, kind=RunError)
    refused("has shape|of shape", tmp_path / "adapter", tmp_path / "merged", restore("tiny-llava-gqa", tmp_path))
    quantised = shutil.copytree(base, tmp_path / "quantised")
    fields = json.loads((quantised / "config.json").read_text()) | {"quantization_config": {"load_in_4bit": True}}
    (quantised / "config.json").write_text(json.dumps(fields))
    refused("weights are quantised", tmp_path / "adapter", tmp_path / "merged", quantised)
    shutil.rmtree(base)
    refused(r"its base \(.*model\) is not there", tmp_path / "adapter", tmp_path / "merged")
