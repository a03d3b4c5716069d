"""Tensors mapped one at a time: right bytes, nothing left behind, and room under a data limit."""

import gc
import os
import resource
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from lapilli.base.errors import ModelError
from lapilli.checkpoint.mapping import map_bytes
from lapilli.checkpoint.stream import open_file


def test_bytes_at_any_offset(tmp_path):
    content = os.urandom(20_000)
    (tmp_path / "f").write_bytes(content)
    for offset, size in ((0, 20_000), (1, 1), (4096, 4096), (4097, 9000), (19_999, 1), (77, 0)):
        assert bytes(map_bytes(tmp_path / "f", offset, size).numpy()) == content[offset : offset + size]
    with pytest.raises(OSError, match="shorter"):
        map_bytes(tmp_path / "f", 19_999, 2)


def test_writing_to_a_tensor_leaves_the_file_and_other_readers_alone(tmp_path):
    save_file({"a": torch.ones(5000), "b": torch.zeros(3)}, tmp_path / "f.safetensors")
    before = (tmp_path / "f.safetensors").read_bytes()
    one, other = (open_file(tmp_path / "f.safetensors")["a"].read() for _ in range(2))
    one.mul_(3)
    assert (one[0], other[0]) == (3, 1)
    assert (tmp_path / "f.safetensors").read_bytes() == before


def test_nothing_stays_mapped_or_open(tmp_path):
    save_file({"a": torch.ones(300_000)}, tmp_path / "f.safetensors")
    lazy = open_file(tmp_path / "f.safetensors")["a"]

    def mapped() -> int:
        return Path("/proc/self/maps").read_text().count(str(tmp_path))

    kept = [lazy.read()[7:9] for _ in range(5)]
    assert mapped() == 5, "a view keeps its pages"
    assert not any(os.path.realpath(link).startswith(str(tmp_path)) for link in Path("/proc/self/fd").iterdir())
    assert all(part.sum() == 2 for part in kept)
    del kept
    gc.collect()
    assert mapped() == 0


def test_a_file_larger_than_the_data_limit_is_read(tmp_path):
    """The limit counts writable mappings; the file here is a sparse one of 3 GB."""
    names = {
        f"t{i}": {"dtype": "F16", "shape": [250, 10**6], "data_offsets": [i * 5 * 10**8, (i + 1) * 5 * 10**8]}
        for i in range(6)
    }
    import json
    import struct

    header = json.dumps(names).encode()
    header += b" " * (-len(header) % 8)
    with open(tmp_path / "f.safetensors", "wb") as stream:
        stream.write(struct.pack("<Q", len(header)) + header)
        stream.truncate(8 + len(header) + 3 * 10**9)
    script = (
        "import sys; from pathlib import Path; from lapilli.checkpoint.stream import open_file\n"
        "print(sum(int(t.read()[3, :5].sum()) for t in open_file(Path(sys.argv[1])).values()))"
    )
    limit = 1_500_000_000
    done = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path / "f.safetensors")],
        capture_output=True,
        text=True,
        check=False,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_DATA, (limit, limit)),
    )
    assert (done.stdout.strip(), done.returncode) == ("0", 0), done.stderr[-2000:]


def test_a_file_that_shrank_after_it_was_opened_is_named(tmp_path):
    save_file({"a": torch.ones(5000)}, tmp_path / "f.safetensors")
    lazy = open_file(tmp_path / "f.safetensors")["a"]
    os.truncate(tmp_path / "f.safetensors", 500)
    with pytest.raises(ModelError, match=r"f\.safetensors: a can't be read .*shorter"):
        lazy.read()


def test_pickles_are_mapped_a_tensor_at_a_time_too(tmp_path):
    whole = torch.arange(24.0)
    tensors = {"a": whole.view(4, 6), "turned": whole.view(4, 6).t(), "part": whole[5:9], "b": torch.ones(3).bfloat16()}
    tensors |= {"none": torch.zeros(0, 3), "one": torch.tensor(7)}
    torch.save(tensors, tmp_path / "f.bin")
    opened = open_file(tmp_path / "f.bin")
    for name, tensor in tensors.items():
        found = opened[name].read()
        assert (found.dtype, opened[name].shape) == (tensor.dtype, tuple(tensor.shape))
        assert torch.equal(found, tensor), name
    opened["a"].read().zero_()
    assert torch.equal(opened["turned"].read(), tensors["turned"]), "the file did not change"


def test_pickles_that_can_only_be_read_whole(tmp_path):
    tensors = {"a": torch.arange(12.0).view(3, 4)}
    torch.save(tensors, tmp_path / "old.bin", _use_new_zipfile_serialization=False)
    torch.save(tensors, tmp_path / "new.bin")
    with (
        zipfile.ZipFile(tmp_path / "new.bin") as source,
        zipfile.ZipFile(tmp_path / "packed.bin", "w", zipfile.ZIP_DEFLATED) as packed,
    ):
        for entry in source.infolist():
            packed.writestr(entry.filename, source.read(entry))
    for name in ("old.bin", "packed.bin"):
        assert torch.equal(open_file(tmp_path / name)["a"].read(), tensors["a"]), name
