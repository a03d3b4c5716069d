"""Errors a user can act on.

Everything lapilli refuses is a `LapilliError` whose message names the file, the record and the field, and says what
to do. The command line prints the message alone; a traceback means a defect of ours.
"""

from collections.abc import Iterable
from difflib import get_close_matches


class LapilliError(Exception):
    """Base of every error that the user, not the programmer, can mend."""


class RecipeError(LapilliError):
    """A recipe, an override or a command-line value is wrong."""


class DataError(LapilliError):
    """A record, an image or a data file is wrong."""


class ModelError(LapilliError):
    """A model folder, or one of the parts of a model, can't be used."""


class RunError(LapilliError):
    """A training run can't start or can't go on."""


def nearest(name: str, valid: Iterable[str]) -> str:
    """Return ` (did you mean "x"?)` for the valid name closest to `name`, or an empty string if none is close."""
    close = get_close_matches(name, list(valid), n=1, cutoff=0.5)
    return f' (did you mean "{close[0]}"?)' if close else ""


def unknown(kind: str, name: str, valid: Iterable[str]) -> str:
    """Word the refusal of an unknown name: the name, the nearest valid one, and the whole list."""
    valid = sorted(valid)
    return f'unknown {kind} "{name}"{nearest(name, valid)}; known: {", ".join(valid)}'
