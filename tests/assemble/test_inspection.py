"""`inspect`: every kind of folder and file is told by its content, under names that say nothing."""

import gzip
import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from tests.checkpoint.test_open_clip import write as write_open_clip
from tests.support.llava import REFERENCE, edit_config, restore, tensors_of
from tests.support.parts import make_language, make_vision
from tests.support.tiny import build_tiny
from typer.testing import CliRunner

from lapilli.assemble.build import BuildOptions, build
from lapilli.assemble.inspection.door import inspect
from lapilli.assemble.inspection.parts import part_of
from lapilli.assemble.load import load
from lapilli.base.errors import ModelError
from lapilli.cli.inspect import app


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    return build_tiny(tmp_path_factory.mktemp("x") / "hf-llava-lora")


def remedies(found):
    return {missing.what: missing.remedy for missing in found.missing}


def dtypes(found):
    return {part.name: set(part.dtypes) for part in found.parts}


def test_a_llava_checkpoint(tmp_path):
    folder = restore("tiny-llava-v1.5", tmp_path).rename(tmp_path / "just a name")
    found = inspect(folder)
    assert (found.format, found.missing) == ("llava", [])
    assert {part.name: part.parameters for part in found.parts} == {
        "vision encoder": 45152,
        "projector": 6272,
        "language model": 338240,
    }
    assert found.parameters == sum(tensor.numel() for tensor in tensors_of("tiny-llava-v1.5").values())
    assert dtypes(found)["language model"] == {"float32"}
    assert found.tokens_per_image == "16 (4x4 patches of a 56x56 picture)"
    assert "vicuna_v1" in found.template
    assert found.image == "pad, layer -2, patch, flat"


@pytest.mark.parametrize(
    ("name", "tokens", "projector"),
    [("tiny-llava-v1.6-anyres", "52 to 88", "mlp2x_gelu"), ("tiny-llava-mlp3x-cls", "17 ", "mlp3x_gelu")],
)
def test_layouts_of_pictures(tmp_path, name, tokens, projector):
    found = inspect(restore(name, tmp_path))
    assert found.tokens_per_image.startswith(tokens)
    assert next(part.what for part in found.parts if part.name == "projector") == projector


def test_what_a_llava_checkpoint_lacks_is_named(tmp_path):
    folder = restore("tiny-llava-v1.5", tmp_path)
    edit_config(folder, mm_vision_tower="../gone")
    (folder / "tokenizer.model").unlink()
    (folder / "tokenizer_config.json").unlink()
    lacks = remedies(inspect(folder))
    assert "../gone, no folder here" in lacks["vision encoder"]
    assert "tokenizer.model" in lacks["tokenizer"]
    (folder / "model.safetensors").write_bytes(b"\x00" * 100)
    assert "can't be read as weights" in remedies(inspect(folder))["weights"]
    (folder / "model.safetensors").unlink()
    assert "no weights here" in remedies(inspect(folder))["weights"]
    edit_config(folder, mm_vision_tower="openai/clip-vit-large-patch14-336")
    assert "on the Hugging Face Hub" in inspect(folder).details["vision encoder"]


def test_pieces_of_llava(tmp_path):
    whole = restore("tiny-llava-v1.5", tmp_path)
    projector = {k: v for k, v in tensors_of("tiny-llava-v1.5").items() if "mm_projector" in k}
    alone = tmp_path / "alone"
    shutil.copytree(whole, alone, ignore=shutil.ignore_patterns("*.safetensors"))
    edit_config(alone, _name_or_path="../tiny-llava-v1.5")
    torch.save(projector, alone / "mm_projector.bin")
    found = inspect(alone)
    assert (found.format, found.details["base"], found.missing) == ("llava-projector", "../tiny-llava-v1.5", [])
    edit_config(alone, _name_or_path="../gone")
    assert "--base" in remedies(inspect(alone))["base"]

    file = inspect(alone / "mm_projector.bin")
    assert (file.format, file.parts[0].what, file.parameters) == ("projector", "mlp2x_gelu", 6272)
    assert file.details["from and to"] == "features of 32 numbers to embeddings of 64"

    (alone / "mm_projector.bin").rename(alone / "non_lora_trainables.bin")
    about = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["q_proj"], "base_model_name_or_path": "x"}
    (alone / "adapter_config.json").write_text(json.dumps(about))
    name = "base_model.model.model.layers.0.self_attn.q_proj.lora_{}.weight"
    adapters = {name.format("A"): torch.zeros(4, 64), name.format("B"): torch.zeros(64, 4)}
    save_file(adapters, alone / "adapter_model.safetensors")
    found = inspect(alone)
    assert (found.format, found.details["adapters"]) == ("llava-lora", "LORA, rank 4, alpha 8")
    assert {part.name: part.parameters for part in found.parts} == {"projector": 6272, "adapters": 512}
    (alone / "non_lora_trainables.bin").unlink()
    assert any("non_lora_trainables.bin" in what for what in remedies(inspect(alone)))
    assert inspect(alone / "adapter_model.safetensors").format == "adapters"


def test_a_delta_is_told_from_a_model(tmp_path):
    folder = restore("tiny-llava-v1.5", tmp_path)
    tensors = tensors_of("tiny-llava-v1.5")
    tensors["model.norm.weight"] = tensors["model.norm.weight"] - 1
    save_file(tensors, folder / "model.safetensors")
    found = inspect(folder)
    assert found.format == "llava-delta"
    assert "lapilli delta apply" in remedies(found)["its base"]


def test_folders_that_lapilli_writes(built, tmp_path):
    found = inspect(built)
    assert (found.format, found.template, found.missing) == ("hf", "vicuna_v1", [])
    assert found.tokens_per_image.startswith("16 ")
    assert found.parameters == sum(p.numel() for p in load(built).model.parameters())


def test_adapters_of_ours_and_of_peft(built, tmp_path):
    folder = tmp_path / "a"
    folder.mkdir()
    about = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q_proj", "k_proj"]}
    (folder / "adapter_config.json").write_text(json.dumps(about | {"base_model_name_or_path": "somewhere/else"}))
    save_file(
        {"base_model.model.model.layers.0.q_proj.lora_A.weight": torch.ones(2, 64)},
        folder / "adapter_model.safetensors",
    )
    found = inspect(folder)
    assert (found.format, found.details["on"]) == ("peft-adapter", "k_proj, q_proj")
    assert "--base" in remedies(found)["base"]

    (folder / "base.json").write_text(json.dumps({"base": str(built)}))
    shutil.copyfile(built / "lapilli.json", folder / "lapilli.json")
    assert any("projector.safetensors" in what for what in remedies(inspect(folder)))
    save_file({"projector.0.weight": torch.ones(64, 32)}, folder / "projector.safetensors")
    found = inspect(folder)
    assert (found.format, found.template, found.missing) == ("lapilli-adapter", "vicuna_v1", [])
    assert found.details["base"] == str(built)
    assert [part.name for part in found.parts] == ["projector", "adapters"]


def test_without_lapilli_json(built, tmp_path):
    folder = shutil.copytree(built, tmp_path / "m")
    (folder / "lapilli.json").unlink()
    found = inspect(folder)
    assert (found.format, found.missing) == ("hf", [])
    assert found.template == "the tokenizer's chat template"
    assert found.tokens_per_image == "16"


def test_our_own_layout_and_runs(tmp_path):
    parts = str(make_vision("siglip", tmp_path / "v")), str(make_language("llama", tmp_path / "l"))
    run = tmp_path / "run"
    build(BuildOptions(*parts, projector="linear"), run / "model")
    found = inspect(run / "model")
    assert (found.format, found.missing) == ("lapilli", [])
    assert {part.name: part.what for part in found.parts}["projector"] == "linear"
    (run / "run.json").write_text(json.dumps({"model": "x"}))
    whole = inspect(run)
    assert (whole.format, whole.inner.format, whole.missing) == ("run", "lapilli", [])
    (run / "model").rename(tmp_path / "elsewhere")
    assert "has not finished" in remedies(inspect(run))["model/"]
    (tmp_path / "elsewhere" / "lapilli.json").unlink()
    assert "lapilli.json" in remedies(inspect(tmp_path / "elsewhere"))


def test_parts_alone(tmp_path):
    language = inspect(make_language("mpt", tmp_path / "l"))
    assert (language.format, language.missing) == ("language-model", [])
    encoder = inspect(make_vision("dinov2", tmp_path / "v"))
    assert (encoder.format, encoder.missing, encoder.parts[0].dtypes.keys()) == ("vision-encoder", [], {"float32"})
    write_open_clip(tmp_path / "o", quick=True)
    found = inspect(tmp_path / "o")
    assert (found.format, found.missing) == ("open-clip", [])
    assert "56 pixels" in found.parts[0].what
    write_open_clip(tmp_path / "p", ls_init_value=0.1)
    assert "ls_init_value" in " ".join(remedies(inspect(tmp_path / "p")).values())
    (tmp_path / "l" / "config.json").unlink()
    assert "config.json" in remedies(inspect(tmp_path / "l"))


def test_prepared_data(tmp_path):
    folder = tmp_path / "any"
    shutil.copytree(REFERENCE / "cerebras" / "sda_chat", folder)
    found = inspect(folder)
    assert (found.format, found.parts) == ("prepared-data", [])
    assert "data_params.json" in found.notes[0]
    about = {"post-process": {"n_examples": 1234, "num_tokens": 5}, "processing": {"max_seq_length": 256}}
    (folder / "data_params.json").write_text(json.dumps(about))
    details = inspect(folder).details
    assert (details["prepared by"], details["rows"], details["row length"]) == (
        "Cerebras' preprocessing",
        "1,234",
        "256",
    )


def test_cerebras(tmp_path):
    kept = REFERENCE / "cerebras" / "convert" / "distinct"
    shutil.copyfile(kept / "config_to_cs-2.9.yaml", tmp_path / "c.yaml")
    (tmp_path / "w.mdl").write_bytes(gzip.decompress((kept / "pytorch_model_to_cs-2.9.mdl.gz").read_bytes()))
    for path in (tmp_path, tmp_path / "w.mdl"):
        found = inspect(path)
        assert (found.format, found.missing) == ("cerebras", [])
        assert {part.name: part.parameters for part in found.parts}["projector"] == 6272
        assert found.tokens_per_image == "16 (4x4 patches of a 56x56 picture)"
    (tmp_path / "c.yaml").unlink()
    assert inspect(tmp_path / "w.mdl").missing


def test_what_is_nothing_of_ours(tmp_path):
    (tmp_path / "notes.txt").write_text("hello")
    for path in (tmp_path, tmp_path / "notes.txt", tmp_path / "gone"):
        with pytest.raises(ModelError):
            inspect(path)
    (tmp_path / "data.json").write_text("[]")
    with pytest.raises(ModelError, match="lapilli data check"):
        inspect(tmp_path / "data.json")


@pytest.mark.parametrize(
    ("name", "part"),
    [
        ("model.vision_tower.vision_tower.vision_model.encoder.layers.0.mlp.fc1.weight", "vision encoder"),
        ("vision_tower.encoder.layers.0.mlp.fc1.weight", "vision encoder"),
        ("model.language_model.layers.3.mlp.up_proj.weight", "language model"),
        ("language_model.lm_head.weight", "language model"),
        ("transformer.blocks.0.norm_1.weight", "language model"),
        ("transformer.mm_projector.0.weight", "projector"),
        ("multi_modal_projector.linear_1.bias", "projector"),
        ("model.image_newline", "projector"),
        ("embeddings.patch_embeddings.projection.weight", "vision encoder"),
        ("base_model.model.model.layers.0.q_proj.lora_A.default.weight", "adapters"),
        ("something.else", "other"),
    ],
)
def test_parts_by_name(name, part):
    assert part_of(name) == part


def test_the_command(built, tmp_path):
    said = CliRunner().invoke(app, [str(built), "--json"])
    assert said.exit_code == 0
    made = json.loads(said.stdout)
    assert (made["format"], made["path"]) == ("hf", str(built))
    assert made["parameters"] == sum(part["parameters"] for part in made["parts"])
    shown = CliRunner().invoke(app, [str(built)]).stdout
    assert "tokens per image     16" in shown
    (Path(shutil.copytree(built, tmp_path / "m")) / "tokenizer.json").unlink()
    for file in ("tokenizer_config.json", "tokenizer.model"):
        (tmp_path / "m" / file).unlink(missing_ok=True)
    assert "missing: tokenizer: " in CliRunner().invoke(app, [str(tmp_path / "m")]).stdout
