"""A language model, a vision encoder and a projector that was trained elsewhere become a model folder.

This is `build` with a projector that is there already: what its own folder says of layer, image mode and encoder holds
unless it is said otherwise, and whether it fits the two parts is known before any weights are read.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from lapilli.assemble import parts
from lapilli.assemble.build import BuildOptions, BuildReport, build
from lapilli.assemble.projector import Found, find
from lapilli.base.atomic import refuse_taken
from lapilli.base.errors import ModelError
from lapilli.model.vision import vision_part


def options_for(language_model: str, projector: Path, chosen: dict[str, Any]) -> BuildOptions:
    """What to build: `chosen` fields of BuildOptions, then what the projector's folder says, then build's defaults.

    Raises ModelError if nothing names a vision encoder, or if the projector does not fit the parts' widths.
    """
    found = find(projector)
    origin = found.origin
    known = {
        "vision_encoder": origin.vision_encoder,
        "image_mode": origin.image_mode,
        "feature_layers": origin.feature_layers,
        "feature_select": origin.feature_select,
        "im_start_end": found.marks is not None,
    }
    fields: dict[str, Any] = {name: value for name, value in known.items() if value is not None}
    fields |= {name: value for name, value in chosen.items() if value is not None}
    if "vision_encoder" not in fields:
        raise ModelError(
            f"{projector}: does not say which vision encoder it was trained with; name it (--vision-encoder)"
        )
    fields |= {"projector": found.weights.kind, "projector_weights": str(projector)}
    options = BuildOptions(language_model=language_model, **fields)
    _check_widths(found, options)
    return options


def attach(options: BuildOptions, out: Path, say: Callable[[str], None] = lambda _line: None) -> BuildReport:
    """Build the model folder `out`. Raises ModelError and RunError as `build` does."""
    refuse_taken(out)
    return build(options, out, say)


def _check_widths(found: Found, options: BuildOptions) -> None:
    weights = [tensor for name, tensor in sorted(found.weights.tensors.items()) if name.endswith("weight")]
    if any(len(tensor.shape) != 2 for tensor in weights):
        raise ModelError(f"{found.weights.file}: a projector's weights are matrices")
    vision: Any = vision_part(parts.read_config(options.vision_encoder, "vision encoder"))
    language: Any = parts.read_config(options.language_model, "language model").get_text_config()
    widths = {
        (weights[0].shape[1], f"features of {options.vision_encoder}"): vision.hidden_size
        * len(options.feature_layers),
        (weights[-1].shape[0], f"embeddings of {options.language_model}"): language.hidden_size,
    }
    for (has, what), wanted in widths.items():
        if has != wanted:
            raise ModelError(f"{found.weights.file}: a projector for {has} numbers, but the {what} have {wanted}")
