"""`lapilli data show` as a user runs it: standard output, standard error and exit status."""

import gzip
import json
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
from transformers import LlamaTokenizer
from typer.testing import CliRunner

from lapilli.base.errors import LapilliError
from lapilli.base.layout import ImageLayout
from lapilli.cli.data import app
from lapilli.data.encode import Encoder
from lapilli.data.read.llava import RawRecord, parse
from lapilli.data.show import Glyph, as_text, draw
from lapilli.data.template import get_template
from lapilli.data.tokenizer import load_tokenizer

REFERENCE = Path(__file__).parents[1] / "reference"
TOKENIZER = str(REFERENCE / "tokenizer")


def run(*arguments):
    return CliRunner().invoke(app, ["show", *map(str, arguments)])


def write(path, values):
    path.write_text(json.dumps(values), encoding="utf-8")
    return path


def conversation(name, *texts, **more):
    roles = ("human", "gpt")
    return {"id": name, "conversations": [{"from": roles[i % 2], "value": t} for i, t in enumerate(texts)], **more}


@pytest.fixture
def data(tmp_path):
    PIL.Image.new("RGB", (64, 48)).save(tmp_path / "a.png")
    good = [
        conversation(7, "Q\n<image>", "A <b>cat</b>\nhere 무", image="a.png"),
        conversation("text", "\x1b[31mQ", "Yes"),
    ]
    bad = [
        conversation("lost", "<image>", "A", image="b.png"),
        conversation("many", "<image><image>", "A", image="a.png"),
    ]
    return write(tmp_path / "good.json", good), write(tmp_path / "mixed.json", [good[0], *bad, good[1]])


@pytest.mark.parametrize("legacy", [True, False])
@pytest.mark.parametrize(("template", "chatml"), [("v1", False), ("mpt", True), ("v0_mmtag", False)])
def test_json_has_the_originals_ids(tmp_path, template, chatml, legacy):
    """From a tokenizer that transformers saved, whichever treatment of spaces it was made with."""
    tokenizer = LlamaTokenizer.from_pretrained(TOKENIZER, add_bos_token=True, legacy=legacy)
    if chatml:
        tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    with gzip.open(REFERENCE / f"masks/{template}.jsonl.gz", "rt", encoding="utf-8") as file:
        rows = [row for row in map(json.loads, file) if row["legacy"] is legacy]
    for wrapped in (True, False):
        chosen = [row for row in rows if row["mm_use_im_start_end"] is wrapped]
        values = [
            {"id": i, "conversations": row["conversations"]} | ({"image": "x.jpg"} if row["has_image"] else {})
            for i, row in enumerate(chosen)
        ]
        options = ["--json", "--unexpanded", "--no-images", "--placement", "front", "--template", template]
        options += ["--im-start-end"] if wrapped else []
        result = run(write(tmp_path / "rows.json", values), "--model", tmp_path / "tokenizer", *options)
        assert result.exit_code == 0
        shown = [json.loads(line) for line in result.stdout.splitlines()]
        assert [s["id"] for s in shown] == list(range(len(chosen)))
        assert [s["input_ids"] for s in shown] == [row["input_ids"] for row in chosen]
        assert ("<im_start>, <im_end>" in result.stderr) is wrapped


def test_good_records_are_shown_and_bad_ones_listed(data, tmp_path):
    result = run(data[1], "--images", tmp_path, "--model", TOKENIZER, "--template", "v1", "--json")
    assert [json.loads(line)["id"] for line in result.stdout.splitlines()] == [7, "text"]
    assert result.exit_code == 1
    assert "record 2 (id lost): image" in result.stderr
    assert "record 3 (id many): `image` names 1 picture(s), but the text has 2 <image>" in result.stderr
    assert "2 of 4 records can't be used" in result.stderr


def test_terminal_marks_what_is_learnt(data, tmp_path):
    result = run(data[0], "--images", tmp_path, "--model", TOKENIZER, "--template", "v1")
    assert result.exit_code == 0
    assert "USER: Q\n▐ a.png 64x48 ▌ ASSISTANT:⟦ A <b>cat</b>⏎\nhere 무</s>⟧" in result.stdout
    assert "\x1b" not in result.stdout
    assert "␛[31mQ ASSISTANT:⟦ Yes</s>⟧" in result.stdout
    assert "add_bos_token=True, legacy=True" in result.stderr


def test_limit(data, tmp_path):
    result = run(data[1], "--no-images", "--model", TOKENIZER, "--template", "v1", "--json", "--limit", 1)
    assert (result.exit_code, len(result.stdout.splitlines())) == (0, 1)


def test_html_is_one_page_with_every_word(data, tmp_path):
    class Reader(HTMLParser):
        def __init__(self):
            super().__init__()
            self.text, self.outside, self.tags = "", [], []

        def handle_data(self, data):
            self.text += data

        def handle_starttag(self, tag, attrs):
            self.tags.append(tag)
            self.outside += [value for name, value in attrs if name in ("src", "href")]

    page = tmp_path / "page.html"
    result = run(data[0], "--images", tmp_path, "--model", TOKENIZER, "--template", "v1", "--html", page)
    assert (result.exit_code, result.stdout) == (0, "")
    reader = Reader()
    reader.feed(page.read_text(encoding="utf-8"))
    assert " A <b>cat</b>⏎\nhere 무</s>" in reader.text
    assert "a.png 64x48" in reader.text
    assert reader.outside == []
    assert "script" not in reader.tags


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--template", "vicuna_v2"], 'unknown template "vicuna_v2" (did you mean "vicuna_v1"?)'),
        ([], "has no lapilli.json that names a template"),
        (["--template", "v1", "--placement", "fornt"], 'unknown --placement "fornt" (did you mean "front"?)'),
        (["--template", "tokenizer"], "has no chat_template of its own"),
        (["--template", "v1", "--html", "/nowhere/page.html"], "--html /nowhere/page.html: can't write it"),
    ],
)
def test_refusals(data, options, message):
    result = run(data[0], "--model", TOKENIZER, "--no-images", *options)
    assert isinstance(result.exception, LapilliError)
    assert message in str(result.exception)


def test_pictures_are_expanded_as_in_training():
    tokenizer = load_tokenizer(TOKENIZER)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    layout = ImageLayout(tile_height=4, tile_width=4, grid_height=2, grid_width=3)
    encoder = Encoder(tokenizer, get_template("v1"), layout, "<image>")
    sample = parse(RawRecord("f", 1, conversation("x", "<image>Q<image>", "A 🔬", "Q", "B", image=["a", "b"])))
    drawing, example = draw(sample, encoder, [(640, 480), (1, 1)]), encoder.encode(sample)
    assert np.array_equal(drawing.input_ids, example.input_ids)
    assert np.array_equal(drawing.labels, example.labels)
    text = as_text(drawing, coloured=False).plain
    assert "USER: ▐ a 640x480 = 6 tokens ▌Q▐ b 1x1 = 6 tokens ▌ ASSISTANT:⟦ A 🔬</s>⟧USER: Q ASSISTANT:⟦ B</s>⟧" in text
    shown = [token for item in drawing.items if isinstance(item, Glyph) for token in item.ids]
    assert shown == [token for token in example.input_ids.tolist() if token != encoder.image_token_id]
