"""A model small enough to train in a test, and Examples for it."""

import numpy as np
import pytest
import torch
from transformers import CLIPVisionConfig, CLIPVisionModel, LlamaConfig, LlamaForCausalLM

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
