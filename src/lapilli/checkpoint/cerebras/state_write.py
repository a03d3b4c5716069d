"""Cerebras' `.mdl` files, written a tensor at a time in the layout that their own library gives them.

Beside the datasets the root holds a description of each tensor, which their library reads instead of the datasets'
own tables, and a mark that the file is whole, which comes last.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from lapilli.base.errors import ModelError, RunError
from lapilli.base.progress import Progress
from lapilli.checkpoint.cerebras.names import is_copy
from lapilli.checkpoint.cerebras.state_file import ABOUT, FORMAT, MODEL
from lapilli.checkpoint.stream import Lazy

_CODES = {"torch.float64": 12, "torch.float32": 11, "torch.float16": 10, "torch.bfloat16": 15, "torch.int64": 5,
          "torch.int32": 4, "torch.int16": 3, "torch.uint8": 6}  # fmt: skip
"""Their numbers for element types."""


def write_state_file(
    file: Path,
    tensors: Mapping[str, Lazy],
    release: str,
    *,
    tied: Mapping[str, str] | None = None,
    hashes: bool = False,
    progress: Progress | None = None,
) -> Iterator[tuple[str, str | None]]:
    """Write a `.mdl` file, a tensor at a time; yield each name with its SHA-256 when it is written.

    `tensors` and `tied` (name: the tensor that it is the same as) have no `model.` yet. The mark of a whole file comes
    last. Raises ModelError for a tensor that comes out other than said, and RunError if the disk is full.
    """
    import h5py
    import hdf5plugin

    names = [*tensors, *(tied or {})]
    spec = [{"model": dict.fromkeys(names, "*")}, _tree(["model"], [_node(names, [_LEAF] * len(names))])]
    try:
        with h5py.File(file, "w") as made:
            made.attrs.update(
                {"__spec__": json.dumps(spec, indent=4), "__version__": FORMAT, "__cstorch_version__": f"{release}.0"}
            )
            for name, tensor in tensors.items():
                value = _checked(name, tensor)
                dataset = made.create_dataset(MODEL + name, data=value, **(hdf5plugin.LZ4() if value.shape else {}))
                dataset.attrs.update(_about(tensor))
                if progress is not None and not is_copy(name):
                    progress.advance(tensor.size_bytes)
                yield name, hashlib.sha256(value.data).hexdigest() if hashes else None
            for name, tensor in tensors.items():
                made.attrs[MODEL + name + ABOUT] = _entry(MODEL + name, _about(tensor))
            for name, target in (tied or {}).items():
                about = {"key": MODEL + target, "__LINKED__": True, "__TYPE__": "LinkedObject", "__NONE__": True}
                made.attrs[MODEL + name + ABOUT] = _entry(MODEL + name, about)
            made.attrs["__SUCCESS__"] = True
    except OSError as error:
        raise RunError(f"{file}: can't be written ({error.strerror or error})") from error


def _checked(name: str, tensor: Lazy) -> Any:
    """The tensor as an array; of bfloat16, which HDF5 doesn't know, the bits."""
    value = tensor.read()
    if tuple(value.shape) != tensor.shape or value.dtype != tensor.dtype:
        raise ModelError(
            f"{tensor.where}: {name} came out as {tuple(value.shape)} {value.dtype}, not {tensor.shape} {tensor.dtype}"
        )
    if str(value.dtype) not in _CODES:
        raise ModelError(f"{tensor.where}: {value.dtype} has no place in a .mdl file")
    value = value.detach().contiguous()
    return (value.view(torch.int16) if value.dtype == torch.bfloat16 else value).numpy()


def _about(tensor: Lazy) -> dict[str, Any]:
    kind = str(tensor.dtype)
    return {"__TORCH__": True, "shapes": [list(tensor.shape)], "dtypes": [kind], "rtfx_dtypes": [_CODES[kind]],
            "__TYPE__": "TorchTensorSerializer", "__NUMPY__": True, "compressed": False}  # fmt: skip


def _entry(name: str, about: Mapping[str, Any]) -> str:
    spec = [{name: "*"}, _tree([name], [_LEAF])]
    return json.dumps({"__spec__": spec, "__objects__": [name], name + ABOUT: about}, indent=4)


_LEAF = {"type": None, "context": None, "children_spec": []}


def _node(names: list[str], children: list[Any]) -> dict[str, Any]:
    return {"type": "builtins.dict", "context": json.dumps(names), "children_spec": children}


def _tree(names: list[str], children: list[Any]) -> str:
    """A table of names as PyTorch's trees are written, with their version."""
    return json.dumps([1, _node(names, children)])
