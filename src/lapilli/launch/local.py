"""A run in several processes of this machine: torchrun, told to hand on signals and to wait for what is saved.

torchrun by itself knows nothing of SIGUSR1, and kills what it started 30 seconds after any other signal. Here it hands
on every signal that is a wish to stop and waits as long as a SLURM job would. When a process dies it ends the others
and starts all of them again, `restarts` times; the run goes on from its newest checkpoint.
"""

import signal
from collections.abc import Sequence
from dataclasses import fields

from lapilli.base.errors import RecipeError, RunError
from lapilli.launch.command import SAVE_SECONDS, SIGNALS, train_words


def torchrun_words(recipe: str, overrides: Sequence[str], processes: int, restarts: int) -> list[str]:
    """The words after `torchrun`."""
    return [
        "--standalone",
        *("--nproc-per-node", str(processes)),
        *("--max-restarts", str(restarts)),
        *patience(),
        "-m",
        "lapilli.cli",
        *train_words(recipe, overrides),
    ]


def patience() -> list[str]:
    """What has torchrun hand on all signals and wait until the run is saved."""
    return ["--signals-to-handle", SIGNALS, "--shutdown-timeout", str(SAVE_SECONDS)]


def default_processes() -> int:
    """One for each CUDA device. Raises RecipeError where there is none."""
    import torch

    if not torch.cuda.is_available():
        raise RecipeError("there is no CUDA device to count; say how many processes: --processes N")
    return torch.cuda.device_count()


def start(words: Sequence[str]) -> str | None:
    """Run torchrun in this process; return the name of the signal that stopped it, None for a run that is done.

    Raises RunError if a process failed and there are no restarts left, and for a torch whose torchrun would not wait
    until the run is saved.
    """
    from torch.distributed.elastic.multiprocessing import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig
    from torch.distributed.run import main

    absent = {"signals_to_handle", "shutdown_timeout"} - {field.name for field in fields(LaunchConfig)}
    if absent:
        raise RunError(
            f"the torchrun of this torch can't be told {', '.join(sorted(absent))}, and would kill a run that is being "
            "saved; install a newer torch (2.13 can), or start torchrun yourself"
        )
    try:
        main(list(words))
    except SignalException as stopped:
        return signal.Signals(stopped.sigval).name
    except ChildFailedError as failed:
        rank, failure = failed.get_first_failure()
        status = failure.exitcode
        how = f"was killed by {failure.signal_name()}" if status < 0 else f"ended with status {status}"
        raise RunError(
            f"process {rank} {how}, and no restart is left; its last words stand above. The same command goes on from "
            "the newest checkpoint"
        ) from failed
    return None
