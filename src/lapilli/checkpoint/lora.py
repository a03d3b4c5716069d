"""LoRA adapters on disk, merged into the weights they belong to a tensor at a time.

The arithmetic is PEFT's (W + B·A·alpha/r), done in float32 and rounded once. What PEFT
can do beyond that, and would change the weights in another way, is refused by the name of its setting.
"""

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from lapilli.base.errors import ModelError
from lapilli.checkpoint.stream import Lazy, Tensors, open_file
from lapilli.checkpoint.tensors import read_json, some

CONFIG = "adapter_config.json"
_WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")
_PREFIX = "base_model.model."
_MATRIX = re.compile(r"(.+)\.lora_(embedding_)?([AB])(?:\.default)?(?:\.weight)?")
_REFUSED = (
    "use_dora", "layer_replication", "lora_bias", "use_qalora", "trainable_token_indices", "target_parameters",
    "alora_invocation_tokens", "megatron_config",
)  # fmt: skip
_CHANGES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")
"""Ways to begin that take a part out of the base's own weights."""


@dataclass(frozen=True)
class Update:
    """What is added to one weight: `scale` * B·A, with A (r, in) and B (out, r)."""

    a: Lazy
    b: Lazy
    scale: float
    transposed: bool
    """The weight is (in, out): embeddings, and layers that PEFT calls `fan_in_fan_out`."""

    @property
    def shape(self) -> tuple[int, int]:
        """Of the weight that this was trained on."""
        out, width = self.b.shape[0], self.a.shape[1]
        return (width, out) if self.transposed else (out, width)

    def delta(self) -> torch.Tensor:
        """B·A·scale in float32, as the weight lies."""
        product = self.b.read().float() @ self.a.read().float()
        return (product.T if self.transposed else product).mul_(self.scale)

    @property
    def is_zero(self) -> bool:
        """Whether it changes nothing, as an adapter that never got a gradient."""
        return not bool(self.b.read().any())


@dataclass(frozen=True, kw_only=True)
class Merged(Lazy):
    """A weight with an update added as it is read; the two apart, for those who keep them so."""

    weight: Lazy
    update: Update


@dataclass(frozen=True)
class Adapters:
    """The adapters of a folder, by the names that the base's layout has for its layers."""

    file: Path
    updates: Mapping[str, Update]
    """By the name of the weight that they change."""
    whole: Tensors
    """Tensors that were trained in full and stand in the file as they are: biases, or layers in `modules_to_save`."""


def open_adapters(folder: Path) -> Adapters:
    """Open the adapters of a folder that PEFT wrote. Raises ModelError for settings that are not plain LoRA."""
    config = _settings(folder)
    file = next((folder / name for name in _WEIGHTS if (folder / name).is_file()), None)
    if file is None:
        raise ModelError(f"{folder}: {CONFIG} is here but no weights ({' or '.join(_WEIGHTS)}); copy them here")
    pairs: dict[str, dict[str, Lazy]] = {}
    whole: Tensors = {}
    embeddings: set[str] = set()
    for full, tensor in open_file(file).items():
        if not full.startswith(_PREFIX):
            raise ModelError(f"{tensor.where}: not a name that PEFT gives (they begin with {_PREFIX})")
        name = full.removeprefix(_PREFIX)
        match = _MATRIX.fullmatch(name)
        if match is not None:
            pairs.setdefault(match[1], {})[match[3]] = tensor
            embeddings |= {match[1]} if match[2] else set()
        elif "lora_" in name:
            raise ModelError(f"{tensor.where}: such adapters are not supported; merge them with PEFT")
        else:
            whole[name.replace(".base_layer.", ".").replace(".modules_to_save.", ".")] = tensor
    updates = {
        f"{layer}.weight": _update(file, config, layer, pair, layer in embeddings) for layer, pair in pairs.items()
    }
    return Adapters(file, updates, whole)


def _settings(folder: Path) -> dict[str, Any]:
    where = folder / CONFIG
    config = read_json(where)
    kind = config.get("peft_type")
    if kind != "LORA":
        raise ModelError(f"{where}: peft_type is {kind!r}; only LORA adapters are read")
    found = next((key for key in _REFUSED if config.get(key)), None)
    if found is not None:
        raise ModelError(f"{where}: {found}: {config[found]!r} is not supported; merge this adapter with PEFT")
    start = str(config.get("init_lora_weights"))
    if start.startswith(_CHANGES_BASE):
        raise ModelError(
            f"{where}: init_lora_weights: {start!r} changed the base's own weights at the start of training; save the "
            "adapter from PEFT with `path_initial_model_for_weight_conversion`, which makes it a plain one"
        )
    for key in ("r", "lora_alpha"):
        if not isinstance(config.get(key), int | float) or config[key] <= 0:
            raise ModelError(f"{where}: {key} must be a positive number, not {config.get(key)!r}")
    return config


def _update(file: Path, config: Mapping[str, Any], layer: str, pair: Mapping[str, Lazy], embedding: bool) -> Update:
    if set(pair) != {"A", "B"}:
        missing = "B" if "A" in pair else "A"
        raise ModelError(f"{file}: {layer}.lora_{missing} is missing; copy the file again")
    a, b = pair["A"], pair["B"]
    if len(a.shape) != 2 or len(b.shape) != 2 or a.shape[0] != b.shape[1]:
        raise ModelError(f"{a.where}: {a.shape} and {b.shape} are not the two factors of a matrix")
    rank = _by_layer(config, "rank_pattern", layer, config["r"])
    if a.shape[0] != rank:
        raise ModelError(f"{a.where}: has rank {a.shape[0]}, {CONFIG} says {rank}")
    alpha = _by_layer(config, "alpha_pattern", layer, config["lora_alpha"])
    scale = alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)
    return Update(a, b, scale, embedding or bool(config.get("fan_in_fan_out")))


def _by_layer(config: Mapping[str, Any], key: str, layer: str, default: Any) -> Any:
    """A setting that PEFT allows to differ between layers, whose names are matched from their end."""
    patterns = config.get(key) or {}
    return next((value for name, value in patterns.items() if re.fullmatch(rf"(.*\.)?({name})", layer)), default)


def merged(
    tensors: Tensors, adapters: Adapters, name_of: Callable[[str], str | None], dtype: torch.dtype | None = None
) -> Tensors:
    """The tensors with the adapters added as they are read; what they change comes in `dtype` (None: as stored).

    `name_of` gives the name in `tensors` for a name in the adapters' file; None leaves the adapter out, which the
    caller has to say. Raises ModelError for an adapter that has no weight here, or one of another shape.
    """
    made = dict(tensors)
    for name, update in adapters.updates.items():
        ours = name_of(name)
        if ours is not None:
            made[ours] = _added(_weight(made, ours, name, update.a), update, dtype)
    for name, tensor in adapters.whole.items():
        ours = name_of(name)
        if ours is None:
            continue
        old = _weight(made, ours, name, tensor)
        if old.shape != tensor.shape:
            raise ModelError(f"{tensor.where}: has shape {tensor.shape}, the base's {old.where} {old.shape}")
        made[ours] = tensor.to(dtype or old.dtype)
    return made


def _weight(tensors: Tensors, ours: str, name: str, adapter: Lazy) -> Lazy:
    if ours not in tensors:
        some_names = some(key for key in tensors if key.rsplit(".", 2)[-2:] == ours.rsplit(".", 2)[-2:])
        near = f"; it has {some_names}" if some_names else ""
        raise ModelError(f"{adapter.where}: the base has no {name}{near}. Is it the model that this was trained on?")
    return tensors[ours]


def _added(weight: Lazy, update: Update, dtype: torch.dtype | None) -> Lazy:
    if weight.shape != update.shape:
        raise ModelError(
            f"{update.a.where}: trained on a weight of shape {update.shape}, the base's {weight.where} has "
            f"{weight.shape}; give the model that this was trained on as its base"
        )
    made = dtype or weight.dtype
    return Merged(
        weight.shape,
        made,
        weight.where,
        lambda: update.delta().add_(weight.read()).to(made),
        weight=weight,
        update=update,
    )
