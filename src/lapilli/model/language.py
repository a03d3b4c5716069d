"""Language models: any Hugging Face causal language model, fed with packed sequences.

Two things differ between them and are found out once, on a shrunken copy: whether attention goes through transformers'
attention interface, so that segments can be isolated without padding (`varlen`; otherwise `padded`), and whether the
output layer may be applied to chosen positions alone (`direct`; otherwise the model's own forward pass must do it,
`forward`, as for models that scale or cap their logits).
"""

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from lapilli.base.errors import ModelError
from lapilli.model import attention
from lapilli.model.shrink import SHRINK_ERRORS, shrunken

Packing = Literal["varlen", "padded"]
Head = Literal["direct", "forward"]

_TOLERANCE = 1e-4


@dataclass(frozen=True)
class LanguageTraits:
    packing: Packing
    head: Head
    reason: str = ""
    """Why packing is not `varlen`; empty where it is."""


def native_attention(model: PreTrainedModel) -> str:
    """The attention implementation of PyTorch that a model offers: fused where it can, written out where it can't."""
    inner: Any = getattr(model, "base_model", model)
    return "sdpa" if getattr(inner, "_supports_sdpa", False) else "eager"


def use_attention(language_model: PreTrainedModel, name: str) -> str:
    """Set the attention implementation of every layer and return the one before.

    The setting stays until it is changed: with gradient checkpointing, layers run again during the backward pass.
    """
    before: Any = language_model.config._attn_implementation
    if before != name:
        for module in language_model.modules():
            config = getattr(module, "config", None)
            if isinstance(config, PreTrainedConfig):
                config._attn_implementation = name
    return before


def packed_states(
    language_model: PreTrainedModel,
    embeds: torch.Tensor,
    position_ids: torch.Tensor,
    cu_seqlens: torch.Tensor,
    packing: Packing,
    kernel: attention.Kernel = "auto",
    rows: int | None = None,
) -> torch.Tensor:
    """Run the layers over a packed sequence: embeds (T, D), position_ids (T,), cu_seqlens (N+1,) -> states (T, D).

    `rows` says that there are so many segments, all of one length; then no shape depends on what is in `cu_seqlens`.
    """
    base = language_model.base_model
    if packing == "varlen":
        use_attention(language_model, attention.packed_name(kernel))
        return base(
            inputs_embeds=embeds[None],
            position_ids=position_ids[None],
            use_cache=False,
            cu_seq_lens_q=cu_seqlens,
            cu_seq_lens_k=cu_seqlens,
            **_said_of(rows),
        ).last_hidden_state[0]
    if kernel != "auto":
        use_attention(language_model, kernel)
    padded, mask = to_padded(embeds, cu_seqlens, rows)
    states = base(inputs_embeds=padded, attention_mask=mask, use_cache=False).last_hidden_state
    return states.flatten(0, 1) if rows is not None else states[mask.bool()]


def packed_logits(
    language_model: PreTrainedModel,
    embeds: torch.Tensor,
    position_ids: torch.Tensor,
    cu_seqlens: torch.Tensor,
    keep: torch.Tensor,
    packing: Packing,
    kernel: attention.Kernel = "auto",
    rows: int | None = None,
) -> torch.Tensor:
    """As `packed_states`, through the model's own output layer, at positions `keep` (S,): logits (S, V)."""
    if packing == "varlen":
        use_attention(language_model, attention.packed_name(kernel))
        return language_model(
            inputs_embeds=embeds[None],
            position_ids=position_ids[None],
            use_cache=False,
            logits_to_keep=keep,
            cu_seq_lens_q=cu_seqlens,
            cu_seq_lens_k=cu_seqlens,
            **_said_of(rows),
        ).logits[0]
    if kernel != "auto":
        use_attention(language_model, kernel)
    padded, mask = to_padded(embeds, cu_seqlens, rows)
    logits = language_model(inputs_embeds=padded, attention_mask=mask, use_cache=False).logits
    return (logits.flatten(0, 1) if rows is not None else logits[mask.bool()])[keep]


def _said_of(rows: int | None) -> dict[str, int]:
    """What attention is told of rows; nothing where there are none, since models pass on whatever they are given."""
    return {} if rows is None else {"packed_rows": rows}


def to_padded(
    embeds: torch.Tensor, cu_seqlens: torch.Tensor, rows: int | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Lay packed embeds (T, D) out as (N, longest, D), padded on the right, with a mask (N, longest) of ones."""
    if rows is not None:
        padded = embeds.unflatten(0, (rows, -1))
        return padded, torch.ones(padded.shape[:2], dtype=torch.long, device=embeds.device)
    parts = torch.split(embeds, (cu_seqlens[1:] - cu_seqlens[:-1]).tolist())
    padded = nn.utils.rnn.pad_sequence(list(parts), batch_first=True)
    lengths = torch.tensor([len(p) for p in parts], device=embeds.device)
    mask = torch.arange(padded.shape[1], device=embeds.device)[None] < lengths[:, None]
    return padded, mask.long()


def _segments(hidden_size: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    lengths = (7, 1, 12, 5)
    embeds = torch.randn(sum(lengths), hidden_size)
    positions = torch.cat([torch.arange(n) for n in lengths])
    bounds = torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()], dtype=torch.int32)
    return embeds, positions, bounds


def probe_language(config: PreTrainedConfig) -> LanguageTraits:
    """Find out, on a shrunken random copy, how this architecture takes packed sequences.

    Packed logits are compared with those of each segment run alone. Raises ModelError if the architecture can't be
    used at all: it takes no embeddings, or padding changes its answers.
    """
    attention.register()
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        try:
            model: Any = shrunken(config, AutoModelForCausalLM.from_config).eval()
            embeds, positions, bounds = _segments(model.get_input_embeddings().weight.shape[1])
            alone = torch.cat(
                [
                    model(inputs_embeds=embeds[None, a:b], use_cache=False).logits[0]
                    for a, b in zip(bounds[:-1].tolist(), bounds[1:].tolist(), strict=True)
                ]
            )
        except SHRINK_ERRORS as error:
            raise ModelError(f"{config.model_type} can't be used as a language model: {error}") from error
        native = model.config._attn_implementation
        reasons = []
        for packing in ("varlen", "padded"):
            use_attention(model, native)
            try:
                keep = torch.arange(len(embeds))
                logits = packed_logits(model, embeds, positions, bounds, keep, packing)
                difference = _difference(logits, alone)
                if difference < _TOLERANCE:
                    return LanguageTraits(
                        packing, _probe_head(model, embeds, positions, bounds, packing, alone), "; ".join(reasons)
                    )
                reasons.append(f"{packing}: logits differ by {difference:.1e} from those of unpacked sequences")
            except (*SHRINK_ERRORS, ModelError) as error:
                reasons.append(f"{packing}: {error}")
    raise ModelError(f"{config.model_type} can't be used as a language model: {'; '.join(reasons)}")


def _probe_head(
    model: PreTrainedModel,
    embeds: torch.Tensor,
    positions: torch.Tensor,
    bounds: torch.Tensor,
    packing: Packing,
    expected: torch.Tensor,
) -> Head:
    states = packed_states(model, embeds, positions, bounds, packing)
    logits = output_layer(model)(states)
    return "direct" if _difference(logits, expected) < _TOLERANCE else "forward"


def _difference(a: torch.Tensor, b: torch.Tensor) -> float:
    """Largest difference, relative to the spread of the expected values."""
    if a.shape != b.shape:
        return float("inf")
    return float((a - b).abs().max() / b.std().clamp_min(1e-12))


def output_layer(language_model: PreTrainedModel) -> nn.Module:
    """Return the output embeddings. Raises ModelError for a model that has none."""
    layer: Any = language_model.get_output_embeddings()
    if layer is None:
        raise ModelError(f"{type(language_model).__name__} has no output embeddings")
    return layer
