"""lapilli: build, train, convert, evaluate and serve LLaVA-style vision-language models.

Importing the package is instant. `lapilli.load` and `lapilli.build` bring in PyTorch when they are first used, and
make our own `model_type` known to transformers' Auto classes; where transformers is imported already, importing
lapilli does so at once.
"""

import sys
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lapilli.assemble.build import build as build
    from lapilli.generate.assistant import Assistant as Assistant
    from lapilli.generate.assistant import load as load
    from lapilli.model.vlm import VisionLanguageModel as VisionLanguageModel

from lapilli.base.version import VERSION

__version__ = VERSION

_PUBLIC = {
    "load": "lapilli.generate.assistant",
    "Assistant": "lapilli.generate.assistant",
    "build": "lapilli.assemble.build",
    "VisionLanguageModel": "lapilli.model.vlm",
}
__all__ = ["Assistant", "VisionLanguageModel", "build", "load"]


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module 'lapilli' has no attribute {name!r}")
    import_module("lapilli.model.vlm").register()
    return getattr(import_module(_PUBLIC[name]), name)


if "transformers" in sys.modules:
    import_module("lapilli.model.vlm").register()
