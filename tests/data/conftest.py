"""A small world: pictures on disk, conversations about them, and an encoder for both."""

import json

import numpy as np
import PIL.Image
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from lapilli.base.layout import ImageLayout
from lapilli.data.encode import Encoder
from lapilli.data.image import ImageSpec
from lapilli.data.template import get_template
from lapilli.recipe.schema import Source

ANYRES = ((16, 32), (32, 16), (32, 32))


@pytest.fixture
def make_encoder():
    """A factory: keyword arguments of Encoder, and `mode`."""
    letters = [chr(i) for i in range(32, 127)]
    vocabulary = {token: i for i, token in enumerate(["<unk>", "<image>", "\n", *letters])}
    core = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, unk_token="<unk>", eos_token="~")

    def make(mode="pad", **options):
        layout = ImageLayout(
            mode=mode,
            tile_height=16,
            tile_width=16,
            grid_height=2,
            grid_width=2,
            pinpoints=ANYRES if mode == "anyres" else (),
        )
        return Encoder(tokenizer, get_template("v1"), layout, "<image>", **options)

    return make


@pytest.fixture
def make_spec():
    return lambda mode="pad": ImageSpec(mode=mode, shortest_edge=16, crop=(16, 16), mean=(0.5,) * 3, std=(0.5,) * 3)


@pytest.fixture
def world(tmp_path):
    """A Source of 23 records: one, two or no pictures, short and long answers, a different shape per picture."""
    return write_world(tmp_path, 23)


def write_world(folder, n, name="chat.json"):
    rng = np.random.default_rng(0)
    images = folder / "images"
    images.mkdir(exist_ok=True)
    records = []
    for i in range(n):
        paths = []
        for k in range((1, 0, 2)[i % 3]):
            width, height = rng.integers(4, 60, 2)
            picture = PIL.Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8))
            paths.append(f"{i}_{k}.png")
            picture.save(images / paths[-1])
        question = "<image>" * len(paths) + f"What is {i}?"
        turns = [{"from": "human", "value": question}, {"from": "gpt", "value": "It is " + "so " * (i % 7) + str(i)}]
        records.append({"id": f"r{i}", "conversations": turns} | ({"image": paths} if paths else {}))
    (folder / name).write_text(json.dumps(records))
    return Source(path=str(folder / name), images=str(images))
