"""Whether the files that a recipe names are there: asked before a run, and before it is sent to a cluster."""

from collections.abc import Sequence
from pathlib import Path

from lapilli.base.errors import DataError
from lapilli.recipe.schema import Stage


def check_files(stages: Sequence[Stage]) -> None:
    """Raise DataError, naming all of them, for data files and picture folders that are not there.

    Said at once, before the first file is read from end to end.
    """
    missing = []
    for stage in stages:
        at = f"stage {stage.name}: data" if len(stages) > 1 else "data"
        for split, sources in (("train", stage.data.train), ("validation", stage.data.validation)):
            for source in sources:
                # A pattern over shards is resolved where it is opened.
                if "{" not in source.path and not Path(source.path).exists():
                    missing.append(f"{at}.{split}: {source.path}: no such file or folder")
                if source.images is not None and not Path(source.images).exists():
                    missing.append(f"{at}.images: {source.images}: no such folder (for pictures of {source.path})")
    if missing:
        raise DataError("\n".join(dict.fromkeys(missing)))
