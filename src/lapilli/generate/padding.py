"""Whether prompts of different lengths may share a batch.

Most language models give a prompt that is padded on the left the answer it has alone; some position schemes and
states don't. Which kind an architecture is, is found by trying it, once, on a small random copy.
"""

from typing import Any

import torch
from transformers import AutoModelForCausalLM, GenerationConfig, PreTrainedConfig

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
