"""Damaged and made-up files of every format: whatever they hold, the outcome is Samples or a DataError."""

import gzip
import io
import json
import random
import tarfile
from contextlib import suppress

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lapilli.base.errors import DataError
from lapilli.data.picture import ImageLimits, image_size
from lapilli.data.prepare.job import prepare
from lapilli.data.read.open import RawRecord, open_source
from lapilli.data.read.prepared import PreparedStore
from lapilli.data.read.shapes import parse
from lapilli.data.sample import Image, Message, Sample, Text
from lapilli.recipe.schema import Source

TALK = {
    "id": "x",
    "images": ["a.png"],
    "conversations": [{"from": "human", "value": "<image>Q"}, {"from": "gpt", "value": "A"}],
}
WORDS = [
    "conversations", "messages", "from", "value", "role", "content", "type", "text", "image", "images", "image_url",
    "url", "weight", "texts", "question", "answer", "caption", "system", "semantic_loss_weight", "include_tags",
    "semantic_drop_mask", "semantic_attention_mask", "bytes", "path", "id", "user", "human", "assistant", "gpt",
    "prompt", "completion", "<image>", "a.png", "data:image/png;base64,AA==",
]  # fmt: skip
FEW = settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def outcome(path, images=None):
    """Read all of a source as `check` does; any error but DataError fails the test."""
    with suppress(DataError):
        reader = open_source(Source(path=str(path), images=None if images is None else str(images)))
        for raw in reader.records():
            for placement in ("keep", "front"):
                with suppress(DataError):
                    sample = reader.parse(raw, placement)
                    sound(sample)
                    for image in sample.images:
                        with suppress(DataError):
                            image_size(image, reader.images, ImageLimits(10**6, 10**6), sample.where)


def sound(sample):
    """What the rest of the road relies on."""
    assert isinstance(sample, Sample)
    assert isinstance(sample.id, str)
    for message in sample.messages:
        assert isinstance(message, Message)
        for part in message.parts:
            assert isinstance(part, Text | Image)
            if isinstance(part, Text):
                part.text.encode("utf-8")
                assert part.weight is None or part.weight >= 0
            else:
                assert isinstance(part.path, str) or isinstance(part.data, bytes)
    sample.where.encode("utf-8")


atoms = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.sampled_from(WORDS)
    | st.text(st.characters(codec=None), max_size=6)
)
values = st.recursive(
    atoms, lambda v: st.lists(v, max_size=4) | st.dictionaries(st.sampled_from(WORDS), v, max_size=5), max_leaves=25
)


@given(value=values)
@settings(max_examples=400, deadline=None)
def test_any_value_is_a_sample_or_a_reason(value):
    for given_value in (value, {"messages": value}, {"conversations": value}, {"sda": value}):
        for placement in ("keep", "front"):
            with suppress(DataError):
                sound(parse(RawRecord("f", 1, given_value), placement))


parts = st.dictionaries(st.sampled_from(["text", "image", "why", "include_tags"]), atoms, max_size=2)
turns = st.lists(
    st.fixed_dictionaries(
        {
            "type": st.sampled_from(["user", "assistant", "prompt", "completion", "system"]),
            "content": st.lists(parts, max_size=3),
        },
        optional={name: st.lists(atoms, max_size=3) for name in WORDS if name.startswith("semantic_")},
    ),
    max_size=3,
)


@given(value=turns)
@settings(max_examples=200, deadline=None)
def test_any_semantic_data_array_is_a_sample_or_a_reason(value):
    with suppress(DataError):
        sound(parse(RawRecord("f", 1, value)))


@FEW
@given(content=st.binary(max_size=300) | st.text(max_size=200).map(lambda s: s.encode("utf-8", "surrogatepass")))
def test_any_bytes_as_a_file(tmp_path, content):
    for start in (b"", b"[", b"{", b"[{", b"\x1f\x8b\x08\0", b"\x28\xb5\x2f\xfd", b"PAR1", b"ARROW1\0\0", b"\xff" * 4):
        (tmp_path / "d").write_bytes(start + content)
        outcome(tmp_path / "d")


def good_files():
    """One good file of each format, as bytes."""
    files = {
        "list": json.dumps([TALK] * 3, indent=1).encode(),
        "lines": "\n".join(json.dumps(TALK) for _ in range(3)).encode(),
        "array": json.dumps([{"type": "user", "content": [{"text": "Q"}, {"image": "a.png"}]},
                             {"type": "assistant", "content": [{"text": "A"}]}]).encode(),
    }  # fmt: skip
    asked = {"role": "user", "content": [{"type": "text", "text": "Q"}, {"type": "image_url", "image_url": "a.png"}]}
    files["sharegpt"] = json.dumps({**TALK, "system": "S", "conversations": [
        {"from": "user", "value": "<image>Q"}, {"from": "chatgpt", "value": "A"}]}).encode()  # fmt: skip
    files["openai"] = "\n".join([json.dumps({"messages": [asked, {"role": "assistant", "content": "A"}]})] * 3).encode()
    files["pairs"] = json.dumps([{"image": "a.png", "texts": [{"question": "Q", "answer": "A"}]}] * 3).encode()
    files["gzip"] = gzip.compress(files["openai"])
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w") as file:
        for name, data in (("k.png", b"\x89PNG"), ("k.json", json.dumps(TALK).encode()), ("l.txt", b"words")):
            info = tarfile.TarInfo(name)
            info.size = len(data)
            file.addfile(info, io.BytesIO(data))
    return files | {"tar": stream.getvalue()} | tables()


def tables():
    import pyarrow as pa
    from pyarrow import parquet

    rows = [{**TALK, "images": [{"bytes": b"\x89PNG", "path": "a"}]}] * 5
    table = pa.Table.from_pylist(rows)
    found = {}
    for name, new in (("stream", pa.ipc.new_stream), ("file", pa.ipc.new_file)):
        sink = io.BytesIO()
        with new(sink, table.schema) as writer:
            writer.write_table(table, max_chunksize=2)
        found[name] = sink.getvalue()
    sink = io.BytesIO()
    parquet.write_table(table, sink)
    packed = pa.BufferOutputStream()
    with pa.CompressedOutputStream(packed, "zstd") as stream:
        stream.write("\n".join([json.dumps(TALK)] * 3).encode())
    found["zstd"] = packed.getvalue().to_pybytes()
    return found | {"parquet": sink.getvalue()}


GOOD = good_files()


@pytest.mark.parametrize("name", GOOD)
@FEW
@given(seed=st.integers(0, 2**32), changes=st.integers(0, 10), cut=st.booleans())
def test_damaged_files(tmp_path, name, seed, changes, cut):
    data, rng = bytearray(GOOD[name]), random.Random(seed)
    for _ in range(changes):
        data[rng.randrange(len(data))] = rng.choice([0, 255, rng.randrange(256)])
    (tmp_path / "d").write_bytes(data[: rng.randrange(len(data))] if cut else data)
    outcome(tmp_path / "d", tmp_path)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A Hugging Face dataset on disk, as bytes of its files."""
    import datasets

    folder = tmp_path_factory.mktemp("saved")
    rows = [{"conversations": TALK["conversations"], "images": [{"bytes": b"\x89PNG", "path": None}]}] * 5
    datasets.Dataset.from_list(rows).save_to_disk(folder / "d")
    return {path.name: path.read_bytes() for path in (folder / "d").iterdir()}


@settings(FEW, max_examples=100)
@given(seed=st.integers(0, 2**32), changes=st.integers(0, 10), cut=st.booleans())
def test_damaged_datasets(tmp_path, saved, seed, changes, cut):
    rng = random.Random(seed)
    chosen = rng.choice(sorted(saved))
    for name, content in saved.items():
        data = bytearray(content)
        if name == chosen:
            for _ in range(changes):
                data[rng.randrange(len(data))] = rng.choice([0, 255, rng.randrange(256)])
            data = data[: rng.randrange(len(data))] if cut else data
        (tmp_path / name).write_bytes(data)
    outcome(tmp_path, tmp_path)


@pytest.mark.parametrize("layout", ["ours", "cerebras"])
@pytest.mark.parametrize("suffix", [".h5", ".json"])
def test_damaged_prepared_folders(world, make_encoder, make_spec, tmp_path, layout, suffix):
    encoder, out = make_encoder(max_length=300), tmp_path / "out"
    prepare([world], encoder, make_spec(), out, layout=layout, max_images=2, stream=io.StringIO())
    files = sorted(path for path in out.iterdir() if path.suffix == suffix)
    rng, refused = random.Random(0), 0
    for _ in range(60):
        path = rng.choice(files)
        whole = path.read_bytes()
        data = bytearray(whole)
        for _ in range(rng.randrange(1, 10)):
            data[rng.randrange(len(data))] = rng.choice([0, 255, rng.randrange(256)])
        path.write_bytes(data[: rng.randrange(len(data))] if rng.random() < 0.3 else data)
        try:
            list(PreparedStore(out, encoder))
        except DataError:
            refused += 1
        path.write_bytes(whole)
    assert refused > 10
    assert len(list(PreparedStore(out, encoder))) == 23


def test_the_good_files_are_good(tmp_path):
    for data in GOOD.values():
        (tmp_path / "d").write_bytes(data)
        reader = open_source(Source(path=str(tmp_path / "d")))
        raw = next(iter(reader.records()))
        assert [m.role for m in reader.parse(raw).messages][-2:] == ["user", "assistant"]


def test_names_of_columns_that_are_not_text(tmp_path):
    for name in ("stream", "file", "parquet"):
        (tmp_path / "d").write_bytes(GOOD[name].replace(b"conversations", b"conversation\xff"))
        with pytest.raises(DataError, match="can't be read as an Arrow or Parquet table"):
            open_source(Source(path=str(tmp_path / "d")))
