"""How an Intel Gaudi executes: decided by a variable that its part of PyTorch reads when it is imported.

So the recipe's word must be turned into that variable before PyTorch is; nothing here imports it.
"""

import os
import sys
from collections.abc import MutableMapping
from importlib.util import find_spec

from lapilli.base.errors import RunError

PACKAGE = "habana_frameworks"
_LAZY, _INT64 = "PT_HPU_LAZY_MODE", "PT_ENABLE_INT64_SUPPORT"
_VALUES = {"eager": "0", "lazy": "1"}


def settle_mode(device: str, mode: str, environment: MutableMapping[str, str] | None = None) -> None:
    """Set what `run.hpu_mode` asks for, and that token numbers stay int64, for a run that may be on an HPU.

    Nothing is set where Gaudi's package is not installed, or imported already. Raises RunError where the environment
    says the contrary.
    """
    environment = os.environ if environment is None else environment
    if device not in ("auto", "hpu") or PACKAGE in sys.modules or find_spec(PACKAGE) is None:
        return
    wanted, found = _VALUES[mode], environment.get(_LAZY)
    if found not in (None, wanted):
        raise RunError(
            f"run.hpu_mode is {mode}, but {_LAZY}={found} is set, and means the contrary; unset it, or give "
            f"run.hpu_mode={'lazy' if found == '1' else 'eager'}"
        )
    environment[_LAZY] = wanted
    environment.setdefault(_INT64, "1")
