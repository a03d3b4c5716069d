"""Prepared folders: good rows are good, and each fault of a row is found and filed."""

import io
import json
import shutil
from pathlib import Path

import h5py
import numpy as np
import PIL.Image
import pytest
from typer.testing import CliRunner

from lapilli.base.errors import DataError, LapilliError
from lapilli.cli.data import app
from lapilli.data.doctor.examine import examine
from lapilli.data.prepare.job import prepare
from lapilli.data.read.prepared import PreparedStore
from lapilli.recipe.schema import Source


def look(path, validation=(), images=None, **options):
    source = Source(path=str(path), images=images)
    return examine([source], validation, **{"stream": io.StringIO()} | options)


@pytest.fixture
def prepared(world, make_encoder, make_spec, tmp_path):
    """A factory: the world as a prepared folder, and what its rows are."""

    def make(layout="ours", name="rows", **options):
        out = tmp_path / name
        given = {"layout": layout, "max_images": 2, "shard_records": 10, "stream": io.StringIO()} | options
        prepare([world], make_encoder(max_length=300), make_spec(), out, **given)
        return out

    return make


def spoil(folder, change):
    """Let `change` write in the first shard, without a change of its length in bytes being noticed."""
    file = min(folder.glob("*.h5"))
    with h5py.File(file, "r+") as shard:
        change(shard)
    said = json.loads((folder / "data_params.json").read_text())
    for shard in said["lapilli"]["shards"]:
        shard["bytes"] = (folder / shard["file"]).stat().st_size
    (folder / "data_params.json").write_text(json.dumps(said))


@pytest.mark.parametrize("layout", ["ours", "cerebras"])
@pytest.mark.parametrize("workers", [0, 2])
def test_rows_that_are_good_give_the_numbers_of_their_records(
    world, make_encoder, make_spec, prepared, layout, workers
):
    rows = look(prepared(layout), workers=workers)
    records = examine([world], encoder=make_encoder(max_length=300), spec=make_spec(), stream=io.StringIO())
    assert rows.ok
    assert not len(rows.findings)
    assert (rows.records, rows.unit, rows.parts[0].format) == (23, "tokens", f"prepared ({layout})")
    assert rows.lengths.tolist() == records.lengths.tolist()
    assert rows.usable.supervised.tolist() == records.usable.supervised.tolist()
    assert rows.pictures_per_sample() == records.pictures_per_sample()
    assert rows.picture_facts() == records.picture_facts()
    assert rows.padding() == records.padding()


def test_pictures_that_are_gone_damaged_or_others_now_are_found(world, prepared):
    folder, pictures = prepared(), Path(world.images)
    (pictures / "0_0.png").unlink()
    (pictures / "3_0.png").write_bytes((pictures / "3_0.png").read_bytes()[:50])
    PIL.Image.new("RGB", (90, 91)).save(pictures / "6_0.png")
    found = look(folder)
    assert {code: [p.number for p in found.findings.of(code)] for code in found.findings.codes} == {
        "missing": [1],
        "truncated": [4],
        "changed": [7],
    }
    (changed,) = found.findings.of("changed")
    assert "is 90 x 91 pixels, but was" in changed.message
    assert changed.where.startswith(f"{folder}: row 7 ({world.path}: record 7 (id r6)")
    assert found.bad == 3


def set_id(shard):
    shard["input_ids"][3] = 5_000


def set_place(shard):
    shard["image_start"][0] += 1_000


def set_count(shard):
    shard["image_tokens"][0] -= 1
    shard["lengths"][0] -= 1


def set_supervised(shard):
    first = int(shard["token_ends"][0])
    shard["supervised"][:first] = 0
    shard["supervised_tokens"][0] = 0


def set_table(shard):
    shard["supervised_tokens"][0] += 1


@pytest.mark.parametrize(
    ("change", "code", "words"),
    [
        (set_id, "vocabulary", "such as 5000 (the vocabulary has"),
        (set_place, "row", "prepare it again"),
        (set_count, "places", "3 places, but its layout gives it 4"),
        (set_supervised, "no_supervised", "no token is supervised"),
        (set_table, "row", "but the folder's table says"),
    ],
)
def test_each_fault_of_a_row_is_filed_under_its_reason(prepared, change, code, words):
    folder = prepared()
    spoil(folder, change)
    found = look(folder)
    (problem,) = found.findings.in_order()
    assert (problem.code, problem.number) == (code, 1)
    assert words in problem.message
    assert found.bad == 1
    assert len(found.usable) == 22


def test_repeats_and_leaks_are_found_among_rows(world, prepared, tmp_path):
    records = json.loads(Path(world.path).read_text())
    whole = prepared()
    Path(world.path).write_text(json.dumps([records[2], records[5], records[5]]))
    few = prepared(name="few")
    found = look(whole, [Source(path=str(few))])
    assert [p.number for p in found.findings.of("leak")] == [3, 6]
    assert [p.number for p in found.findings.of("duplicate")] == [3]
    assert not found.ok


def test_files_of_cerebras_own_need_a_model_for_their_pictures(world, make_encoder, make_spec, prepared):
    folder = prepared("cerebras")
    (folder / "data_params.json").unlink()
    for file in folder.glob("*.rows"):
        file.unlink()
    with pytest.raises(DataError, match=r"which token stands for a picture.*--model"):
        look(folder)
    found = look(folder, images=world.images, encoder=make_encoder(), spec=make_spec())
    assert found.ok, list(found.findings.in_order())
    assert found.lengths.tolist() == PreparedStore(folder, make_encoder()).lengths.tolist()
    other = make_encoder("square")
    other.layout = other.layout.model_copy(update={"grid_width": 4})
    with pytest.raises(DataError, match="prepared for something else"):
        look(folder, encoder=other)


def test_ids_are_held_against_the_vocabulary_of_a_model(world, make_encoder, prepared):
    folder = prepared("cerebras")
    (folder / "data_params.json").unlink()
    file = min(folder.glob("*.h5"))
    with h5py.File(file, "r+") as shard:
        data = shard["data"][2]
        text = np.flatnonzero((data[4] == 0) & (data[3] == 0))
        data[0, text[1]] = data[2, text[1] - 1] = 9_999
        shard["data"][2] = data
    found = look(folder, images=world.images, encoder=make_encoder())
    assert [(p.code, p.number) for p in found.findings.in_order()] == [("vocabulary", 3)]


def test_the_command_opens_prepared_folders(prepared, tmp_path):
    folder = prepared()
    result = CliRunner().invoke(app, ["check", str(folder), "--workers", "0"])
    assert result.exit_code == 0, result.output
    assert "all 23 records can be used" in result.stdout
    assert "prepared (ours)" in result.stdout
    refused = CliRunner().invoke(app, ["check", str(folder), "--fix", str(tmp_path / "clean")])
    assert isinstance(refused.exception, LapilliError)
    assert "prepared data; mend the conversations" in str(refused.exception)
    shutil.copy(min(folder.glob("*.h5")), tmp_path / "one.h5")
    alone = CliRunner().invoke(app, ["check", str(tmp_path / "one.h5")])
    assert isinstance(alone.exception, DataError)
