"""The original's flags that hold a language model's layers in fewer bits, for all verbs that ask one."""

from typing import Literal

from lapilli.base.errors import RunError


def held(load_8bit: bool, load_4bit: bool) -> Literal["int8", "nf4"] | None:
    """What `--load-8bit` and `--load-4bit` ask for. Raises RunError for both."""
    if load_8bit and load_4bit:
        raise RunError("--load-8bit and --load-4bit: give one of them")
    return "int8" if load_8bit else "nf4" if load_4bit else None
