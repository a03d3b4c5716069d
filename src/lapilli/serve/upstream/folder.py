"""Whether vLLM or SGLang can load a folder, and the conversation template that they are given for it.

They know transformers' layout and nothing of ours, so the folder must be one, and what else they have to know of it is
put in their words here: the template with the text's first token in it, for they add none of their own, and the texts
that end an answer.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lapilli.assemble.folder import read_spec
from lapilli.assemble.opening.hf import open_hf
from lapilli.assemble.source import model_folder, recognise
from lapilli.base.errors import ModelError
from lapilli.checkpoint.tensors import read_json
from lapilli.data.encode import Encoder
from lapilli.data.template import Template
from lapilli.serve.upstream.body import Dialect


@dataclass(frozen=True, slots=True)
class Loadable:
    """A folder that an engine loads, with Jinja for its template, and what ends an answer beside its end token."""

    folder: Path
    template: Template
    chat_template: str
    stop: tuple[str, ...]


def loadable(path: Path | str, engine: Dialect, template: str | None = None) -> Loadable:
    """What an engine needs to know of a model folder, from its descriptions alone.

    Raises ModelError for one that the engine can't load, with the command that makes one that it can.
    """
    folder = model_folder(path)
    kind = recognise(folder)
    base = " --base BASE" if "-" in kind else ""
    convert = f"lapilli convert {path} NEW --to hf{base}"
    if kind != "hf":
        raise ModelError(
            f"{path}: a {_KINDS.get(kind, kind)}; {_NAMES[engine]} loads folders of transformers' layout. "
            f"Make one, and serve it: {convert}"
        )
    _check(folder, read_json(folder / "config.json"), engine)
    opened = open_hf(folder, read_spec(folder), template)  # and with it all that can be checked beforehand
    chosen = opened.spec.template
    prefix = str(opened.tokenizer.decode(Encoder(opened.tokenizer, chosen, None, None).prefix))
    jinja = with_prefix(opened.spec.chat_template(), prefix)
    return Loadable(folder, chosen, jinja, chosen.stop)


_NAMES = {"vllm": "vLLM", "sglang": "SGLang"}
_KINDS = {
    "llava": "folder of LLaVA's layout",
    "lapilli": "folder of lapilli's own type (the model does not fit transformers' classes: conversion says why)",
    "cerebras": "checkpoint of Cerebras'",
    "llava-lora": "folder of LoRA adapters",
    "llava-projector": "folder with a projector alone",
    "hf-lora": "folder of LoRA adapters",
    "lapilli-adapter": "folder of adapters",
}


def _check(folder: Path, config: dict[str, Any], engine: Dialect) -> None:
    kind = config.get("model_type")
    if kind not in ("llava", "llava_next"):
        raise ModelError(f"{folder}: holds a {kind} model, not a joined one; join one with `lapilli build`")
    if "quantization_config" in config:
        raise ModelError(f"{folder}: quantised weights; serve the folder that they were made from")
    if engine == "sglang":
        vision = (config.get("vision_config") or {}).get("model_type")
        if kind == "llava_next":
            raise ModelError(f"{folder}: SGLang has no class for llava_next (image mode anyres); use --engine vllm")
        if vision != "clip_vision_model":
            raise ModelError(f"{folder}: SGLang takes CLIP encoders in llava models, not {vision}; use --engine vllm")


def with_prefix(jinja: str, prefix: str) -> str:
    """A chat template whose text begins with `prefix` (the token that begins a text), unless it writes that already.

    Engines tokenise a rendered conversation as it stands, while models here are trained with that token before it.
    """
    if not prefix:
        return jinja
    quoted = "'" + prefix.replace("\\", "\\\\").replace("'", "\\'") + "'"
    whole = "{{ '' }}" + jinja + "{{ '' }}"  # blanks at its ends are text, not the layout of the tags around it
    return (
        f"{{% set rendered %}}{whole}{{% endset %}}"
        f"{{% if not rendered.startswith({quoted}) %}}{{{{ {quoted} }}}}{{% endif %}}{{{{ rendered }}}}"
    )
