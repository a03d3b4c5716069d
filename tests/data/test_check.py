"""Every bad record is found before training starts; nothing is left out silently; the index fits or is made again."""

import io
import json
import os
from pathlib import Path

import numpy as np
import PIL.Image
import pytest

from lapilli.base.errors import DataError
from lapilli.data import check
from lapilli.data.check import BadData, index
from lapilli.data.image import ImageLimits
from lapilli.data.stamp import FileHashes
from lapilli.recipe.schema import Source


def read(source):
    return json.loads(Path(source.path).read_text())


def write(source, records):
    Path(source.path).write_text(json.dumps(records))


def run(source, encoder, spec, **options):
    sources = [source] if isinstance(source, Source) else source
    return index(sources, encoder, spec, stream=io.StringIO(), **options)


@pytest.mark.parametrize("mode", ["square", "pad", "anyres"])
def test_the_index_says_what_encoding_gives(world, make_encoder, make_spec, mode):
    encoder = make_encoder(mode)
    corpus = run(world, encoder, make_spec(mode))
    assert len(corpus) == corpus.index.records == 23
    for i in range(23):
        placed = corpus.samples[i]
        sizes = [PIL.Image.open(Path(placed.root) / image.path).size for image in placed.sample.images]
        assert corpus.index.image_sizes(i) == sizes
        example = encoder.encode(placed.sample, sizes)
        assert (example.length, example.supervised) == (corpus.index.lengths[i], corpus.index.supervised[i])
        assert (corpus.index.words[i] > 0) == bool(sizes)
    assert corpus.index.summary()["pictures"] == 8 + 2 * 7


def test_every_bad_record_is_listed_by_kind(world, make_encoder, make_spec):
    records = read(world)
    for i in (0, 2, 3, 5, 6):
        records[i]["image"] = [f"gone{i}.png"] * len(records[i]["image"])
    records[9]["image"] = ["../chat.json"]
    (Path(world.images) / "12_0.png").write_bytes(b"\x89PNG\r\n\x1a\nhalf")
    records[1]["conversations"][1]["value"] = ""
    records[4]["conversations"][0]["value"] = "<image> but no picture"
    records[7]["conversations"] = records[7]["conversations"][:1]
    write(world, records)
    with pytest.raises(BadData) as caught:
        run(world, make_encoder(), make_spec())
    message = str(caught.value)
    assert len(caught.value.problems) == 10
    for i in (0, 1, 2, 3, 4, 5, 6, 7, 9, 12):
        assert sum(f"(id r{i})" in problem for problem in caught.value.problems) == 1
    assert message.startswith("10 of 23 records can't be used:")
    assert "5 x image" in message.splitlines()[1]
    assert "... and 2 more" in message
    assert "leaves the image folder" in message


def test_one_bad_record_is_one_line(world, make_encoder, make_spec):
    (Path(world.images) / "3_0.png").unlink()
    with pytest.raises(
        BadData, match=r'^\S+chat\.json: record 4 \(id r3\): image "3_0\.png": there is no file'
    ) as caught:
        run(world, make_encoder(), make_spec())
    assert "\n" not in str(caught.value)


def test_budgets_hold_before_training(world, make_encoder, make_spec):
    with pytest.raises(BadData, match="more than 900 pixels"):
        run(world, make_encoder(), make_spec(), limits=ImageLimits(max_pixels=900))
    PIL.Image.new("1", (40_000, 1)).save(Path(world.images) / "0_0.png")
    with pytest.raises(BadData, match=r'id r0.*image "0_0\.png".*long and thin'):
        run(world, make_encoder(), make_spec())


def test_too_long_is_an_error_or_is_counted(world, make_encoder, make_spec):
    lengths = run(world, make_encoder(), make_spec()).index.lengths
    limit = int(np.sort(lengths)[-5])
    over = int((lengths > limit).sum())
    assert over > 1
    with pytest.raises(BadData, match=f"{over} of 23 records"):
        run(world, make_encoder(max_length=limit), make_spec())
    corpus = run(world, make_encoder(max_length=limit, too_long="drop"), make_spec())
    assert (len(corpus), corpus.index.dropped, len(corpus.index.notes)) == (23 - over, over, over)
    assert list(corpus.index.note_counts().values()) == [over]
    assert corpus.index.lengths.max() == limit
    assert all("record" in note.where for note in corpus.index.notes)
    with pytest.raises(DataError, match="nothing is left"):
        run(world, make_encoder(max_length=5, too_long="drop"), make_spec())


def test_dropped_turns_are_counted_and_the_record_stays(world, make_encoder, make_spec):
    records = read(world)[:3]
    records[0]["conversations"] += [
        {"from": "human", "value": "<image>And this " + "long " * 90},
        {"from": "gpt", "value": "Yes"},
    ]
    records[0]["image"].append("2_0.png")
    write(world, records)
    corpus = run(world, make_encoder(max_length=300, too_long="truncate_turns"), make_spec())
    assert len(corpus) == 3
    assert corpus.index.lengths.max() <= 300
    (note,) = corpus.index.notes
    assert "id r0" in note.where
    assert "2 turns dropped" in note.reason


def test_a_kept_index_gives_the_same_corpus_without_opening_a_picture(
    world, make_encoder, make_spec, tmp_path, monkeypatch
):
    limit = int(np.sort(run(world, make_encoder(), make_spec()).index.lengths)[-4])
    options = {"cache": tmp_path / "cache"}
    encoder = make_encoder(max_length=limit, too_long="drop")
    first = run(world, encoder, make_spec(), **options)
    monkeypatch.setattr(check, "usable_size", None)
    second = run(world, encoder, make_spec(), **options)
    assert [p.sample for p in second.samples] == [p.sample for p in first.samples]
    assert second.index.notes == first.index.notes
    assert second.index.summary() == first.index.summary()
    for name in ("kept", "lengths", "supervised", "pictures", "words", "sizes"):
        assert np.array_equal(getattr(first.index, name), getattr(second.index, name))
        assert getattr(first.index, name).dtype == getattr(second.index, name).dtype


def test_what_decides_tokens_changes_the_stamp(world, make_encoder, make_spec):
    def stamp(mode="pad", spec_mode=None, source=world, placement="keep", limits=None, **options):
        spec = make_spec(spec_mode or mode)
        return run(source, make_encoder(mode, **options), spec, placement=placement, limits=limits).index.stamp

    stamps = [
        stamp(),
        stamp(mode="square"),
        stamp(max_length=999),
        stamp(max_length=999, too_long="drop"),
        stamp(placement="front"),
        stamp(im_start_end=True),
        stamp(limits=ImageLimits(max_pixels=10_000)),
    ]
    records = read(world)
    records[0]["conversations"][1]["value"] += "!"
    write(world, records)
    stamps.append(stamp())
    assert len(set(stamps)) == len(stamps)
    assert stamp() == stamps[-1]


@pytest.mark.parametrize("name", ["samples.bin", "ends.npy", "lengths.npy", "sizes.npy", "about.json"])
def test_a_damaged_index_is_refused_by_name(world, make_encoder, make_spec, tmp_path, name):
    run(world, make_encoder(), make_spec(), cache=tmp_path / "cache")
    (kept,) = (tmp_path / "cache").glob("index-*")
    (kept / name).write_bytes((kept / name).read_bytes()[:-1])
    with pytest.raises(DataError, match=r"index-\w+: the data index is damaged"):
        run(world, make_encoder(), make_spec(), cache=tmp_path / "cache")


def test_processes_find_what_one_finds(world, make_encoder, make_spec, monkeypatch):
    monkeypatch.setattr(check, "CHUNK_RECORDS", 4)
    alone = run(world, make_encoder(), make_spec())
    together = run(world, make_encoder(), make_spec(), workers=2)
    assert [p.sample for p in together.samples] == [p.sample for p in alone.samples]
    assert np.array_equal(together.index.lengths, alone.index.lengths)
    assert np.array_equal(together.index.sizes, alone.index.sizes)


def test_several_sources_keep_their_own_image_folders(world, make_encoder, make_spec, tmp_path):
    text = tmp_path / "text.json"
    text.write_text(json.dumps([r for r in read(world) if "image" not in r]))
    corpus = run([Source(path=str(text)), world], make_encoder(), make_spec())
    assert [corpus.samples[i].root for i in (0, 8)] == [str(tmp_path), world.images]
    assert len(corpus) == 8 + 23
    with pytest.raises(BadData, match="there is no file"):
        run(Source(path=world.path), make_encoder(), make_spec())


def test_bad_records_within_the_allowed_part_are_left_out_and_noted(world, make_encoder, make_spec, tmp_path):
    (Path(world.images) / "12_0.png").unlink()
    allowed = {"max_bad_ratio": 0.05, "cache": tmp_path / "cache"}
    corpus = run(world, make_encoder(), make_spec(), **allowed)
    assert (len(corpus), corpus.index.records, corpus.index.dropped) == (22, 23, 1)
    assert 12 not in corpus.index.kept
    (note,) = corpus.index.notes
    assert "id r12" in note.where
    assert note.reason.startswith('left out as bad: image "12_0.png": there is no file')
    with pytest.raises(BadData):  # an index made under a milder policy is no excuse
        run(world, make_encoder(), make_spec(), cache=tmp_path / "cache")
    (Path(world.images) / "3_0.png").unlink()
    with pytest.raises(BadData, match=r"max_bad_ratio 0.05 allows 1"):
        run(world, make_encoder(), make_spec(), max_bad_ratio=0.05)


def test_a_changed_file_is_seen_although_its_hash_is_remembered(tmp_path):
    file = tmp_path / "a.json"
    file.write_text("one")
    os.utime(file, (1, 1))
    hashes = FileHashes(tmp_path)
    first = hashes.of(str(file))
    hashes.save()
    file.write_text("two")
    os.utime(file, (2, 2))
    assert FileHashes(tmp_path).of(str(file)) != first
    file.write_text("one")
    os.utime(file, (1, 1))
    assert FileHashes(tmp_path).of(str(file)) == first


def test_a_remembered_hash_spares_reading_unless_the_file_is_new(tmp_path):
    old, new = tmp_path / "old.json", tmp_path / "new.json"
    for file in (old, new):
        file.write_text("one")
    os.utime(old, (1, 1))
    hashes = FileHashes(tmp_path)
    hashes.of(str(old)), hashes.of(str(new))
    hashes.save()
    assert [Path(name).name for name in json.loads((tmp_path / "hashes.json").read_text())] == ["old.json"]
