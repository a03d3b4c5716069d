"""Loading tokenizers: the ids that SentencePiece itself gives, and none changed without a word."""

import json
import logging
import shutil
from pathlib import Path

import pytest
import sentencepiece
from tests.support.parts import make_tokenizer
from transformers import AutoTokenizer, LlamaTokenizer

from lapilli.base.errors import ModelError
from lapilli.data.tokenizer import load_tokenizer

FOLDER = Path(__file__).parents[1] / "reference" / "tokenizer"
TEXTS = ["USER: hi", " leading", "  two", "\nline", "무 🔬 é", "a  b \n\n c"]


def ids(tokenizer, text):
    return tokenizer(text)["input_ids"]


@pytest.mark.parametrize("text", TEXTS)
def test_a_bare_model_file_gives_sentencepieces_ids_and_a_bos(text, caplog):
    pieces = sentencepiece.SentencePieceProcessor(str(FOLDER / "tokenizer.model"))
    with caplog.at_level(logging.INFO):
        assert ids(load_tokenizer(FOLDER), text) == [1, *pieces.encode(text)]
    assert "add_bos_token=True, legacy=True" in caplog.text


@pytest.mark.parametrize("legacy", [True, False])
def test_saved_and_loaded_it_is_the_same_one(tmp_path, legacy):
    """transformers' own loading brings `legacy=True` back as False."""
    text = "a</s>b <s>c"
    made = LlamaTokenizer.from_pretrained(FOLDER, add_bos_token=True, legacy=legacy)
    made.save_pretrained(tmp_path / "once")
    loaded = load_tokenizer(tmp_path / "once")
    assert ids(loaded, text) == ids(made, text)
    assert (loaded.bos_token, loaded.eos_token, loaded.unk_token) == ("<s>", "</s>", "<unk>")
    loaded.save_pretrained(tmp_path / "twice")
    assert ids(AutoTokenizer.from_pretrained(tmp_path / "twice"), text) == ids(made, text)


@pytest.mark.parametrize("legacy", [True, False])
def test_what_the_config_says_is_followed(tmp_path, legacy):
    shutil.copy(FOLDER / "tokenizer.model", tmp_path)
    config = {"tokenizer_class": "LlamaTokenizer", "add_bos_token": False, "legacy": legacy}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    expected = LlamaTokenizer.from_pretrained(FOLDER, add_bos_token=False, legacy=legacy)
    assert ids(load_tokenizer(tmp_path), "a</s>b") == ids(expected, "a</s>b")


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({}, "no tokenizer here"),
        ({"tokenizer.json": "{"}, "can't"),
        ({"tokenizer.model": "not a model"}, "can't load tokenizer.model"),
        ({"tokenizer.model": "x", "tokenizer_config.json": "{"}, "tokenizer_config.json: can't read it"),
    ],
)
def test_broken_folders_are_named(tmp_path, files, message):
    for name, content in files.items():
        (tmp_path / name).write_text(content)
    with pytest.raises(ModelError) as error:
        load_tokenizer(tmp_path)
    assert str(tmp_path) in str(error.value)
    assert message in str(error.value)


def test_a_model_type_that_transformers_does_not_know_is_nothing_to_warn_of(tmp_path):
    tokenizer = make_tokenizer()
    tokenizer.save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "known to nobody", "vocab_size": 400}))
    said: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("transformers").addHandler(handler)
    try:
        loaded = load_tokenizer(tmp_path)
    finally:
        logging.getLogger("transformers").removeHandler(handler)
    assert said == []
    assert ids(loaded, "Two red dogs") == ids(tokenizer, "Two red dogs")
