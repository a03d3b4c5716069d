"""The template that LLaVA's web server takes for a model, from the model's name alone.

Its protocol says nothing else about a model, so this guess is what its users are used to. Whoever knows better says so:
the operator, or a worker of ours.
"""

from __future__ import annotations


def guess_template(model: str) -> str:
    """A shipped template's name. Where the original's table has none for its own guess, the nearest that exists."""
    name = model.lower()
    if "llava" not in name:  # here the original looks at the name as it is written
        return "mpt_text-2023-06" if "mpt" in model else "llama_2" if "llama-2" in model else "vicuna_v1"
    if "llama-2" in name:
        return "llava_llama_2"
    if "mistral" in name or "mixtral" in name:
        return "chatml_direct" if "orca" in name or "hermes" in name else "mistral_instruct"
    if "llava-v1.6-34b" in name:
        return "chatml_direct"
    if "v1" not in name and "mpt" in name:
        return "mpt"
    tagged = "mmtag" in name or ("plain" in name and "finetune" not in name)
    if "v1" in name:
        return "v1_mmtag" if tagged else "llava_v1"
    return "v0_mmtag" if tagged else "llava_v0"
