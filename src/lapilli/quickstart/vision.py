# pyright: reportArgumentType=false, reportCallIssue=false, reportReturnType=false, reportIndexIssue=false
"""Part one, made openly: a small CLIP, trained with the contrastive loss on (picture, caption) pairs.

Only its vision half is kept, as an ordinary Hugging Face folder; what it was trained with is the same loss, the same
architecture classes and the same two ingredients as OpenAI's, at a size that two CPU cores train in about a minute.
"""

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from transformers import CLIPConfig, CLIPImageProcessorPil, CLIPModel, PreTrainedTokenizerBase

from lapilli.quickstart.scans import CELL_PIXELS, Scans
from lapilli.quickstart.scenes import COLOUR_NAMES, PICTURE_PIXELS, Scene, draw, random_scene

MEAN, STD = (0.25, 0.25, 0.25), (0.25, 0.25, 0.25)
"""Per channel, of pixels in 0..1: the pictures are mostly dark, so ImageNet's numbers would waste range."""
CAPTION_TOKENS = 10
FEW_COLOURS = 2
"""In every other batch; there the captions differ mostly in their digits, which is the part that is hard to see."""


def clip_config(tokenizer: PreTrainedTokenizerBase) -> CLIPConfig:
    return CLIPConfig(
        text_config={
            "vocab_size": len(tokenizer),
            "hidden_size": 64,
            "intermediate_size": 256,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "max_position_embeddings": CAPTION_TOKENS,
            "bos_token_id": tokenizer.bos_token_id,
            "eos_token_id": tokenizer.eos_token_id,
            "pad_token_id": tokenizer.pad_token_id,
        },
        vision_config={
            "hidden_size": 128,
            "intermediate_size": 512,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "image_size": PICTURE_PIXELS,
            "patch_size": CELL_PIXELS,
        },
        projection_dim=128,
    )


def caption_ids(captions: list[str], tokenizer: PreTrainedTokenizerBase) -> torch.Tensor:
    """Captions as (B, CAPTION_TOKENS) ids, each ended by the end token, whose state CLIP reads as the caption's."""
    rows = torch.full((len(captions), CAPTION_TOKENS), tokenizer.pad_token_id, dtype=torch.long)
    for row, caption in zip(rows, captions, strict=True):
        ids = [*tokenizer(caption)["input_ids"], tokenizer.eos_token_id]
        row[: len(ids)] = torch.tensor(ids)
    return rows


def distinct_scenes(rng: np.random.Generator, count: int, colours: Sequence[str]) -> list[Scene]:
    """Draw `count` scenes of which no two have the same caption: equal captions would be each other's wrong answer."""
    scenes: dict[str, Scene] = {}
    while len(scenes) < count:
        scene = random_scene(rng, colours=colours)
        scenes.setdefault(scene.caption, scene)
    return list(scenes.values())


def train_vision(
    scans: Scans,
    tokenizer: PreTrainedTokenizerBase,
    out: Path,
    *,
    seed: int,
    steps: int,
    batch_size: int,
    say: Callable[[str], None],
) -> None:
    """Train a CLIP of this size for `steps` batches of fresh pictures and save its vision half to `out`.

    `out` gets `config.json`, `model.safetensors` and `preprocessor_config.json`.
    """
    torch.manual_seed(seed)
    rng = np.random.default_rng(seed)
    model = CLIPModel(clip_config(tokenizer))
    # As strong as a patch from the start; at the usual 0.02 a minute is too short to learn left from right.
    torch.nn.init.normal_(model.vision_model.embeddings.position_embedding.weight, std=0.5)
    peak, warmup = 1e-3, max(1, steps // 20)
    optimizer = torch.optim.AdamW(model.parameters(), lr=peak, weight_decay=0.05, betas=(0.9, 0.98))
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda k: min((k + 1) / warmup, 0.5 * (1 + float(np.cos(np.pi * k / steps)))),
    )
    mean, std = torch.tensor(MEAN).view(3, 1, 1), torch.tensor(STD).view(3, 1, 1)
    for step in range(1, steps + 1):
        few = rng.choice(COLOUR_NAMES, FEW_COLOURS, replace=False)
        scenes = distinct_scenes(rng, batch_size, COLOUR_NAMES if step % 2 else few)
        pixels = torch.from_numpy(draw(scenes, scans, rng)).permute(0, 3, 1, 2)
        output = model(
            input_ids=caption_ids([s.caption for s in scenes], tokenizer),
            pixel_values=(pixels.float() / 255 - mean) / std,
            return_loss=True,
        )
        output.loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if step % max(1, steps // 16) == 0 or step == steps:
            with torch.no_grad():
                right = (output.logits_per_image.argmax(-1) == torch.arange(batch_size)).float().mean()
            say(f"vision encoder  step {step}/{steps}  loss {output.loss:.3f}  own caption found {right:.0%}")
    model.vision_model.save_pretrained(out)
    CLIPImageProcessorPil(
        size={"shortest_edge": PICTURE_PIXELS},
        crop_size={"height": PICTURE_PIXELS, "width": PICTURE_PIXELS},
        image_mean=list(MEAN),
        image_std=list(STD),
    ).save_pretrained(out)
