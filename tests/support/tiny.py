"""Tiny models for tests of generation: random ones from the reference parts, and one that says what it is told to."""

import shutil
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import numpy as np
import PIL.Image
import torch
import transformers as hf
from tests.support.parts import make_tokenizer, make_vision

from lapilli.assemble.build import BuildOptions, build

PARTS = Path(__file__).parents[1] / "reference" / "checkpoints"


def build_tiny(folder: Path, **options) -> Path:
    """LLaVA's shape in small: the reference CLIP encoder and Llama with its SentencePiece tokenizer."""
    chosen = {"vision_encoder": str(PARTS / "vision-tower"), "language_model": str(PARTS / "llama-base")}
    build(BuildOptions(**(chosen | options)), folder)
    return folder


def build_parrot(
    folder: Path, says: str, *, endless: bool = False, positions: int = 512, marks: Sequence[str] = (), **options
) -> Path:
    """A model whose answer is known: after a prompt that ends in a colon it says `says`, then its end token.

    `endless`: it says it again and again, and ends never. `marks` are pieces of `says` that get tokens of their own.
    Each token determines the next (so no token may occur twice): layers add nothing, and the output row of a token is
    the embedding of the one before it. Raises AssertionError for a text with repeated tokens.
    """
    tokenizer = make_tokenizer()
    tokenizer.add_tokens(list(marks))
    spoken = tokenizer(says)["input_ids"]
    chain = [*tokenizer(":")["input_ids"], *spoken, tokenizer.eos_token_id]
    assert len(set(chain)) == len(chain), [tokenizer.decode([i]) for i in chain]
    config = hf.LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=256,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=4,
        max_position_embeddings=positions,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )
    torch.manual_seed(0)
    model = hf.AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        rows = torch.nn.functional.normalize(torch.randn(len(tokenizer), 256), dim=1)
        model.model.embed_tokens.weight.copy_(rows)
        model.lm_head.weight.zero_()
        for before, token in pairwise(chain):
            model.lm_head.weight[token] = rows[before]
        if endless:
            model.lm_head.weight[tokenizer.eos_token_id] = 0.0
            model.lm_head.weight[spoken[0]] += rows[spoken[-1]]
        model.model.layers[0].self_attn.o_proj.weight.zero_()
        model.model.layers[0].mlp.down_proj.weight.zero_()
    parts = folder.with_name(folder.name + "-parts")
    model.save_pretrained(parts / "language")
    tokenizer.save_pretrained(parts / "language")
    vision = make_vision("clip", parts / "vision")
    chosen = {"vision_encoder": str(vision), "language_model": str(parts / "language")}
    build(BuildOptions(**(chosen | options)), folder)
    shutil.rmtree(parts)
    return folder


def make_picture(path: Path, width: int = 93, height: int = 57, seed: int = 0) -> Path:
    """A picture of smooth random colours; the format follows the name."""
    coarse = np.random.default_rng(seed).integers(0, 256, (5, 7, 3), dtype=np.uint8)
    PIL.Image.fromarray(coarse).resize((width, height), PIL.Image.Resampling.BICUBIC).save(path)
    return path
