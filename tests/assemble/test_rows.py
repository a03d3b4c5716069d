"""Rows of vocabulary tables, added and cut without reading more than is needed."""

import torch
from transformers import LlamaConfig, MptConfig

from lapilli.assemble.rows import cut, grow, mean_row, tables_of, with_rows
from lapilli.checkpoint.stream import held

CONFIG = LlamaConfig(
    vocab_size=9001,
    hidden_size=8,
    intermediate_size=8,
    num_hidden_layers=1,
    num_attention_heads=2,
    tie_word_embeddings=False,
)
TABLES = ("language.model.embed_tokens.weight", "language.lm_head.weight")


def _tensors(dtype):
    made = {name: torch.randn(9001, 8).to(dtype) for name in TABLES}
    made["language.model.norm.weight"] = torch.randn(9001).to(dtype)  # as long as the tables, and none
    return made


def test_there_and_back():
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        tensors = _tensors(dtype)
        grown = grow({name: held(t, name) for name, t in tensors.items()}, CONFIG, 9004)
        again = cut(grown, with_rows(CONFIG, 9004), 9001)
        for name, tensor in tensors.items():
            assert torch.equal(again[name].read(), tensor)
            assert again[name].shape == tensor.shape
        table = grown[TABLES[0]].read()
        expected = tensors[TABLES[0]].double().mean(0).to(dtype)
        assert torch.equal(table[9001:], expected.expand(3, 8))
        assert grown["language.model.norm.weight"].shape == (9001,)


def test_the_mean_is_exact_over_pieces():
    table = torch.full((10_000, 2), 1e-3, dtype=torch.float16)
    assert torch.equal(mean_row(table), table[0])


def test_tables_by_architecture():
    assert set(TABLES) <= set(tables_of(CONFIG))
    assert "language.transformer.wte.weight" in tables_of(MptConfig(d_model=8, n_heads=2, n_layers=1, vocab_size=50))
    assert with_rows(CONFIG, 5).vocab_size == 5
    assert CONFIG.vocab_size == 9001
