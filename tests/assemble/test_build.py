"""`build` and `load` as library calls: what is refused, what is kept, and what a folder says."""

import json

import pytest
import torch
import transformers as hf
from safetensors.torch import save_file
from tests.support.parts import make_language, make_vision

from lapilli.assemble.adapter import save_adapter
from lapilli.assemble.build import BuildOptions, build, dry_run
from lapilli.assemble.folder import read_spec
from lapilli.assemble.load import load
from lapilli.base.errors import LapilliError, ModelError, RecipeError
from lapilli.model.adapter import add_lora, merge_lora
from lapilli.model.freeze import apply_freeze


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    root = tmp_path_factory.mktemp("parts")
    return str(make_vision("clip", root / "clip")), str(make_language("llama", root / "llama"))


@pytest.fixture(scope="module")
def model(parts, tmp_path_factory):
    out = tmp_path_factory.mktemp("model") / "m"
    build(BuildOptions(*parts), out)
    return out


def test_new_rows_are_the_mean_and_old_rows_are_kept(parts, model):
    before = hf.AutoModelForCausalLM.from_pretrained(parts[1])
    after = load(model).model
    rows = before.config.vocab_size
    for get in ("get_input_embeddings", "get_output_embeddings"):
        old, new = getattr(before, get)().weight, getattr(after, get)().weight
        assert torch.equal(new[:rows], old)
        assert torch.allclose(new[rows:], old.mean(0, keepdim=True), atol=1e-6)
    assert after.config.image_token_id == rows


def test_dry_run_says_what_build_makes_and_writes_nothing(parts, tmp_path):
    said = dry_run(BuildOptions(*parts))
    made = build(BuildOptions(*parts), tmp_path / "m")
    assert said.tokens_per_image == made.tokens_per_image
    assert said.parameters == made.parameters, "the image token's row included"
    assert list(tmp_path.iterdir()) == [tmp_path / "m"]


def test_a_path_that_is_not_there_is_not_looked_for_on_the_hub(parts, tmp_path):
    for options in (BuildOptions(parts[0], str(tmp_path / "no")), BuildOptions("./no", parts[1])):
        with pytest.raises(ModelError, match=r"(language model|vision encoder) .*no: no such folder"):
            dry_run(options)


def test_folder_holds_no_path_of_this_machine(model, parts):
    for file in model.iterdir():
        if file.suffix in (".json", ".jinja"):
            assert parts[0] not in file.read_text()
            assert parts[1] not in file.read_text()


def test_vision_half_of_a_dual_encoder(parts, tmp_path):
    config = hf.CLIPConfig(
        vision_config=hf.CLIPVisionConfig(
            hidden_size=32, num_hidden_layers=3, num_attention_heads=2, image_size=56, patch_size=14
        ).to_dict(),
        text_config={"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 100},
    )
    clip = hf.CLIPModel(config)
    clip.save_pretrained(tmp_path / "dual")
    report = build(BuildOptions(str(tmp_path / "dual"), parts[1]), tmp_path / "m")
    assert any("no image processor" in note for note in report.notes)
    loaded = load(tmp_path / "m").model.vision_encoder.state_dict()
    for name, value in clip.vision_model.state_dict().items():
        assert torch.equal(loaded[name], value), name


@pytest.mark.parametrize("projector", ["linear", "mlp3x_gelu", "mlp1x_gelu"])
@pytest.mark.parametrize("layers", [(-2,), (-1,), (-2, 1)])
@pytest.mark.parametrize("select", ["patch", "cls_patch"])
def test_projectors_layers_and_selections_survive_saving(parts, tmp_path, projector, layers, select):
    options = BuildOptions(*parts, projector=projector, feature_layers=layers, feature_select=select)
    build(options, tmp_path / "m")
    loaded = load(tmp_path / "m")
    assert loaded.layout.tokens_per_tile == 16 + (select == "cls_patch")
    pixels = torch.rand(2, 3, 56, 56)
    features = loaded.model.encode_images(pixels, torch.ones(2), torch.ones(2, 2))
    reference = hf.AutoModel.from_pretrained(parts[0])(pixels, output_hidden_states=True).hidden_states
    states = torch.cat([reference[i][:, int(select == "patch") :] for i in layers], dim=-1)
    assert torch.allclose(features, loaded.model.projector(states).flatten(0, 1), atol=1e-5)


def test_layers_above_the_one_that_is_read_do_not_run_and_do_not_train(model):
    loaded = load(model).model
    ran = []
    for i, layer in enumerate(loaded.vision_encoder.encoder.layers):
        layer.register_forward_hook(lambda *_, i=i: ran.append(i))
    loaded.encode_images(torch.rand(1, 3, 56, 56), torch.ones(1), torch.ones(1, 2))
    assert ran == [0, 1]
    table = {row.part: row for row in apply_freeze(loaded, "full")}
    assert table["vision_encoder"].unused == table["vision_encoder"].frozen > 0


def test_projector_weights_are_taken_or_refused(parts, tmp_path):
    weights = {f"model.mm_projector.{k}": v for k, v in torch.nn.Sequential(
        torch.nn.Linear(32, 64), torch.nn.GELU(), torch.nn.Linear(64, 64)).state_dict().items()}  # fmt: skip
    torch.save(weights, tmp_path / "mm_projector.bin")
    save_file(weights, tmp_path / "mm_projector.safetensors")
    for name in ("mm_projector.bin", "mm_projector.safetensors"):
        build(BuildOptions(*parts, projector_weights=str(tmp_path / name)), tmp_path / name[-3:])
        got = load(tmp_path / name[-3:]).model.projector.state_dict()
        assert all(torch.equal(got[k.rsplit("projector.", 1)[1]], v) for k, v in weights.items())
    save_file({k: v[..., :3].contiguous() for k, v in weights.items()}, tmp_path / "wrong.safetensors")
    with pytest.raises(ModelError, match="shape"):
        build(BuildOptions(*parts, projector_weights=str(tmp_path / "wrong.safetensors")), tmp_path / "no")
    assert not (tmp_path / "no").exists()


def test_a_pickle_that_holds_more_than_tensors_is_refused(parts, tmp_path):
    class Evil:
        def __reduce__(self):
            return (print, ("ran",))

    torch.save({"model.mm_projector.0.weight": Evil()}, tmp_path / "evil.bin")
    with pytest.raises(ModelError, match="can't be read"):
        build(BuildOptions(*parts, projector_weights=str(tmp_path / "evil.bin")), tmp_path / "no")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"projector": "mlp2_gelu"}, 'unknown projector "mlp2_gelu".*did you mean "mlp2x_gelu"'),
        ({"template": "vicuna_v2"}, "vicuna_v1"),
        ({"projector": "identity"}, "equal widths"),
        ({"feature_layers": (7,)}, "feature layer 7 does not exist"),
        ({"vision_encoder": "/nowhere"}, "vision encoder /nowhere"),
    ],
)
def test_wrong_options_are_refused_before_anything_is_written(parts, tmp_path, change, message):
    fields = {"vision_encoder": parts[0], "language_model": parts[1]} | change
    with pytest.raises(LapilliError, match=message):
        build(BuildOptions(**fields), tmp_path / "m")
    assert not (tmp_path / "m").exists()


def test_a_model_without_room_for_the_image_token_is_refused(model, tmp_path):
    import shutil

    folder = tmp_path / "m"
    shutil.copytree(model, folder)
    spec = json.loads((folder / "lapilli.json").read_text())
    spec["joined"]["image_token_id"] = 99999
    (folder / "lapilli.json").write_text(json.dumps(spec))
    with pytest.raises(ModelError, match="no room for the image token"):
        load(folder)


def test_keep_vocabulary_adds_no_rows(parts, tmp_path):
    build(BuildOptions(*parts, keep_vocabulary=True), tmp_path / "m")
    loaded = load(tmp_path / "m")
    rows = hf.AutoConfig.from_pretrained(parts[1]).vocab_size
    assert loaded.model.get_input_embeddings().weight.shape[0] == rows == loaded.model.config.image_token_id
    spec = read_spec(tmp_path / "m")
    assert spec is not None
    assert spec.stored_as == "lapilli"


def test_weights_that_are_missing_are_named(parts, tmp_path):
    import shutil

    from safetensors.torch import load_file

    shutil.copytree(parts[1], tmp_path / "lm")
    tensors = load_file(tmp_path / "lm" / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, tmp_path / "lm" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"layers\.1\.mlp\.up_proj"):
        build(BuildOptions(parts[0], str(tmp_path / "lm")), tmp_path / "m")


def test_adapters_reach_the_language_model_alone_and_merge_exactly(model, tmp_path):
    loaded = load(model)
    add_lora(loaded.model, r=4, alpha=8, dropout=0.0)
    apply_freeze(loaded.model, "freeze_vision", lora=True)
    trains = [n for n, p in loaded.model.named_parameters() if p.requires_grad]
    assert all(n.startswith("projector") or ".lora_" in n for n in trains)
    assert not any("lora" in n for n, _ in loaded.model.vision_encoder.named_parameters())
    assert not any("lora" in n for n, _ in loaded.model.get_output_embeddings().named_parameters())
    with torch.no_grad():
        for name, parameter in loaded.model.named_parameters():
            if ".lora_B" in name or name.startswith("projector"):
                parameter.normal_(std=0.1)
    ids = torch.tensor([[1, 5, 7, 9]])
    expected = loaded.model(input_ids=ids).logits
    save_adapter(loaded.model, loaded.tokenizer, loaded.spec, model, tmp_path / "adapter")
    merge_lora(loaded.model)
    assert torch.allclose(loaded.model(input_ids=ids).logits, expected, atol=1e-5)
    again = load(tmp_path / "adapter").model
    assert torch.allclose(again(input_ids=ids).logits, expected, atol=1e-5)
    assert torch.equal(again.projector[0].weight, loaded.model.projector[0].weight)
    (tmp_path / "adapter" / "projector.safetensors").unlink()
    with pytest.raises(ModelError, match=r"adapter: projector\.safetensors is missing"):
        load(tmp_path / "adapter", base=model)


@pytest.mark.parametrize(
    ("freeze", "message"),
    [
        (["."], "freezes every parameter"),
        (["vision_tower"], "matches no parameter"),
        (["("], "not a regular expression"),
        ("projektor", 'did you mean "projector"'),
    ],
)
def test_frozen_sets_that_make_no_sense_are_refused(model, freeze, message):
    with pytest.raises(RecipeError, match=message):
        apply_freeze(load(model).model, freeze)


def test_expressions_freeze_what_they_match(model):
    loaded = load(model).model
    apply_freeze(loaded, ["^vision_encoder", r"language_model\.model\.layers\.0\."])
    for name, parameter in loaded.named_parameters():
        frozen = name.startswith("vision_encoder") or ".layers.0." in name
        assert parameter.requires_grad != frozen, name
