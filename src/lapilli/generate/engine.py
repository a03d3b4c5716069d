"""The engine: prepared prompts in, answers out, many at a time.

Evaluation, chat and serving share it. Answers grow in slots, each beginning and ending by itself, where the language
model's attention allows it; else in padded batches, said aloud. End tokens, stop strings, lengths, draws and
cancelling are each prompt's own. Nothing is cut in silence: a prompt that does not fit is refused, an answer that
ended early says why.
"""

import logging
import os
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from typing import Any, TypeVar

import torch
from transformers import GenerationConfig

from lapilli.assemble.load import Loaded
from lapilli.base.errors import ModelError
from lapilli.base.memory import keep_freed_memory
from lapilli.generate.decoding import Answer, Decoding
from lapilli.generate.growing import Growing
from lapilli.generate.padding import answer_padded, why_not_padded
from lapilli.generate.processor import Processor, Prompt
from lapilli.generate.scheduler import LOOKAHEAD, Scheduler
from lapilli.generate.slots_probe import why_not_slots
from lapilli.generate.text import TextStream, Vocabulary
from lapilli.model.language import native_attention, use_attention
from lapilli.model.split import shares
from lapilli.model.vlm import VisionLanguageModel

log = logging.getLogger(__name__)

OnText = Callable[[int, str], None]
Cancelled = Callable[[int], bool]
Key = TypeVar("Key", bound=Hashable)

_OF_SLOTS = frozenset(("repetition_penalty", "no_repeat_ngram_size", "encoder_repetition_penalty", "bad_words_ids",
                       "min_length", "min_new_tokens", "forced_bos_token_id", "forced_eos_token_id", "sequence_bias",
                       "begin_suppress_tokens", "guidance_scale", "renormalize_logits",
                       "exponential_decay_length_penalty", "typical_p", "min_p", "penalty_alpha"))  # fmt: skip
"""Settings of generation_config.json that change answers and that only transformers' own `generate` follows."""


@dataclass(frozen=True, slots=True)
class Room:
    """How long prompts may be: the model's positions, and tokens whose keys and values (`token_bytes` each) are held.

    By itself it holds nothing of the model, so prompts can be checked elsewhere.
    """

    context_tokens: int | None
    budget_tokens: int | None
    token_bytes: int

    def check(self, prompt: Prompt) -> None:
        """Raise ModelError for a prompt that leaves no room for an answer in the model's context, or in memory."""
        what = f"the prompt is {prompt.length} tokens ({prompt.image_tokens} of them for {len(prompt.tiles)} pictures)"
        if self.context_tokens is not None and prompt.length >= self.context_tokens:
            raise ModelError(
                f"{what}, the model's context holds {self.context_tokens}; shorten the text, give fewer pictures or "
                "start a new conversation"
            )
        if self.budget_tokens is not None and prompt.length >= self.budget_tokens:
            raise ModelError(
                f"{what}, there is memory for {self.budget_tokens} ({self.token_bytes:,} bytes each); give the engine "
                "more memory, or shorten the text"
            )


class Engine:
    """Answers prompts with one model.

    Settings of the folder's `generation_config.json` that are not about sampling (a repetition penalty, say) hold, as
    they do in transformers. `memory_bytes` bounds the keys and values that are held at a time; by default a quarter of
    the machine's memory, or half of what is free on the GPU.
    """

    def __init__(self, loaded: Loaded, processor: Processor | None = None, *, memory_bytes: int | None = None) -> None:
        self.model = loaded.model
        self.processor = processor or Processor(loaded)
        self.stop = loaded.template.stop
        self.end_ids = _end_ids(loaded)
        self.context_tokens = _context_tokens(loaded.model.config.text_config)
        self.memory_bytes = memory_bytes
        self._vocabulary = Vocabulary(loaded.tokenizer)
        self._known = loaded.tokenizer.get_vocab()
        if next(self.model.parameters()).device.type == "cpu":
            keep_freed_memory()

    @cached_property
    def padded_because(self) -> str:
        """Why answers can't grow in slots; empty if they can. Said once, as a warning."""
        asked = _settings_of(self.model.language_model.generation_config)
        reason = f"generation_config.json sets {', '.join(asked)}" if asked else why_not_slots(self.model.config)
        if reason:
            kind = self.model.config.text_config.model_type
            log.warning("%s: no continuous batching (%s); prompts are answered in padded batches", kind, reason)
        return reason

    @cached_property
    def alone_because(self) -> str:
        """Why only prompts of equal length may share a padded batch; empty if any may. Said once, as a warning."""
        reason = why_not_padded(self.model.config.text_config)
        if reason:
            kind = self.model.config.text_config.model_type
            log.warning("%s: %s; only prompts of equal length are answered together", kind, reason)
        return reason

    @cached_property
    def token_bytes(self) -> int:
        """What the keys and values of one token take; 0 if the configuration does not say."""
        config: Any = self.model.config.text_config.get_text_config()
        heads = getattr(config, "num_key_value_heads", None) or getattr(config, "num_attention_heads", 0)
        width = getattr(config, "head_dim", None) or config.hidden_size // max(1, config.num_attention_heads)
        layers = getattr(config, "num_hidden_layers", 0)
        return 2 * layers * heads * width * next(self.model.language_model.parameters()).element_size()

    @cached_property
    def budget_tokens(self) -> int | None:
        """How many tokens' keys and values may be held at a time; None: not known what one takes."""
        if not self.token_bytes:
            return None
        return (_half_free(self.model) if self.memory_bytes is None else self.memory_bytes) // self.token_bytes

    @cached_property
    def never(self) -> tuple[int, ...]:
        """Tokens that no answer has: the image token, and what generation_config.json suppresses."""
        config = self.model.language_model.generation_config
        suppressed = getattr(config, "suppress_tokens", None) or ()
        return tuple(sorted({self.model.config.image_token_id, *suppressed}))

    @property
    def room(self) -> Room:
        """What prompts are held to."""
        return Room(self.context_tokens, self.budget_tokens, self.token_bytes)

    def check(self, prompt: Prompt) -> None:
        """Raise ModelError for a prompt that leaves no room for an answer in the model's context, or in memory."""
        self.room.check(prompt)

    def scheduler(self, slots: int) -> Scheduler:
        """A scheduler over slots, for callers that feed it themselves. Raises ModelError if the model has none."""
        if self.padded_because:
            raise ModelError(f"no slots: {self.padded_because}")
        return Scheduler(self.model, self.processor.image_spec, slots, self.budget_tokens, self.never)

    def growing(
        self,
        prompt: Prompt,
        decoding: Decoding,
        on_text: Callable[[str], None] | None = None,
        cancelled: Callable[[], bool] | None = None,
    ) -> Growing:
        """The answer to a prompt, to be grown. The template's stop strings are added to the decoding's."""
        room = decoding.max_new_tokens
        if self.context_tokens is not None:
            room = min(room, self.context_tokens - prompt.length)
        stop = tuple(dict.fromkeys((*decoding.stop, *self.stop)))
        ends = self.end_ids | {self._known[s] for s in decoding.stop if s in self._known}
        return Growing(prompt.length, decoding, room, ends, TextStream(self._vocabulary, stop, on_text), cancelled)

    def generate(
        self,
        prompts: Sequence[Prompt],
        decoding: Decoding | Sequence[Decoding] | None = None,
        *,
        batch_size: int = 32,
        on_text: OnText | None = None,
        cancelled: Cancelled | None = None,
    ) -> list[Answer]:
        """Answer prompts, in their order, each with its own Decoding or all with the same; `batch_size` at a time.

        The template's stop strings are added to each Decoding's. `on_text(i, piece)` is called with each new piece of
        prompt i's answer; the pieces add up to its text. `cancelled(i)` is asked after every token; once it is true
        the answer ends with what it has. Raises ModelError before anything is generated if a prompt does not fit
        the model's context.
        """
        decoding = decoding or Decoding()
        decodings = [decoding] * len(prompts) if isinstance(decoding, Decoding) else list(decoding)
        if len(decodings) != len(prompts):
            raise ValueError(f"{len(decodings)} decodings for {len(prompts)} prompts")
        for prompt in prompts:
            self.check(prompt)
        items = zip(range(len(prompts)), prompts, decodings, strict=True)
        answers = dict(self.stream(items, batch_size=batch_size, on_text=on_text, cancelled=cancelled))
        return [answers[i] for i in range(len(prompts))]

    @torch.no_grad()
    def stream(
        self,
        items: Iterable[tuple[Key, Prompt, Decoding]],
        *,
        batch_size: int = 32,
        on_text: Callable[[Key, str], None] | None = None,
        cancelled: Callable[[Key], bool] | None = None,
    ) -> Iterator[tuple[Key, Answer]]:
        """As `generate`, for any number of (key, prompt, decoding); answers come as they end, with their key.

        Some hundred prompts are taken ahead, so that those that begin alike are answered together. Raises ModelError
        for a prompt that does not fit.
        """
        if batch_size < 1:
            raise ModelError(f"batch_size must be at least 1, not {batch_size}")
        try:
            yield from self._stream(iter(items), batch_size, on_text, cancelled)
        finally:
            use_attention(self.model.language_model, native_attention(self.model.language_model))

    def _stream(
        self,
        source: Iterator[tuple[Key, Prompt, Decoding]],
        batch_size: int,
        on_text: Callable[[Key, str], None] | None,
        cancelled: Callable[[Key], bool] | None,
    ) -> Iterator[tuple[Key, Answer]]:
        scheduler: Scheduler | None = None
        growing: dict[int, tuple[Key, Growing]] = {}
        padded: list[tuple[Key, Prompt, Growing]] = []
        while True:
            free = LOOKAHEAD - len(padded) - (0 if scheduler is None else scheduler.waiting)
            for key, prompt, decoding in islice(source, max(0, free)):
                self.check(prompt)
                row = self._row(key, prompt, decoding, on_text, cancelled)
                if decoding.num_beams > 1 or self.padded_because:
                    padded.append((key, prompt, row))
                    continue
                scheduler = scheduler or self.scheduler(batch_size)
                scheduler.add(row, prompt)
                growing[id(row)] = key, row
            if scheduler is not None and (scheduler.waiting or scheduler.active):
                scheduler.step()
                for name in [name for name, (_, row) in growing.items() if row.ended]:
                    key, row = growing.pop(name)
                    yield key, row.answer()
            elif padded:
                yield from self._padded(padded, batch_size)
                padded = []
            else:
                return

    @torch.no_grad()
    def score(self, prompt: Prompt, continuations: Sequence[Sequence[int]]) -> list[list[float]]:
        """Log-probability of each token of each continuation, given the prompt and the tokens before it.

        The prompt is computed once. Raises ModelError if the model has no slots, or a text does not fit its context.
        """
        self.check(prompt)
        longest = prompt.length + max(map(len, continuations), default=0)
        if self.context_tokens is not None and longest > self.context_tokens:
            raise ModelError(
                f"prompt and continuation are {longest} tokens, the model's context holds {self.context_tokens}"
            )
        scheduler = self.scheduler(1)
        try:
            return scheduler.score(prompt, continuations)
        finally:
            use_attention(self.model.language_model, native_attention(self.model.language_model))

    def _row(
        self,
        key: Key,
        prompt: Prompt,
        decoding: Decoding,
        on_text: Callable[[Key, str], None] | None,
        cancelled: Callable[[Key], bool] | None,
    ) -> Growing:
        show = None if on_text is None else lambda piece: on_text(key, piece)
        gone = None if cancelled is None else lambda: cancelled(key)
        return self.growing(prompt, decoding, show, gone)

    def _padded(self, items: Sequence[tuple[Key, Prompt, Growing]], batch_size: int) -> Iterator[tuple[Key, Answer]]:
        for beams in sorted({row.decoding.num_beams for _, _, row in items}):
            part = [item for item in items if item[2].decoding.num_beams == beams]
            for batch in self._batches([p.length for _, p, _ in part], max(1, batch_size // beams)):
                chosen = [part[i] for i in batch]
                rows = [row for _, _, row in chosen]
                answer_padded(self.model, self.processor, [p for _, p, _ in chosen], rows, self.end_ids, self.never)
                for key, _, row in chosen:
                    yield key, row.answer()

    def _batches(self, lengths: Sequence[int], batch_size: int) -> list[list[int]]:
        """Indices of prompts that are answered together: neighbours in length, the longest first."""
        order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
        apart = len(set(lengths)) > 1 and batch_size > 1 and bool(self.alone_because)
        batches: list[list[int]] = []
        for i in order:
            fits = batches and len(batches[-1]) < batch_size
            if fits and not (apart and lengths[batches[-1][0]] != lengths[i]):
                batches[-1].append(i)
            else:
                batches.append([i])
        return batches


def _end_ids(loaded: Loaded) -> set[int]:
    """Every token that ends an answer: the model's, the tokenizer's, and stop strings that are one token."""
    known = loaded.tokenizer.get_vocab()
    ids = {known[s] for s in loaded.template.stop if s in known}
    configs = (loaded.model.generation_config, loaded.model.language_model.generation_config)
    for end in (loaded.tokenizer.eos_token_id, *(c.eos_token_id for c in configs if c is not None)):
        ids |= set(end) if isinstance(end, list) else {end}
    return {int(i) for i in ids if i is not None}


def _context_tokens(config: Any) -> int | None:
    """How many positions the language model has; None if its configuration does not say."""
    config = config.get_text_config()
    for name in ("max_position_embeddings", "max_seq_len", "n_positions"):
        value = getattr(config, name, None)
        if isinstance(value, int) and value > 0:
            return value
    return None


def _settings_of(config: GenerationConfig | None) -> list[str]:
    """Settings that differ from what `generate` does by itself and that slots don't follow."""
    if config is None:
        return []
    return sorted(name for name in _OF_SLOTS if getattr(config, name, None) not in (None, 0, 1.0, False))


def _half_free(model: VisionLanguageModel) -> int:
    """Half of what is free on the model's GPU, or a quarter of the machine's memory.

    Of several GPUs, the one with the least room for its layers' keys and values decides.
    """
    if next(model.parameters()).device.type == "cuda":
        return min(int(torch.cuda.mem_get_info(d)[0] / 2 / part) for d, part in shares(model).items())
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 4
