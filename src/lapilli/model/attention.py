"""Attention over packed sequences, isolated per Example.

One function, registered with transformers' attention interface, serves every language model that goes through that
interface. No mask is ever built: the kernel is given the boundaries. On CUDA, half-precision segments go to PyTorch's
variable-length kernel in one call; elsewhere each segment goes to scaled_dot_product_attention by itself. What a model
asks of attention beyond the plain form (sliding window, soft-capping, sinks, grouped heads) is honoured here, and an
argument that is not known here is refused, because ignoring it would silently train another model.

Which kernel computes a segment may be chosen; the function is registered once for each choice, so that the choice goes
with a model and not with the process.
"""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, Literal, get_args

import torch
from torch import nn
from torch.nn import functional as F
from transformers import AttentionInterface

from lapilli.base.errors import ModelError

Kernel = Literal["auto", "flash_attention_2", "sdpa", "eager"]
"""`flash_attention_2`: all segments in one call of PyTorch's variable-length kernel; `sdpa`: each by
scaled_dot_product_attention; `eager`: written out. `auto` takes the first that can do what is asked."""

PACKED = "lapilli_packed"
"""Name under which the function is registered, and value of `_attn_implementation` while packed."""

_IRRELEVANT = frozenset(
    {
        # Said to every attention function; they matter to caches, masks, outputs or rotary embeddings, not here.
        "position_ids", "cache_position", "use_cache", "output_attentions", "output_hidden_states", "return_dict",
        "position_embeddings", "num_items_in_batch", "layer_idx", "cache_params", "attn_implementation",
        "max_length_q", "max_length_k", "cu_seq_lens_k", "is_causal", "logits_to_keep", "output_router_logits",
    }
)  # fmt: skip


def register() -> None:
    """Make `PACKED` known to transformers, and its other kernels; calling it again changes nothing.

    Compiled layers call it as it is: how many segments there are differs from batch to batch. Rows of one length are
    compiled with their layer.
    """
    segments = torch.compiler.disable(packed_attention)
    for kernel in get_args(Kernel):
        AttentionInterface.register(packed_name(kernel), partial(_registered, segments=segments, kernel=kernel))


def _registered(*args: Any, segments: Callable[..., Any], packed_rows: int | None = None, **kwargs: Any) -> Any:
    if packed_rows is None:
        return segments(*args, **kwargs)
    return packed_attention(*args, packed_rows=packed_rows, **kwargs)


def packed_name(kernel: Kernel) -> str:
    """Value of `_attn_implementation` for packed attention by this kernel."""
    return PACKED if kernel == "auto" else f"{PACKED}_{kernel}"


def foreign_arguments(kwargs: Mapping[str, Any]) -> set[str]:
    """Names of arguments of an attention function that say something, and something that is not known here."""
    return {k for k, v in kwargs.items() if v is not None and k not in _IRRELEVANT}


def packed_attention(
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
    cu_seq_lens_q: torch.Tensor | None = None,
    packed_rows: int | None = None,
    kernel: Kernel = "auto",
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Causal attention inside each segment of a packed sequence.

    `query` (1, Hq, T, d), `key` and `value` (1, Hk, T, d), `cu_seq_lens_q` (N+1,) segment boundaries; `sliding_window`
    in tokens; `softcap` bounds the logits by tanh (Gemma 2); `s_aux` (Hq,) are sink logits (gpt-oss). `packed_rows`
    says that there are so many segments, all of one length: they are then computed side by side, and their length is
    not read from the device. Returns ((1, T, Hq, d), None). Raises ModelError for an argument that would change
    attention in a way not known here, and where the `kernel` that is named can't do what is asked.
    """
    foreign = foreign_arguments(kwargs)
    if foreign or attention_mask is not None or cu_seq_lens_q is None:
        what = ", ".join(sorted(foreign)) or ("a mask" if attention_mask is not None else "no segment boundaries")
        raise ModelError(f"packed attention can't serve {type(module).__name__}: it was given {what}")
    scale = scaling if scaling is not None else query.shape[-1] ** -0.5
    plain = softcap is None and s_aux is None
    if kernel in ("auto", "flash_attention_2"):
        why_not = _why_not_varlen(query, plain, dropout)
        if not why_not:
            return _varlen(query, key, value, cu_seq_lens_q, scale, sliding_window), None
        if kernel == "flash_attention_2":
            raise ModelError(f"run.attention: flash_attention_2 can't serve {type(module).__name__}: {why_not}")
    if kernel == "sdpa" and not plain:
        raise ModelError(f"run.attention: sdpa can't serve {type(module).__name__}: {_BEYOND}; use auto or eager")

    groups = query.shape[1] // key.shape[1]
    if groups > 1:
        key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
    if packed_rows is None:
        lengths = (cu_seq_lens_q[1:] - cu_seq_lens_q[:-1]).tolist()
        # `split` and not slices: its backward pass is one concatenation, where every slice would fill a whole tensor.
        parts = (x.split(lengths, dim=2) for x in (query, key, value))
    else:
        lengths = [query.shape[2] // packed_rows]
        parts = ([x[0].unflatten(1, (packed_rows, -1)).transpose(0, 1)] for x in (query, key, value))
    outputs = []
    for length, q, k, v in zip(lengths, *parts, strict=True):
        window = sliding_window if sliding_window is not None and length > sliding_window else None
        if plain and kernel != "eager":
            mask = _causal(length, window, q.device) if window is not None else None
            out = F.scaled_dot_product_attention(
                q, k, v, attn_mask=mask, dropout_p=dropout, is_causal=mask is None, scale=scale
            )
        else:
            out = _explicit(q, k, v, scale, window, softcap, s_aux, dropout)
        outputs.append(out)
    if packed_rows is not None:  # (rows, Hq, length, d)
        return outputs[0].transpose(1, 2).flatten(0, 1)[None], None
    return torch.cat(outputs, dim=2).transpose(1, 2).contiguous(), None


_BEYOND = "it caps its logits or adds sinks, which fused kernels don't do"


def _why_not_varlen(query: torch.Tensor, plain: bool, dropout: float) -> str:
    """Why the variable-length kernel can't be used; empty if it can."""
    if not query.is_cuda or query.dtype not in (torch.bfloat16, torch.float16):
        return f"it is for half precision on CUDA, not for {str(query.dtype).removeprefix('torch.')} on {query.device}"
    if not plain:
        return _BEYOND
    return "" if dropout == 0 else f"its attention has dropout ({dropout}), which that kernel does not do"


def _varlen(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    bounds: torch.Tensor,
    scale: float,
    window: int | None,
) -> torch.Tensor:
    from torch.nn.attention.varlen import varlen_attn

    longest = int((bounds[1:] - bounds[:-1]).max())
    q, k, v = (x[0].transpose(0, 1).contiguous() for x in (query, key, value))
    # transformers counts the token itself in its window, the kernel counts the tokens before it.
    left = window - 1 if window is not None else -1
    out = varlen_attn(
        q,
        k,
        v,
        bounds,
        bounds,
        longest,
        longest,
        scale=scale,
        window_size=(left, 0),
        enable_gqa=q.shape[1] != k.shape[1],
    )
    assert isinstance(out, torch.Tensor)
    return out[None]


def _causal(length: int, window: int | None, device: torch.device) -> torch.Tensor:
    """Boolean (length, length) mask, True where attention is allowed."""
    distance = torch.arange(length, device=device)[:, None] - torch.arange(length, device=device)[None, :]
    return (distance >= 0) if window is None else (distance >= 0) & (distance < window)


def _explicit(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    scale: float,
    window: int | None,
    softcap: float | None,
    sinks: torch.Tensor | None,
    dropout: float,
) -> torch.Tensor:
    """Attention written out, for what fused kernels don't offer."""
    scores = (q @ k.transpose(-1, -2)) * scale
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    scores = scores.masked_fill(~_causal(q.shape[2], window, q.device), torch.finfo(scores.dtype).min)
    if sinks is not None:
        scores = torch.cat([scores, sinks.view(1, -1, 1, 1).expand(*scores.shape[:3], 1).to(scores.dtype)], dim=-1)
    weights = torch.softmax(scores.float(), dim=-1).to(v.dtype)
    if sinks is not None:
        weights = weights[..., :-1]
    return F.dropout(weights, dropout) @ v
