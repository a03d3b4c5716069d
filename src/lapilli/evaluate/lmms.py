"""What lmms-eval finds under its entry point `lmms_eval.models`: that a model called `lapilli` exists, and where.

Kept apart from the model itself, because lmms-eval reads this while it is still being imported.
"""

from __future__ import annotations

from typing import Any


def manifest() -> Any:
    """lmms-eval's description of the model that `--model lapilli` names."""
    from lmms_eval.models.registry_v2 import ModelManifest

    return ModelManifest(model_id="lapilli", simple_class_path="lapilli.evaluate.lmms_model.Lapilli")
