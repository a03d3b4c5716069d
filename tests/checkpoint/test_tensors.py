"""Damaged and hostile tensor files and indexes give an error that names the file, whatever byte is hit."""

import json
import pickle
import random
import struct
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from lapilli.base.errors import ModelError
from lapilli.checkpoint.stream import open_file, open_folder

TENSORS = {"a": torch.arange(12.0).reshape(3, 4), "b": torch.arange(5)}


def _read(file):
    return {name: tensor.read() for name, tensor in open_file(file).items()}


def _error(act, otherwise):
    """What is said to a user, or `otherwise` if it works; any other exception is a defect."""
    try:
        act()
    except ModelError as error:
        return str(error)
    return otherwise


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("kind", ["safetensors", "zip", "legacy"])
def test_damaged_files_never_crash(kind, tmp_path):
    file = tmp_path / ("whole.safetensors" if kind == "safetensors" else "whole.bin")
    if kind == "safetensors":
        save_file(TENSORS, file)
    else:
        torch.save(TENSORS, file, _use_new_zipfile_serialization=kind == "zip")
    assert all(torch.equal(t, TENSORS[name]) for name, t in _read(file).items())
    whole, draw, errors = file.read_bytes(), random.Random(0), []
    for _ in range(150):
        damaged = bytearray(whole)
        if draw.random() < 0.3:
            del damaged[draw.randrange(len(damaged)) :]
        else:
            for _ in range(3):
                damaged[draw.randrange(len(damaged))] = draw.randrange(256)
        file.write_bytes(bytes(damaged))
        try:
            _read(file)
        except ModelError as error:
            errors.append(str(error))
    assert len(errors) > 50
    assert all(str(file) in said for said in errors)


ANYTHING: Any = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)
ENTRY = st.fixed_dictionaries(
    {},
    optional={
        "dtype": st.sampled_from(["F32", "BF16", "I64", "F8_E5M2", "F4", "X"]) | ANYTHING,
        "shape": st.lists(st.integers(-1, 2**63), max_size=3) | ANYTHING,
        "data_offsets": st.lists(st.integers(-1, 2**63), min_size=2, max_size=2) | ANYTHING,
    },
)


@settings(max_examples=100, deadline=None)
@given(
    header=st.dictionaries(st.text(max_size=5), ENTRY, max_size=3) | ANYTHING,
    length=st.none() | st.integers(0, 2**64 - 1),
    data=st.binary(max_size=64),
)
def test_headers_of_any_content(header, length, data):
    text = json.dumps(header).encode()
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "model.safetensors"
        file.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + data)
        assert str(file) in _error(lambda: _read(file), str(file))


@settings(max_examples=100, deadline=None)
@given(
    index=st.fixed_dictionaries(
        {},
        optional={
            "weight_map": st.dictionaries(
                st.sampled_from(["a", "b", "c"]),
                st.sampled_from(["one.safetensors", "two.safetensors", "no.bin", "../one.safetensors", "", "."])
                | ANYTHING,
            )
            | ANYTHING,
            "metadata": ANYTHING,
        },
    )
    | ANYTHING
)
def test_indexes_of_any_content(index):
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for key, tensor in zip(("one", "two"), TENSORS.items(), strict=True):
            save_file(dict([tensor]), folder / f"{key}.safetensors")
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
        made: dict[str, Any] = {}
        assert str(folder) in _error(lambda: made.update(open_folder(folder)), str(folder))
        assert {n: made[n].shape for n in made} == {n: tuple(TENSORS[n].shape) for n in made}


@pytest.fixture
def shards(tmp_path):
    """Two shards and their index."""
    for key, tensor in zip(("one", "two"), TENSORS.items(), strict=True):
        save_file(dict([tensor]), tmp_path / f"{key}.safetensors")
    index = {"weight_map": {"a": "one.safetensors", "b": "two.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    return tmp_path


def _refused(folder, message):
    with pytest.raises(ModelError, match=message):
        open_folder(folder)


def test_shards_that_are_not_what_the_index_says(shards):
    index = shards / "model.safetensors.index.json"
    whole = index.read_text()
    index.write_text(whole.replace('"b"', '"a"'))
    _refused(shards, r'model\.safetensors\.index\.json: .*"a" stands there twice')
    index.write_text(json.dumps({"weight_map": {"a": "one.safetensors", "b": "one.safetensors"}}))
    _refused(shards, r"one\.safetensors: holds other tensors than listed: b")
    index.write_text(whole)
    save_file(TENSORS, shards / "two.safetensors")
    _refused(shards, r"two\.safetensors: holds other tensors than listed: a")
    (shards / "two.safetensors").write_bytes((shards / "one.safetensors").read_bytes()[:-4])
    _refused(shards, r"two\.safetensors: can't be read as weights")
    (shards / "two.safetensors").unlink()
    _refused(shards, r"two\.safetensors: this shard is missing")


@pytest.mark.parametrize(
    "content",
    [{"a": Path("/")}, {"a": print}, [1, 2], {"a": {"b": torch.ones(1)}}, {1: torch.ones(1)}],
    ids=["object", "code", "list", "nested", "number"],
)
def test_pickles_that_hold_more_than_tensors(content, tmp_path):
    file = tmp_path / "pytorch_model.bin"
    torch.save(content, file)
    _refused(tmp_path, r"pytorch_model\.bin: (can't be read safely: it holds more than tensors|not a table of tensors)")
    file.write_bytes(pickle.dumps(content, protocol=2))
    _refused(tmp_path, r"pytorch_model\.bin: ")


@pytest.mark.parametrize("value", [torch.eye(2).to_sparse(), torch.empty(2, device="meta")], ids=["sparse", "meta"])
def test_pickled_tensors_that_are_not_plain_numbers(value, tmp_path):
    torch.save({"a": value}, tmp_path / "pytorch_model.bin")
    _refused(tmp_path, r"pytorch_model\.bin: ")
