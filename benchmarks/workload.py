"""The benchmarks' model and data, made on the spot: random weights, random words, real JPEG files.

The numbers are those of LLaVA-1.5 in small: 576 tokens per picture, conversations as long as those of the 665K
instruction set, 8 % of them text only.
"""

import json
import random
from pathlib import Path

import numpy as np
import PIL.Image
import torch
import transformers as hf

WORDS = (  # noqa: SIM905  (a word list reads better as text)
    "a the of in on is are and two three red green blue cat dog table chart slide tissue street large small left right "
    "picture shows near people many few building kitchen bottle horse image number above below because however"
).split()


def make_language_model(folder: Path, tokenizer_model: Path, width: int = 512, layers: int = 8) -> None:
    """A Llama with a SentencePiece tokenizer; 512 wide and 8 layers deep it has 27 million parameters."""
    config = hf.LlamaConfig(
        hidden_size=width,
        intermediate_size=width * 43 // 16,
        num_hidden_layers=layers,
        num_attention_heads=8,
        num_key_value_heads=8,
        vocab_size=2000,
        max_position_embeddings=4096,
        tie_word_embeddings=False,
    )
    torch.manual_seed(0)
    hf.LlamaForCausalLM(config).save_pretrained(folder)
    # As the original's own checkpoints have it: it reads the SentencePiece file itself.
    (folder / "tokenizer.model").write_bytes(tokenizer_model.read_bytes())
    settings = {"tokenizer_class": "LlamaTokenizer", "legacy": True, "add_bos_token": True, "add_eos_token": False}
    settings |= {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<unk>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))


def make_vision_encoder(folder: Path, width: int = 256, layers: int = 6) -> None:
    """A CLIP vision encoder for 336-pixel pictures in 14-pixel patches."""
    config = hf.CLIPVisionConfig(
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=layers,
        num_attention_heads=4,
        image_size=336,
        patch_size=14,
    )
    torch.manual_seed(1)
    hf.CLIPVisionModel(config).save_pretrained(folder)
    settings = {
        "image_processor_type": "CLIPImageProcessor",
        "do_resize": True,
        "size": {"shortest_edge": 336},
        "resample": 3,
        "do_center_crop": True,
        "crop_size": {"height": 336, "width": 336},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "do_convert_rgb": True,
        "image_mean": [0.48145466, 0.4578275, 0.40821073],
        "image_std": [0.26862954, 0.26130258, 0.27577711],
    }
    (folder / "preprocessor_config.json").write_text(json.dumps(settings))


def make_pictures(folder: Path, count: int, seed: int = 0) -> list[str]:
    """JPEG files of 640x480 and 480x640 pixels, smooth enough to compress as photographs do."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    names = []
    for i in range(count):
        size = (640, 480) if i % 3 else (480, 640)
        small = PIL.Image.fromarray(rng.integers(0, 256, (24, 32, 3), dtype=np.uint8))
        names.append(f"{i:04d}.jpg")
        small.resize(size, PIL.Image.Resampling.BICUBIC).save(folder / names[-1], quality=90)
    return names


def make_conversations(path: Path, pictures: list[str], count: int, seed: int = 0) -> None:
    """Multi-turn conversations: with a picture about 170 words, without one (8 %) about 600."""
    rng = random.Random(seed)
    records = []
    for i in range(count):
        text_only = i % 12 == 5
        turns = rng.choice([2, 3, 4, 5]) if text_only else rng.choice([1, 1, 2, 3, 4, 6])
        conversations = []
        for turn in range(turns):
            question = _sentence(rng, rng.randint(6, 18)) + "?"
            if turn == 0 and not text_only:
                question = "<image>\n" + question
            words = rng.randint(60, 130) if text_only else rng.choice([2, 5, 15, 30, 60])
            conversations.append({"from": "human", "value": question})
            conversations.append({"from": "gpt", "value": _sentence(rng, words) + "."})
        record = {"id": f"{i:05d}", "conversations": conversations}
        if not text_only:
            record["image"] = pictures[i % len(pictures)]
        records.append(record)
    path.write_text(json.dumps(records))


def _sentence(rng: random.Random, words: int) -> str:
    return " ".join(rng.choice(WORDS) for _ in range(words))


def gemm_rate(size: int = 2048, repeats: int = 5) -> float:
    """This machine's fp32 matrix rate in GFLOP/s: the best of several products of two square matrices."""
    import time

    a, b = torch.randn(size, size), torch.randn(size, size)
    best = float("inf")
    for _ in range(repeats):
        began = time.perf_counter()
        a @ b
        best = min(best, time.perf_counter() - began)
    return 2 * size**3 / best / 1e9
