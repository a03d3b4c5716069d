"""Continuous batching: answers begin as soon as a slot is free, and end each by itself.

Waiting prompts that begin alike (the same picture, the same system text) are taken together: what they share is
computed once and kept for those that come later. Every picture is encoded once, however many prompts show it.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from lapilli.data.image import ImageSpec, normalise
from lapilli.generate.growing import Growing
from lapilli.generate.processor import Prompt
from lapilli.generate.slots import SLOTS, Prefix, SlotCache, Step
from lapilli.model.language import use_attention
from lapilli.model.vlm import VisionLanguageModel

PREFILL_TOKENS = 4096
"""Tokens of prompts that are computed in one call, at most, unless one prompt alone has more."""
LOOKAHEAD = 512
"""Waiting prompts that are searched for those that begin as the first one does."""
_WORTH_SHARING = 16
_KEPT_PREFIXES = 8
_KEPT_PICTURES = 64
_TILES_AT_ONCE = 32


class _Task:
    """A prompt with its answer."""

    def __init__(self, row: Any, prompt: Prompt, identity: np.ndarray) -> None:
        self.row, self.prompt, self.identity = row, prompt, identity
        self.token = 0

    @property
    def length(self) -> int:
        return len(self.identity)


class Scheduler:
    """Answers prompts with one model, up to `slots` at a time.

    `budget_tokens` bounds the keys and values that are held, in tokens; fewer slots are used where it would be
    exceeded, but always one. Tokens in `never` are in no answer.
    """

    def __init__(
        self,
        model: VisionLanguageModel,
        image_spec: ImageSpec,
        slots: int,
        budget_tokens: int | None = None,
        never: Sequence[int] = (),
    ) -> None:
        self.model, self.image_spec = model, image_spec
        self.slots, self.budget_tokens = slots, budget_tokens
        rows = model.get_output_embeddings().weight.shape[0]  # type: ignore[union-attr]
        # The image token has no row where a vocabulary was kept as it was.
        self._never = torch.tensor([i for i in never if i < rows], dtype=torch.long)
        self.calls = {"prefix": 0, "prompt": 0, "token": 0}
        """Calls of the language model by kind, and `pictures` encoded: what a test or a curious user counts."""
        self.pictures = 0
        self._waiting: deque[_Task] = deque()
        self._active: list[_Task] = []
        self._cache = SlotCache()
        self._prefixes: OrderedDict[bytes, tuple[np.ndarray, Prefix]] = OrderedDict()
        self._features: OrderedDict[bytes, torch.Tensor] = OrderedDict()

    @property
    def waiting(self) -> int:
        return len(self._waiting)

    @property
    def active(self) -> int:
        return len(self._active)

    def add(self, row: Growing, prompt: Prompt) -> None:
        """Let a prompt wait for its turn."""
        self._waiting.append(_Task(row, prompt, self._identity(prompt)))

    def step(self) -> None:
        """Begin what fits, then make one token for every answer; does nothing if nothing waits or is active."""
        self._waiting = deque(task for task in self._waiting if not task.row.ended)
        while self._waiting and self._may_begin():
            self._begin()
        if self._active:
            self._advance()

    def drop_ended(self) -> None:
        """Free the slots of answers that ended between steps, because nobody waits for them any more."""
        for number in reversed([i for i, task in enumerate(self._active) if task.row.ended]):
            self._free(number)

    # ---- beginning --------------------------------------------------------------------------------------------------

    def _may_begin(self) -> bool:
        free = self.slots - len(self._active)
        return free >= min(len(self._waiting), max(1, self.slots // 4)) and self._fits(self._waiting[0], 0, 1)

    def _fits(self, task: _Task, shared: int, more: int) -> bool:
        """Whether `more` answers, the longest of them `task` behind `shared` tokens, fit into the budget."""
        if self.budget_tokens is None or not self._active:
            return True
        own = max(self._need(task, shared), *(self._need(t, 0) for t in self._active))
        held = sum(p.length for _, p in self._prefixes.values())
        return own * (len(self._active) + more) + held <= self.budget_tokens

    def _need(self, task: _Task, shared: int) -> int:
        return task.length - shared + task.row.room

    def _begin(self) -> None:
        """Take the first waiting prompt and those that share its beginning; make their first tokens."""
        head = self._waiting[0]
        stored = self._stored(head.identity)
        peers, length = self._peers(head)
        if length > (0 if stored is None else stored.length):
            prefix = self._make_prefix(head, length)
        else:
            prefix = stored
            if prefix is not None:
                start = head.identity[: prefix.length]
                peers = [t for t in self._ahead() if _begins(t.identity, start)]
            else:
                peers = [t for t in self._ahead() if self._stored(t.identity) is None]
        shared = 0 if prefix is None else prefix.length
        free = self.slots - len(self._active)
        chosen: list[_Task] = []
        tokens = 0
        for task in [head, *(t for t in peers if t is not head)]:
            tokens += task.length - shared
            full = len(chosen) == free or tokens > PREFILL_TOKENS or not self._fits(task, shared, len(chosen) + 1)
            if chosen and full:
                break
            chosen.append(task)
        taken = set(map(id, chosen))
        self._waiting = deque(t for t in self._waiting if id(t) not in taken)
        self._prefill(chosen, prefix)

    def _ahead(self) -> list[_Task]:
        return [self._waiting[i] for i in range(1, min(LOOKAHEAD, len(self._waiting)))]

    def _peers(self, head: _Task) -> tuple[list[_Task], int]:
        """The waiting prompts that begin as `head` does, its pictures included, and how many tokens all share."""
        pictures = np.flatnonzero(head.identity < 0)
        least = max(_WORTH_SHARING, int(pictures[-1]) + 1 if len(pictures) else 0)
        found = [(t, n) for t in self._ahead() if (n := _common(head.identity, t.identity)) >= least]
        if not found:
            return [], 0
        # Each prompt keeps a token of its own, whose logits begin its answer.
        shared = min(head.length - 1, *(min(n, t.length - 1) for t, n in found))
        return ([t for t, _ in found], shared) if shared >= _WORTH_SHARING else ([], 0)

    def _stored(self, identity: np.ndarray) -> Prefix | None:
        """The longest prefix at hand that a prompt begins with."""
        best = None
        for key, (start, prefix) in self._prefixes.items():
            if len(start) < len(identity) and _begins(identity, start) and (best is None or prefix.length > best[0]):
                best = prefix.length, key, prefix
        if best is None:
            return None
        self._prefixes.move_to_end(best[1])
        return best[2]

    def _make_prefix(self, task: _Task, length: int) -> Prefix:
        prefix = Prefix(length)
        embeds = self._embeds(task.prompt, 0, length)
        self._call("prefix", embeds, torch.arange(length), None, Step(self._cache, making=prefix))
        start = task.identity[:length].copy()
        self._prefixes[start.tobytes()] = start, prefix
        while len(self._prefixes) > _KEPT_PREFIXES:
            self._prefixes.popitem(last=False)  # answers that still need it hold it themselves
        return prefix

    def _prefill(self, tasks: Sequence[_Task], prefix: Prefix | None) -> None:
        self._encode_pictures([t.prompt for t in tasks] if prefix is None else [])
        shared = 0 if prefix is None else prefix.length
        rows = [self._cache.add(prefix) for _ in tasks]
        counts = [task.length - shared for task in tasks]
        embeds = torch.cat([self._embeds(task.prompt, shared, task.length) for task in tasks])
        positions = torch.cat([torch.arange(shared, task.length) for task in tasks])
        last = torch.tensor(counts).cumsum(0) - 1
        logits = self._call("prompt", embeds, positions, last, Step(self._cache, None, rows, counts, prefix))
        for row, count in zip(rows, counts, strict=True):
            self._cache.lengths[row] = count
        self._active += tasks
        self._take(rows, logits)

    def score(self, prompt: Prompt, continuations: Sequence[Sequence[int]]) -> list[list[float]]:
        """Log-probability of each token of each continuation of a prompt; see `Engine.score`."""
        task = _Task(None, prompt, self._identity(prompt))
        prefix = self._make_prefix(task, task.length - 1) if task.length > 1 else None
        last = self._embeds(prompt, task.length - 1, task.length)
        made: list[list[float]] = []
        for ids in continuations:
            if not ids:
                made.append([])
                continue
            wanted = torch.tensor(ids, device=self._device)
            embeds = torch.cat([last, self.model.embed(wanted[:-1])]) if len(ids) > 1 else last
            positions = torch.arange(task.length - 1, task.length - 1 + len(ids))
            cache = SlotCache()
            step = Step(cache, None, [cache.add(prefix)], [len(ids)], prefix)
            logits = self._call("prompt", embeds, positions, torch.arange(len(ids)), step)
            found = torch.log_softmax(self._allowed(logits), dim=-1).gather(1, wanted[:, None])[:, 0]
            made.append(found.tolist())
        return made

    # ---- going on ---------------------------------------------------------------------------------------------------

    def _advance(self) -> None:
        rows = range(len(self._active))
        ids = torch.tensor([task.token for task in self._active], device=self._device)
        positions = torch.tensor([self._cache.position(row) for row in rows])
        logits = self._call(
            "token", self.model.embed(ids), positions, torch.arange(len(ids)), Step(self._cache, rows=rows)
        )
        for row in rows:
            self._cache.lengths[row] += 1
        self._take(rows, logits)

    def _take(self, rows: Sequence[int], logits: torch.Tensor) -> None:
        """Give each of the rows its next token from logits (rows, V); free those that have ended."""
        logits = self._allowed(logits)
        likeliest = logits.argmax(-1).tolist()
        for row, best, scores in zip(rows, likeliest, logits, strict=True):
            task = self._active[row]
            chosen = task.row.choose(scores)
            task.token = best if chosen is None else chosen
            task.row.push(task.token)
        for row in sorted(rows, reverse=True):
            if self._active[row].row.ended:
                self._free(row)

    def _allowed(self, logits: torch.Tensor) -> torch.Tensor:
        """Logits (rows, V) in float32, without the tokens that no answer has."""
        return logits.float().index_fill(-1, self._never.to(logits.device), float("-inf"))

    def _free(self, row: int) -> None:
        self._cache.remove(row)
        last = self._active.pop()
        if row < len(self._active):
            self._active[row] = last

    # ---- the model --------------------------------------------------------------------------------------------------

    @property
    def _device(self) -> torch.device:
        return self.model.get_input_embeddings().weight.device  # type: ignore[union-attr,return-value]

    def _call(
        self, kind: str, embeds: torch.Tensor, positions: torch.Tensor, keep: torch.Tensor | None, step: Step
    ) -> torch.Tensor:
        self.calls[kind] += 1
        return slot_logits(self.model, embeds, positions, keep, step)

    def _identity(self, prompt: Prompt) -> np.ndarray:
        """(T,) int64: equal where two prompts give the model the same; below zero at pictures."""
        made = prompt.input_ids.astype(np.int64, copy=True)
        places = np.flatnonzero(made == self.model.config.image_token_id)
        start = 0
        for key, (width, height) in zip(prompt.keys, prompt.sizes, strict=True):
            count = self.model.layout.tokens(width, height)
            name = int.from_bytes(key[:7], "big")
            made[places[start : start + count]] = -1 - ((name + np.arange(count)) & (2**62 - 1))
            start += count
        return made

    def _embeds(self, prompt: Prompt, start: int, stop: int) -> torch.Tensor:
        """Embedded tokens (stop - start, D) of a part of a prompt."""
        is_image = prompt.input_ids == self.model.config.image_token_id
        ids = torch.from_numpy(prompt.input_ids[start:stop]).to(self._device)
        before, inside = int(is_image[:start].sum()), int(is_image[start:stop].sum())
        if not inside:
            return self.model.embed(ids)
        self._encode_pictures([prompt])
        features = torch.cat([self._features[key] for key in prompt.keys])
        return self.model.embed(ids, features[before : before + inside])

    def _encode_pictures(self, prompts: Sequence[Prompt]) -> None:
        """Encode those pictures of the prompts that are not at hand, several at a time."""
        wanted: dict[bytes, tuple[torch.Tensor, tuple[int, int]]] = {}
        for prompt in prompts:
            for key, tiles, size in zip(prompt.keys, prompt.tiles, prompt.sizes, strict=True):
                if key in self._features:
                    self._features.move_to_end(key)
                else:
                    wanted[key] = tiles, size
        keep = max(_KEPT_PICTURES, sum(len(p.keys) for p in prompts))
        todo = list(wanted.items())
        while todo:
            batch = [todo.pop(0)]
            while todo and sum(len(tiles) for _, (tiles, _) in batch) + len(todo[0][1][0]) <= _TILES_AT_ONCE:
                batch.append(todo.pop(0))
            pixels = normalise(torch.cat([tiles for _, (tiles, _) in batch]).to(self._device), self.image_spec)
            counts = torch.tensor([len(tiles) for _, (tiles, _) in batch])
            sizes = torch.tensor([size for _, (_, size) in batch])
            features = self.model.encode_images(pixels, counts, sizes)
            lengths = [self.model.layout.tokens(*size) for _, (_, size) in batch]
            for (key, _), part in zip(batch, features.split(lengths), strict=True):
                self._features[key] = part
            self.pictures += len(batch)
        while len(self._features) > keep:
            self._features.popitem(last=False)


def slot_logits(
    model: VisionLanguageModel, embeds: torch.Tensor, positions: torch.Tensor, keep: torch.Tensor | None, step: Step
) -> torch.Tensor:
    """Run the language model over the tokens of a step: embeds (T, D), positions (T,) -> logits (K, V) at `keep` (K,).

    Without `keep` only the keys and values are wanted; the logits of the last token are returned.
    """
    language: Any = model.language_model
    use_attention(language, SLOTS)
    inputs: dict[str, Any] = {
        "inputs_embeds": embeds[None],
        "position_ids": positions.to(embeds.device)[None],
        "use_cache": False,
        "slots": step,
    }
    keep = (torch.tensor([len(embeds) - 1]) if keep is None else keep).to(embeds.device)
    if model.config.head == "direct":
        return model.head(language.base_model(**inputs).last_hidden_state[0][keep])
    return language(**inputs, logits_to_keep=keep).logits[0]


def _common(a: np.ndarray, b: np.ndarray) -> int:
    """How many leading values are equal."""
    length = min(len(a), len(b))
    differ = np.flatnonzero(a[:length] != b[:length])
    return int(differ[0]) if len(differ) else length


def _begins(identity: np.ndarray, start: np.ndarray) -> bool:
    return len(identity) > len(start) and bool(np.array_equal(identity[: len(start)], start))
