"""The tensors of a checkpoint: safetensors files under the model's own names, written by all processes together.

torch.distributed.checkpoint plans who writes what and lays shards out again for another number of processes; its
storage for safetensors keeps the plan in the files' headers, so that the pickle of its own format is neither written
nor read. Each kind (weights, optimizer, average) has a folder of its own: its names are the canonical ones.
"""

import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from safetensors import SafetensorError
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, DefaultSavePlanner
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata
from torch.distributed.tensor import DTensor

from lapilli.base.errors import RunError

FILE_BYTES = 4 * 2**30
"""A process builds one file of about this size in memory at a time."""


@dataclass
class Staged:
    """One kind's tensors as they were when they were staged: what this process writes, and the sizes of all."""

    tensors: dict[str, torch.Tensor] = field(default_factory=dict)
    sizes: dict[str, int] = field(default_factory=dict)

    @property
    def files(self) -> dict[str, int]:
        """Number of the file, from 1, that each name stands in."""
        files, total = {}, 0
        for name, size in self.sizes.items():
            files[name] = 1 + total // FILE_BYTES
            total += size
        return files


def stage(tensors: Iterable[tuple[str, str, torch.Tensor]], rank: int, ranks: int, *, copy: bool) -> dict[str, Staged]:
    """Take down what this process will write, by kind; with `copy` on the CPU, so that training may go on meanwhile.

    `tensors` are (kind, name, tensor), the same on all processes: a DTensor, of which each process writes its shard, or
    a whole one, which goes to the process that has least to write so far.
    """
    staged: dict[str, Staged] = {}
    loads = [0] * ranks
    for kind, name, tensor in tensors:
        into = staged.setdefault(kind, Staged())
        size = into.sizes[name] = tensor.numel() * tensor.element_size()
        if not isinstance(tensor, DTensor):
            writer = loads.index(min(loads))
            loads[writer] += size
            if writer != rank:
                continue
        into.tensors[name] = tensor.detach().to("cpu", copy=True) if copy else tensor.detach()
    return staged


def write(folder: Path, staged: Staged, group: dist.ProcessGroup | None) -> None:
    """Write one kind's tensors into `folder`, durable.

    The processes of `group` call it together (None: this one alone). Raises, on all of them, OSError or RunError with
    the first process's reason.
    """
    writer = HuggingFaceStorageWriter(str(folder), fqn_to_index_mapping=staged.files, save_distributed=True)
    writer.per_thread_copy_ahead = 0  # it would start the first GPU from every process's thread
    try:
        dcp.save(
            staged.tensors,
            storage_writer=writer,
            planner=DefaultSavePlanner(flatten_state_dict=False),
            process_group=group,
            no_dist=group is None,
        )
    except CheckpointException as error:
        reason, said = _reason(error)
        raise reason if isinstance(reason, OSError) else RunError(said) from error


@dataclass(frozen=True)
class Known:
    """Shape and type of a tensor in a checkpoint."""

    shape: torch.Size
    dtype: torch.dtype


class _Reader(HuggingFaceStorageReader):
    """Reads the headers of the files once, however often it is asked for tensors."""

    def __init__(self, folder: Path) -> None:
        super().__init__(str(folder))
        self._content: Metadata | None = None

    def read_metadata(self) -> Metadata:
        if self._content is None:
            self._content = super().read_metadata()
        return self._content


class Saved:
    """The tensors of a checkpoint, by kind, to be read by each process for itself."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._readers: dict[str, _Reader] = {}

    def known(self, kind: str) -> dict[str, Known]:
        """Return what there is of a kind, by name; nothing if the checkpoint lacks the kind.

        Raises RunError for a damaged file.
        """
        if not (self.folder / kind).is_dir():
            return {}
        with _named(self.folder / kind):
            content = self._reader(kind).read_metadata().state_dict_metadata
        return {
            name: Known(found.size, found.properties.dtype)
            for name, found in content.items()
            if isinstance(found, TensorStorageMetadata)
        }

    def load(self, kind: str, into: dict[str, torch.Tensor]) -> None:
        """Fill the tensors `into`, plain or DTensors, in place; of a DTensor only this process's shard is read.

        They need not be all of the kind. Raises RunError if one is not there, or of another shape.
        """
        known = self.known(kind)
        for name, tensor in into.items():
            if name not in known:
                raise RunError(f"{self.folder}: lacks {name} in {kind}, which this run trains")
            if known[name].shape != tensor.shape:
                raise RunError(
                    f"{self.folder}: {name} {tuple(known[name].shape)} in {kind} does not fit this run's model, "
                    f"which has {tuple(tensor.shape)}"
                )
        if not into:
            return
        with _named(self.folder / kind), unwarned(), torch.no_grad():
            dcp.load(
                {name: tensor.detach() for name, tensor in into.items()},
                storage_reader=self._reader(kind),
                planner=DefaultLoadPlanner(flatten_state_dict=False),
                no_dist=True,
            )

    def whole(self, kind: str, name: str) -> torch.Tensor:
        """Return one whole tensor, on the CPU. Raises RunError if it is not there."""
        known = self.known(kind).get(name)
        if known is None:
            raise RunError(f"{self.folder}: lacks {name} in {kind}, which this run trains")
        tensor = torch.empty(known.shape, dtype=known.dtype)
        self.load(kind, {name: tensor})
        return tensor

    def _reader(self, kind: str) -> _Reader:
        if kind not in self._readers:
            self._readers[kind] = _Reader(self.folder / kind)
        return self._readers[kind]


@contextmanager
def unwarned() -> Iterator[None]:
    """Keep torch.distributed.checkpoint from warning that one process saves, or that each reads for itself."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled", UserWarning)
        yield


def _reason(error: CheckpointException) -> tuple[BaseException, str]:
    """What failed in the first process where something did, and how to say it."""
    rank = min(error.failures)
    reason, _trace = error.failures[rank]
    return reason, f"process {rank}: {type(reason).__name__}: {reason}"


@contextmanager
def _named(folder: Path) -> Iterator[None]:
    try:
        yield
    except CheckpointException as error:
        raise RunError(f"{folder}: can't be read: {_reason(error)[1]}") from error
    except (SafetensorError, OSError, ValueError, KeyError) as error:
        raise RunError(f"{folder}: can't be read: {error}") from error
