"""One name for each tensor, whatever layout it comes from.

Readers give these names and writers take them: `vision.<name>` with the vision model's own name (without a leading
`vision_model.`, which transformers dropped between its versions), `projector.<number>.weight|bias` numbered as in
LLaVA (`projector.weight|bias` if it is linear), `language.<name>` with the causal language model's own name, and
`image_newline`. Tables of positions, which the configuration gives, have no name and are left out.
"""

from collections.abc import Callable, Iterable
from typing import Any

from lapilli.base.errors import ModelError
from lapilli.checkpoint.stream import Tensors

VISION, PROJECTOR, LANGUAGE, NEWLINE = "vision.", "projector.", "language.", "image_newline"

_NAMED_VISION_MODEL = ("clip_vision_model", "siglip_vision_model")
"""Encoders whose released names begin with `vision_model.`, which newer versions of transformers leave out."""
_COMPUTED = ("rotary_emb.inv_freq", "embeddings.position_ids", "attn.masked_bias")
"""Tensors that old transformers saved although the configuration gives them."""

_LLAVA_VISION = ("model.vision_tower.vision_tower.", "transformer.vision_tower.vision_tower.")
_LLAVA_PROJECTOR = ("model.mm_projector.", "transformer.mm_projector.")
_LLAVA_NEWLINE = ("model.image_newline", "transformer.image_newline")
_LINEARS = {"linear_1": "0", "linear_2": "2"}

NameOf = Callable[[str], str | None]
"""From a name on disk to the canonical one; None for what has none."""


def vision_prefix(config: Any) -> str:
    """What stands before a vision encoder's canonical names in files that hold it alone."""
    return "vision_model." if config.model_type in _NAMED_VISION_MODEL else ""


def canonical(tensors: Tensors, name_of: NameOf) -> tuple[Tensors, list[str]]:
    """The tensors under their canonical names, and the names of those left out because they are computed.

    Raises ModelError if two tensors would have one name.
    """
    made: Tensors = {}
    computed: list[str] = []
    for name, tensor in tensors.items():
        if name.endswith(_COMPUTED):
            computed.append(name)
            continue
        new = name_of(name)
        if new is None:
            raise ModelError(f"{tensor.where}: has no place in a joined model")
        if new in made:
            raise ModelError(f"{tensor.where}: the same tensor as {made[new].where}, under another name")
        made[new] = tensor
    return made, computed


def part(tensors: Tensors, prefix: str) -> Tensors:
    """The tensors of one part (`VISION`, `PROJECTOR` or `LANGUAGE`), under the part's own names."""
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def vision_name(name: str) -> str:
    """The canonical name of a vision model's own tensor."""
    return VISION + name.removeprefix("vision_model.")


def language_name(name: str) -> str:
    """The canonical name of a causal language model's own tensor."""
    return LANGUAGE + name


def llava_name(name: str) -> str:
    """From LLaVA's layout; what is neither encoder, projector nor newline is the language model's."""
    for prefix in _LLAVA_VISION:
        if name.startswith(prefix):
            return vision_name(name.removeprefix(prefix))
    for prefix in _LLAVA_PROJECTOR:
        if name.startswith(prefix):
            return PROJECTOR + name.removeprefix(prefix)
    return NEWLINE if name in _LLAVA_NEWLINE else language_name(name)


def own_name(name: str) -> str | None:
    """From our own `model_type`."""
    first, _, rest = name.partition(".")
    if first == "vision_encoder":
        return vision_name(rest)
    if first == "language_model":
        return language_name(rest)
    return name if first == "projector" or name == NEWLINE else None


def hf_name(causal: Any) -> NameOf:
    """From transformers' `llava` and `llava_next`, in the spellings of all its versions.

    `causal` is an empty causal language model of the folder's kind, which knows how its own tensors are called.
    """
    own, base, output = set(causal.state_dict()), causal.base_model_prefix, output_name(causal)

    def name_of(name: str) -> str | None:
        name = name.removeprefix("model.")
        first, _, rest = name.partition(".")
        if first == "vision_tower":
            return vision_name(rest)
        if first == "multi_modal_projector":
            layer, _, kind = rest.partition(".")
            return f"{PROJECTOR}{_LINEARS[layer]}.{kind}" if layer in _LINEARS else None
        if name == NEWLINE:
            return NEWLINE
        if first == "lm_head":
            return f"{LANGUAGE}{output}.{rest}"
        if first != "language_model":
            return None
        if rest.startswith("lm_head."):
            return f"{LANGUAGE}{output}.{rest.removeprefix('lm_head.')}"
        if rest in own or rest.startswith(f"{base}."):
            return language_name(rest)
        return language_name(f"{base}.{rest.removeprefix('model.')}")

    return name_of


def output_name(causal: Any) -> str:
    """How a causal language model calls its output layer."""
    output = causal.get_output_embeddings()
    return next((name for name, module in causal.named_modules() if module is output), "lm_head")


def input_name(causal: Any) -> str:
    """How a causal language model calls its embedding."""
    table = causal.get_input_embeddings()
    return next(name for name, module in causal.named_modules() if module is table)


def said(computed: Iterable[str]) -> str:
    """What to tell of tables that were left out."""
    return f"{len(list(computed))} tables of positions are computed from config.json, not read"
