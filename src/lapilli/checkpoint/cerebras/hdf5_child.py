"""Reads an HDF5 file for another process, which asks by standard input; nothing of lapilli is imported.

The HDF5 library trusts a file's own tables: on a damaged file it may end its process or never return. Here it ends a
process that nobody misses. Answers on standard output are parts, each a length (8 bytes) and so many bytes; a length of
zero ends an answer, and the highest length of all says that a part with an error message follows.
"""

import json
import struct
import sys
from typing import Any

FAILED = 2**64 - 1
_PART_BYTES = 2**24


def _say(part: Any) -> None:
    sys.stdout.buffer.write(struct.pack("<Q", len(part)))
    sys.stdout.buffer.write(part)


def _end() -> None:
    sys.stdout.buffer.write(struct.pack("<Q", 0))
    sys.stdout.buffer.flush()


def _plain(value: Any) -> Any:
    """An attribute as JSON can hold it."""
    if hasattr(value, "tolist"):
        value = value.tolist()
    if isinstance(value, bytes):
        return value.decode("utf-8", "replace")
    if isinstance(value, list | tuple):
        return [_plain(entry) for entry in value]
    return value if isinstance(value, str | int | float | bool) or value is None else str(type(value))


def table(file: Any) -> dict[str, Any]:
    """The root's attributes, and each dataset's shape, dtype and attributes; other entries by what they are."""
    import h5py

    entries: dict[str, Any] = {}
    for name in file:
        link = file.get(name, getlink=True)
        if not isinstance(link, h5py.HardLink):
            entries[name] = {"is": f"a link to {getattr(link, 'filename', 'another place')}"}
            continue
        entry = file[name]
        if not isinstance(entry, h5py.Dataset):
            entries[name] = {"is": "a group"}
        elif entry.external:
            entries[name] = {"is": f"kept in {entry.external[0][0]}"}
        else:
            entries[name] = {
                "shape": None if entry.shape is None else list(entry.shape),
                "dtype": entry.dtype.str,
                "stored_bytes": entry.id.get_storage_size(),
                "attributes": {key: _plain(value) for key, value in entry.attrs.items()},
            }
    return {"attributes": {key: _plain(value) for key, value in file.attrs.items()}, "entries": entries}


def send(dataset: Any) -> None:
    """A dataset's bytes, rows of whole chunks at a time, so that each chunk is unpacked once."""
    import numpy as np

    if not dataset.shape:
        _say(np.ascontiguousarray(dataset[()]).data.cast("B"))
        return
    row_bytes = max(1, dataset.dtype.itemsize * int(np.prod(dataset.shape[1:], dtype=np.int64)))
    whole = dataset.chunks[0] if dataset.chunks else 1
    rows = max(whole, _PART_BYTES // row_bytes // whole * whole)
    for start in range(0, dataset.shape[0], rows):
        part = np.ascontiguousarray(dataset[start : start + rows])
        if part.nbytes:
            _say(part.data.cast("B"))


def main(path: str) -> None:
    """Answer until the asker is gone: `null` asks for the table, a name for that dataset."""
    import h5py
    import hdf5plugin  # noqa: F401  (registers the LZ4 filter)

    file: Any = None
    for line in sys.stdin:
        name = json.loads(line)
        try:
            file = file or h5py.File(path, "r", locking=False)
            if name is None:
                _say(json.dumps(table(file)).encode())
            else:
                send(file[name])
        except Exception as error:  # noqa: BLE001  (whatever the library says goes back as a message)
            sys.stdout.buffer.write(struct.pack("<Q", FAILED))
            _say(f"{type(error).__name__}: {error}".encode("utf-8", "replace"))
        _end()


if __name__ == "__main__":
    main(sys.argv[1])
