"""Tokenizer files in the words of transformers 4.37: the same ids, and no token that has no row."""

import json

from tests.support.llava import REFERENCE
from tests.support.parts import make_tokenizer
from tokenizers import Tokenizer

from lapilli.assemble.old_tokenizer import write_old_tokenizer
from lapilli.assemble.vocabulary import add_tokens
from lapilli.data.tokenizer import load_tokenizer

TEXT = "USER: Two red dogs, 0123 사진\nASSISTANT:"


def test_newer_files_in_older_words(tmp_path):
    tokenizer = make_tokenizer()
    rows = len(tokenizer)
    ids = tokenizer(TEXT).input_ids
    add_tokens(tokenizer, im_start_end=False)
    tokenizer.save_pretrained(tmp_path / "new")
    (tmp_path / "old").mkdir()
    notes = write_old_tokenizer(tokenizer, [tmp_path / "absent", tmp_path / "new"], rows, tmp_path / "old")
    assert notes == ["tokens without a row, left out of the tokenizer: <image>"]
    assert "<image>" not in "".join(file.read_text() for file in (tmp_path / "old").iterdir())
    config = json.loads((tmp_path / "old" / "tokenizer_config.json").read_text())
    assert config["tokenizer_class"] == "PreTrainedTokenizerFast"
    backend = json.loads((tmp_path / "old" / "tokenizer.json").read_text())
    assert all(isinstance(merge, str) for merge in backend["model"]["merges"])
    assert Tokenizer.from_file(str(tmp_path / "old" / "tokenizer.json")).encode(TEXT).ids == ids


def test_tokens_with_rows_stay(tmp_path):
    tokenizer = make_tokenizer()
    add_tokens(tokenizer, im_start_end=True)
    write_old_tokenizer(tokenizer, [], len(tokenizer), tmp_path)
    assert load_tokenizer(tmp_path).get_vocab() == tokenizer.get_vocab()


def test_files_of_its_time_are_copied(tmp_path):
    source = REFERENCE / "checkpoints" / "llama-base"
    assert write_old_tokenizer(load_tokenizer(source), [source], 2000, tmp_path) == []
    assert (tmp_path / "tokenizer.model").read_bytes() == (source / "tokenizer.model").read_bytes()
    written, before = (json.loads((p / "tokenizer_config.json").read_text()) for p in (tmp_path, source))
    assert written == before
