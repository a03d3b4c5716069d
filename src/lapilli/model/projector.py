"""Projectors: from the vision encoder's features to the language model's embedding space.

The names are LLaVA's: `linear`, `mlp{N}x_gelu` and `identity`. Parameters are numbered as in LLaVA's checkpoints
(`0.weight`, `2.weight`, ...), so a `mm_projector.bin` maps one to one.
"""

import re
from collections.abc import Iterable

from torch import nn

from lapilli.base.errors import ModelError, nearest

_MLP = re.compile(r"mlp([1-9][0-9]*)x_gelu")
KNOWN = ("linear", "mlp2x_gelu", "mlp3x_gelu", "identity")


def check_projector(name: str) -> None:
    """Raise ModelError, with the nearest valid name, unless `name` is a projector."""
    if name not in ("linear", "identity") and not _MLP.fullmatch(name):
        known: Iterable[str] = KNOWN
        raise ModelError(
            f'unknown projector "{name}"{nearest(name, known)}; known: linear, identity, mlpNx_gelu (N layers)'
        )


def build_projector(name: str, vision_hidden_size: int, hidden_size: int) -> nn.Module:
    """Return a randomly initialised projector mapping (..., vision_hidden_size) to (..., hidden_size).

    Raises ModelError for an unknown name, and for `identity` between different widths.
    """
    check_projector(name)
    if name == "identity":
        if vision_hidden_size != hidden_size:
            raise ModelError(
                f"projector identity needs equal widths; vision features have {vision_hidden_size}, "
                f"the language model {hidden_size} (use linear or mlp2x_gelu)"
            )
        return nn.Identity()
    if name == "linear":
        return nn.Linear(vision_hidden_size, hidden_size)
    match = _MLP.fullmatch(name)
    assert match is not None
    layers: list[nn.Module] = [nn.Linear(vision_hidden_size, hidden_size)]
    for _ in range(int(match.group(1)) - 1):
        layers += [nn.GELU(), nn.Linear(hidden_size, hidden_size)]
    return nn.Sequential(*layers)
