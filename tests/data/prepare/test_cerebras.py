"""Cerebras' layout against files that their own preprocessing wrote (`tests/reference/cerebras`).

Their hooks change records before they are tokenised (pictures to the front, blanks cut off, ftfy); what a record is
after that is written down here as the input. Every row that differs is named with the reason.
"""

import json
import shutil
import unicodedata
from pathlib import Path

import h5py
import numpy as np
import pytest

from lapilli.base.errors import DataError
from lapilli.base.layout import ImageLayout
from lapilli.data.encode import Encoder
from lapilli.data.image import ImageSpec
from lapilli.data.prepare import cerebras
from lapilli.data.prepare.job import prepare
from lapilli.data.read.prepared import PreparedStore, is_prepared
from lapilli.data.sample import IGNORE
from lapilli.data.template import Template
from lapilli.data.tokenizer import load_tokenizer
from lapilli.recipe.schema import Source

REFERENCE = Path(__file__).parents[2] / "reference"
RUNS = REFERENCE / "cerebras"
ROWS = json.loads((RUNS / "rows.json").read_text())

_VICUNA = Template(
    name="vicuna",
    system="A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, "
    "detailed, and polite answers to the user's questions.",
    system_suffix=" ",
    user_prefix="USER: ",
    user_suffix=" ",
    answer_prefix="ASSISTANT: ",
    answer_end="</s>",
)
TEMPLATES = {
    "phase1_prompt_completion": Template(name="phase1", user_text="drop", answer_end="</s>"),
    "phase2_vicuna_template": _VICUNA,
    "sda_chat": _VICUNA,
}
OTHERWISE = {
    "phase2_vicuna_template": {
        "p2-image-column-but-no-token": "a picture that no text asks for is refused here and left out in silence there",
        "p2-user-last": "theirs trains the first word after the answer's end",
    },
    "sda_chat": {
        "image-in-assistant-default-weight": "theirs trains the pictures of an answer",
        "weights-on-user": "theirs takes a weight of 0 for none given",
        "weights-integer-and-fraction": "theirs cuts 1.75 to 1",
        "attention-mask-text": "text hidden from attention is refused here",
        "attention-mask-image": "a picture hidden from attention is refused here",
        "named-region-attention": "theirs hides the region by its configuration",
        "named-region-dropped": "theirs drops the region by its configuration",
        "named-region-weight": "theirs weighs the region by its configuration",
    },
}

REPAIRED = {"LÃ©tÃ© — “café” ﬁn 紅い 🦊 é.": 'Lété — "café" fin 紅い 🦊 é.'}
"""What ftfy, which theirs runs over every text, makes of the one that it has to mend."""


@pytest.fixture(scope="module")
def tokenizer():
    tokenizer = load_tokenizer(REFERENCE / "checkpoints/llama-base")
    tokenizer.add_tokens(["<special_image_token>"], special_tokens=True)
    return tokenizer


@pytest.fixture
def make(tokenizer):
    layout = ImageLayout(tile_height=56, tile_width=56, grid_height=4, grid_width=4)
    return lambda run, **options: Encoder(tokenizer, TEMPLATES[run], layout, "<special_image_token>", **options)


def hooked(run, folder):
    """The records of a run as their hook hands them on."""
    file = folder / "records.jsonl"
    if run == "sda_chat":
        shutil.copy(RUNS / run / "records.jsonl", file)
        return file
    lines = []
    for line in (RUNS / run / "records.jsonl").read_text().splitlines():
        record = json.loads(line)
        for turn in record["conversations"]:
            turn["value"] = unicodedata.normalize("NFC", turn["value"])
            turn["value"] = REPAIRED.get(turn["value"], turn["value"])
            if turn["from"] == "system":
                turn["value"] = turn["value"].strip()
            if "<image>" in turn["value"]:
                turn["value"] = "<image>" + turn["value"].replace("<image>", "").strip()
        lines.append(json.dumps(record))
    file.write_text("\n".join(lines))
    return file


def read(folder):
    (file,) = folder.glob("*.h5")
    with h5py.File(file) as opened:
        arrays = {name: opened[name][()] for name in opened}
        about = {name: (d.dtype, d.shape[1:], d.chunks, d.compression) for name, d in opened.items()}
        return arrays, about, {k: int(v) for k, v in opened.attrs.items()}


@pytest.mark.parametrize("run", TEMPLATES)
def test_equal_arrays_from_equal_records(make, tmp_path, run):
    source = Source(path=str(hooked(run, tmp_path)), images=str(RUNS / "images"))
    encoder = make(run, max_length=256, too_long="drop")
    spec, images = ImageSpec(size=(56, 56)), 3 if run == "sda_chat" else 1
    prepare([source], encoder, spec, tmp_path / "out", layout="cerebras", max_images=images)
    found, found_about, attributes = read(tmp_path / "out")
    wanted, wanted_about, wanted_attributes = read(RUNS / run)
    assert found_about == wanted_about
    assert attributes.keys() == wanted_attributes.keys()
    assert attributes["n_examples"] == len(found["data"])
    ours = [example.id for example in PreparedStore(tmp_path / "out", encoder)]
    different = {name: name not in ours for name in OTHERWISE.get(run, {}) if name in ROWS[run]}
    for theirs, name in enumerate(ROWS[run]):
        if name in different:
            continue
        row = ours.index(name)
        for array, values in wanted.items():
            np.testing.assert_array_equal(found[array][row], values[theirs], err_msg=f"{name}: {array}")
    for name, refused in different.items():  # the list above holds nothing that has become equal
        if not refused:
            row, theirs = ours.index(name), ROWS[run].index(name)
            assert any((found[a][row] != wanted[a][theirs]).any() for a in wanted), name


@pytest.mark.parametrize("run", TEMPLATES)
def test_their_files_read_as_examples(make, tmp_path, run):
    source = Source(path=str(hooked(run, tmp_path)), images=str(RUNS / "images"))
    encoder = make(run, max_length=257, too_long="drop")
    prepare([source], encoder, ImageSpec(size=(56, 56)), tmp_path / "out", max_images=3)
    ours = {example.id: example for example in PreparedStore(tmp_path / "out", encoder)}
    shutil.copytree(RUNS / run, tmp_path / "theirs", ignore=shutil.ignore_patterns("*.jsonl"))
    assert is_prepared(tmp_path / "theirs")
    store = PreparedStore(tmp_path / "theirs", encoder)
    assert len(store) == len(ROWS[run])
    assert store.facts is None
    read = 0
    for i, name in enumerate(ROWS[run]):
        if name in OTHERWISE.get(run, {}):
            continue
        found, wanted = store[i], ours[name]
        np.testing.assert_array_equal(found.input_ids, wanted.input_ids)
        np.testing.assert_array_equal(found.labels, wanted.labels)
        assert found.weights is None
        assert [(s.image.path, s.start, s.tokens) for s in found.images] == [
            (s.image.path, s.start, s.tokens) for s in wanted.images
        ]
        assert (store.lengths[i], store.supervised[i]) == (found.length, found.supervised)
        assert store.pictures[i] == len(found.images)
        read += 1
    assert read >= 8


def test_hidden_text_is_refused(make):
    store = PreparedStore(RUNS / "sda_chat", make("sda_chat"))
    with pytest.raises(DataError, match="row 12: key_padding_mask hides part of the text"):
        store[ROWS["sda_chat"].index("attention-mask-text")]


def test_whole_weights_are_read(make):
    store = PreparedStore(RUNS / "sda_chat", make("sda_chat"))
    example = store[ROWS["sda_chat"].index("weights-integer-and-fraction")]
    assert set(example.weights.tolist()) == {0.0, 1.0, 2.0}
    assert ((example.weights > 0) == (example.labels != IGNORE)).all()


def test_what_their_files_say_must_fit(make, tokenizer):
    layout = ImageLayout(tile_height=56, tile_width=56, grid_height=2, grid_width=4)
    other = Encoder(tokenizer, _VICUNA, layout, "<special_image_token>", max_length=100)
    with pytest.raises(DataError, match=r"16 places in the prepared data, 8 here; rows are up to 1.. tokens long"):
        PreparedStore(RUNS / "sda_chat", other)


@pytest.mark.parametrize(
    ("options", "message"),
    [({"max_length": None}, "give --max-length"), ({"embed_images": True}, "holds picture paths only")],
)
def test_what_the_layout_has_no_place_for(make, tmp_path, options, message):
    encoder = make("sda_chat", max_length=options.pop("max_length", 256))
    source = Source(path=str(RUNS / "sda_chat/records.jsonl"), images=str(RUNS / "images"))
    with pytest.raises(DataError, match=message):
        prepare([source], encoder, ImageSpec(size=(56, 56)), tmp_path / "out", layout="cerebras", **options)
    assert not (tmp_path / "out").exists()


def test_a_row_it_cannot_hold_is_named(make, tmp_path):
    source = Source(path=str(RUNS / "sda_chat/records.jsonl"), images=str(RUNS / "images"))
    encoder = make("sda_chat", max_length=256)
    prepare([source], encoder, ImageSpec(size=(56, 56)), tmp_path / "out", layout="cerebras", max_images=2)
    lines = (tmp_path / "out/quarantine.jsonl").read_text().splitlines()
    reasons = {entry["id"]: entry["reason"] for entry in map(json.loads, lines)}
    assert reasons["three-images"].startswith("3 pictures, but every row of the cerebras layout has 2")
    assert "whole loss weights only" in reasons["weights-integer-and-fraction"]
    assert not list((tmp_path / "out").glob(f"*{cerebras.ROWS}.h5"))


@pytest.mark.parametrize("layout", ["ours", "cerebras"])
def test_damaged_bytes_end_in_a_message(make, tmp_path, layout):
    """Bytes changed anywhere in a shard: rows read, or a DataError; never another exception."""
    source = Source(path=str(RUNS / "sda_chat/records.jsonl"), images=str(RUNS / "images"))
    encoder = make("sda_chat", max_length=256)
    out = tmp_path / "out"
    prepare([source], encoder, ImageSpec(size=(56, 56)), out, layout=layout, max_images=3)
    (shard,) = out.glob("*.h5")
    whole, rng = shard.read_bytes(), np.random.default_rng(0)
    refused = 0
    for _ in range(150):
        damaged = bytearray(whole)
        at = int(rng.integers(0, min(len(whole), 12_000)))
        damaged[at : at + 4] = rng.bytes(4)[: len(damaged) - at]
        shard.write_bytes(damaged)
        try:
            list(PreparedStore(out, encoder))
        except DataError as error:
            assert shard.name in str(error) or "output_chunk" in str(error)  # noqa: PT017
            refused += 1
    assert refused > 20
