"""Cerebras' state files: theirs are read, ours are laid out like theirs, and damaged ones end no process of ours."""

import json
import random
from pathlib import Path

import h5py
import hdf5plugin  # noqa: F401
import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tests.support.cerebras import REFERENCE, equal, restore, values

from lapilli.base.errors import ModelError
from lapilli.checkpoint.cerebras import open_cerebras
from lapilli.checkpoint.cerebras.state_file import open_state_file
from lapilli.checkpoint.cerebras.state_write import write_state_file
from lapilli.checkpoint.stream import Lazy, Tensors, digest_of, held

MIXED = {"a.weight": torch.randn(5, 4).bfloat16(), "b.weight": torch.randn(3, 4, 2).half(), "c": torch.arange(3.0)}


@pytest.fixture(scope="module")
def theirs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return restore("distinct", tmp_path_factory.mktemp("theirs")) / "pytorch_model_to_cs-2.9.mdl"


@pytest.fixture
def mixed(tmp_path: Path) -> Path:
    file = tmp_path / "mixed.mdl"
    tensors = {name: held(value, name) for name, value in MIXED.items()}
    for name, digest in write_state_file(file, tensors, "2.9", tied={"tied.weight": "a.weight"}, hashes=True):
        assert digest == digest_of(tensors[name])
    return file


def test_ours_is_laid_out_like_theirs(theirs: Path, tmp_path: Path) -> None:
    tensors, notes = open_state_file(theirs)
    assert notes == []
    made = tmp_path / "ours.mdl"
    list(write_state_file(made, tensors, "2.10"))
    with h5py.File(theirs) as one, h5py.File(made) as other:
        assert list(one) == list(other)
        assert set(one.attrs) == set(other.attrs)
        spec, again = json.loads(one.attrs["__spec__"]), json.loads(other.attrs["__spec__"])
        assert spec[0] == again[0]
        for key in set(one.attrs) - {"__spec__"}:
            assert one.attrs[key] == other.attrs[key]
            assert one.attrs.get_id(key).dtype == other.attrs.get_id(key).dtype
        for name in one:
            a, b = one[name], other[name]
            assert (a.dtype, a.chunks, a.shape) == (b.dtype, b.chunks, b.shape)
            assert np.array_equal(a[...], b[...])
            assert (
                a.id.get_create_plist().get_filter(0)[:3]
                == b.id.get_create_plist().get_filter(0)[:3]
                == (32004, 1, (0,))
            )
            assert set(a.attrs) == set(b.attrs)
            assert all(np.array_equal(a.attrs[key], b.attrs[key]) for key in a.attrs)


def test_every_dtype_and_tied_tensors_come_back(mixed: Path) -> None:
    tensors, _ = open_state_file(mixed)
    assert equal(values(tensors), MIXED | {"tied.weight": MIXED["a.weight"]})


def test_a_training_runs_file_is_read_without_what_is_not_the_models(tmp_path: Path) -> None:
    folder = restore("training-run", tmp_path)
    opened = open_cerebras(folder)
    assert equal(values(opened.tensors), load_file(REFERENCE / "training-run" / "expected.safetensors"))
    assert any(
        "1 of global_step" in note and "of optimizer" in note and "of __metadata__" in note for note in opened.notes
    )
    assert opened.llava_fields["tune_mm_mlp_adapter"] is True
    assert any("tied" in note for note in opened.notes)


def _change(file: Path, change) -> None:
    with h5py.File(file, "a") as opened:
        change(opened)


def _other_place(opened: h5py.File) -> None:
    opened["model.d"] = h5py.ExternalLink("elsewhere.mdl", "/model.d")


def _lie(opened: h5py.File) -> None:
    opened["model.b.weight"].attrs["dtypes"] = ["torch.float32"]


def _pickled(opened: h5py.File) -> None:
    opened.create_dataset("model.d", data=h5py.Empty("f")).attrs["__BYTES__"] = np.void(b"\x80\x04.")


def _graph(opened: h5py.File) -> None:
    about = {"model.d.__metadata__": {"__TYPE__": "DeferredGraphTensor", "jit_graph": "x"}}
    opened.attrs["model.d.__metadata__"] = json.dumps(about)


def _nonsense(opened: h5py.File) -> None:
    full = {"__TYPE__": "DeferredFullTensor", "shape": ["x"], "dtype": "torch.load", "fill_value": None}
    opened.attrs["model.d.__metadata__"] = json.dumps({"model.d.__metadata__": full})


def _too_large(opened: h5py.File) -> None:
    opened.create_dataset("model.d", shape=(2**20, 2**20), dtype="f4", chunks=(64, 64), compression="gzip")
    opened["model.d"][0, 0] = 1


def _cut(opened: h5py.File) -> None:
    opened.attrs["__SUCCESS__"] = False


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (_other_place, "elsewhere.mdl"),
        (_lie, "b.weight"),
        (_pickled, "model.d"),
        (_graph, "DeferredGraph"),
        (_nonsense, r"model\.d: its description"),
        (_too_large, r"model\.d: .* can't be in"),
        (_cut, "to its end"),
    ],
)
def test_what_cannot_be_read_is_refused_by_name(mixed: Path, change, words: str) -> None:
    _change(mixed, change)
    with pytest.raises(ModelError, match=words):
        open_state_file(mixed)


def test_old_files_and_constant_tensors(mixed: Path) -> None:
    def older(opened: h5py.File) -> None:
        opened.attrs["__version__"] = 0.4
        del opened.attrs["__SUCCESS__"]
        opened["model.a.weight"].attrs["is_bfloat16"] = True
        del opened["model.a.weight"].attrs["dtypes"]
        full = {"__TYPE__": "DeferredFullTensor", "shape": [2, 3], "dtype": "torch.float16", "fill_value": 0.5}
        opened.attrs["model.d.__metadata__"] = json.dumps({"model.d.__metadata__": full})

    _change(mixed, older)
    tensors, _ = open_state_file(mixed)
    assert equal(
        values(tensors),
        MIXED | {"tied.weight": MIXED["a.weight"], "d": torch.full((2, 3), 0.5, dtype=torch.float16)},
    )


def test_a_tensor_that_changes_its_shape_is_refused(tmp_path: Path) -> None:
    wrong: Tensors = {"a": Lazy((2, 2), torch.float32, "here", lambda: torch.zeros(2, 3))}
    with pytest.raises(ModelError, match="came out as"):
        list(write_state_file(tmp_path / "x.mdl", wrong, "2.9"))
    with pytest.raises(ModelError, match="to its end"):
        open_state_file(tmp_path / "x.mdl")


def _harmed(content: bytes, seed: int) -> bytes:
    """The file with bytes changed in its tables, which come first, or cut off."""
    chance, made = random.Random(seed), bytearray(content)
    if seed % 5 == 0:
        return bytes(made[: chance.randrange(8, len(made))])
    used = [place for place in range(8, min(len(made), 12000)) if made[place]]
    for place in chance.sample(used, chance.choice([1, 2, 8, 50])):
        made[place] = chance.randrange(256)
    return bytes(made)


def _fuzz(content: bytes, seeds: range, folder: Path) -> int:
    """Open and read harmed files; return how many were refused."""
    refused = 0
    for seed in seeds:
        file = folder / f"{seed}.mdl"
        file.write_bytes(_harmed(content, seed))
        try:
            values(open_state_file(file, patience_seconds=2)[0])
        except ModelError:
            refused += 1
    return refused


def test_damaged_files_are_refused(mixed: Path, tmp_path: Path) -> None:
    assert _fuzz(mixed.read_bytes(), range(5), tmp_path) >= 2
    (tmp_path / "text.mdl").write_text("no HDF5")
    with pytest.raises(ModelError, match="no HDF5 file"):
        open_state_file(tmp_path / "text.mdl")


@pytest.mark.slow
def test_many_damaged_files_are_refused(theirs: Path, mixed: Path, tmp_path: Path) -> None:
    assert _fuzz(mixed.read_bytes(), range(100, 160), tmp_path) >= 20
    assert _fuzz(theirs.read_bytes(), range(200, 230), tmp_path) >= 10
