"""A folder as other software sees it: loaded in a process of its own with nothing but transformers.

Used by tests that hold lapilli's answers against those of transformers' own classes.
"""

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

_SCRIPT = """
import json, sys
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

folders, picture, text, new_tokens, out = json.loads(sys.argv[1])
answers = {}
for folder in folders:
    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).eval()
    processor = AutoProcessor.from_pretrained(folder, backend="pil")
    inputs = processor(images=Image.open(picture), text=text, return_tensors="pt")
    with torch.no_grad():
        logits = model(**inputs).logits[0]
        rows = model.generate(**inputs, max_new_tokens=new_tokens, do_sample=False)
    ids = inputs["input_ids"][0]
    answers[folder] = {"ids": ids, "logits": logits, "tokens": rows[0, len(ids):], "pixels": inputs["pixel_values"]}
assert not any(name.split(".")[0] == "lapilli" for name in sys.modules)
torch.save(answers, out)
"""


@dataclass(frozen=True)
class Alone:
    """What transformers alone makes of one picture and one text."""

    ids: list[int]
    logits: torch.Tensor
    """(T, V)"""
    tokens: list[int]
    """Greedy tokens, the end token included where there is one."""
    pixels: torch.Tensor


def transformers_alone(
    folders: Sequence[Path | str], picture: Path | str, text: str, new_tokens: int = 8, *, out: Path
) -> dict[str, Alone]:
    """Run every folder on a picture file and a text with `<image>`, in one process that never imports lapilli.

    `out` is a file to pass tensors through. Fails the test with the process's error output if it fails.
    """
    arguments = json.dumps([[str(f) for f in folders], str(picture), text, new_tokens, str(out)])
    # Not even on the path: an installed lapilli would only be imported by name, and the script checks that too.
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    done = subprocess.run(
        [sys.executable, "-c", _SCRIPT, arguments], capture_output=True, text=True, check=False, env=environment
    )
    assert done.returncode == 0, done.stderr[-3000:]
    answers = torch.load(out, weights_only=True)
    return {
        folder: Alone(a["ids"].tolist(), a["logits"], a["tokens"].tolist(), a["pixels"])
        for folder, a in answers.items()
    }
