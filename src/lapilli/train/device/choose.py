"""Which device a run uses. All that differs between devices is behind these small classes."""

import torch
import torch.distributed as dist

from lapilli.train.device import hpu
from lapilli.train.device.cpu import Cpu
from lapilli.train.device.cuda import Cuda
from lapilli.train.device.hpu import Hpu
from lapilli.train.device.hpu_mode import settle_mode

Device = Cpu | Cuda | Hpu


def choose_device(name: str, local_rank: int = 0, hpu_mode: str = "eager") -> Device:
    """Return the device of that name; `auto` is CUDA where PyTorch sees it, else a Gaudi, else the CPU.

    `local_rank` is the number of this process on its machine, which decides among several GPUs; `hpu_mode` says how a
    Gaudi executes.

    Raises RunError for a device that is not there.
    """
    settle_mode(name, hpu_mode)
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "hpu" if hpu.is_there() else "cpu"
    if name == "hpu":
        return Hpu(hpu_mode)
    return Cuda(local_rank) if name == "cuda" else Cpu()


def back_ends(local_rank: int) -> str:
    """What the processes of a run talk through, by kind of device, as torch.distributed takes it.

    It is asked before the run's device is known: whatever this machine has is made ready.
    """
    if torch.cuda.is_available() and dist.is_nccl_available():
        return "cpu:gloo,cuda:nccl"
    return hpu.join_others(local_rank) if hpu.is_there() else "gloo"
