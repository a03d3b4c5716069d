"""The same conversations written in every format are read back as the same Samples, with the same pictures."""

import gzip
import importlib
import io
import json
import tarfile
import zipfile

import PIL.Image
import pytest

from lapilli.base.errors import DataError
from lapilli.data.check import index
from lapilli.data.picture import image_size, open_image
from lapilli.data.read.open import expand, open_source
from lapilli.data.read.position import Spot
from lapilli.data.sample import Image, Text
from lapilli.recipe.schema import Source


def picture(width):
    stream = io.BytesIO()
    PIL.Image.new("RGB", (width, 3), (width, 0, 0)).save(stream, "PNG")
    return stream.getvalue()


# Pictures are told apart by their widths; a question is a list of texts and widths.
TALKS = [
    [(["look ", 5, " and ", 6, " é\u2028"], "two"), (["more?"], "no")],
    [(["no picture"], "none")],
    [([7, "\nwhat?"], "seven"), (["and ", 8], "eight")],
]
PICTURES = {f"p/{width}.png": picture(width) for width in (5, 6, 7, 8)}


def widths(talk):
    return [part for question, _ in talk for part in question if isinstance(part, int)]


def llava(talk, **more):
    turns = []
    for question, answer in talk:
        turns.append({"from": "human", "value": "".join("<image>" if isinstance(p, int) else p for p in question)})
        turns.append({"from": "gpt", "value": answer})
    return {"conversations": turns, **more}


def openai(talk, image):
    messages = []
    for question, answer in talk:
        parts = [image(p) if isinstance(p, int) else {"type": "text", "text": p} for p in question]
        messages += [{"role": "user", "content": parts}, {"role": "assistant", "content": answer}]
    return {"messages": messages}


def array(talk):
    turns = []
    for question, answer in talk:
        content = [{"image": f"p/{p}.png"} if isinstance(p, int) else {"text": p} for p in question]
        turns += [{"type": "user", "content": content}, {"type": "assistant", "content": [{"text": answer}]}]
    return turns


def named(talk):
    return {"images": [f"p/{w}.png" for w in widths(talk)]}


def write_folder(root):
    (root / "p").mkdir()
    for name, data in PICTURES.items():
        (root / name).write_bytes(data)


def write_list(root):
    write_folder(root)
    (root / "d").write_text(json.dumps([llava(t, **named(t)) for t in TALKS], indent=2, ensure_ascii=False))
    return root / "d", None


def write_lines(root):
    lines = "\n".join(json.dumps(llava(t, **named(t))) for t in TALKS)
    (root / "d").write_bytes(gzip.compress(lines.encode()))
    with zipfile.ZipFile(root / "pictures", "w") as file:
        for name, data in PICTURES.items():
            file.writestr(name, data)
    return root / "d", root / "pictures"


def write_openai(root):
    write_folder(root)
    image = lambda w: {"type": "image_url", "image_url": {"url": f"p/{w}.png"}}  # noqa: E731
    pa = importlib.import_module("pyarrow")
    with pa.CompressedOutputStream(str(root / "d"), "zstd") as stream:
        stream.write(json.dumps([openai(t, image) for t in TALKS]).encode())
    return root / "d", root


def write_array(root):
    write_folder(root)
    (root / "d").write_text("\n".join(json.dumps(array(t)) for t in TALKS))
    return root / "d", None


def add(file, name, data):
    info = tarfile.TarInfo(name)
    info.size = len(data)
    file.addfile(info, io.BytesIO(data))


def write_shards(root):
    folder = root / "shards"
    folder.mkdir()
    for i, talk in enumerate(TALKS):
        with tarfile.open(folder / f"{i:02}.tar", "w") as file:
            add(file, f"r{i}.json", json.dumps(llava(talk, image="elsewhere.jpg" if widths(talk) else None)).encode())
            add(file, f"r{i}.cls", b"3")
            for k, width in enumerate(widths(talk)):
                add(file, f"r{i}.{k}.png", picture(width))
    return folder, root


def write_one_shard(root):
    with tarfile.open(root / "s.tar", "w") as file:
        for i, talk in enumerate(TALKS):
            for k, width in enumerate(widths(talk)):
                add(file, f"./deep/r{i}.{k}.png", picture(width))
            add(file, f"./deep/r{i}.json", json.dumps(llava(talk)["conversations"]).encode())
    return root / "s.tar", root / "not-there"


def write_shard_of_paths(root):
    (root / "images").mkdir()
    write_folder(root / "images")
    with tarfile.open(root / "s.tar", "w") as file:
        for i, talk in enumerate(TALKS):
            add(file, f"r{i}.json", json.dumps(llava(talk, **named(talk))).encode())
    return root / "s.tar", root / "images"


def cells(talk):
    return [{"bytes": picture(w), "path": f"{w}.png"} for w in widths(talk)]


def write_parquet(root):
    pa = importlib.import_module("pyarrow")
    from pyarrow import parquet

    table = pa.Table.from_pylist([llava(t, images=cells(t), note=None) for t in TALKS])
    parquet.write_table(table, root / "d.parquet", row_group_size=2)
    return root / "d.parquet", None


def write_parquet_files(root):
    pa = importlib.import_module("pyarrow")
    from pyarrow import parquet

    (root / "data").mkdir()
    (root / "data" / "README.md").write_text("about")
    for i, talk in enumerate(TALKS):
        row = {"conversations": json.dumps(llava(talk)["conversations"]), "images": [picture(w) for w in widths(talk)]}
        schema = pa.schema({"conversations": pa.string(), "images": pa.list_(pa.binary())})
        parquet.write_table(pa.Table.from_pylist([row], schema), root / "data" / f"{i}.parquet")
    return root / "data", root


def write_parquet_paths(root):
    pa = importlib.import_module("pyarrow")
    from pyarrow import parquet

    write_folder(root)
    rows = [llava(t, images=[{"bytes": None, "path": p} for p in named(t)["images"]]) for t in TALKS]
    kind = pa.list_(pa.struct({"bytes": pa.binary(), "path": pa.string()}))
    turns = pa.list_(pa.struct({"from": pa.string(), "value": pa.string()}))
    table = pa.Table.from_pylist(rows, pa.schema({"conversations": turns, "images": kind}))
    parquet.write_table(table, root / "d.parquet")
    return root / "d.parquet", root


def write_dataset(root):
    datasets = importlib.import_module("datasets")
    features = datasets.Features(
        {
            "images": datasets.Sequence(datasets.Image()),
            "conversations": datasets.Sequence({"from": datasets.Value("string"), "value": datasets.Value("string")}),
        }
    )
    rows = [llava(t, images=cells(t)) for t in TALKS]
    for row in rows:  # as `datasets` keeps lists of objects
        row["conversations"] = {k: [turn[k] for turn in row["conversations"]] for k in ("from", "value")}
    data = datasets.Dataset.from_list(rows, features=features)
    data.save_to_disk(root / "saved", num_shards=2)
    (root / "saved" / "cache-1.arrow").write_bytes(b"\xff\xff\xff\xffnot a part of it")
    return root / "saved", root


def write_nested_dataset(root):
    pa = importlib.import_module("pyarrow")
    image = lambda w: {"type": "image", "image": {"bytes": picture(w), "path": None}}  # noqa: E731
    rows = []
    for talk in TALKS:
        record = openai(talk, image)
        for message in record["messages"]:
            if isinstance(message["content"], str):
                message["content"] = [{"type": "text", "text": message["content"]}]
        rows.append(record)
    table = pa.Table.from_pylist(rows)
    with pa.OSFile(str(root / "d.arrow"), "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table, max_chunksize=2)
    return root / "d.arrow", None


WRITERS = [
    write_list, write_lines, write_openai, write_array, write_shards, write_one_shard, write_shard_of_paths,
    write_parquet, write_parquet_files, write_parquet_paths, write_dataset, write_nested_dataset,
]  # fmt: skip


@pytest.mark.parametrize("write", WRITERS)
def test_round_trip(write, tmp_path):
    path, images = write(tmp_path)
    reader = open_source(Source(path=str(path), images=None if images is None else str(images)))
    samples = [reader.parse(raw) for raw in reader.records()]
    read = []
    for sample in samples:
        turns = []
        for message in sample.messages:
            assert all(p.text for p in message.parts if isinstance(p, Text))
            parts = [image_size(p, reader.images)[0] if isinstance(p, Image) else p.text for p in message.parts]
            turns.append(parts)
        read.append(list(zip(turns[::2], ["".join(a) for a in turns[1::2]], strict=True)))
    assert read == TALKS
    assert open_image(samples[2].images[0], reader.images).getpixel((0, 0)) == (7, 0, 0)
    assert len({sample.id for sample in samples}) == len(samples)
    assert all(sample.where.startswith(tuple(reader.files)) for sample in samples)


@pytest.mark.parametrize("write", WRITERS)
def test_every_reader_ends_at_its_end(write, tmp_path):
    path, images = write(tmp_path)
    reader = open_source(Source(path=str(path), images=None if images is None else str(images)))
    spot = Spot(reader.files)
    assert spot.total > 0
    seen = [spot.bytes for _ in reader.records(spot)]
    assert len(seen) == 3
    assert seen == sorted(seen)
    assert 0 < seen[0] < seen[-1] <= spot.total
    assert [raw.value for raw in reader.records()] == [raw.value for raw in reader.records(Spot(reader.files))]


@pytest.mark.parametrize("write", [write_lines, write_one_shard, write_parquet, write_dataset])
def test_forked_workers_check_pictures_inside_other_files(write, tmp_path, make_encoder, make_spec):
    path, images = write(tmp_path)
    source = Source(path=str(path), images=None if images is None else str(images))
    corpus = index([source], make_encoder(), make_spec(), workers=2)
    assert [corpus.index.image_sizes(i) for i in range(3)] == [[(w, 3) for w in widths(talk)] for talk in TALKS]
    assert open_image(corpus.samples[0].sample.images[1], corpus.samples[0].root).size == (6, 3)


def test_captions_in_shards(tmp_path):
    with tarfile.open(tmp_path / "s.tar", "w") as file:
        for i in range(2):
            add(file, f"{i:05}.jpg", picture(5 + i))
            add(file, f"{i:05}.json", json.dumps({"caption": "old", "url": "http://x"}).encode())
            add(file, f"{i:05}.txt", f"a picture {i}".encode())
        add(file, "2.txt", b"words alone")
        add(file, "3.jpg", picture(3))
    reader = open_source(Source(path=str(tmp_path / "s.tar")))
    raws = list(reader.records())
    assert [reader.parse(raw).messages[1].text for raw in raws[:2]] == ["a picture 0", "a picture 1"]
    assert reader.parse(raws[1]).id == "00001"
    for raw, message in zip(raws[2:], ("conversations` is missing", "neither a json nor a txt"), strict=True):
        with pytest.raises(DataError, match=message):
            reader.parse(raw)


def test_brace_patterns(tmp_path):
    assert expand("a{08..11}{x,yy}") == [f"a{n}{t}" for n in ("08", "09", "10", "11") for t in ("x", "yy")]
    (tmp_path / "a{1}").touch()
    assert expand(str(tmp_path / "a{1}")) == [str(tmp_path / "a{1}")]
    for pattern in ("{5..1}", "{0..99999}{0..99999}", "{0..999999999}"):
        with pytest.raises(DataError):
            expand(pattern)


def test_sources_that_are_refused_say_what_they_hold(tmp_path):
    def reason(path):
        with pytest.raises(DataError) as error:
            open_source(Source(path=str(path)))
        return str(error.value)

    assert "no data file in this folder; known formats: JSON" in reason(tmp_path)
    assert "No such file" in reason(tmp_path / "nothing")
    with zipfile.ZipFile(tmp_path / "z", "w") as file:
        file.writestr("a", "b")
    assert "a zip archive; name it as `images`" in reason(tmp_path / "z")
    write_one_shard(tmp_path)
    write_parquet(tmp_path)
    assert "files of several kinds (1 parquet, 1 tar)" in reason(tmp_path)
    (tmp_path / "x").mkdir()
    (tmp_path / "x" / "dataset_dict.json").touch()
    (tmp_path / "x" / "train").mkdir()
    assert "holds the splits train; name the folder of one" in reason(tmp_path / "x")


def test_a_list_is_read_through_a_small_window(tmp_path):
    import tracemalloc

    with (tmp_path / "d").open("w") as stream:
        for i in range(6_000):
            stream.write("[" if not i else ",")
            json.dump(llava(TALKS[1], id=i, note="x" * 3000), stream)
        stream.write("]")
    tracemalloc.start()
    count = sum(1 for _ in open_source(Source(path=str(tmp_path / "d"))).records())
    assert count == 6_000
    assert tracemalloc.get_traced_memory()[1] < 10_000_000 < (tmp_path / "d").stat().st_size
    tracemalloc.stop()
