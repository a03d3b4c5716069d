"""What PyTorch's `torch.hpu` is."""

import torch

import habana_frameworks
from habana_frameworks import calls


class random:
    @staticmethod
    def manual_seed_all(seed):
        calls.append(("seed", seed))

    @staticmethod
    def get_rng_state():
        calls.append("get_rng_state")
        return torch.tensor([7], dtype=torch.uint8)

    @staticmethod
    def set_rng_state(state):
        calls.append(("set_rng_state", state.tolist()))


def is_available():
    return habana_frameworks.devices > 0


def current_device():
    return 0


def get_device_name():
    return "GAUDI2"


def max_memory_allocated():
    return 123_456
