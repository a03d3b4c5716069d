"""The mode, which is read once, when PyTorch is imported."""

import os

_lazy = os.environ.get("PT_HPU_LAZY_MODE", "0") == "1"


def is_lazy():
    return _lazy
