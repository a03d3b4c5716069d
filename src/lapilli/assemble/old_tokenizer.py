"""Tokenizer files that transformers 4.37 reads, for folders that the original LLaVA shall load.

Files that the source has are copied; those that only a newer version understands are put in the older words. A token
without a row (the image token, which the original never looks up) is left out, or the original would add a row.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from lapilli.assemble.kept import TOKENIZER_FILES
from lapilli.checkpoint.stream import copy_files
from lapilli.checkpoint.tensors import read_json

_WHOLE = ("tokenizer.json", "tokenizer.model", "vocab.json")


def write_old_tokenizer(
    tokenizer: PreTrainedTokenizerBase, beside: Iterable[Path], rows: int, folder: Path
) -> list[str]:
    """Write the tokenizer's files from the first of the folders `beside` that has them, or as it is in memory.

    Tokens with ids of `rows` and more are left out. Returns what the user should know.
    """
    source = next((p for p in beside if any((p / name).is_file() for name in _WHOLE)), None)
    if source is None:
        tokenizer.save_pretrained(folder)
        (folder / "chat_template.jinja").unlink(missing_ok=True)
    else:
        copy_files(TOKENIZER_FILES, source, folder)
    left_out = {text for text, number in tokenizer.get_vocab().items() if number >= rows}
    notes = [f"tokens without a row, left out of the tokenizer: {', '.join(sorted(left_out))}"] if left_out else []
    config = folder / "tokenizer_config.json"
    if config.is_file():
        _rewrite(config, _old_config(read_json(config), left_out))
    for name in ("added_tokens.json", "special_tokens_map.json"):
        if (folder / name).is_file():
            _rewrite(folder / name, _without(read_json(folder / name), left_out))
    if (folder / "tokenizer.json").is_file():
        _rewrite(folder / "tokenizer.json", _old_backend(read_json(folder / "tokenizer.json"), left_out))
    return notes


def _rewrite(file: Path, fields: dict[str, Any]) -> None:
    file.write_text(json.dumps(fields, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _old_config(fields: dict[str, Any], left_out: set[str]) -> dict[str, Any]:
    """tokenizer_config.json with the class and the keys that transformers 4 knows."""
    made = _without(fields, left_out)
    if made.get("tokenizer_class") == "TokenizersBackend":
        made["tokenizer_class"] = "PreTrainedTokenizerFast"
    for new in ("backend", "processor_class", "chat_template"):
        made.pop(new, None)
    extra = made.pop("extra_special_tokens", None)
    if isinstance(extra, list) and extra:
        made["additional_special_tokens"] = extra
    if "added_tokens_decoder" in made:
        decoder = made["added_tokens_decoder"]
        made["added_tokens_decoder"] = {k: v for k, v in decoder.items() if v.get("content") not in left_out}
    return made


def _without(fields: dict[str, Any], left_out: set[str]) -> dict[str, Any]:
    """The object without these tokens, as keys, as values and in lists."""
    made: dict[str, Any] = {}
    for key, value in fields.items():
        text = value.get("content") if isinstance(value, dict) else value
        if key in left_out or (isinstance(text, str) and text in left_out):
            continue
        if isinstance(value, list):
            made[key] = [v for v in value if (v.get("content") if isinstance(v, dict) else v) not in left_out]
        else:
            made[key] = value
    return made


def _old_backend(fields: dict[str, Any], left_out: set[str]) -> dict[str, Any]:
    """tokenizer.json with merges as text, as tokenizers wrote them before pairs, and without these tokens."""
    made = dict(fields)
    made["added_tokens"] = [t for t in made.get("added_tokens", []) if t.get("content") not in left_out]
    model = dict(made.get("model") or {})
    merges = model.get("merges") or []
    pairs = [m for m in merges if isinstance(m, list)]
    if pairs and not any(" " in part for pair in pairs for part in pair):
        model["merges"] = [" ".join(m) if isinstance(m, list) else m for m in merges]
    made["model"] = model
    return made
