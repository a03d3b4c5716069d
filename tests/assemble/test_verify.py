"""The proof of a conversion finds whatever is wrong with it: made wrong on purpose, one thing at a time."""

import json
import shutil

import pytest
import torch
import transformers as hf
from safetensors.torch import load_file, save_file
from tests.support.llava import NAMES, restore
from tests.support.parts import LANGUAGE, VISION, make_language, make_tokenizer, make_vision

from lapilli.assemble.build import BuildOptions, build
from lapilli.assemble.load import load
from lapilli.assemble.save import save
from lapilli.assemble.source import materialise, open_model
from lapilli.assemble.streamed import ends_only, streamed
from lapilli.assemble.verify import fixed_picture, verify
from lapilli.model.quiet import quiet


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return restore("tiny-llava-v1.5", tmp_path_factory.mktemp("source"))


@pytest.fixture(scope="module")
def copied(source, tmp_path_factory):
    """The same model in transformers' layout with a row for the image token, as a conversion writes it."""
    folder = tmp_path_factory.mktemp("copied") / "hf"
    opened = load(source)
    rows = opened.model.config.text_config.vocab_size
    language = opened.model.language_model
    with quiet():
        language.resize_token_embeddings(rows + 1, mean_resizing=False)
    opened.model.config.text_config, opened.model.config.image_row = language.config, True
    save(opened.model, opened.tokenizer, opened.spec.model_copy(update={"stored_as": "transformers"}), folder)
    return folder


def places_of(source, folder):
    """Where each tensor went, as the target's own reader tells it."""
    written = open_model(folder).tensors
    return {name: [("", written[name].where.rpartition(": ")[2])] for name in open_model(source).tensors}


def proof(source, folder, how="sample"):
    return verify(open_model(source), folder, places_of(source, folder), how)


@pytest.fixture
def target(copied, tmp_path):
    return shutil.copytree(copied, tmp_path / "hf")


def change(folder, edit):
    file = folder / "model.safetensors"
    tensors = load_file(file)
    edit(tensors)
    save_file(tensors, file, metadata={"format": "pt"})


@pytest.mark.parametrize("how", ["sample", "full"])
def test_an_honest_copy_has_no_problems(source, target, how):
    found = proof(source, target, how)
    assert found.problems == []
    assert found.equal == found.tensors == len(open_model(source).tensors)
    assert found.logits_difference == 0.0
    assert found.logits_spread > 0.01
    assert list(found.added_rows.values()) == [["<image>"], ["<image>"]]
    assert found.blocks == (
        "the whole model" if how == "full" else "vision blocks 0, 1 of 3, language blocks 0, 1 of 2"
    )
    assert json.loads(json.dumps(found.as_dict()))["problems"] == []
    assert ("tensors", f"{found.tensors} of {found.tensors} equal bit for bit (0.00 GB)") in found.rows()


def test_one_changed_bit_is_found(source, target):
    def edit(tensors):
        name = "model.language_model.layers.1.mlp.down_proj.weight"
        name = name if name in tensors else next(k for k in tensors if k.endswith("layers.1.mlp.down_proj.weight"))
        tensors[name].view(torch.int32)[3, 5] ^= 1

    change(target, edit)
    found = proof(source, target)
    assert found.different == ["language.model.layers.1.mlp.down_proj.weight"]
    assert "1 tensors differ: language.model.layers.1.mlp.down_proj.weight" in found.problems[0]
    assert any(row[0] == "PROBLEM" for row in found.rows())


def test_two_tensors_in_each_others_place_are_found(source, target):
    def edit(tensors):
        one, other = (
            next(k for k in tensors if k.endswith(f"layers.{i}.self_attn.q_proj.weight") and "language" in k)
            for i in (0, 1)
        )
        tensors[one], tensors[other] = tensors[other], tensors[one]

    change(target, edit)
    assert len(proof(source, target).different) == 2


def test_tensors_without_a_source_and_without_a_target_are_found(source, target):
    opened, places = open_model(source), places_of(source, target)
    lost = "language.model.norm.weight"
    del opened.tensors[lost]
    found = verify(opened, target, {name: place for name, place in places.items() if name != lost}, "sample")
    assert found.invented[0].startswith(str(target))
    assert found.invented[1:] == [lost]
    assert found.not_run, "half a model has no logits"
    extra = open_model(source)
    extra.tensors["language.extra.weight"] = extra.tensors[lost]
    assert verify(extra, target, places, "sample").unused == ["language.extra.weight"]


@pytest.mark.parametrize(
    ("file", "key", "value"),
    [
        ("text_config", "rms_norm_eps", 0.1),
        ("vision_config", "hidden_act", "gelu"),
        ("text_config", "rope_theta", 17.0),
    ],
)
def test_a_setting_that_changes_answers_is_found(source, target, file, key, value):
    """Every tensor is equal; only running the model shows it."""
    config = json.loads((target / "config.json").read_text())
    if key == "rope_theta":
        config[file]["rope_parameters"][key] = value
    else:
        config[file][key] = value
    (target / "config.json").write_text(json.dumps(config))
    found = proof(source, target)
    assert found.equal == found.tensors
    assert found.logits_difference > 1e-4
    assert found.problems[0].startswith("logits differ by")


def test_other_image_settings_are_found(source, target):
    spec = json.loads((target / "lapilli.json").read_text())
    spec["image"]["mean"] = [0.5, 0.5, 0.5]
    (target / "lapilli.json").write_text(json.dumps(spec))
    assert "image settings differ" in proof(source, target).problems[0]


def test_another_dtype_is_declared_and_overflow_is_told(source, target, tmp_path):
    change(target, lambda tensors: tensors.update({k: v.half() for k, v in tensors.items()}))
    found = proof(source, target)
    assert found.problems == []
    assert found.cast == {"float32 to float16": found.tensors}
    assert 0 < found.logits_difference < 0.1
    opened = open_model(source)
    name = "language.model.norm.weight"
    opened.tensors[name] = opened.tensors[name].then(lambda tensor: tensor + 1e6)
    found = verify(opened, target, places_of(source, target), "sample")
    assert found.overflowed == [name]
    assert "too large for the target's dtype" in " ".join(found.problems)


def test_none_reads_nothing(source, tmp_path):
    found = verify(open_model(source), tmp_path / "not there", {}, "none")
    assert found.rows() == [("verified", "no (--verify none)")]


def test_copies_that_the_reader_passes_over_are_compared_too(source):
    """A LLaVA checkpoint of DeepSpeed holds its untrained encoder a second time."""
    places = {}
    prefix = "model.vision_tower.vision_tower.vision_model."
    for name in open_model(source).tensors:
        part, _, rest = name.partition(".")
        heads = {"vision": prefix, "projector": "model.mm_projector.", "language": ""}
        places[name] = [("", heads[part] + rest)] + (
            [("../vision-tower", "vision_model." + rest)] if part == "vision" else []
        )
    found = verify(open_model(source), source, places, "sample")
    vision = sum(name.startswith("vision.") for name in places)
    assert (found.problems, found.tensors) == ([], len(places) + vision)


# ---- running from the disk --------------------------------------------------------------------------------------


def logits(model, side):
    picture = fixed_picture()
    layout = side.config.image_layout
    pixels = torch.rand(
        layout.tiles(*picture.size),
        3,
        layout.tile_height,
        layout.tile_width,
        generator=torch.Generator().manual_seed(0),
    )
    ids = [3, 4, *[side.config.image_token_id] * layout.tokens(*picture.size), 5, 6, 7]
    with torch.no_grad():
        return model(
            input_ids=torch.tensor([ids]),
            pixel_values=pixels,
            tiles_per_image=torch.tensor([len(pixels)]),
            image_sizes=torch.tensor([picture.size]),
        ).logits


@pytest.mark.parametrize("name", NAMES)
def test_a_streamed_model_gives_the_loaded_models_logits(tmp_path, name):
    opened = open_model(restore(name, tmp_path))
    with quiet():
        expected = logits(materialise(opened, torch.float32), opened)
        torch.testing.assert_close(logits(streamed(opened), opened), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(("vision", "language"), [*[(v, "llama") for v in VISION], *[("clip", k) for k in LANGUAGE]])
def test_any_pair_of_parts_streams(tmp_path, vision, language):
    parts = str(make_vision(vision, tmp_path / "v")), str(make_language(language, tmp_path / "l"))
    build(BuildOptions(*parts), tmp_path / "m")
    opened = open_model(tmp_path / "m")
    with quiet():
        expected = logits(materialise(opened, torch.float32), opened)
        torch.testing.assert_close(logits(streamed(opened), opened), expected, atol=1e-4, rtol=1e-4)


def test_a_cut_model_keeps_its_ends(tmp_path):
    """Blocks between the ends are taken out of a model by hand: what remains answers as the cut one."""
    tokenizer = make_tokenizer()
    torch.manual_seed(0)
    clip = hf.CLIPVisionModel(
        hf.CLIPVisionConfig(
            hidden_size=32,
            num_hidden_layers=8,
            num_attention_heads=2,
            patch_size=14,
            intermediate_size=64,
            image_size=56,
        )
    )
    llama = hf.LlamaForCausalLM(
        hf.LlamaConfig(
            hidden_size=64, intermediate_size=96, num_hidden_layers=7, num_attention_heads=4, vocab_size=len(tokenizer)
        )
    )
    for model in (clip, llama):
        for parameter in model.parameters():
            if parameter.ndim > 1:
                torch.nn.init.normal_(parameter, std=0.15)
    clip.save_pretrained(tmp_path / "v")
    llama.save_pretrained(tmp_path / "l")
    tokenizer.save_pretrained(tmp_path / "l")
    build(BuildOptions(str(tmp_path / "v"), str(tmp_path / "l")), tmp_path / "m")
    opened = open_model(tmp_path / "m")
    cut, said = ends_only(opened)
    assert said == "vision blocks 0, 1, 5, 6 of 8, language blocks 0, 1, 5, 6 of 7"
    with quiet():
        whole = materialise(opened, torch.float32)
        vision = whole.vision_encoder
        layers = vision.encoder.layers if hasattr(vision, "encoder") else vision.vision_model.encoder.layers
        for stack in (layers, whole.language_model.model.layers):
            for i in reversed(range(2, len(stack) - 2 - (len(stack) == 8))):
                del stack[i]
            for i, layer in enumerate(stack):
                if hasattr(layer.self_attn, "layer_idx"):
                    layer.self_attn.layer_idx = i
        vision.config.num_hidden_layers, whole.language_model.config.num_hidden_layers = 5, 4
        assert len(layers) == 5
        torch.testing.assert_close(logits(streamed(cut), cut), logits(whole, opened), atol=1e-5, rtol=1e-5)
