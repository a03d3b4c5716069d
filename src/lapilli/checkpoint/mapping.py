"""One tensor's bytes of a file, mapped for as long as the tensor lives.

Mapping a whole file, as the usual readers do, counts all of it against a process's data limit (`ulimit -d`, which
clusters set), because the pages may be written to. So each tensor is mapped by itself when it is read, and let go with
it; no file stays open. A tensor that is written to gets pages of its own, the file never changes.
"""

import ctypes
import mmap
import os
import weakref
from pathlib import Path

import torch

_FAILED = ctypes.c_void_p(-1).value


def map_bytes(file: Path, offset: int, size_bytes: int) -> torch.Tensor:
    """The bytes (size_bytes,) uint8 at `offset`. Raises OSError if the file is gone, shorter, or can't be mapped."""
    if size_bytes == 0:
        return torch.empty(0, dtype=torch.uint8)
    start = offset // mmap.ALLOCATIONGRANULARITY * mmap.ALLOCATIONGRANULARITY
    length = offset - start + size_bytes
    handle = os.open(file, os.O_RDONLY)
    try:
        if os.fstat(handle).st_size < offset + size_bytes:
            raise OSError(f"{file} has become shorter")
        address = _map(length, handle, start)
    finally:
        os.close(handle)
    pages = (ctypes.c_ubyte * length).from_address(address)
    weakref.finalize(pages, _unmap, address, length).atexit = False  # at the end a tensor may still look there
    return torch.frombuffer(pages, dtype=torch.uint8, count=size_bytes, offset=offset - start)


def _map(length: int, handle: int, start: int) -> int:
    """A private mapping: Python's own `mmap` would keep a file open for each."""
    call = ctypes.CDLL(None, use_errno=True).mmap
    call.restype = ctypes.c_void_p
    call.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long)
    address = call(None, length, mmap.PROT_READ | mmap.PROT_WRITE, mmap.MAP_PRIVATE, handle, start)
    if address is None or address == _FAILED:
        error = ctypes.get_errno()
        raise OSError(error, os.strerror(error))
    return address


def _unmap(address: int, length: int) -> None:
    call = ctypes.CDLL(None, use_errno=True).munmap
    call.argtypes = (ctypes.c_void_p, ctypes.c_size_t)
    call(address, length)
