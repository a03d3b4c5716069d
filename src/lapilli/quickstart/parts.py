"""Both parts at the same time, in a process of one thread each.

Models this small keep one core busy and two threads waiting for each other; and where another program wants a core as
well, waiting threads cost more than they bring.
"""

import os
import subprocess
import sys
from pathlib import Path

import torch
import typer
from transformers import AutoTokenizer
from transformers.utils import logging as transformers_logging

from lapilli.base.errors import RunError
from lapilli.base.memory import keep_freed_memory
from lapilli.quickstart.language import train_language
from lapilli.quickstart.plan import Paths, Sizes
from lapilli.quickstart.scans import load_scans
from lapilli.quickstart.vision import train_vision

PARTS = ("language", "vision")


def make_parts(root: Path, sizes: Sizes) -> None:
    """Train both parts into `root`, where the tokenizer is already. Their lines go to standard output.

    Raises RunError if one of them fails; the other is stopped then.
    """
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "lapilli.quickstart.parts"]
    running = {
        part: subprocess.Popen([*command, part, str(root), sizes.model_dump_json()], env=environment) for part in PARTS
    }
    try:
        for part, process in running.items():
            if process.wait():
                raise RunError(f"making the {part} part ended with status {process.returncode}; its message is above")
    finally:
        for process in running.values():
            process.terminate()
            process.wait()


def make_part(part: str, root: Path, sizes: Sizes) -> None:
    """Train one part in this process, on one thread."""
    torch.set_num_threads(1)
    keep_freed_memory()
    transformers_logging.disable_progress_bar()
    paths = Paths(root)
    tokenizer = AutoTokenizer.from_pretrained(paths.language_model)
    if part == "language":
        train_language(
            tokenizer,
            paths.language_model,
            seed=sizes.seed,
            steps=sizes.language_steps,
            batch_size=sizes.language_batch,
            say=typer.echo,
        )
    else:
        train_vision(
            load_scans(sizes.seed)[0],
            tokenizer,
            paths.vision_encoder,
            seed=sizes.seed,
            steps=sizes.vision_steps,
            batch_size=sizes.vision_batch,
            say=typer.echo,
        )


if __name__ == "__main__":
    make_part(sys.argv[1], Path(sys.argv[2]), Sizes.model_validate_json(sys.argv[3]))
