"""Names and row orders against the tables found in the original converter's output."""

import pytest
import torch
from tests.support.cerebras import load_json

from lapilli.base.errors import ModelError
from lapilli.checkpoint.cerebras.names import is_copy, model_name, reordered, to_ours, to_theirs
from lapilli.checkpoint.names import llava_name, vision_name

TABLES = load_json("key_tables")
HEAD_WIDTH = 16


@pytest.mark.parametrize("name", TABLES)
def test_names_and_rows_equal_the_originals(name: str) -> None:
    table = TABLES[name]
    for folder, theirs_hf, theirs_cs, shape, rows in table["rows"]:
        ours = vision_name(theirs_hf) if folder == "image_model" else llava_name(theirs_hf)
        assert theirs_cs in to_theirs(ours, table["model"])
        assert to_ours(theirs_cs, table["model"]) == (None if is_copy(theirs_cs) else ours)
        numbers = torch.arange(shape[0]).reshape(-1, *[1] * (len(shape) - 1)).expand(shape)
        turned = reordered(ours, numbers, HEAD_WIDTH, theirs=True)
        assert turned.reshape(shape[0], -1)[:, 0].tolist() == (rows or list(range(shape[0])))
        assert torch.equal(reordered(ours, turned, HEAD_WIDTH, theirs=False), numbers)


def test_what_has_no_place_has_no_name() -> None:
    nowhere = (
        "image_newline",
        "projector.weight",
        "projector.1.weight",
        "language.model.layers.x.mlp.up_proj.weight",
        "language.transformer.wte.weight",
        "vision.encoder.layers.0.self_attn.rel_pos",
    )
    for name in nowhere:
        assert to_theirs(name, "mmsimple-llava") == ()
    assert to_ours("image_model.image_model_list.0.1.embedding_layer.cls_embedding", "mmsimple-llava") is None
    assert to_ours("text_model.transformer_decoder.layers.0.ffn.ffn.0.linear_img.weight", "mmsimple-llava") is None


def test_models_by_the_names_in_use() -> None:
    assert {model_name(name) for name in ("mm_simple", "multimodal_simple", "mmsimple-llava")} == {"mmsimple-llava"}
    with pytest.raises(ModelError, match="did you mean"):
        model_name("lava")
