"""Whole models: the original's files and ours are one model, in every form and release, and round trips are exact."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from tests.support.cerebras import REFERENCE, equal, fields, load_json, random_model, restore, values

from lapilli.base.errors import ModelError
from lapilli.checkpoint.cerebras import (
    encoder_folder,
    is_cerebras,
    open_cerebras,
    tokenizer_folder,
    write_cerebras,
)
from lapilli.checkpoint.cerebras.state_file import open_state_file
from lapilli.checkpoint.names import llava_name, vision_name
from lapilli.checkpoint.stream import held

TOKENIZER = REFERENCE.parents[1] / "tokenizer"
SMALL = {"vocab_size": 40, "hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 4,
         "num_key_value_heads": 4, "mm_hidden_size": 8, "vision_hidden_size": 8, "vision_intermediate_size": 12,
         "vision_num_hidden_layers": 2, "vision_image_size": 28, "vision_projection_dim": 8}  # fmt: skip


@pytest.fixture(scope="module")
def theirs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return restore("distinct", tmp_path_factory.mktemp("theirs"))


def small(**changes: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    return fields(**(SMALL | changes))


def test_their_tensors_are_the_ones_that_the_key_table_says(theirs: Path) -> None:
    opened = open_cerebras(theirs)
    stored, _ = open_state_file(theirs / "pytorch_model_to_cs-2.9.mdl")
    wanted = {}
    for folder, name, place, _, rows in load_json("key_tables")["mmsimple"]["rows"]:
        value = stored[place].read()
        back = value if rows is None else torch.empty_like(value).index_copy(0, torch.tensor(rows), value)
        wanted[vision_name(name) if folder == "image_model" else llava_name(name)] = back
    assert equal(values(opened.tensors), wanted)
    assert any("no tokenizer" in note for note in opened.notes)


@pytest.mark.parametrize("form", ["mdl", "tensors"])
def test_what_we_write_holds_their_tensors(theirs: Path, tmp_path: Path, form: Any) -> None:
    made = write_cerebras(open_cerebras(theirs), tmp_path, "2.9", form=form, hashes=True)
    assert sum(len(places) for places in made.places.values()) == 81
    assert set(made.written) == {place for places in made.places.values() for place in places}
    again = open_cerebras(tmp_path)
    assert equal(values(again.tensors), values(open_cerebras(theirs).tensors))
    if form == "mdl":
        wanted, _ = open_state_file(theirs / "pytorch_model_to_cs-2.9.mdl")
        found, _ = open_state_file(tmp_path / "pytorch_model_to_cs-2.9.mdl")
        assert equal(values(found), values(wanted))


@pytest.mark.parametrize(
    ("model", "form", "release"),
    [
        ("mm_simple", "mdl", "cs-2.3"),
        ("mm_simple", "mdl", "cs-2.10"),
        ("mm_simple", "tree", "2.9"),
        ("llava", "mdl", "cs-2.4"),
        ("llava", "tensors", "2.2"),
    ],
)
def test_round_trips_are_exact(tmp_path: Path, model: str, form: Any, release: str) -> None:
    folder = tmp_path / "model"
    llava, clip = small(num_key_value_heads=2, mm_projector_type="mlp3x_gelu", mm_vision_select_layer=1)
    llava |= {"image_aspect_ratio": "square", "tokenizer_model_max_length": 99}
    tensors = random_model(llava, clip, torch.bfloat16)
    made = write_cerebras((llava, clip, tensors), folder, release, model=model, form=form, tokenizer=TOKENIZER)
    assert any("expand_to_square" in note for note in made.notes)
    assert is_cerebras(folder)
    back = open_cerebras(folder)
    assert equal(values(back.tensors), values(tensors))
    ids = {"bos_token_id": 1, "eos_token_id": 2}
    assert back.llava_fields == llava | {"mm_vision_tower": "../image_model"} | ids
    assert {key: back.clip_fields[key] for key in clip} == clip
    assert tokenizer_folder(folder) == folder / "text_model"
    assert encoder_folder(folder) == folder / "image_model"
    moved = folder.rename(tmp_path / "moved")
    assert (moved / "text_model" / back.llava_fields["mm_vision_tower"] / "config.json").exists()
    assert equal(values(open_cerebras(moved).tensors), values(tensors))


@pytest.mark.slow
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    layers=st.integers(1, 3),
    heads=st.sampled_from([(1, 1), (2, 1), (4, 2), (4, 4), (6, 3)]),
    head_width=st.sampled_from([2, 4, 10]),
    depth=st.integers(1, 4),
    vision=st.tuples(st.integers(1, 3), st.sampled_from([1, 2])),
    rows=st.integers(3, 50),
    tied=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.float16, torch.bfloat16]),
    model=st.sampled_from(["mmsimple-llava", "llava"]),
    form=st.sampled_from(["mdl", "tensors", "tree"]),
)
def test_random_models_come_back(
    tmp_path: Path, layers, heads, head_width, depth, vision, rows, tied, dtype, model, form
) -> None:
    folder = tmp_path / "model"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    llava, clip = small(
        num_hidden_layers=layers, num_attention_heads=heads[0], num_key_value_heads=heads[1],
        hidden_size=heads[0] * head_width, mm_projector_type=f"mlp{depth}x_gelu", vocab_size=rows,
        tie_word_embeddings=tied, vision_num_hidden_layers=vision[0], vision_num_attention_heads=vision[1],
        mm_vision_select_layer=-vision[0],
    )  # fmt: skip
    tensors = random_model(llava, clip, dtype)
    write_cerebras((llava, clip, tensors), folder, "2.9", model=model, form=form)
    assert equal(values(open_cerebras(folder).tensors), values(tensors))


def test_ids_come_from_the_tokenizer(tmp_path: Path) -> None:
    llava, clip = small(bos_token_id=77, eos_token_id=78)
    write_cerebras(
        (llava, clip, random_model(llava, clip, torch.float32)), tmp_path, "2.9", form="tree", tokenizer=TOKENIZER
    )
    back = open_cerebras(tmp_path)
    assert (back.llava_fields["bos_token_id"], back.llava_fields["eos_token_id"]) == (1, 2)
    assert any("bos_token_id 77 is 1 in the tokenizer" in note for note in back.notes)


# ---- trees as people have them ----------------------------------------------------------------------------------


def _tree(folder: Path, **changes: Any) -> tuple[Path, dict[str, torch.Tensor]]:
    llava, clip = small(**changes)
    tensors = random_model(llava, clip, torch.float32)
    write_cerebras((llava, clip, tensors), folder, "2.9", form="tree", tokenizer=TOKENIZER)
    return folder, values(tensors)


def _rewrite(folder: Path, change) -> None:
    from safetensors.torch import load_file

    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")
    (folder / "model.safetensors.index.json").unlink(missing_ok=True)


def test_a_whole_clip_and_a_copy_of_the_encoder_are_told_and_not_read(tmp_path: Path) -> None:
    folder, wanted = _tree(tmp_path)
    copies = {
        f"model.vision_tower.vision_tower.vision_model.{k[7:]}": v + 1 for k, v in wanted.items() if k[:7] == "vision."
    }
    _rewrite(folder / "text_model", lambda tensors: tensors.update(copies))
    others = {
        "logit_scale": torch.ones(1),
        "text_model.final_layer_norm.weight": torch.ones(4),
        "vision_model.embeddings.position_ids": torch.arange(5),
    }
    _rewrite(folder / "image_model", lambda tensors: tensors.update(others))
    back = open_cerebras(folder)
    assert equal(values(back.tensors), wanted)
    assert any(f"{len(copies)} tensors of a vision encoder are not read" in note for note in back.notes)
    assert any("1 of logit_scale, 1 of position tables, 1 of text_model" in note for note in back.notes)

    config = json.loads((folder / "text_model" / "config.json").read_text())
    (folder / "text_model" / "config.json").write_text(json.dumps(config | {"unfreeze_mm_vision_tower": True}))
    tuned = values(open_cerebras(folder).tensors)
    assert torch.equal(tuned["vision.pre_layrnorm.bias"], wanted["vision.pre_layrnorm.bias"] + 1)


def test_a_start_without_projector_gets_one_and_says_so(tmp_path: Path) -> None:
    folder, wanted = _tree(tmp_path / "tree")

    def drop(tensors: dict[str, torch.Tensor]) -> None:
        for name in [name for name in tensors if "mm_projector" in name]:
            del tensors[name]

    _rewrite(folder / "text_model", drop)
    one, two = open_cerebras(folder), open_cerebras(folder)
    assert any("new and random" in note for note in one.notes)
    made = values(one.tensors)
    assert equal(made, values(two.tensors))
    assert {name: value.shape for name, value in made.items()} == {name: value.shape for name, value in wanted.items()}
    for layer, inputs in ((0, 8), (2, 16)):
        weight = made[f"projector.{layer}.weight"]
        assert 0.8 * inputs**-0.5 < weight.abs().max() <= inputs**-0.5
    write_cerebras(one, tmp_path, "2.9")


def test_bad_input_is_refused_by_name(tmp_path: Path, theirs: Path) -> None:
    llava, clip = small()
    tensors = random_model(llava, clip, torch.float32)

    def refused(words: str, changed: dict[str, Any] | None = None, **config: Any) -> None:
        with pytest.raises(ModelError, match=words):
            write_cerebras((llava | config, clip, changed or tensors), tmp_path, "2.9")
        assert not list(tmp_path.iterdir())

    refused("image_newline", tensors | {"image_newline": held(torch.zeros(16), "newline")})
    refused("q_proj.bias", tensors | {"language.model.layers.0.self_attn.q_proj.bias": held(torch.zeros(16), "b")})
    refused("post_layernorm.bias", {n: t for n, t in tensors.items() if n != "vision.post_layernorm.bias"})
    refused("embed_tokens", vocab_size=41)
    refused("projector.4", mm_projector_type="mlp3x_gelu")
    refused("num_key_value_heads", num_key_value_heads=3)
    refused("head_dim", head_dim=8)
    refused("differs from the embedding", tie_word_embeddings=True)
    with pytest.raises(ModelError, match="form"):
        write_cerebras((llava, clip, tensors), tmp_path, "2.9", form="pickle")  # type: ignore[arg-type]

    assert not is_cerebras(tmp_path)
    with pytest.raises(ModelError, match="no model of Cerebras"):
        open_cerebras(tmp_path)
    folder = tmp_path / "theirs"
    shutil.copytree(theirs, folder)
    config = (folder / "config_to_cs-2.9.yaml").read_text()
    (folder / "config_to_cs-2.9.yaml").write_text(config.replace("hidden_size: 64", "hidden_size: 128"))
    with pytest.raises(ModelError, match="rotary_dim"):
        open_cerebras(folder)
    (folder / "config_to_cs-2.9.yaml").write_text(config.replace("vocab_size: 2000", "vocab_size: 2001"))
    with pytest.raises(ModelError, match=r"word_embeddings.*2001|lm_head.*2001"):
        open_cerebras(folder)
    shutil.copyfile(folder / "pytorch_model_to_cs-2.9.mdl", folder / "second.mdl")
    assert is_cerebras(folder)
    with pytest.raises(ModelError, match=r"2 checkpoints.*second\.mdl"):
        open_cerebras(folder)
    (folder / "config_to_cs-2.9.yaml").unlink()
    with pytest.raises(ModelError, match="configuration"):
        open_cerebras(folder / "second.mdl")


def test_more_than_one_encoder_in_the_weights_is_refused(tmp_path: Path) -> None:
    from safetensors.torch import load_file

    llava, clip = small()
    write_cerebras((llava, clip, random_model(llava, clip, torch.float32)), tmp_path, "2.9", form="tensors")
    tensors = load_file(tmp_path / "model.safetensors")
    unfit = {
        "image_model.image_model_list.1.0.embedding_layer.cls_embedding": "one encoder and one projector",
        "image_model.image_model_list.0.1.ffn.0.linear_layer.weight": "one encoder and one projector",
        "text_model.extra.weight": "no place",
    }
    for name, words in unfit.items():
        save_file(tensors | {name: torch.zeros(2)}, tmp_path / "model.safetensors")
        with pytest.raises(ModelError, match=words):
            open_cerebras(tmp_path)
    twice = dict(tensors)
    twice["text_model.ln_f.weight"] = twice["text_model.ln_f.weight"] + 1
    save_file(twice, tmp_path / "model.safetensors")
    with pytest.raises(ModelError, match="ln_f"):
        open_cerebras(tmp_path)
