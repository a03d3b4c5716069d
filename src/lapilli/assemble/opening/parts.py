"""The parts that a checkpoint names and does not hold: vision encoders and base language models, opened unread.

A part lies in a folder or, by its name, on the Hugging Face Hub; of the Hub only the weight files of one format are
fetched.
"""

from pathlib import Path
from typing import Any

import torch
from transformers import AutoModel, PreTrainedConfig
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

from lapilli.base.errors import ModelError
from lapilli.checkpoint import names, open_clip
from lapilli.checkpoint.stream import Tensors, open_file, open_folder
from lapilli.checkpoint.tensors import WEIGHT_FILES, some
from lapilli.model.shrink import SHRINK_ERRORS


def empty_model(auto: Any, config: PreTrainedConfig, where: Any) -> Any:
    """A model of `config` on the meta device, for its names and shapes. Raises ModelError if there is no such model."""
    try:
        with torch.device("meta"):
            return auto.from_config(config)
    except SHRINK_ERRORS as error:
        raise ModelError(f"{where}: describes no {config.model_type} model ({str(error).splitlines()[0]})") from error


def open_weights(name_or_path: str, part: str) -> Tensors:
    """The tensors of a part, under the names of its files. Raises ModelError if its weights can't be found."""
    folder = Path(name_or_path)
    if open_clip.is_open_clip(folder):
        return open_clip.open_encoder(folder)
    if folder.is_dir():
        return open_folder(folder)
    from transformers.utils.hub import cached_file, get_checkpoint_shard_files

    try:
        for file in WEIGHT_FILES:
            found = cached_file(name_or_path, file, _raise_exceptions_for_missing_entries=False)
            if found is not None:
                if file.endswith(".json"):
                    get_checkpoint_shard_files(name_or_path, found)
                return open_file(Path(found))
    except (OSError, ValueError) as error:
        raise ModelError(f"{part} {name_or_path}: can't be fetched ({str(error).splitlines()[0]})") from error
    raise ModelError(f"{part} {name_or_path}: no weights there ({', '.join(WEIGHT_FILES)})")


def open_encoder(place: str, config: PreTrainedConfig) -> tuple[Tensors, str]:
    """The tensors of a vision encoder under canonical names, and what to tell of tensors that are not its own.

    Of a dual encoder these are its vision half. Raises ModelError naming tensors that are missing.
    """
    empty = empty_model(AutoModel, config, place)
    names_of = Names(empty)
    made: Tensors = {}
    others: list[str] = []
    if open_clip.is_open_clip(Path(place)):
        opened = open_clip.open_encoder(Path(place))
    else:
        opened = open_weights(place, "vision encoder")
    for name, tensor in opened.items():
        own = name.removeprefix("vision_model.")
        if names_of.place(own) is None and empty.base_model_prefix:
            own = own.removeprefix(f"{empty.base_model_prefix}.")
        if names_of.place(own) is None or name.startswith("text_model."):
            others.append(name)
        else:
            made[names.vision_name(own)] = tensor
    missing = sorted(names_of.needed - {names_of.place(name) for name in names.part(made, names.VISION)})
    if missing:
        raise ModelError(f"vision encoder {place}: {len(missing)} tensors are missing: {some(missing)}")
    return made, f"{len(others)} tensors beside the vision encoder are not read: {some(others)}" if others else ""


def settle_ties(config: Any, causal: Any, tensors: Tensors, where: Path, *, tied: bool = False) -> str:
    """Let the configuration of a language model (`causal`, empty) say of its output layer what the tensors hold.

    A tied layer that has other values than the embedding is a layer of its own. `tied`: it is another configuration's
    word that one that is not there is the embedding. Returns what to tell of it.
    """
    layers = (names.input_name(causal), names.output_name(causal))
    table, output = (tensors.get(names.language_name(f"{layer}.weight")) for layer in layers)
    if table is not None and output is None and tied:
        config.tie_word_embeddings = True
    if config.tie_word_embeddings and table is not None and output is not None:
        same = table.shape == output.shape and torch.equal(table.read(), output.read())
        config.tie_word_embeddings = same
        return "" if same else f"{where}: says that embedding and output layer are one, and holds two: both are kept"
    return ""


class Names:
    """Which of an empty model's places a tensor's name means, old names included that transformers itself renames."""

    def __init__(self, empty: Any) -> None:
        self.places = empty.state_dict()
        self.prefix = "vision_model." if any(name.startswith("vision_model.") for name in self.places) else ""
        """Some versions of transformers have one level more, which no canonical name has."""
        self.needed = {name for name, _ in empty.named_parameters()}
        self._base = empty.base_model_prefix
        changes = get_model_conversion_mapping(empty)
        self._renamings = [change for change in changes if isinstance(change, WeightRenaming)]
        self._converters = [change for change in changes if isinstance(change, WeightConverter)]

    def place(self, name: str) -> str | None:
        """The place of a tensor; None if it has none."""
        name = self.prefix + name.removeprefix(self.prefix)
        if name in self.places:
            return name
        renamed, _ = rename_source_key(name, self._renamings, self._converters, self._base, self.places)
        return renamed if renamed in self.places else None

    def reshaped(self, name: str) -> bool:
        """Whether transformers makes the place's tensor out of several, so that shapes can't be compared."""
        _, pattern = rename_source_key(name, self._renamings, self._converters, self._base, self.places)
        return pattern is not None and self.prefix + name not in self.places
