"""Keys and values of answers in the making, and the attention that reads them.

Every answer in the making has a slot. What several prompts begin with (the system text and a picture, say) is computed
and held once, beside the slots. The tokens of one call lie end to end without padding: a prefix, the rests of prompts
behind their prefixes, or one new token for each slot. The attention function, registered with transformers' attention
interface, finds in the `Step` that it is handed which keys each token sees; whatever else a model asks of attention
(window, soft-capping, sinks, grouped heads) is honoured, and an argument that is not known here is refused.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from transformers import AttentionInterface

from lapilli.base.errors import ModelError
from lapilli.model.attention import foreign_arguments

SLOTS = "lapilli_slots"
"""Name under which the function is registered."""

_BLOCK_TOKENS = 192
"""Rests of prompts share calls of about this many tokens, with a mask between them: fewer calls against more products
that are masked away."""


def register() -> None:
    """Make `SLOTS` known to transformers; calling it again changes nothing."""
    AttentionInterface.register(SLOTS, slot_attention)


@dataclass(eq=False)
class Prefix:
    """What prompts have in common at their beginning: keys and values (Hk, P, d) of each layer."""

    length: int
    keys: list[torch.Tensor] = field(default_factory=list)
    values: list[torch.Tensor] = field(default_factory=list)


class SlotCache:
    """Keys and values of answers, what is not in a prefix: per layer (slots, Hk, capacity, d), grown as they need.

    Slots 0 to `active` - 1 are in use, without holes; `lengths` tokens are in each, behind its prefix.
    """

    def __init__(self) -> None:
        self.lengths: list[int] = []
        self.prefixes: list[Prefix | None] = []
        self.keys: list[torch.Tensor] = []
        self.values: list[torch.Tensor] = []

    @property
    def active(self) -> int:
        return len(self.lengths)

    def add(self, prefix: Prefix | None) -> int:
        """Take the next free slot and return its number."""
        self.lengths.append(0)
        self.prefixes.append(prefix)
        return self.active - 1

    def remove(self, row: int) -> None:
        """Free a slot; the last one moves into its place."""
        last = self.active - 1
        if row != last:
            length = self.lengths[last]
            for stored in (*self.keys, *self.values):
                stored[row, :, :length] = stored[last, :, :length]
            self.lengths[row], self.prefixes[row] = self.lengths[last], self.prefixes[last]
        self.lengths.pop()
        self.prefixes.pop()

    def position(self, row: int) -> int:
        """Where the next token of a slot stands in its text."""
        prefix = self.prefixes[row]
        return self.lengths[row] + (0 if prefix is None else prefix.length)

    def room(self, layer: int, like: torch.Tensor, length: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values of a layer, grown to hold `length` tokens in each active slot; `like` (1, Hk, T, d)."""
        if layer == len(self.keys):
            shape = (_rounded(self.active, 8), like.shape[1], _rounded(length, 128), like.shape[3])
            self.keys.append(like.new_zeros(shape))
            self.values.append(like.new_zeros(shape))
        rows, _, tokens, _ = self.keys[layer].shape
        if rows < self.active or tokens < length:
            more = (0, 0, 0, max(0, _rounded(length, 128) - tokens), 0, 0, 0, max(0, _rounded(self.active, 8) - rows))
            self.keys[layer], self.values[layer] = F.pad(self.keys[layer], more), F.pad(self.values[layer], more)
        return self.keys[layer], self.values[layer]


def _rounded(number: int, unit: int) -> int:
    return -(-number // unit) * unit


@dataclass(eq=False)
class Step:
    """What the tokens of one call are. Exactly one of the three kinds:

    - `making`: the tokens of a prefix that is made;
    - `rows` with `counts`: the rests of prompts, `counts` tokens for each slot, all behind the same `prefix`;
    - `rows` without: one token for each active slot.
    """

    cache: SlotCache
    making: Prefix | None = None
    rows: Sequence[int] = ()
    counts: Sequence[int] = ()
    prefix: Prefix | None = None
    layer: int = 0
    """The layer that attends next; counted here, since models number their layers in different ways."""
    masks: dict[Any, Any] = field(default_factory=dict)
    """What is the same in every layer, made by the first one: by its kind, and the layer's window and device."""

    def once(self, kind: str, window: int | None, device: torch.device, make: Callable[[], Any]) -> Any:
        """What `make` gives, made once for all layers of the same window on the same device."""
        key = kind, window, device
        if key not in self.masks:
            self.masks[key] = make()
        return self.masks[key]


@dataclass(frozen=True)
class _Form:
    """What a layer asks of attention beyond the plain form."""

    scale: float
    window: int | None
    softcap: float | None
    sinks: torch.Tensor | None

    @property
    def plain(self) -> bool:
        return self.softcap is None and self.sinks is None


def slot_attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    slots: Step | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Causal attention of the tokens of one `Step`, each to its own text.

    `query` (1, Hq, T, d), `key` and `value` (1, Hk, T, d); returns ((1, T, Hq, d), None). Raises ModelError for an
    argument that would change attention in a way not known here.
    """
    foreign = foreign_arguments(kwargs)
    if foreign or attention_mask is not None or slots is None:
        what = ", ".join(sorted(foreign)) or ("a mask" if attention_mask is not None else "no slots")
        raise ModelError(f"attention over slots can't serve {type(module).__name__}: it was given {what}")
    del dropout  # nothing is trained here
    form = _Form(scaling if scaling is not None else query.shape[-1] ** -0.5, sliding_window, softcap, s_aux)
    layer = slots.layer
    slots.layer += 1
    if slots.making is not None:
        slots.making.keys.append(key[0].clone())
        slots.making.values.append(value[0].clone())
        out = _attend(query, key, value, form)
    elif slots.counts:
        out = _rests(slots, layer, query, key, value, form)
    else:
        out = _next(slots, layer, query, key, value, form)
    return out.transpose(1, 2).contiguous(), None


# ---- a prefix, and the rests behind one -----------------------------------------------------------------------------


def _rests(
    step: Step, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, form: _Form
) -> torch.Tensor:
    keys, values = step.cache.room(layer, key, max(step.counts))
    counts = list(step.counts)
    for row, k, v in zip(step.rows, key.split(counts, dim=2), value.split(counts, dim=2), strict=True):
        keys[row, :, : k.shape[2]] = k[0]
        values[row, :, : v.shape[2]] = v[0]
    prefix = step.prefix
    if prefix is None:
        parts = (x.split(counts, dim=2) for x in (query, key, value))
        return torch.cat([_attend(q, k, v, form) for q, k, v in zip(*parts, strict=True)], dim=2)
    shared = prefix.length
    blocks = step.once("blocks", None, query.device, lambda: _blocks(counts))

    def make_masks() -> list[torch.Tensor]:
        seen = [_rests_mask(block, shared, form.window, query.device) for block in blocks]
        # Added to the scores, as the fused kernel does it: made once for all layers.
        return [torch.where(one, 0.0, float("-inf")).to(query.dtype) for one in seen] if form.plain else seen

    masks = step.once(f"rests, {form.plain}", form.window, query.device, make_masks)
    sizes = [sum(block) for block in blocks]
    all_keys, all_values = (_with_room(x, max(sizes)) for x in (prefix.keys[layer], prefix.values[layer]))
    outs: list[torch.Tensor] = []
    for size, mask, q, k, v in zip(sizes, masks, *(x.split(sizes, dim=2) for x in (query, key, value)), strict=True):
        all_keys[:, :, shared : shared + size], all_values[:, :, shared : shared + size] = k, v
        outs.append(_masked(q, all_keys[:, :, : shared + size], all_values[:, :, : shared + size], mask, form))
    return torch.cat(outs, dim=2)


def _with_room(prefix: torch.Tensor, tokens: int) -> torch.Tensor:
    """A prefix (Hk, P, d) with room for tokens behind it: (1, Hk, P + tokens, d)."""
    made = prefix.new_empty(1, prefix.shape[0], prefix.shape[1] + tokens, prefix.shape[2])
    made[0, :, : prefix.shape[1]] = prefix
    return made


def _blocks(counts: Sequence[int]) -> list[list[int]]:
    """Neighbours, together at most _BLOCK_TOKENS unless one alone has more."""
    made: list[list[int]] = []
    for count in counts:
        if made and sum(made[-1]) + count <= _BLOCK_TOKENS:
            made[-1].append(count)
        else:
            made.append([count])
    return made


def _rests_mask(counts: Sequence[int], shared: int, window: int | None, device: torch.device) -> torch.Tensor:
    """(T, shared + T) bool: each text sees the common beginning and what of it stands before."""
    own = torch.block_diag(*[torch.ones(n, n, dtype=torch.bool).tril() for n in counts])
    mask = torch.cat([own.new_ones(len(own), shared), own], dim=1)
    if window is not None:
        positions = torch.cat([torch.arange(n) for n in counts])[:, None]
        ages = torch.cat([torch.arange(shared, 0, -1) + positions, positions - positions.T], dim=1)
        mask &= ages < window
    return mask.to(device)


def _attend(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, form: _Form) -> torch.Tensor:
    """One whole text: `query` (1, Hq, T, d), `key` (1, Hk, T, d)."""
    length = query.shape[2]
    if form.plain and (form.window is None or length <= form.window):
        return F.scaled_dot_product_attention(
            query, key, value, is_causal=True, scale=form.scale, enable_gqa=query.shape[1] != key.shape[1]
        )
    ages = torch.arange(length, device=query.device)[:, None] - torch.arange(length, device=query.device)[None, :]
    mask = ages >= 0 if form.window is None else (ages >= 0) & (ages < form.window)
    return _masked(query, key, value, mask, form)


def _masked(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor, form: _Form
) -> torch.Tensor:
    """Attention under a mask (..., T, L), True where a key is seen; for the plain form also what is added to scores."""
    if form.plain:
        return F.scaled_dot_product_attention(
            query, key, value, attn_mask=mask, scale=form.scale, enable_gqa=query.shape[1] != key.shape[1]
        )
    out, top, total = _partial(query, key, value, mask, form)
    return _whole(out, top, total, form).to(query.dtype)


# ---- one token for each slot ----------------------------------------------------------------------------------------


def _next(
    step: Step, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, form: _Form
) -> torch.Tensor:
    """`query` (1, Hq, B, d): the next token of each active slot -> (1, Hq, B, d)."""
    cache = step.cache
    active, longest = cache.active, max(cache.lengths) + 1
    keys, values = cache.room(layer, key, longest)
    where = key.device
    places = step.once("places", None, where, lambda: torch.tensor(cache.lengths, device=where))
    numbers = step.once("numbers", None, where, lambda: torch.arange(active, device=where))
    keys[numbers, :, places] = key[0].transpose(0, 1)
    values[numbers, :, places] = value[0].transpose(0, 1)
    queries = query.transpose(0, 2)  # (B, Hq, 1, d)
    mask = step.once("own", form.window, where, lambda: _own_mask(places, longest, form.window))
    own = keys[:active, :, :longest], values[:active, :, :longest]
    groups = step.once("groups", form.window, where, lambda: _groups(cache, places, form.window))
    if not groups:
        return _masked(queries, *own, mask, form).transpose(0, 2)
    out, top, total = _partial(queries, *own, mask, form)
    for prefix, rows, seen in groups:
        asked = queries if rows is None else queries[rows]
        common = prefix.keys[layer][None], prefix.values[layer][None]
        found = [x.transpose(0, 2) for x in _partial(asked.transpose(0, 2), *common, seen, form)]
        _merge((out, top, total), slice(None) if rows is None else rows, found)
    return _whole(out, top, total, form).to(query.dtype).transpose(0, 2)


def _own_mask(places: torch.Tensor, longest: int, window: int | None) -> torch.Tensor:
    """(B, 1, 1, L) bool: which of its own keys each slot's new token sees."""
    ages = places[:, None] - torch.arange(longest, device=places.device)[None, :]
    mask = ages >= 0 if window is None else (ages >= 0) & (ages < window)
    return mask[:, None, None]


def _groups(
    cache: SlotCache, places: torch.Tensor, window: int | None
) -> list[tuple[Prefix, torch.Tensor | None, torch.Tensor | None]]:
    """Each prefix in use, its slots (None: all of them), and which of its keys they see (None: all of them)."""
    made: list[tuple[Prefix, torch.Tensor | None, torch.Tensor | None]] = []
    for prefix in {id(p): p for p in cache.prefixes if p is not None}.values():
        rows = torch.tensor([row for row, p in enumerate(cache.prefixes) if p is prefix], device=places.device)
        seen = None
        if window is not None:
            before = torch.arange(prefix.length, 0, -1, device=places.device)
            seen = (places[rows][:, None] + before[None, :]) < window
        made.append((prefix, None if len(rows) == cache.active else rows, seen))
    return made


def _partial(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None, form: _Form
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Attention to some of the keys, not yet divided: weighted values (..., Hq, T, d), largest score and sum of weights
    (..., Hq, T, 1), all float32."""
    groups = query.shape[1] // key.shape[1]
    grouped = query.unflatten(1, (key.shape[1], groups)).flatten(2, 3)  # (., Hk, groups * T, d)
    scores = (grouped @ key.transpose(-1, -2)).float() * form.scale
    if form.softcap is not None:
        scores = form.softcap * torch.tanh(scores / form.softcap)
    scores = scores.unflatten(2, (groups, query.shape[2])).flatten(1, 2)  # (., Hq, T, L)
    if mask is not None:
        scores = scores.masked_fill(~mask, float("-inf"))
    top = scores.amax(-1, keepdim=True).clamp_min(torch.finfo(torch.float32).min)
    weights = torch.exp(scores - top)
    total = weights.sum(-1, keepdim=True)
    weighted = weights.to(value.dtype).unflatten(1, (key.shape[1], groups)).flatten(2, 3) @ value
    return weighted.unflatten(2, (groups, query.shape[2])).flatten(1, 2).float(), top, total


def _merge(
    into: tuple[torch.Tensor, torch.Tensor, torch.Tensor], rows: torch.Tensor | slice, more: Sequence[torch.Tensor]
) -> None:
    """Add attention to further keys for some rows, in place: both halves are brought to the larger of their scores."""
    out, top, total = into
    higher = torch.maximum(top[rows], more[1])
    old, new = torch.exp(top[rows] - higher), torch.exp(more[1] - higher)
    out[rows] = out[rows] * old + more[0] * new
    total[rows] = total[rows] * old + more[2] * new
    top[rows] = higher


def _whole(out: torch.Tensor, top: torch.Tensor, total: torch.Tensor, form: _Form) -> torch.Tensor:
    """Divide by the sum of weights, a sink's weight among them."""
    if form.sinks is not None:
        total = total + torch.exp(form.sinks.view(1, -1, 1, 1).float() - top)
    return out / total
