"""Whether a language model's answers can grow in slots: found by trying it, once, on a small random copy."""

from __future__ import annotations

from typing import Any

import torch
from transformers import AutoModelForCausalLM

from lapilli.base.errors import ModelError
from lapilli.generate import slots
from lapilli.generate.slots import Prefix, SlotCache, Step
from lapilli.model.config import LapilliConfig
from lapilli.model.language import native_attention, use_attention
from lapilli.model.quiet import quiet
from lapilli.model.shrink import SHRINK_ERRORS, shrunken

_TOLERANCE = 1e-4
_COMMON = 7
_OWN = (3, 6)
_STEPS = 3


def why_not_slots(config: LapilliConfig) -> str:
    """Return why answers can't grow in slots with this language model; empty if they can.

    Logits of texts behind a common beginning, and of texts by themselves, are compared with those of whole texts run
    alone.
    """
    slots.register()
    with quiet(), torch.random.fork_rng(devices=[]), torch.no_grad():
        try:
            model: Any = shrunken(config.text_config, AutoModelForCausalLM.from_config).eval()
            width = model.get_input_embeddings().weight.shape[1]
            common = torch.randn(_COMMON, width)
            texts = [torch.cat([common, torch.randn(own + _STEPS, width)]) for own in _OWN]
            use_attention(model, native_attention(model))
            expected = [model(inputs_embeds=text[None], use_cache=False).logits[0] for text in texts]
            found = [_in_slots(model, texts, shared) for shared in (_COMMON, 0)]
        except (*SHRINK_ERRORS, ModelError) as error:
            return (str(error).splitlines() or [type(error).__name__])[0]
    wanted = [whole[_COMMON + own - 1 :] for whole, own in zip(expected, _OWN, strict=True)]
    spread = torch.cat(wanted).std().clamp_min(1e-12)
    difference = max(
        float((a - b).abs().max() / spread) for logits in found for a, b in zip(logits, wanted, strict=True)
    )
    return "" if difference < _TOLERANCE else f"slots change its logits by {difference:.1e}"


def _in_slots(model: Any, texts: list[torch.Tensor], shared: int) -> list[torch.Tensor]:
    """Logits (steps + 1, V) at the end of each text (T, D), the last tokens of all texts taken one at a time."""
    cache = SlotCache()
    prefix = Prefix(shared) if shared else None
    if prefix is not None:
        _run(model, texts[0][:shared], torch.arange(shared), Step(cache, making=prefix))
    starts = [len(text) - _STEPS for text in texts]
    rows = [cache.add(prefix) for _ in texts]
    counts = [start - shared for start in starts]
    embeds = torch.cat([text[shared:start] for text, start in zip(texts, starts, strict=True)])
    positions = torch.cat([torch.arange(shared, start) for start in starts])
    logits = _run(model, embeds, positions, Step(cache, None, rows, counts, prefix))
    made = [logits[torch.tensor(counts).cumsum(0) - 1]]
    cache.lengths = list(counts)
    for step in range(_STEPS):
        embeds = torch.stack([text[start + step] for text, start in zip(texts, starts, strict=True)])
        positions = torch.tensor([cache.position(row) for row in rows])
        made.append(_run(model, embeds, positions, Step(cache, rows=rows)))
        cache.lengths = [length + 1 for length in cache.lengths]
    return list(torch.stack(made, dim=1))


def _run(model: Any, embeds: torch.Tensor, positions: torch.Tensor, step: Step) -> torch.Tensor:
    use_attention(model, slots.SLOTS)
    return model(inputs_embeds=embeds[None], position_ids=positions[None], use_cache=False, slots=step).logits[0]
