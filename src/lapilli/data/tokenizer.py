"""Loading a tokenizer from a folder so that it gives the ids its model was trained with.

transformers 5 rebuilds some tokenizers from their class instead of reading the file: a Llama tokenizer saved with
SentencePiece's older treatment of spaces comes back with the newer one, and one that is only a `tokenizer.model`
comes back without its BOS. Both change ids without a word, so both are set right here, and said.
"""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lapilli.base.errors import ModelError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

log = logging.getLogger(__name__)


def load_tokenizer(path: str | Path) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a model folder, a tokenizer folder, or a name on the Hugging Face Hub.

    No code from the folder is run. Raises ModelError naming the folder and what is wrong with it.
    """
    from transformers import AutoTokenizer

    folder = Path(path)
    if folder.is_dir():
        if not any(
            (folder / name).is_file() for name in ("tokenizer.json", "tokenizer.model", "tokenizer_config.json")
        ):
            raise ModelError(f"{path}: no tokenizer here (neither tokenizer.json nor tokenizer.model)")
        if _is_sentencepiece_llama(folder):
            return _from_sentencepiece(folder)
    elif folder.exists():
        raise ModelError(f"{path}: give the folder that holds the tokenizer, not a file in it")
    else:
        refuse_missing_path(str(path))
        log.info("%s: no such folder here; asking the Hugging Face Hub", path)
    try:
        tokenizer = AutoTokenizer.from_pretrained(str(path), trust_remote_code=False, **_unknown_model(folder))
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise ModelError(f"{path}: can't load a tokenizer ({_first_line(error)})") from error
    if not tokenizer.is_fast:
        raise ModelError(f"{path}: {type(tokenizer).__name__} gives no character offsets; save its fast version here")
    return _as_in_file(tokenizer, folder)


def _unknown_model(folder: Path) -> dict[str, Any]:
    """The configuration of a model whose type transformers does not know, as lapilli's own before it is registered.

    Left to itself it takes this plain class too, and warns that one of another type was asked for.
    """
    from transformers import CONFIG_MAPPING, PreTrainedConfig

    file = folder / "config.json"
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError):
        return {}  # whoever needs it says what is wrong with it
    kind = content.get("model_type") if isinstance(content, dict) else None
    if not isinstance(kind, str) or kind in CONFIG_MAPPING:
        return {}
    return {"config": PreTrainedConfig.from_dict(content)}


def refuse_missing_path(name: str, what: str = "") -> None:
    """Raise ModelError for what can only be a path and is not there: the Hub, which takes half a minute to fail, has
    names such as `owner/name`."""
    if not Path(name).expanduser().exists() and (name.startswith((".", "/", "~")) or name.count("/") > 1):
        raise ModelError(f"{what}{name}: no such folder")


def _config(folder: Path) -> dict[str, Any]:
    file = folder / "tokenizer_config.json"
    if not file.is_file():
        return {}
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ModelError(f"{file}: can't read it ({error})") from error
    if not isinstance(config, dict):
        raise ModelError(f"{file}: not a JSON object")
    return config


def _is_sentencepiece_llama(folder: Path) -> bool:
    if (folder / "tokenizer.json").is_file() or not (folder / "tokenizer.model").is_file():
        return False
    return str(_config(folder).get("tokenizer_class", "LlamaTokenizer")).startswith("LlamaTokenizer")


def _from_sentencepiece(folder: Path) -> PreTrainedTokenizerBase:
    """A Llama tokenizer from `tokenizer.model`, with what transformers 4 assumed where the config says nothing."""
    from tokenizers import normalizers
    from transformers import LlamaTokenizer, PreTrainedTokenizerFast

    config = _config(folder)
    settings = {"add_bos_token": config.get("add_bos_token", True), "legacy": config.get("legacy", True)}
    missing = [key for key in settings if key not in config]
    if missing:
        said = ", ".join(f"{key}={settings[key]}" for key in missing)
        log.info("%s: only a tokenizer.model says how this text was split; taken: %s", folder, said)
    try:
        tokenizer = LlamaTokenizer.from_pretrained(str(folder), **settings)
    except (OSError, ValueError, KeyError, TypeError, ImportError) as error:
        raise ModelError(f"{folder}: can't load tokenizer.model ({_first_line(error)})") from error
    if not settings["legacy"]:
        return tokenizer
    # SentencePiece puts a space before every text, also before one that begins with a space, which the class does not.
    backend = tokenizer.backend_tokenizer
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.pre_tokenizer = None
    # A plain fast tokenizer is saved and loaded as it is; LlamaTokenizer would be rebuilt without `legacy`.
    return PreTrainedTokenizerFast(tokenizer_object=backend, **_kept_settings(tokenizer))


def _as_in_file(tokenizer: Any, folder: Path) -> PreTrainedTokenizerBase:
    """This tokenizer, or the one in the folder's `tokenizer.json` if the class splits text in another way than it.

    Where the config says `legacy`, it names the behaviour of the original, and the class follows it.
    """
    from transformers import PreTrainedTokenizerFast

    file = folder / "tokenizer.json"
    if not file.is_file() or "legacy" in _config(folder):
        return tokenizer
    written, loaded = json.loads(file.read_text(encoding="utf-8")), json.loads(tokenizer.backend_tokenizer.to_str())
    if all(written.get(key) == loaded.get(key) for key in ("normalizer", "pre_tokenizer")):
        return tokenizer
    log.info(
        "%s: %s splits text in another way than tokenizer.json; the file is used", folder, type(tokenizer).__name__
    )
    return PreTrainedTokenizerFast.from_pretrained(str(folder))


def _kept_settings(tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """What a tokenizer made from SentencePiece holds beside its backend."""
    special = {key: token for key, token in tokenizer.special_tokens_map.items() if isinstance(token, str)}
    return special | {
        "chat_template": tokenizer.chat_template,
        "clean_up_tokenization_spaces": False,
        "model_max_length": tokenizer.model_max_length,
        "padding_side": tokenizer.padding_side,
    }


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
