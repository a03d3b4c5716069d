"""Upload of a finished folder to the Hugging Face Hub, only when it is asked for.

Whatever would make the upload fail that can be known beforehand (no token, offline mode, a name that is none) is said
before a conversion begins.
"""

from __future__ import annotations

import os
from pathlib import Path

from huggingface_hub import HfApi, constants, get_token
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, OfflineModeIsEnabled
from huggingface_hub.utils import validate_repo_id

from lapilli.base.errors import RecipeError, RunError


def check_hub(repo: str) -> None:
    """Raise RecipeError for a name that can't be a repository, RunError if nothing can be uploaded from here."""
    try:
        validate_repo_id(repo)
    except HFValidationError as error:
        raise RecipeError(f"--push-to-hub {repo}: no name of a repository ({str(error).splitlines()[0]})") from error
    if constants.HF_HUB_OFFLINE:
        raise RunError("--push-to-hub: HF_HUB_OFFLINE is set, so nothing can be uploaded")
    if get_token() is None:
        raise RunError("--push-to-hub: no Hugging Face token here; log in with `hf auth login` or set HF_TOKEN")


def push(folder: Path, repo: str) -> str:
    """Upload `folder` to the repository, which is made, private, if it is not there; return its address.

    Raises RunError with the Hub's answer; the folder stays as it is.
    """
    api = HfApi()
    try:
        address = api.create_repo(repo, private=True, exist_ok=True)
        api.upload_folder(repo_id=address.repo_id, folder_path=os.fspath(folder), commit_message="Converted by lapilli")
    except (HfHubHTTPError, OfflineModeIsEnabled, OSError) as error:
        raise RunError(
            f"{folder}: written, but not uploaded to {repo} ({' '.join(str(error).split())}); upload it with "
            f"`hf upload {repo} {folder}`"
        ) from error
    return str(address)
