"""Small random copies of a model, of the same architecture.

Probing (which form of packing a language model allows, what an encoder's tokens are, whether transformers' own class
can hold a joined model) runs on these, so that it takes a second whatever the model's size. The width of an attention
head is kept, because rotary tables and the like are written for it.
"""

import copy
from collections.abc import Callable
from typing import Any

import torch
from transformers import PreTrainedConfig, PreTrainedModel

SHRINK_ERRORS = (ValueError, RuntimeError, TypeError, AttributeError, IndexError, KeyError, AssertionError)
"""What building or running an unsuitable model raises; third-party model code has no narrower contract."""

_LAYERS = 3
_VOCABULARY = 128


def _narrow(config: PreTrainedConfig) -> None:
    heads = config.num_attention_heads
    key_value_heads = getattr(config, "num_key_value_heads", None) or heads
    group = max(1, heads // key_value_heads)
    width = getattr(config, "head_dim", None) or config.hidden_size // heads
    config.num_attention_heads = 2 * group
    if getattr(config, "num_key_value_heads", None):
        config.num_key_value_heads = 2
    config.hidden_size = 2 * group * width
    for name in ("intermediate_size", "ffn_dim", "d_ff"):
        if isinstance(getattr(config, name, None), int):
            setattr(config, name, 2 * config.hidden_size)
    for name in ("num_local_experts", "num_experts", "n_routed_experts"):
        if isinstance(getattr(config, name, None), int):
            setattr(config, name, min(getattr(config, name), 4))


def _shorten(config: PreTrainedConfig) -> None:
    for name in ("layer_types", "mlp_layer_types"):
        kinds = getattr(config, name, None)
        if kinds and not isinstance(getattr(type(config), name, None), property):
            # One layer of each kind the model has, then as many of the first as are missing.
            distinct = list(dict.fromkeys(kinds))
            setattr(config, name, (distinct + kinds)[: max(_LAYERS, len(distinct))])
    kinds = getattr(config, "layer_types", None)
    config.num_hidden_layers = len(kinds) if kinds else _LAYERS
    if isinstance(getattr(config, "sliding_window", None), int):
        # Short enough that probing with a few tokens reaches beyond the window.
        config.sliding_window = 4
    if getattr(config, "vocab_size", None):
        config.vocab_size = _VOCABULARY
        for name in ("pad_token_id", "bos_token_id", "eos_token_id"):
            if getattr(config, name, None) is not None:
                setattr(config, name, 0)


def shrink_config(config: PreTrainedConfig, *, narrow: bool = True) -> PreTrainedConfig:
    """Return a copy of `config` with three layers and 128 tokens, and (with `narrow`) two heads per group."""
    small = copy.deepcopy(config)
    _shorten(small)
    if narrow:
        _narrow(small)
    return small


def shrunken(config: PreTrainedConfig, make: Callable[[Any], Any], seed: int = 0) -> PreTrainedModel:
    """Build a small random float32 model of `config`'s architecture with `make` (an Auto class's `from_config`).

    Architectures whose width can't be cut freely are only shortened. Weights are spread out, so that differences in
    attention show in the output.
    """
    torch.manual_seed(seed)
    try:
        model = make(_plain(shrink_config(config)))
    except SHRINK_ERRORS:
        model = make(_plain(shrink_config(config, narrow=False)))
    model = model.float()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=0.1)
    return model


def _plain(config: PreTrainedConfig) -> PreTrainedConfig:
    config.dtype = torch.float32
    return config
