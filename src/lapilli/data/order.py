"""Sample order as a pure function of (seed, epoch, position).

Nothing but a position has to be saved to resume a run, with any number of workers. `length_groups` and
`modality_groups` spare padding where sequences can't be packed. `modality_groups_llava` repeats the arithmetic of
LLaVA's length-grouped sampler, including its treatment of the last groups, so that its runs can be repeated sample by
sample.
"""

from collections.abc import Callable, Sequence
from typing import Literal, get_args

import numpy as np

from lapilli.base.errors import DataError, RecipeError, unknown
from lapilli.data.sample import Sample

Order = Literal["shuffled", "sequential", "length_groups", "modality_groups", "modality_groups_llava"]
ORDERS: tuple[Order, ...] = get_args(Order)

WINDOW_STEPS = 50
"""Steps among whose samples `length_groups` and `modality_groups` look for similar lengths."""

Permutation = Callable[[int], list[int]]


def epoch_order(
    n: int,
    seed: int,
    epoch: int,
    order: str = "shuffled",
    *,
    lengths: Sequence[int] | np.ndarray | None = None,
    pictures: Sequence[int] | np.ndarray | None = None,
    batch_size: int = 1,
    batches_per_step: int = 1,
) -> np.ndarray:
    """Return the order (n,) int64 in which epoch `epoch` (from 0) visits samples 0 to n-1, each exactly once.

    The grouped orders need the shape of a step: `batches_per_step` micro-batches of `batch_size` samples.
    `length_groups` and `modality_groups` need `lengths` in tokens, and the latter how many `pictures` each sample has;
    `modality_groups_llava` needs `lengths` as `llava_length` counts them. Raises RecipeError for an unknown order.
    """
    if order == "sequential":
        return np.arange(n, dtype=np.int64)
    if order == "shuffled":
        # Sorting a counter-based generator's raw output: NumPy promises that stream, not that of `permutation`.
        raw = np.random.Philox(key=_key(seed, epoch)).random_raw(n)
        return np.argsort(raw, kind="stable").astype(np.int64)
    if order in ("length_groups", "modality_groups"):
        if lengths is None or len(lengths) != n:
            raise RecipeError(f"order {order} needs the length of every sample")
        members = [epoch_order(n, seed, epoch)]
        if order == "modality_groups":
            if pictures is None or len(pictures) != n:
                raise RecipeError("order modality_groups needs the number of pictures of every sample")
            pictured = np.asarray(pictures)[members[0]] > 0
            members = [members[0][pictured], members[0][~pictured]]
        return _similar_lengths(members, np.asarray(lengths), batch_size * batches_per_step, seed, epoch)
    if order == "modality_groups_llava":
        if lengths is None or len(lengths) != n:
            raise RecipeError("order modality_groups_llava needs the length of every sample")
        # Epoch 0 is what LLaVA draws after torch.manual_seed(seed).
        torch_seed = seed if epoch == 0 else int(np.random.Philox(key=_key(seed, epoch)).random_raw() >> 1)
        indices = llava_modality_groups(np.asarray(lengths).tolist(), batch_size, batches_per_step, torch_seed)
        return np.asarray(indices, dtype=np.int64)
    raise RecipeError(f"data.order: {unknown('order', order, ORDERS)}")


def _key(seed: int, epoch: int) -> np.ndarray:
    return np.array([seed % 2**64, epoch], dtype=np.uint64)


def _similar_lengths(groups: Sequence[np.ndarray], lengths: np.ndarray, step: int, seed: int, epoch: int) -> np.ndarray:
    """Cut each group of shuffled samples into steps of similar length, and shuffle the steps of all groups.

    Within a step the longest comes first. What is left of a group after its last full step comes at the end, group
    after group, so at most one step of the epoch is mixed.
    """
    steps: list[np.ndarray] = []
    rest: list[np.ndarray] = []
    for members in groups:
        full = len(members) // step * step
        for start in range(0, full, WINDOW_STEPS * step):
            window = members[start : min(full, start + WINDOW_STEPS * step)]
            steps += list(_longest_first(window, lengths).reshape(-1, step))
        rest.append(_longest_first(members[full:], lengths))
    # Its own place in the stream, or the steps would come in the order in which samples were shuffled.
    raw = np.random.Philox(key=_key(seed, epoch), counter=np.array([0, 0, 0, 2], dtype=np.uint64)).random_raw(
        len(steps)
    )
    return np.concatenate([*(steps[i] for i in np.argsort(raw, kind="stable")), *rest]).astype(np.int64)


def _longest_first(members: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    return members[np.argsort(-lengths[members], kind="stable")]


def llava_length(sample: Sample) -> int:
    """Words of the conversation, negative without a picture: what LLaVA groups by (picture tokens don't count).

    Raises DataError for a sample without any word, which that order can't place.
    """
    words = sum(len(message.text.split()) for message in sample.messages)
    if words == 0:
        raise DataError(f"{sample.where or sample.id}: no words, so order modality_groups_llava can't place it")
    return words if sample.images else -words


def llava_modality_groups(lengths: Sequence[int], batch_size: int, batches_per_step: int, seed: int) -> list[int]:
    """LLaVA's `group_by_modality_length`: steps of one modality each, similar lengths side by side.

    The last step of each modality, even when full, goes into one mixed, sorted step at the end. Data of one modality
    is grouped by signed length, so text-only data comes shortest first within a step.
    """
    permutation = _torch_permutation(seed)
    with_image = [i for i, length in enumerate(lengths) if length > 0]
    text_only = [i for i, length in enumerate(lengths) if length < 0]
    if not with_image or not text_only:
        return _length_groups(lengths, batch_size, batches_per_step, permutation)
    step = batch_size * batches_per_step
    steps: list[list[int]] = []
    rest: list[int] = []
    for members in (with_image, text_only):
        grouped = _length_groups([abs(lengths[i]) for i in members], batch_size, batches_per_step, permutation)
        pieces = chunks_of([members[i] for i in grouped], step)
        steps += pieces[:-1]
        rest += pieces[-1]
    shuffled = [index for i in permutation(len(steps)) for index in steps[i]]
    return shuffled + sorted(rest)


def llava_length_groups(lengths: Sequence[int], batch_size: int, batches_per_step: int, seed: int) -> list[int]:
    """LLaVA's grouping by length alone, whatever the modality."""
    return _length_groups(lengths, batch_size, batches_per_step, _torch_permutation(seed))


def _torch_permutation(seed: int) -> Permutation:
    """Successive `torch.randperm` draws from one generator, as LLaVA takes them after `torch.manual_seed(seed)`."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    return lambda n: torch.randperm(n, generator=generator).tolist()


def _length_groups(lengths: Sequence[int], batch_size: int, batches: int, permutation: Permutation) -> list[int]:
    """Shuffle, cut into steps, sort each step by falling length, deal it into `batches` of about equal length."""
    out: list[int] = []
    for step in chunks_of(permutation(len(lengths)), batch_size * batches):
        for batch in _deal(sorted(step, key=lambda i: lengths[i], reverse=True), lengths, batches):
            out += batch
    return out


def _deal(indices: Sequence[int], lengths: Sequence[int], batches: int) -> list[Sequence[int]]:
    """Give each index to the batch with the smallest total so far; a batch is closed when it has its share."""
    if len(indices) % batches:
        return [indices[i::batches] for i in range(batches)]
    share = len(indices) // batches
    dealt: list[list[int]] = [[] for _ in range(batches)]
    totals: list[float] = [0.0] * batches
    for index in indices:
        smallest = totals.index(min(totals))
        dealt[smallest].append(index)
        totals[smallest] += lengths[index]
        if len(dealt[smallest]) == share:
            totals[smallest] = float("inf")
    return list(dealt)


def chunks_of(items: Sequence[int], size: int) -> list[list[int]]:
    """Cut into consecutive pieces of `size`; the last one may be shorter."""
    return [list(items[i : i + size]) for i in range(0, len(items), size)]
