"""Any conversation, in every format: what is written is what is read, and prepared rows are what encoding gives."""

import gzip
import io
import json
import os
import tarfile

import numpy as np
import PIL.Image
import pyarrow
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pyarrow import parquet

from lapilli.data.image import image_size
from lapilli.data.prepare.job import prepare
from lapilli.data.read.open import open_source
from lapilli.data.read.prepared import PreparedStore
from lapilli.data.sample import Image, Text
from lapilli.recipe.schema import Source

SIZES = [(4, 9), (30, 5), (16, 16)]


def picture(size):
    stream = io.BytesIO()
    PIL.Image.new("RGB", size).save(stream, "PNG")
    return stream.getvalue()


PICTURES = [picture(size) for size in SIZES]

# A question is texts and pictures (by number), no two texts side by side; an answer is text.
plain = st.text(st.characters(codec="utf-8", exclude_characters="<>\0"), min_size=1, max_size=12).filter(str.strip)
letters = st.text(st.characters(min_codepoint=32, max_codepoint=125, exclude_characters="<>"), min_size=1, max_size=12)
letters = letters.filter(str.strip)


def talks(words):
    number = st.integers(0, len(PICTURES) - 1)
    question = st.lists(words | number, min_size=1, max_size=5).map(joined)
    return st.lists(st.tuples(question, words), min_size=1, max_size=3)


def joined(parts):
    """The same parts with texts that stand side by side made one."""
    found = []
    for part in parts:
        if isinstance(part, str) and found and isinstance(found[-1], str):
            found[-1] += part
        else:
            found.append(part)
    return found


def numbers(talk):
    return [part for question, _ in talk for part in question if isinstance(part, int)]


def written(parts):
    return "".join("<image>" if isinstance(part, int) else part for part in parts)


def turns(talk, who=("from", "human", "gpt", "value")):
    name, asks, answers, said = who
    pairs = [({name: asks, said: written(q)}, {name: answers, said: a}) for q, a in talk]
    return [turn for pair in pairs for turn in pair]


def llava(talk):
    return {"conversations": turns(talk), "images": [f"{i}.png" for i in numbers(talk)]}


def sharegpt(talk):
    return {"conversations": turns(talk, ("from", "user", "chatgpt", "value")), "images": llava(talk)["images"]}


def openai(talk):
    messages = []
    for question, answer in talk:
        parts = [
            {"type": "text", "text": p}
            if isinstance(p, str)
            else {"type": "image_url", "image_url": {"url": f"{p}.png"}}
            for p in question
        ]
        messages += [{"role": "user", "content": parts}, {"role": "assistant", "content": answer}]
    return {"messages": messages}


def array(talk):
    found = []
    for question, answer in talk:
        content = [{"text": p} if isinstance(p, str) else {"image": f"{p}.png"} for p in question]
        found += [{"type": "user", "content": content}, {"type": "assistant", "content": [{"text": answer}]}]
    return found


def texts(talk):
    pairs = [{"question": written(q), "answer": a} for q, a in talk]
    return {"texts": pairs, "images": llava(talk)["images"]}


def lines(record):
    return lambda many, path: path.write_text("\n".join(json.dumps(record(talk)) for talk in many), "utf-8")


def a_list(many, path):
    path.write_text(json.dumps([llava(talk) for talk in many], ensure_ascii=False), "utf-8")


def packed(many, path):
    path.write_bytes(gzip.compress("\n".join(json.dumps(openai(talk)) for talk in many).encode()))


def rows(many):
    cells = [{**llava(talk), "images": [{"bytes": PICTURES[i], "path": None} for i in numbers(talk)]} for talk in many]
    kind = pyarrow.list_(pyarrow.struct({"bytes": pyarrow.binary(), "path": pyarrow.string()}))
    said = pyarrow.list_(pyarrow.struct({"from": pyarrow.string(), "value": pyarrow.string()}))
    return pyarrow.Table.from_pylist(cells, pyarrow.schema({"conversations": said, "images": kind}))


def a_parquet(many, path):
    parquet.write_table(rows(many), path, row_group_size=2)


def an_arrow(many, path):
    table = rows(many)
    with pyarrow.OSFile(str(path), "wb") as sink, pyarrow.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table, max_chunksize=2)


def a_dataset(many, path):
    import datasets

    path.unlink(missing_ok=True)
    datasets.Dataset(rows(many)).save_to_disk(path)


def a_shard(many, path):
    with tarfile.open(path, "w") as file:
        for k, talk in enumerate(many):
            members = {f"{k}.{n}.png": PICTURES[i] for n, i in enumerate(numbers(talk))}
            for name, data in {**members, f"{k}.json": json.dumps({"conversations": turns(talk)}).encode()}.items():
                info = tarfile.TarInfo(name)
                info.size = len(data)
                file.addfile(info, io.BytesIO(data))


WRITERS = {
    "llava list": a_list, "llava lines": lines(llava), "sharegpt lines": lines(sharegpt), "openai lines": lines(openai),
    "openai packed": packed, "semantic data arrays": lines(array), "texts lines": lines(texts), "parquet": a_parquet,
    "arrow": an_arrow, "dataset": a_dataset, "webdataset": a_shard,
}  # fmt: skip
FEW = settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def as_written(sample, root):
    """A Sample as the talk that it came from; pictures are told apart by their sizes."""
    found = []
    for message in sample.messages:
        parts = [SIZES.index(image_size(p, root)) if isinstance(p, Image) else p.text for p in message.parts]
        assert all(p.text for p in message.parts if isinstance(p, Text))
        found.append(joined(parts))
    return list(zip(found[::2], ["".join(map(str, answer)) for answer in found[1::2]], strict=True))


@pytest.mark.parametrize("name", WRITERS)
@settings(FEW, max_examples=12)
@given(many=st.lists(talks(plain), min_size=1, max_size=3))
def test_what_is_written_is_what_is_read(name, tmp_path, many):
    for number, data in enumerate(PICTURES):
        (tmp_path / f"{number}.png").write_bytes(data)
    path = tmp_path / "d"
    if path.is_dir():
        path = tmp_path / f"d{os.urandom(6).hex()}"
    WRITERS[name](many, path)
    reader = open_source(Source(path=str(path), images=str(tmp_path)))
    samples = [reader.parse(raw) for raw in reader.records()]
    assert [as_written(sample, reader.images) for sample in samples] == many


@pytest.mark.parametrize("layout", ["ours", "cerebras"])
@settings(FEW, max_examples=8)
@given(many=st.lists(talks(letters), min_size=1, max_size=3))
def test_prepared_rows_are_what_encoding_gives(layout, tmp_path, make_encoder, make_spec, many):
    for number, data in enumerate(PICTURES):
        (tmp_path / f"{number}.png").write_bytes(data)
    a_list(many, tmp_path / "d")
    source, out = Source(path=str(tmp_path / "d"), images=str(tmp_path)), tmp_path / os.urandom(6).hex()
    encoder, reader = make_encoder(max_length=1200), open_source(source)
    prepare([source], encoder, make_spec(), out, layout=layout, max_images=15, stream=io.StringIO())
    store = PreparedStore(out, encoder)
    assert len(store) == len(many)
    for found, raw in zip(store, reader.records(), strict=True):
        sample = reader.parse(raw)
        wanted = encoder.encode(sample, [image_size(image, reader.images) for image in sample.images])
        assert wanted is not None
        assert found.images == wanted.images
        for name in ("input_ids", "labels"):
            np.testing.assert_array_equal(getattr(found, name), getattr(wanted, name))
