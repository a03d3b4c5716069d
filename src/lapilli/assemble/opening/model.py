"""A model that is opened and not read: everything its folder says, and its tensors as they lie.

This is what loading, conversion, verification and the tools around them share, so that each format is understood in
one place only.
"""

import logging
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from transformers import GenerationConfig, PreTrainedTokenizerBase

from lapilli.assemble.folder import FolderSpec
from lapilli.checkpoint import names
from lapilli.checkpoint.stream import Tensors
from lapilli.model.config import LapilliConfig

log = logging.getLogger(__name__)

Format = Literal["llava", "llava-lora", "llava-projector", "hf", "hf-lora", "lapilli", "lapilli-adapter", "cerebras"]
"""What a folder can be; the ones with a dash are pieces, which need a base."""


class Notes(list[str]):
    """What opening a folder has to say: kept for reports, and logged at once."""

    def info(self, text: str) -> None:
        """Note what a user need not act on."""
        log.info("%s", text)
        self.append(text)

    def warn(self, text: str) -> None:
        """Note what a user should know before trusting the answers."""
        log.warning("%s", text)
        self.append(text)


@dataclass
class OpenModel:
    """A joined model whose tensors are read one at a time, when they are needed."""

    folder: Path
    format: Format
    config: LapilliConfig
    tensors: Tensors
    """Under canonical names (`lapilli.checkpoint.names`), as stored; adapters are merged as they are read."""
    tokenizer: PreTrainedTokenizerBase
    spec: FolderSpec
    generation_config: GenerationConfig | None
    notes: Notes = field(default_factory=Notes)
    places: dict[str, str] = field(default_factory=dict)
    """Where the weights of each part lie: `vision`, `projector`, `language`."""

    @property
    def settings(self) -> dict[str, Any]:
        """What config.json of the source said beyond the model, so that going back writes it again."""
        return self.spec.settings

    @property
    def trained_rows(self) -> int:
        """Rows of the embedding that the language model was trained with; a conversion added those beyond."""
        return self.spec.trained_rows or self.config.text_config.get_text_config().vocab_size

    def part(self, prefix: str) -> Tensors:
        """The tensors of a part (`names.VISION`, `names.PROJECTOR`, `names.LANGUAGE`) under the part's own names."""
        return names.part(self.tensors, prefix)
