"""What `prepare` writes is what encoding gives, whoever writes it and however often it is interrupted."""

import json
import multiprocessing
import os
import pickle
import shutil
import signal
import tarfile
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from lapilli.base.errors import DataError, RunError
from lapilli.data.encode import Encoder
from lapilli.data.image import image_size
from lapilli.data.picture import open_image
from lapilli.data.prepare.batch import BatchEncoder
from lapilli.data.prepare.job import prepare
from lapilli.data.prepare.rows import Rows
from lapilli.data.prepare.work import UNFINISHED
from lapilli.data.read.open import open_source
from lapilli.data.read.prepared import PreparedStore, is_prepared
from lapilli.data.sample import Image, Message, Sample, Text
from lapilli.data.tokenizer import load_tokenizer
from lapilli.recipe.schema import Source

REFERENCE = Path(__file__).parents[2] / "reference"
LAYOUTS = ("ours", "cerebras")


def direct(source, encoder):
    """The Examples of a source as encoding one record after the other gives them."""
    reader = open_source(source)
    found = []
    for raw in reader.records():
        try:
            sample = reader.parse(raw)
            sizes = [image_size(image, reader.images) for image in sample.images]
            found.append(encoder.encode(sample, sizes))
        except DataError:
            continue
    return [example for example in found if example is not None]


def assert_same(found, wanted, images=True):
    assert len(found) == len(wanted)
    for one, other in zip(found, wanted, strict=True):
        assert (one.id, one.where) == (other.id, other.where)
        for name in ("input_ids", "labels"):
            np.testing.assert_array_equal(getattr(one, name), getattr(other, name))
            assert getattr(one, name).dtype == np.int64
        assert (one.weights is None) == (other.weights is None)
        if one.weights is not None:
            np.testing.assert_array_equal(one.weights, other.weights)
        if images:
            assert one.images == other.images


def files(folder):
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


@pytest.fixture
def options():
    return {"shard_records": 5, "max_images": 2, "stream": open(os.devnull, "w")}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_reads_back_what_encoding_gives(world, make_encoder, make_spec, tmp_path, options, layout):
    encoder = make_encoder(max_length=300)
    outcome = prepare([world], encoder, make_spec(), tmp_path / "out", layout=layout, **options)
    store = PreparedStore(tmp_path / "out", encoder)
    wanted = direct(world, encoder)
    assert_same(list(store), wanted)
    assert store.lengths.tolist() == [e.length for e in wanted]
    assert store.supervised.tolist() == [e.supervised for e in wanted]
    assert [store.image_sizes(i) for i in range(len(store))] == [
        [(s.width, s.height) for s in e.images] for e in wanted
    ]
    assert store.images == world.images
    assert outcome.shards == 5
    assert is_prepared(tmp_path / "out")
    said = outcome.params["post-process"]
    assert said["n_examples"] == 23
    assert said["loss_valid_tokens"] == sum(e.supervised for e in wanted)
    assert said["num_pad_tokens"] == (0 if layout == "ours" else 23 * 300 - sum(e.length - 1 for e in wanted))


def test_pictures_of_any_size_are_held(world, make_encoder, make_spec, tmp_path, options):
    encoder = make_encoder("anyres")
    prepare([world], encoder, make_spec("anyres"), tmp_path / "out", **options)
    assert_same(list(PreparedStore(tmp_path / "out", encoder)), direct(world, encoder))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_any_number_of_processes_writes_the_same_bytes(world, make_encoder, make_spec, tmp_path, options, layout):
    encoder = make_encoder(max_length=300)
    prepare([world], encoder, make_spec(), tmp_path / "one", layout=layout, **options)
    time.sleep(1.1)  # a time of day in a file would show
    prepare([world], encoder, make_spec(), tmp_path / "two", layout=layout, processes=2, **options)
    one, two = files(tmp_path / "one"), files(tmp_path / "two")
    assert one == two
    assert len(one) == (7 if layout == "ours" else 12)


def test_takes_up_what_a_kill_left(world, make_encoder, make_spec, tmp_path, options):
    encoder, out = make_encoder(max_length=300), tmp_path / "out"
    prepare([world], encoder, make_spec(), tmp_path / "whole", **options)

    def killed_at(number):
        from lapilli.data.prepare import engine, work

        made = work.make_shard

        def make(this, k, records):
            if k == number:
                (out / ".shard-00003.h5.tmp-12345678").write_bytes(b"half")
                os.kill(os.getpid(), signal.SIGKILL)
            return made(this, k, records)

        engine.make_shard = make
        prepare([world], encoder, make_spec(), out, **options)

    child = multiprocessing.get_context("fork").Process(target=killed_at, args=(3,))
    child.start()
    child.join()
    assert child.exitcode == -signal.SIGKILL
    assert (out / UNFINISHED).is_dir()
    with pytest.raises(DataError, match="run the same"):
        PreparedStore(out)
    with pytest.raises(DataError, match=r"facts\.max_length was 300, is 301"):
        prepare([world], make_encoder(max_length=301), make_spec(), out, **options)
    (out / "shard-00001.h5").write_bytes(b"torn")  # a shard that is not as it was written is made again
    outcome = prepare([world], encoder, make_spec(), out, **options)
    assert outcome.kept_shards == 2
    assert outcome.shards == 5
    assert files(out) == files(tmp_path / "whole")
    with pytest.raises(DataError, match="holds prepared data already"):
        prepare([world], encoder, make_spec(), out, **options)


def test_bad_records_are_listed_and_counted(world, make_encoder, make_spec, tmp_path, options):
    records = json.loads(Path(world.path).read_text())
    records[2]["image"] = ["nowhere.png"] * 2
    records[4]["conversations"][1]["value"] = ""
    records[6]["conversations"][1]["value"] = "long " * 100
    records[7]["conversations"][1]["value"] = "half \ud800"
    records.insert(9, "no object")
    (tmp_path / "bad.json").write_text(json.dumps(records))
    source = Source(path=str(tmp_path / "bad.json"), images=world.images)
    encoder = make_encoder(max_length=300, too_long="drop")
    outcome = prepare([source], encoder, make_spec(), tmp_path / "out", **options)
    lines = [json.loads(line) for line in (tmp_path / "out/quarantine.jsonl").read_text().splitlines()]
    assert [(e["record"], e["kind"]) for e in lines] == [
        (3, "bad"), (5, "bad"), (7, "dropped"), (8, "bad"), (10, "bad"),
    ]  # fmt: skip
    assert lines[0]["id"] == "r2"
    assert 'image "nowhere.png"' in lines[0]["reason"]
    assert outcome.statistics.bad == 4
    assert outcome.statistics.dropped == 1
    assert outcome.params["post-process"]["raw_docs_skipped"] == 5
    assert sum(outcome.params["lapilli"]["statistics"]["reasons"].values()) == 5
    assert_same(list(PreparedStore(tmp_path / "out", encoder)), [e for e in direct(source, encoder) if e.id != "r7"])


def test_nothing_left_leaves_no_folder(world, make_encoder, make_spec, tmp_path, options):
    source = world.model_copy(update={"images": str(tmp_path)})
    with pytest.raises(DataError, match="15 x image …: there is no file"):
        prepare([source], make_encoder(max_length=30), make_spec(), tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_disagreement_is_refused_with_both_values(world, make_encoder, make_spec, tmp_path, options, layout):
    prepare([world], make_encoder(max_length=300), make_spec(), tmp_path / "out", layout=layout, **options)
    PreparedStore(tmp_path / "out", make_encoder())  # no limit here contradicts none there
    with pytest.raises(DataError, match="max_length is 300 in the prepared data, 200 here"):
        PreparedStore(tmp_path / "out", make_encoder(max_length=200))
    other = make_encoder(max_length=300)
    other.template = other.template.model_copy(update={"system": "Other."})
    with pytest.raises(DataError, match=r"template is \w{12} \(v1\) in the prepared data, \w{12} \(v1\) here"):
        PreparedStore(tmp_path / "out", other)
    other = make_encoder(max_length=300)
    other.layout = other.layout.model_copy(update={"grid_width": 3})
    with pytest.raises(DataError, match="tokens per image is 4 in the prepared data, 6 here"):
        PreparedStore(tmp_path / "out", other)
    PreparedStore(tmp_path / "out", make_encoder("square", max_length=300))  # cut or padded: the tokens are the same
    with pytest.raises(DataError, match=r"image layout is mode pad.* in the prepared data, mode anyres.* here"):
        PreparedStore(tmp_path / "out", make_encoder("anyres", max_length=300))


def test_pictures_may_lie_inside(world, make_encoder, make_spec, tmp_path, options):
    encoder = make_encoder(max_length=300)
    prepare([world], encoder, make_spec(), tmp_path / "out", embed_images=True, **options)
    shutil.move(world.images, tmp_path / "elsewhere")
    store = PreparedStore(tmp_path / "out", encoder)
    for slot in (slot for example in store for slot in example.images):
        assert slot.image.data == (tmp_path / "elsewhere" / slot.image.path).read_bytes()
        assert open_image(slot.image, None).size == (slot.width, slot.height)


def test_pictures_in_archives(world, make_encoder, make_spec, tmp_path, options):
    with tarfile.open(tmp_path / "pictures.tar", "w") as archive:
        for file in sorted(Path(world.images).iterdir()):
            archive.add(file, file.name)
    source = world.model_copy(update={"images": str(tmp_path / "pictures.tar")})
    encoder = make_encoder(max_length=300)
    prepare([source], encoder, make_spec(), tmp_path / "out", embed_images=True, **options)
    store = PreparedStore(tmp_path / "out", encoder)
    assert len(store) == 23
    for slot in (slot for example in store for slot in example.images):
        assert slot.image.data == (Path(world.images) / slot.image.path).read_bytes()
    prepare([source], encoder, make_spec(), tmp_path / "two", layout="cerebras", **options)
    assert len(PreparedStore(tmp_path / "two")) == 8  # the conversations without pictures
    assert "not members of archives" in (tmp_path / "two/quarantine.jsonl").read_text()


def test_sources_with_several_roots_get_one(world, make_encoder, make_spec, tmp_path, options):
    shutil.copytree(world.images, tmp_path / "more/pictures")
    second = world.model_copy(update={"images": str(tmp_path / "more/pictures")})
    prepare([world, second], make_encoder(), make_spec(), tmp_path / "out", **options)
    store = PreparedStore(tmp_path / "out")
    assert store.images == str(tmp_path)
    assert store[0].images[0].image.path == "images/0_0.png"
    assert store[23].images[0].image.path == "more/pictures/0_0.png"
    assert image_size(store[23].images[0].image, store.images) == store.image_sizes(23)[0]


def test_damage_is_refused(world, make_encoder, make_spec, tmp_path, options):
    out = tmp_path / "out"
    prepare([world], make_encoder(), make_spec(), out, **options)
    shard = out / "shard-00002.h5"
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-100])
    with pytest.raises(DataError, match=r"shard-00002\.h5: not as long"):
        PreparedStore(out)
    shard.write_bytes(b"\0" * len(whole))
    with pytest.raises(DataError, match="not a whole shard"):
        PreparedStore(out)
    shard.unlink()
    with pytest.raises(DataError, match="a shard is missing"):
        PreparedStore(out)
    (out / "data_params.json").unlink()
    with pytest.raises(DataError, match=r"data_params\.json is missing"):
        PreparedStore(out)


def test_forked_readers_read_the_same(world, make_encoder, make_spec, tmp_path, options):
    encoder = make_encoder()
    prepare([world], encoder, make_spec(), tmp_path / "out", **options)
    store, wanted = PreparedStore(tmp_path / "out", encoder), direct(world, encoder)
    assert_same([store[i] for i in range(10)], wanted[:10])  # opened here, before the fork
    with multiprocessing.get_context("fork").Pool(3) as pool:
        assert_same(pool.map(store.example, range(23), chunksize=2), wanted)
    assert_same(list(pickle.loads(pickle.dumps(store))), wanted)  # as a spawned worker gets it


@pytest.mark.parametrize("kind", ["letters", "words", "words without BOS"])
def test_ahead_of_time_is_the_same(make_encoder, kind):
    """The batch's shortcuts against the Encoder itself: weights, pictures, what is refused, cut or not ASCII."""
    encoder = make_encoder(max_length=210, too_long="truncate_turns")
    image = "<image>"
    if kind != "letters":
        tokenizer, image = load_tokenizer(REFERENCE / "tokenizer"), "<unk>"
        encoder = Encoder(tokenizer, encoder.template, encoder.layout, image, max_length=150, too_long="truncate_turns")
        assert encoder.prefix == [tokenizer.bos_token_id]
        if kind == "words without BOS":
            encoder.prefix = []
    rng = np.random.default_rng(0)
    samples = []
    for i in range(200):
        parts = [Image("a.png") if rng.random() < 0.3 else Text("wörd "[: rng.integers(0, 6)]) for _ in range(4)]
        weight = rng.choice([None, None, None, 0.0, 0.5, 1.0])
        answer = (Text("It is ", weight), Text(["so", image, "~", "é", ""][rng.integers(5)]), Text("."))
        messages = [Message("user", tuple(parts)), Message("assistant", answer, float(rng.integers(0, 5) > 0))]
        samples.append(Sample(str(i), tuple(messages * int(rng.integers(1, 4)))))
    batch = BatchEncoder(encoder)
    batch.read_ahead(samples)
    kinds = set()
    for sample in samples:
        results = []
        for one in (encoder, batch):
            try:
                results.append(one.encode_noted(sample))
            except DataError as error:
                results.append(str(error))
        wanted, found = results
        if isinstance(wanted, str) or wanted.example is None:
            assert found == wanted
        else:
            assert found.notes == wanted.notes
            assert_same([found.example], [wanted.example])
        kinds.add("refused" if isinstance(wanted, str) else "dropped" if wanted.example is None else "kept")
        kinds.update(() if isinstance(wanted, str) else wanted.notes)
    assert {"refused", "kept"} < kinds
    assert any("turns dropped" in kind for kind in kinds)


def test_weights_are_held(make_encoder, tmp_path):
    from lapilli.data.prepare import ours
    from lapilli.data.prepare.facts import Facts

    encoder = make_encoder()
    plain = Sample("a", (Message("user", (Text("Q"),)), Message("assistant", (Text("yes"),))))
    halves = replace(plain, messages=(plain.messages[0], Message("assistant", (Text("yes", 0.5), Text(" no", 0.25)))))
    wanted = [encoder.encode(sample) for sample in (plain, halves)]
    assert wanted[1].weights is not None
    ours.write_shard(tmp_path / "s.h5", Rows(wanted), Facts.of(encoder).as_json())
    shard = ours.Shard(tmp_path / "s.h5", encoder.image_token_id)
    assert_same([shard.example(0), shard.example(1)], wanted)


@pytest.mark.slow
def test_a_ray_cluster_writes_the_same_bytes(world, make_encoder, make_spec, tmp_path, options):
    """Two real workers of a cluster that is started for the while."""
    prepare([world], make_encoder(), make_spec(), tmp_path / "local", **options)
    prepare([world], make_encoder(), make_spec(), tmp_path / "ray", engine="ray", processes=2, **options)
    assert files(tmp_path / "ray") == files(tmp_path / "local")


def test_a_cluster_that_is_not_there_is_said(world, make_encoder, make_spec, tmp_path, options):
    with pytest.raises(RunError, match=r"--address 127\.0\.0\.1:1: no Ray cluster answers there"):
        prepare([world], make_encoder(), make_spec(), tmp_path / "ray", engine="ray", address="127.0.0.1:1", **options)
