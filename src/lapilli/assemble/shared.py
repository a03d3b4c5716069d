"""Several models in one process, with what their files have in common in memory once.

Models that were made from one another (adapters over one base, and that base) differ in a few tensors. Each gets
modules of its own over shared tensors, so that each can be asked in its own thread and none has to be switched: updates
of low rank stay beside the weights they belong to, everything else that differs is the model's own. Which tensors are
the same is read from where they lie, never from names of folders, so it does not matter how the models came about.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedConfig

from lapilli.assemble.load import Loaded, check_room, load
from lapilli.assemble.opening.model import OpenModel
from lapilli.assemble.opening.parts import Names, empty_model
from lapilli.assemble.opening.quantised import is_quantised
from lapilli.assemble.qlora import materialise_held
from lapilli.assemble.quantise import linear_weights
from lapilli.assemble.source import join, materialise, model_folder, open_model, read_part, recognise
from lapilli.base.errors import ModelError
from lapilli.checkpoint import names
from lapilli.checkpoint.lora import Merged, Update
from lapilli.checkpoint.stream import Lazy, total_bytes
from lapilli.model import split
from lapilli.model.adapter import Beside
from lapilli.model.held import held_bytes
from lapilli.model.quantised import Held, mark_quantised, quantised_linear, sharing
from lapilli.model.quiet import quiet
from lapilli.model.vlm import VisionLanguageModel

log = logging.getLogger(__name__)

_WORTH_SHARING = 0.5
"""Part of a language model's bytes that must lie in the same places for it to be made over another's tensors."""
_VOLATILE = ("_name_or_path", "transformers_version", "dtype", "torch_dtype")


@dataclass(frozen=True)
class Holding:
    """How weights are held: in which type, on which device, the language model's linear layers perhaps quantised.

    With `split`, which begins with `device`, the language model's blocks are dealt out to several devices.
    """

    device: torch.device
    dtype: torch.dtype
    quantised: Held | None = None
    split: tuple[torch.device, ...] = ()


def load_several(
    paths: Mapping[str, Path | str],
    how: Holding,
    *,
    base: Path | str | None = None,
    template: str | None = None,
) -> dict[str, Loaded]:
    """Load models by name, those with common weights over one copy of them; `base` and `template` as `load` takes them.

    What is shared, and what could not be, is logged with its bytes. Adapters over shared weights are not merged: with
    `quantised`, they are added to a quantised base, where one that is loaded alone is merged before. Raises ModelError
    as `load` does, and for a `base` that none of the models needs.
    """
    folders = {name: model_folder(path) for name, path in paths.items()}
    pieces = {name for name, folder in folders.items() if recognise(folder) not in ("hf", "lapilli", "llava")}
    if base is not None and not pieces:
        raise ModelError(f"{', '.join(map(str, folders.values()))}: whole models, which take no base; leave it out")
    opened = {
        name: open_model(folder, base if name in pieces else None, template=template, merged_as=how.dtype)
        for name, folder in folders.items()
        if not is_quantised(folder)
    }
    groups, reasons = _groups(opened)
    made: dict[str, Loaded] = {}
    for group in groups:
        for name, model in _make(group, opened, how, reasons).items():
            made[name] = Loaded(model, opened[name].tokenizer, opened[name].spec, folders[name])
            check_room(made[name])
    for name in folders.keys() - opened.keys():
        if how.quantised is not None or how.split:
            what = "load it as it is" if how.quantised is not None else "it is held on one device"
            raise ModelError(f"{folders[name]}: its weights are quantised already; {what}")
        made[name] = load(folders[name], device=how.device, dtype=how.dtype, template=template)
        reasons[name] = "its weights are stored quantised"
    _say(groups, made, reasons)
    return {name: made[name] for name in paths}


# ---- which models share ---------------------------------------------------------------------------------------------


def _beneath(tensor: Lazy) -> tuple[Lazy, list[Update]]:
    """A tensor as it was before adapters, and what they add to it."""
    updates: list[Update] = []
    while isinstance(tensor, Merged):
        updates.append(tensor.update)
        tensor = tensor.weight
    return tensor, updates


def _bare(opened: OpenModel) -> OpenModel:
    """A model without its adapters."""
    return replace(opened, tensors={name: _beneath(tensor)[0] for name, tensor in opened.tensors.items()})


def _same(one: Lazy, other: Lazy) -> bool:
    return one is other or (one.source is not None and one.source == other.source)


def _groups(opened: Mapping[str, OpenModel]) -> tuple[list[list[str]], dict[str, str]]:
    """Names of models that are made over the tensors of the first of them, and why those alone don't share."""
    groups: list[list[str]] = []
    reasons: dict[str, str] = {}
    bare = {name: _bare(one) for name, one in opened.items()}
    for name, one in bare.items():
        whys = [(group, _why_not(bare[group[0]], one)) for group in groups]
        home = next((group for group, why in whys if not why), None)
        if home is not None:
            home.append(name)
            continue
        groups.append([name])
        reasons[name] = next((f"{why} than {group[0]}'s" for group, why in whys if why != _NOTHING), _NOTHING)
    return groups, {group[0]: reasons[group[0]] for group in groups if len(group) == 1}


_NOTHING = "no other model here has its weights in the same files"


def _why_not(first: OpenModel, other: OpenModel) -> str:
    """Why the second model's language model can't be made over the first's tensors; empty if it can."""
    one, two = first.part(names.LANGUAGE), other.part(names.LANGUAGE)
    common = {name: tensor for name, tensor in two.items() if name in one and _same(one[name], tensor)}
    if total_bytes(common.values()) < _WORTH_SHARING * total_bytes(two.values()):
        return _NOTHING
    differ = _differences(first.config.text_config, other.config.text_config)
    if differ:
        return f"its language model has other settings ({', '.join(differ)})"
    if one.keys() != two.keys():
        return "its language model has other tensors"
    places = _places(other)
    if any(places.reshaped(name) for name in two.keys() - common.keys()):
        return "its language model is stored in another form"
    return ""


def _differences(one: PreTrainedConfig, other: PreTrainedConfig) -> list[str]:
    a, b = ({k: v for k, v in config.to_dict().items() if k not in _VOLATILE} for config in (one, other))
    return sorted(key for key in a.keys() | b.keys() if a.get(key) != b.get(key))


def _places(opened: OpenModel) -> Names:
    return Names(empty_model(AutoModelForCausalLM, opened.config.text_config, opened.folder))


# ---- made over shared tensors ---------------------------------------------------------------------------------------


def _make(
    group: Sequence[str], opened: Mapping[str, OpenModel], how: Holding, reasons: dict[str, str]
) -> dict[str, VisionLanguageModel]:
    """The models of a group; of one that had to be made by itself all the same, `reasons` gets to know why."""
    if len(group) == 1:
        return {group[0]: _connected(_whole(opened[group[0]], how), how)}
    bare = _bare(opened[group[0]])
    root = _whole(bare, how)
    made = {name: _over(root, bare, opened[name], how) for name in group}
    for name, model in made.items():
        why = _why_not_beside(model)
        if why:
            reasons[name] = f"its adapters had to be merged: {why}"
            made[name] = _connected(_whole(opened[name], how), how)
    return made


def _connected(model: VisionLanguageModel, how: Holding) -> VisionLanguageModel:
    if how.split:
        split.connect(model)
    return model


@torch.no_grad()
def _why_not_beside(model: VisionLanguageModel) -> str:
    """Why a model can't be run with adapters beside its weights, found by trying it; empty if it can."""
    table: Any = model.get_input_embeddings()
    try:
        model.language_model(inputs_embeds=table.weight[None, :2], use_cache=False)
    except AttributeError as error:  # code that reads a layer's weight instead of calling the layer
        return str(error)
    return ""


def _whole(opened: OpenModel, how: Holding) -> VisionLanguageModel:
    with quiet():
        if how.quantised is None:
            model = materialise(opened, how.dtype)
        else:
            model = materialise_held(opened, how.quantised, how.dtype, how.dtype, how.device)
    if not how.split:
        return model.to(how.device).eval()  # type: ignore[arg-type]
    where = split.place(model, how.split, [split.free_bytes(device) for device in how.split])
    log.info("%s: layers on %s", opened.folder, split.said(where, how.split))
    return model.eval()


def _over(root: VisionLanguageModel, bare: OpenModel, opened: OpenModel, how: Holding) -> VisionLanguageModel:
    """A model with modules of its own and the tensors of `root`, which is `bare` made, wherever it has the same."""
    language = _copied(root.language_model)
    _give_own(language, bare, opened, how)
    vision = opened.part(names.VISION)
    seen = bare.part(names.VISION)
    alike = vision.keys() == seen.keys() and all(_same(seen[name], vision[name]) for name in vision)
    with quiet():
        if alike and not _differences(bare.config.vision_config, opened.config.vision_config):
            encoder = _copied(root.vision_encoder)
        else:
            encoder = read_part(opened, names.VISION, how.dtype).to(how.device)  # type: ignore[arg-type]
        model = join(opened, encoder, language, how.dtype)
    model.projector.to(how.device)
    if opened.config.image_newline:
        model.image_newline = nn.Parameter(model.image_newline.to(how.device), requires_grad=False)
    return _connected(model.eval(), how)


def _copied(module: Any) -> Any:
    return copy.deepcopy(module, sharing(module))


def _give_own(language: Any, bare: OpenModel, opened: OpenModel, how: Holding) -> None:
    """Put into a copy of the language model what `opened` has in other places than `bare`."""
    shared, places = bare.part(names.LANGUAGE), _places(opened)
    linear = {name.removeprefix(names.LANGUAGE) for name in (linear_weights(opened) if how.quantised else ())}
    tables = (language.get_input_embeddings(), language.get_output_embeddings())
    beside: list[tuple[str, list[Update]]] = []
    for name, tensor in opened.part(names.LANGUAGE).items():
        beneath, updates = _beneath(tensor)
        if not updates and _same(shared[name], tensor):
            continue
        place = places.place(name)
        assert place is not None  # `open_model` has checked it
        layer, _, leaf = place.rpartition(".")
        module = language.get_submodule(layer)
        if updates and _same(shared[name], beneath) and leaf == "weight" and _is_linear(module, tables):
            beside.append((layer, updates))
        elif name in linear:
            assert how.quantised is not None
            bias = None if module.bias is None else module.bias.detach()
            made = quantised_linear(tensor.read(), bias, how.quantised, how.dtype, how.device)
            _set(language, layer, made.eval())
        else:
            value = tensor.read().to(getattr(module, leaf).device, how.dtype, copy=True)
            setattr(module, leaf, nn.Parameter(value, requires_grad=False))
    language.tie_weights()
    for layer, updates in beside:  # last: a bias has its place in the layer itself
        a = torch.cat([update.a.read().float() for update in updates])
        b = torch.cat([update.b.read().float() * update.scale for update in updates], dim=1)
        base = language.get_submodule(layer)
        where = base.weight.device
        _set(language, layer, Beside(base, a.to(where, how.dtype), b.to(where, how.dtype)).eval())
    if how.quantised is not None:
        mark_quantised(language, how.quantised)


def _is_linear(module: nn.Module, tables: Sequence[nn.Module | None]) -> bool:
    """Whether what is added to the weight can be added to the output; tables are read in other ways too."""
    plain = isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D"
    return plain and all(module is not table for table in tables)


def _set(model: nn.Module, place: str, module: nn.Module) -> None:
    above, _, own = place.rpartition(".")
    setattr(model.get_submodule(above), own, module)


# ---- what is said ---------------------------------------------------------------------------------------------------


def held_by(model: nn.Module) -> dict[int, int]:
    """Bytes of a model's weights, by where they lie in memory."""
    return {p.data_ptr(): held_bytes(p) for p in model.parameters()}


def _say(groups: Sequence[Sequence[str]], made: Mapping[str, Loaded], reasons: Mapping[str, str]) -> None:
    if len(made) < 2:
        return
    for names_of_group in groups:
        group = [name for name in names_of_group if name not in reasons]
        if len(group) < 2:
            continue
        held = {name: held_by(made[name].model) for name in group}
        common = set.intersection(*map(set, held.values()))
        once = sum(size for place, size in held[group[0]].items() if place in common)
        own = {name: sum(size for place, size in held[name].items() if place not in common) for name in group}
        log.info(
            "%s share weights of %s, held once; of their own: %s",
            ", ".join(group),
            _size(once),
            ", ".join(f"{name} {_size(size)}" for name, size in own.items()),
        )
    for name, reason in reasons.items():
        log.info("%s shares no weights (%s): %s", name, reason, _size(sum(held_by(made[name].model).values())))


def _size(count: int) -> str:
    return f"{count / 1e9:.2f} GB" if count >= 1e8 else f"{count / 1e6:.2f} MB"
