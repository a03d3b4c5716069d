"""Which device a run uses. All that differs between devices is behind these small classes."""

import torch

from lapilli.train.device.cpu import Cpu
from lapilli.train.device.cuda import Cuda

Device = Cpu | Cuda


def choose_device(name: str, local_rank: int = 0) -> Device:
    """Return the device of that name; `auto` is CUDA where PyTorch sees it, else the CPU.

    `local_rank` is the number of this process on its machine, which decides among several GPUs.

    Raises RunError for a device that is not there.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    return Cuda(local_rank) if name == "cuda" else Cpu()
