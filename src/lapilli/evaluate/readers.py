"""The readers that task files name: a benchmark's files to its questions."""

from lapilli.evaluate import own
from lapilli.evaluate.registry import Entry
from lapilli.evaluate.task import Reader

READERS: dict[str, Entry[Reader]] = {
    "own": Entry(own.read, own.READ_OPTIONS),
}
