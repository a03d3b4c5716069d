"""Padded batches through transformers' own `generate`: for beams, and for models that slots can't serve.

Most language models give a prompt that is padded on the left the answer it has alone; some position schemes and
states don't. Which kind an architecture is, is found by trying it, once, on a small random copy.
"""

from collections.abc import Sequence
from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedConfig,
    StoppingCriteria,
    StoppingCriteriaList,
)

from lapilli.generate.growing import Growing
from lapilli.generate.processor import Processor, Prompt, collate
from lapilli.model.quiet import quiet
from lapilli.model.shrink import SHRINK_ERRORS, shrunken

_TOLERANCE = 1e-4
_LENGTHS = (3, 9)
_STEPS = 3


def why_not_padded(config: PreTrainedConfig) -> str:
    """Return why left padding would change this language model's answers; empty if it does not."""
    with quiet(), torch.random.fork_rng(devices=[]), torch.no_grad():
        try:
            model: Any = shrunken(config, AutoModelForCausalLM.from_config).eval()
            width = model.get_input_embeddings().weight.shape[1]
            prompts = [torch.randn(length, width) for length in _LENGTHS]
            alone = [_logits(model, [prompt])[0] for prompt in prompts]
            together = _logits(model, prompts)
        except SHRINK_ERRORS as error:
            return f"a padded batch fails ({(str(error).splitlines() or [type(error).__name__])[0]})"
    spread = torch.stack(alone).std().clamp_min(1e-12)
    difference = max(float((a - b).abs().max() / spread) for a, b in zip(alone, together, strict=True))
    return "" if difference < _TOLERANCE else f"padding changes its logits by {difference:.1e}"


def _logits(model: Any, prompts: list[torch.Tensor]) -> list[torch.Tensor]:
    """Logits (steps, V) of each prompt (T, D) over a few greedy steps, all prompts in one left-padded batch."""
    longest = max(len(p) for p in prompts)
    embeds = torch.zeros(len(prompts), longest, prompts[0].shape[1])
    mask = torch.zeros(len(prompts), longest, dtype=torch.long)
    for row, prompt in enumerate(prompts):
        embeds[row, longest - len(prompt) :] = prompt
        mask[row, longest - len(prompt) :] = 1
    config = GenerationConfig(
        max_new_tokens=_STEPS,
        min_new_tokens=_STEPS,
        do_sample=False,
        pad_token_id=0,
        output_logits=True,
        return_dict_in_generate=True,
    )
    out = model.generate(inputs_embeds=embeds, attention_mask=mask, generation_config=config)
    return list(torch.stack(out.logits, dim=1))


def answer_padded(
    model: Any,
    processor: Processor,
    prompts: Sequence[Prompt],
    rows: Sequence[Growing],
    end_ids: set[int],
    never: Sequence[int],
) -> None:
    """Grow the answers of one batch to their ends. Rows that search with beams share their number of beams.

    `end_ids` end an answer, tokens in `never` are in none.
    """
    beams = rows[0].decoding.num_beams
    config = GenerationConfig(
        max_new_tokens=max(row.room for row in rows),
        do_sample=False,
        num_beams=beams,
        temperature=1.0,
        top_p=1.0,
        top_k=50,
        pad_token_id=processor.pad_token_id,
        eos_token_id=sorted(end_ids) or None,
        suppress_tokens=list(never),
    )
    inputs = collate(prompts, processor, next(model.parameters()).device)
    if beams > 1:
        found = model.generate(**inputs, generation_config=config)
        for row, ids in zip(rows, found.tolist(), strict=True):
            for token_id in ids:
                row.push(token_id)
    else:
        model.generate(
            **inputs,
            generation_config=config,
            logits_processor=LogitsProcessorList([Sampler(rows)]),
            stopping_criteria=StoppingCriteriaList([_Watch(rows)]),
        )
    for row in rows:
        row.end("cancelled")  # does nothing to rows that have ended


class Sampler(LogitsProcessor):
    """Chooses the token of each row that has a temperature; greedy rows are left to argmax."""

    def __init__(self, rows: Sequence[Growing]) -> None:
        self._rows = rows

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        """Scores (B, V) in, and out with all but the chosen token of each sampled row at -inf."""
        made = scores.clone()
        for number, row in enumerate(self._rows):
            token = None if row.ended else row.choose(scores[number])
            if token is not None:
                made[number] = float("-inf")
                made[number, token] = 0.0
        return made


class _Watch(StoppingCriteria):
    """Hands each row its newest token and says which rows have ended."""

    def __init__(self, rows: Sequence[Growing]) -> None:
        self._rows = rows

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:  # type: ignore[override]
        """input_ids (B, new tokens so far) -> ended (B,)."""
        for row, token_id in zip(self._rows, input_ids[:, -1].tolist(), strict=True):
            row.push(token_id)
        return torch.tensor([row.ended for row in self._rows], device=input_ids.device)
