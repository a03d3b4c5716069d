"""Named tensors in numbered safetensors files.

Written one file at a time, so that no more than one file's bytes are copied from the device at once. Names are the
model's own; which device or process held a tensor leaves no trace.
"""

from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from lapilli.base.errors import RunError

FILE_BYTES = 4 * 2**30


def write_tensors(folder: Path, kind: str, tensors: Iterable[tuple[str, torch.Tensor]]) -> None:
    """Write tensors as `<kind>-00001.safetensors` and so on; a file may exceed FILE_BYTES by one tensor."""
    pending: dict[str, torch.Tensor] = {}
    size, number = 0, 0
    for name, tensor in tensors:
        pending[name] = tensor.detach().to("cpu").contiguous()
        size += tensor.numel() * tensor.element_size()
        if size >= FILE_BYTES:
            number += 1
            save_file(pending, folder / f"{kind}-{number:05d}.safetensors")
            pending, size = {}, 0
    if pending:
        save_file(pending, folder / f"{kind}-{number + 1:05d}.safetensors")


def read_tensors(folder: Path, kind: str) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield every tensor of a kind, one in memory at a time. Raises RunError for a damaged file."""
    for file in sorted(folder.glob(f"{kind}-*.safetensors")):
        try:
            with safe_open(file, framework="pt") as opened:
                for name in opened.keys():  # noqa: SIM118  (not a mapping)
                    yield name, opened.get_tensor(name)
        except (SafetensorError, OSError) as error:
            raise RunError(f"{file}: can't be read: {error}") from error
