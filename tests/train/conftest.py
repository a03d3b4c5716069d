"""A model small enough to train in a test and Examples for it; and the reference runs' parts as a model folder."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from tests.support.runs import make_workshop
from transformers import CLIPVisionConfig, CLIPVisionModel, LlamaConfig, LlamaForCausalLM

from lapilli.assemble.build import BuildOptions, build
from lapilli.base.layout import ImageLayout
from lapilli.data.image import ImageSpec
from lapilli.data.pack import pack
from lapilli.data.sample import IGNORE, Example, Image, ImageSlot
from lapilli.model.config import LapilliConfig
from lapilli.model.vlm import VisionLanguageModel

IMAGE_TOKEN = 1
VOCABULARY = 97
LAYOUT = ImageLayout(tile_height=8, tile_width=8, grid_height=2, grid_width=2)


@pytest.fixture
def tiny_model():
    """Build a VisionLanguageModel of a few thousand parameters; the same one for the same seed."""

    def make(seed: int = 0) -> VisionLanguageModel:
        torch.manual_seed(seed)
        vision = CLIPVisionConfig(
            hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, image_size=8, patch_size=4
        )
        text = LlamaConfig(
            vocab_size=VOCABULARY, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, tie_word_embeddings=False,
        )  # fmt: skip
        config = LapilliConfig(
            vision_config=vision, text_config=text, layout=LAYOUT.model_dump(), image_token_id=IMAGE_TOKEN
        )
        return VisionLanguageModel(config, CLIPVisionModel(vision), LlamaForCausalLM(text)).float()

    return make


@pytest.fixture
def tiny_step():
    """Draw a step's Examples, a third of them text only, with their pictures."""

    def make(n: int, seed: int = 0) -> tuple[list[Example], list[list[torch.Tensor]]]:
        rng = np.random.default_rng(seed)
        examples, tiles = [], []
        for i in range(n):
            images = int(rng.integers(0, 3))
            length = int(rng.integers(4, 20))
            text = rng.integers(2, VOCABULARY, length)
            ids = np.concatenate([np.full(4 * images, IMAGE_TOKEN), text]).astype(np.int64)
            labels = np.where(np.arange(len(ids)) >= len(ids) - length // 2, ids, IGNORE)
            slots = tuple(ImageSlot(Image(path=f"{i}-{k}"), 4 * k, 4, 8, 8) for k in range(images))
            examples.append(Example(f"s{i}", ids, labels, slots))
            tiles.append([torch.from_numpy(rng.integers(0, 256, (1, 3, 8, 8)).astype(np.uint8)) for _ in range(images)])
        return examples, tiles

    return make


@pytest.fixture
def split():
    """Pack a step's Examples into `parts` micro-batches."""

    def make(examples, tiles, parts):
        size = -(-len(examples) // parts)
        cuts = [range(i, min(i + size, len(examples))) for i in range(0, len(examples), size)]
        return [pack([examples[i] for i in cut], [t for i in cut for t in tiles[i]]) for cut in cuts]

    return make


@pytest.fixture
def image_spec():
    return ImageSpec(size=(8, 8), mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))


REFERENCE = Path(__file__).parents[1] / "reference"


@pytest.fixture(scope="session")
def base(tmp_path_factory) -> Path:
    """The model that the reference runs start from. Its vocabulary is theirs, without a row for the image token."""
    folder = tmp_path_factory.mktemp("parts") / "base"
    options = BuildOptions(
        str(REFERENCE / "checkpoints/vision-tower"),
        str(REFERENCE / "checkpoints/llama-base"),
        keep_vocabulary=True,
        projector_weights=str(REFERENCE / "training/projector-init.bin"),
        dtype="float32",
    )
    build(options, folder)
    return folder


@pytest.fixture
def recipe_file(base, tmp_path, monkeypatch):
    """Write a recipe of a few quick steps over some of the reference conversations, and return its path."""
    monkeypatch.chdir(tmp_path)
    records = json.loads((REFERENCE / "training/instruct.json").read_text())
    (tmp_path / "chat.json").write_text(json.dumps(records[40:56]))  # pictures and text-only
    (tmp_path / "held-out.json").write_text(json.dumps(records[:4]))

    def write(more: str = "", name: str = "recipe.yaml") -> str:
        text = f"""\
model: {base}
out: run
data: {{train: chat.json, images: {REFERENCE / "training/images"}, workers: 0}}
train: {{global_batch_size: 4, tokens_per_micro_batch: 700, learning_rate: 1e-3, warmup_ratio: 0}}
run: {{precision: fp32, device: cpu, deterministic: true, threads: 1}}
{more}"""
        (tmp_path / name).write_text(text)
        return str(tmp_path / name)

    return write


@pytest.fixture(scope="module")
def workshop(base, tmp_path_factory):
    """A folder with conversations, text and pictures by turns, and a recipe; tests run in it."""
    folder = make_workshop(tmp_path_factory.mktemp("workshop"), base)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        yield folder
