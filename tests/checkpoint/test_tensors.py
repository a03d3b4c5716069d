"""Damaged tensor files give an error that names the file, whatever byte is hit."""

import random

import pytest
import torch
from safetensors.torch import save_file

from lapilli.base.errors import ModelError
from lapilli.checkpoint.tensors import read_weight_file

TENSORS = {"a": torch.arange(12.0).reshape(3, 4), "b": torch.arange(5)}


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("kind", ["safetensors", "zip", "legacy"])
def test_damaged_files_never_crash(kind, tmp_path):
    file = tmp_path / ("whole.safetensors" if kind == "safetensors" else "whole.bin")
    if kind == "safetensors":
        save_file(TENSORS, file)
    else:
        torch.save(TENSORS, file, _use_new_zipfile_serialization=kind == "zip")
    assert all(torch.equal(t, TENSORS[name]) for name, t in read_weight_file(file).items())
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
            read_weight_file(file)
        except ModelError as error:
            errors.append(str(error))
    assert len(errors) > 50
    assert all(str(file) in said for said in errors)
