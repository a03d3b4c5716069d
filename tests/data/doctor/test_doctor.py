"""Each fault is found, filed under its reason and kept out of the clean data; good data is left alone."""

import base64
import io
import json
import os
import shutil
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from lapilli.base.errors import DataError, LapilliError
from lapilli.cli.data import app
from lapilli.data import check
from lapilli.data.doctor.diagnosis import _padded, _round_up
from lapilli.data.doctor.examine import examine
from lapilli.data.doctor.fix import write_clean
from lapilli.data.doctor.html import html_report
from lapilli.data.doctor.reasons import REASONS
from lapilli.data.image import ImageLimits
from lapilli.recipe.schema import Source


def picture(seed, size=(40, 30)):
    rng = np.random.default_rng(seed)
    return PIL.Image.fromarray(rng.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8))


def record(name, image=None, question="What is it?", answer="It is a stone."):
    mark = "<image>\n" if image else ""
    turns = [{"from": "human", "value": mark + question}, {"from": "gpt", "value": answer}]
    return {"id": name, "conversations": turns} | ({"image": image} if image else {})


@pytest.fixture
def folder(tmp_path):
    for i in range(6):
        picture(i).save(tmp_path / f"{i}.jpg")
    return tmp_path


def write(folder, records, name="chat.json"):
    (folder / name).write_text(json.dumps(records))
    return Source(path=str(folder / name), images=str(folder))


def look(train, validation=(), **options):
    options = {"stream": io.StringIO()} | options
    return examine([train], [validation] if validation else [], **options)


def found(diagnosis):
    """{code: the records that have it}"""
    return {
        code: sorted({p.where.rpartition("(id ")[2].rstrip(")") for p in diagnosis.findings.of(code)})
        for code in diagnosis.findings.codes
    }


def test_good_data_is_good(folder):
    source = write(folder, [record(f"r{i}", f"{i}.jpg") for i in range(6)] + [record("text", answer="No picture.")])
    diagnosis = look(source)
    assert diagnosis.ok
    assert not len(diagnosis.findings)
    assert diagnosis.pictures_per_sample() == {0: 1, 1: 6}
    assert diagnosis.modalities() == {"text only": 1, "one picture": 6}
    assert diagnosis.picture_facts() == {"modes": {"RGB": 6}, "formats": {"JPEG": 6}}
    assert diagnosis.lengths.tolist() == [3 + 4] * 6 + [3 + 2]
    assert any("--model" in what for what in diagnosis.not_checked)


def test_every_fault_is_filed_under_its_reason(folder):
    whole = (folder / "0.jpg").read_bytes()
    (folder / "half.jpg").write_bytes(whole[: len(whole) // 2])
    (folder / "empty.jpg").write_bytes(b"")
    (folder / "text.jpg").write_text("not a picture")
    PIL.Image.fromarray(np.zeros((9, 9), dtype=np.float32)).save(folder / "deep.tif")
    frames = [PIL.Image.new("RGB", (4, 4), colour) for colour in ("red", "blue")]
    frames[0].save(folder / "moving.gif", save_all=True, append_images=frames[1:])
    picture(9, (200, 100)).save(folder / "large.png")
    records = {
        "counts": record("counts") | {"image": "1.jpg"},
        "roles": record("roles") | {"conversations": [{"from": "robot", "value": "x"}]},
        "empty": record("empty", answer=" "),
        "no_supervised": record("no_supervised") | {"conversations": [{"from": "human", "value": "x"}]},
        "record": {"id": "record"},
        "missing": record("missing", "gone.jpg"),
        "outside": record("outside", "../x.jpg"),
        "truncated": record("truncated", "half.jpg"),
        "truncated_2": record("truncated_2", "empty.jpg"),
        "format": record("format", "text.jpg"),
        "mode": record("mode", "deep.tif"),
        "oversized": record("oversized", "large.png"),
        "animated": record("animated", "moving.gif"),
    }
    diagnosis = look(write(folder, list(records.values())), limits=ImageLimits(max_pixels=19_999))
    expected = {code: [code] for code in records if code != "truncated_2"}
    assert found(diagnosis) == expected | {"truncated": ["truncated", "truncated_2"]}
    assert diagnosis.bad == len(records) - 1  # an animated picture can be used
    assert not diagnosis.ok


def test_lines_that_are_not_json_and_files_that_break_off_are_findings(folder):
    lines = [json.dumps(record("a")), '{"id": "b", ', json.dumps(record("c", answer="Another."))]
    (folder / "lines.jsonl").write_text("\n".join(lines))
    diagnosis = look(Source(path=str(folder / "lines.jsonl")))
    assert list(found(diagnosis)) == ["json"]
    assert len(diagnosis.usable) == 2
    whole = json.dumps([record("a"), record("b")])
    (folder / "cut.json").write_text(whole[:-20])
    broken = look(Source(path=str(folder / "cut.json")))
    assert list(found(broken)) == ["file"]
    assert not broken.ok


def test_all_that_is_wrong_with_a_record_is_listed(folder):
    wrong = record("two", ["gone.jpg", "lost.jpg"])
    wrong["conversations"][0]["value"] = "<image><image> Which?"
    diagnosis = look(write(folder, [wrong]))
    assert [p.message.split('"')[1] for p in diagnosis.findings.in_order()] == ["gone.jpg", "lost.jpg"]
    assert diagnosis.findings.records("missing") == diagnosis.bad == 1


def test_damage_inside_a_whole_file_needs_full_decoding(folder):
    picture(3, (64, 64)).save(folder / "hurt.png")
    raw = bytearray((folder / "hurt.png").read_bytes())
    raw[len(raw) // 2] ^= 0xFF
    (folder / "hurt.png").write_bytes(raw)
    source = write(folder, [record("hurt", "hurt.png"), record("well", "1.jpg")])
    assert look(source, decode="header").ok
    assert found(look(source, decode="full")) == {"truncated": ["hurt"]}


@pytest.mark.parametrize("decode", ["header", "full"])
def test_duplicates_and_leaks_go_by_content_and_not_by_name(folder, decode):
    rng = np.random.default_rng(0)  # large enough that a header check hashes its ends only
    large = PIL.Image.fromarray(rng.integers(0, 256, (90, 90, 3), dtype=np.uint8))
    for name in ("large.png", "copy.png"):
        large.save(folder / name)
    raw = bytearray((folder / "large.png").read_bytes())
    assert len(raw) > 20_000
    raw[len(raw) // 2] ^= 1  # differs in the middle alone; its sum of checks is wrong, which only decoding sees
    if decode == "header":
        (folder / "other.png").write_bytes(raw)
    else:
        PIL.Image.fromarray(255 - np.asarray(large)).save(folder / "other.png")
    train = [
        record("first", "large.png"),
        record("twin", "copy.png"),
        record("unlike", "other.png"),
        record("words", "large.png", answer="Another answer."),
        record("leaked", "2.jpg"),
        record("asked", "3.jpg", answer="Of a picture that is held out."),
        record("words"),
    ]
    held_out = [record("v1", "2.jpg"), record("v2", "3.jpg"), record("v3", "4.jpg")]
    diagnosis = look(write(folder, train), write(folder, held_out, "val.json"), decode=decode)
    assert found(diagnosis) == {
        "duplicate": ["twin"],
        "leak": ["leaked"],
        "leaked_picture": ["asked"],
    }
    assert [p.message.endswith("(id first)") for p in diagnosis.findings.of("duplicate")] == [True]
    assert not diagnosis.ok  # a leak spoils the validation


def test_lengths_are_those_that_training_sees(world, make_encoder, make_spec):
    encoder, spec = make_encoder(), make_spec()
    corpus = check.index([world], encoder, spec, stream=io.StringIO())
    diagnosis = look(world, encoder=encoder, spec=spec)
    assert diagnosis.ok
    assert diagnosis.lengths.tolist() == corpus.index.lengths.tolist()
    assert diagnosis.usable.supervised.tolist() == corpus.index.supervised.tolist()
    longest = int(diagnosis.lengths.max())
    short = look(world, encoder=make_encoder(max_length=longest - 1), spec=spec)
    assert short.findings.records("too_long") == int((diagnosis.lengths == longest).sum())


def test_padding_is_counted_as_a_loader_pads(world, make_encoder, make_spec):
    diagnosis = look(world, encoder=make_encoder(), spec=make_spec())
    padding = diagnosis.padding(batch_size=4)
    assert padding is not None
    assert padding.tokens == diagnosis.lengths.sum() <= padding.grouped <= padding.shuffled
    assert _padded(np.array([3, 5, 1, 2, 7]), 2) == 2 * 5 + 2 * 2 + 7
    assert look(world).padding() is None  # words say nothing about tokens


def test_the_histogram_holds_everything_once(world):
    diagnosis = look(world)
    bars = diagnosis.histogram()
    assert sum(count for _, _, count in bars) == len(diagnosis.lengths)
    assert all(low < high for low, high, _ in bars)
    assert bars[-1][1] > diagnosis.lengths.max() >= bars[-1][0]
    assert [_round_up(v) for v in (0.3, 1, 1.1, 3, 7, 51, 101)] == [1, 1, 2, 5, 10, 100, 200]


def test_processes_find_what_one_finds(world, monkeypatch):
    from lapilli.data.doctor import examine as module

    monkeypatch.setattr(module, "CHUNK_RECORDS", 3)
    records = json.loads(Path(world.path).read_text())
    records[5]["conversations"][1]["value"] = ""
    records.append(records[0])
    Path(world.path).write_text(json.dumps(records))
    alone, shared = look(world, workers=0), look(world, workers=2)
    assert list(alone.findings.in_order()) == list(shared.findings.in_order())
    for name in ("number", "words", "identities", "picture_keys", "kind"):
        assert np.array_equal(getattr(alone.usable, name), getattr(shared.usable, name))
    assert [alone.usable.where(i) for i in range(22)] == [shared.usable.where(i) for i in range(22)]


def test_many_problems_go_to_disk_and_come_back_in_order(folder, tmp_path, monkeypatch):
    from lapilli.data.doctor import findings as module

    monkeypatch.setattr(module, "IN_MEMORY_BYTES", 500)
    monkeypatch.setattr(module, "_READ_BYTES", 300)
    records = [record(f"r{i}", "gone.jpg" if i % 2 else "1.jpg", answer="" if i % 3 == 0 else "A.") for i in range(60)]
    source = write(folder, records)
    diagnosis = look(source)
    assert any(file._rolled for file in diagnosis.findings._files.values())
    numbers = {code: [p.number - 1 for p in diagnosis.findings.of(code)] for code in diagnosis.findings.codes}
    assert numbers["empty"] == [i for i in range(60) if i % 3 == 0]
    assert numbers["missing"] == [i for i in range(60) if i % 3 and i % 2]
    assert diagnosis.bad == 40
    assert [p.number for p in diagnosis.findings.first("missing", 2)] == [2, 6]
    in_order = [p.number for p in diagnosis.findings.in_order()]
    assert in_order == sorted(in_order)
    told = json.loads("".join(diagnosis.json_pieces()))
    assert len(told["reasons"]["missing"]["list"]) == 20
    fixed = write_clean(diagnosis, [source], tmp_path / "out", keep_duplicates=True, stream=io.StringIO())
    assert (fixed.files[0].records, fixed.quarantined) == (20, 40)


def test_what_is_kept_of_a_record_is_small(folder):
    """A million records must not need a gigabyte: columns and names, no objects."""
    records = [record(f"{i:012d}", f"{i % 6}.jpg", question=f"What is {i}?") for i in range(2_000)]
    usable = look(write(folder, records)).usable
    held = [value for value in vars(usable).values() if isinstance(value, bytearray)]
    held += list(usable._data.values())
    assert sum(map(len, held)) / len(usable) < 200
    assert usable.where(1_999) == f"{folder / 'chat.json'}: record 2000 (id {1_999:012d})"


def test_only_the_part_of_a_source_that_is_asked_for_is_examined(folder):
    path = write(folder, [record(f"r{i}", answer=f"It is {i}." if i > 1 else "") for i in range(6)]).path
    diagnosis = look(Source(path=path, subset="1:4"))
    assert diagnosis.records == 3
    assert [p.number for p in diagnosis.findings.in_order()] == [2]
    held_out = look(Source(path=path, subset="0.0-0.5"), Source(path=path, subset="0.5-1.0"))
    assert held_out.findings.records("leak") == 0


def test_what_a_policy_leaves_out_is_a_note(world, make_encoder, make_spec):
    lengths = look(world, encoder=make_encoder(), spec=make_spec()).lengths
    limit = int(np.sort(lengths)[-5])
    over = int((lengths > limit).sum())
    diagnosis = look(world, encoder=make_encoder(max_length=limit, too_long="drop"), spec=make_spec())
    assert diagnosis.ok
    assert diagnosis.findings.records("dropped") == over > 0
    assert len(diagnosis.usable) == 23 - over


def test_a_killed_process_is_reported_and_does_not_hang(world, monkeypatch):
    from lapilli.data.doctor import record as module

    monkeypatch.setattr(module, "look", lambda *_, **__: os._exit(9))
    with pytest.raises(DataError, match="was killed"):
        look(world, workers=2)


# --- clean data ------------------------------------------------------------------------------------------------------


def lines(path):
    return [json.loads(line) for line in Path(path).read_text().splitlines()]


def test_clean_data_and_quarantine_together_hold_every_record(folder, tmp_path):
    records = [record(f"r{i}", f"{i}.jpg") for i in range(6)]
    records[1]["image"] = "gone.jpg"
    records[2]["source"] = "a field of the user's own"
    records.append(records[0])
    records[4]["conversations"][1]["value"] = "half a surrogate \ud800"
    source = write(folder, records)
    diagnosis = look(source)
    fixed = write_clean(diagnosis, [source], tmp_path / "out", stream=io.StringIO())
    clean = json.loads((tmp_path / "out" / "chat.json").read_text())
    aside = lines(tmp_path / "out" / "quarantine.jsonl")
    assert clean == [records[i] for i in (0, 2, 3, 5)]
    assert [(entry["record"], [r["code"] for r in entry["reasons"]]) for entry in aside] == [
        (records[1], ["missing"]),
        (records[4], ["record"]),
        (records[6], ["duplicate"]),
    ]
    (file,) = fixed.files
    assert (file.records, fixed.quarantined, file.images) == (4, 3, str(folder))
    assert look(Source(path=file.path, images=file.images)).ok
    kept = write_clean(diagnosis, [source], tmp_path / "kept", keep_duplicates=True, stream=io.StringIO())
    assert kept.files[0].records == 5
    with pytest.raises(LapilliError, match="exists already"):
        write_clean(diagnosis, [source], tmp_path / "out", stream=io.StringIO())


def test_other_formats_become_llava_json(folder, tmp_path):
    turns = [{"role": "user", "content": "Say it."}, {"role": "assistant", "content": "It."}]
    (folder / "chat.jsonl").write_text(json.dumps({"id": "m", "messages": turns, "note": 1}))
    source = Source(path=str(folder / "chat.jsonl"))
    write_clean(look(source), [source], tmp_path / "out", stream=io.StringIO())
    again = look(Source(path=str(tmp_path / "out" / "chat.json")))
    assert again.ok
    assert again.usable.keys.tolist() == look(source).usable.keys.tolist()


def test_pictures_inside_records_become_files(tmp_path):
    records, stored = [], []
    for i in range(3):
        stream = io.BytesIO()
        picture(i).save(stream, "PNG")
        stored.append(stream.getvalue())
        address = "data:image/png;base64," + base64.b64encode(stream.getvalue()).decode()
        asked = [{"type": "image_url", "image_url": {"url": address}}, {"type": "text", "text": "What?"}]
        answer = {"role": "assistant", "content": "It."}
        records.append({"id": str(i), "messages": [{"role": "user", "content": asked}, answer]})
    records[2]["messages"][1]["content"] = [{"type": "text", "text": "It", "weight": 0.5}]
    (tmp_path / "inside.json").write_text(json.dumps(records))
    source = Source(path=str(tmp_path / "inside.json"))
    diagnosis = look(source)
    assert diagnosis.ok
    fixed = write_clean(diagnosis, [source], tmp_path / "out", stream=io.StringIO())
    (file,) = fixed.files
    assert (file.records, fixed.quarantined) == (2, 1)  # LLaVA's files have no weights between 0 and 1
    for record, data in zip(json.loads(Path(file.path).read_text()), stored, strict=False):
        assert (Path(file.images) / record["image"]).read_bytes() == data
    again = look(Source(path=file.path, images=file.images))
    assert again.usable.keys.tolist() == diagnosis.usable.keys[:2].tolist()
    assert again.usable.picture_keys.tolist() == diagnosis.usable.picture_keys[:2].tolist()


@pytest.mark.parametrize("kind", ["zip", "tar"])
def test_pictures_in_archives_are_examined_too(folder, tmp_path, kind):
    shutil.make_archive(str(tmp_path / "all"), kind, folder, ".")
    name = tmp_path / f"all.{kind}"
    (folder / "chat.json").write_text(json.dumps([record("a", "1.jpg"), record("b", "./1.jpg"), record("c", "9.jpg")]))
    diagnosis = look(Source(path=str(folder / "chat.json"), images=str(name)), decode="full")
    assert found(diagnosis) == {"missing": ["c"], "duplicate": ["b"]}


@settings(max_examples=25, deadline=None)
@given(st.binary(max_size=60), st.integers(0, 400))
def test_damaged_files_end_in_a_finding(tmp_path_factory, noise, place):
    """Any bytes anywhere in a data file: findings or a DataError, never another exception."""
    folder = tmp_path_factory.mktemp("fuzz")
    raw = json.dumps([record("a", "x.jpg"), record("b")]).encode()
    place = min(place, len(raw))
    (folder / "chat.json").write_bytes(raw[:place] + noise + raw[place + len(noise) :])
    try:
        diagnosis = look(Source(path=str(folder / "chat.json"), images=str(folder)))
    except DataError:
        return
    html_report([("", diagnosis, ())], 16).encode()
    assert set(diagnosis.findings.codes) <= set(REASONS)
    json.loads("".join(diagnosis.json_pieces()))


# --- the command -----------------------------------------------------------------------------------------------------


def run(*arguments):
    return CliRunner().invoke(app, ["check", *map(str, arguments), "--workers", "0"])


def test_the_command_reports_and_says_by_its_status(folder, tmp_path):
    good = write(folder, [record(f"r{i}", f"{i}.jpg") for i in range(6)])
    result = run(good.path)
    assert result.exit_code == 0
    assert "all 6 records can be used" in result.stdout
    bad = write(folder, [record("a", "gone.jpg"), record("b", "2.jpg")], "bad.json")
    html = tmp_path / "report.html"
    result = run(bad.path, "--json", "--html", html, "--fix", tmp_path / "out")
    assert result.exit_code == 1
    told = json.loads(result.stdout)
    assert told["ok"] is False
    assert told["reasons"]["missing"]["records"] == 1
    assert told["lengths"]["unit"] == "words"
    page = html.read_text()
    assert "picture file missing" in page
    assert "gone.jpg" in page
    assert "<script" not in page
    assert [r["id"] for r in json.loads((tmp_path / "out" / "bad.json").read_text())] == ["b"]
    assert (tmp_path / "out" / "quarantine.jsonl").is_file()


@pytest.mark.parametrize(
    ("options", "word"),
    [
        (("--decode", "ful"), 'did you mean "full"'),
        (("--images", "a", "--images", "b"), "once for all, or once for each"),
        (("--template", "v1"), "--model"),
        (("--fix", "."), "exists already"),
    ],
)
def test_wrong_options_are_refused_before_anything_is_read(folder, options, word):
    source = write(folder, [record("a")])
    result = run(source.path, *options)
    assert isinstance(result.exception, LapilliError)
    assert word in str(result.exception)
