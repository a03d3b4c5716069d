"""The engine: prepared prompts in, answers out, several at a time.

Evaluation, chat and serving share it. It batches prompts of similar length, padded on the left, and runs the language
model's own `generate`; end tokens, stop strings, lengths, draws and cancelling are each prompt's own. Nothing is cut in
silence: a prompt that does not fit is refused, an answer that ended early says why.
"""

import logging
from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any

import torch
from transformers import GenerationConfig, LogitsProcessorList, StoppingCriteria, StoppingCriteriaList

from lapilli.assemble.load import Loaded
from lapilli.base.errors import ModelError
from lapilli.generate.decoding import Answer, Decoding, Finish, Sampler
from lapilli.generate.padding import why_not_padded
from lapilli.generate.processor import Processor, Prompt, collate
from lapilli.generate.text import TextStream, Vocabulary

log = logging.getLogger(__name__)

OnText = Callable[[int, str], None]
Cancelled = Callable[[int], bool]


class Engine:
    """Answers prompts with one model.

    Settings of the folder's `generation_config.json` that are not about sampling (a repetition penalty, say) hold, as
    they do in transformers.
    """

    def __init__(self, loaded: Loaded, processor: Processor | None = None) -> None:
        self.model = loaded.model
        self.processor = processor or Processor(loaded)
        self.stop = loaded.template.stop
        self.end_ids = _end_ids(loaded)
        self.context_tokens = _context_tokens(loaded.model.config.text_config)
        self._vocabulary = Vocabulary(loaded.tokenizer)
        self._known = loaded.tokenizer.get_vocab()

    @cached_property
    def alone_because(self) -> str:
        """Why only prompts of equal length may share a batch; empty if any may. Said once, as a warning."""
        reason = why_not_padded(self.model.config.text_config)
        if reason:
            kind = self.model.config.text_config.model_type
            log.warning("%s: %s; only prompts of equal length are answered together", kind, reason)
        return reason

    def check(self, prompt: Prompt) -> None:
        """Raise ModelError for a prompt that leaves no room for an answer in the model's context."""
        if self.context_tokens is not None and prompt.length >= self.context_tokens:
            raise ModelError(
                f"the prompt is {prompt.length} tokens ({prompt.image_tokens} of them for {len(prompt.tiles)} "
                f"pictures), the model's context holds {self.context_tokens}; shorten the text, give fewer pictures "
                "or start a new conversation"
            )

    def generate(
        self,
        prompts: Sequence[Prompt],
        decoding: Decoding | Sequence[Decoding] | None = None,
        *,
        batch_size: int = 8,
        on_text: OnText | None = None,
        cancelled: Cancelled | None = None,
    ) -> list[Answer]:
        """Answer prompts, in their order, each with its own Decoding or all with the same.

        The template's stop strings are added to each Decoding's. `on_text(i, piece)` is called with each new piece of
        prompt i's answer; the pieces add up to its text. `cancelled(i)` is asked after every token; once it is true
        the answer ends with what it has. Raises ModelError before anything is generated if a prompt does not fit
        the model's context.
        """
        if batch_size < 1:
            raise ModelError(f"batch_size must be at least 1, not {batch_size}")
        decoding = decoding or Decoding()
        decodings = [decoding] * len(prompts) if isinstance(decoding, Decoding) else list(decoding)
        if len(decodings) != len(prompts):
            raise ValueError(f"{len(decodings)} decodings for {len(prompts)} prompts")
        for prompt in prompts:
            self.check(prompt)
        answers: dict[int, Answer] = {}
        for batch in self._batches([p.length for p in prompts], batch_size):
            rows = [self._row(i, prompts[i], decodings[i], on_text, cancelled) for i in batch]
            self._run([prompts[i] for i in batch], rows)
            answers |= {row.index: row.answer() for row in rows}
        return [answers[i] for i in range(len(prompts))]

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

    def _row(
        self, index: int, prompt: Prompt, decoding: Decoding, on_text: OnText | None, cancelled: Cancelled | None
    ) -> "_Row":
        room = decoding.max_new_tokens
        if self.context_tokens is not None:
            room = min(room, self.context_tokens - prompt.length)
        stop = tuple(dict.fromkeys((*decoding.stop, *self.stop)))
        ends = self.end_ids | {self._known[s] for s in decoding.stop if s in self._known}
        show = None if on_text is None else lambda piece: on_text(index, piece)
        stream = TextStream(self._vocabulary, stop, show)
        is_cancelled = None if cancelled is None else lambda: cancelled(index)
        return _Row(index, prompt.length, decoding, room, ends, stream, is_cancelled)

    def _run(self, prompts: Sequence[Prompt], rows: Sequence["_Row"]) -> None:
        config = GenerationConfig(
            max_new_tokens=max(row.room for row in rows),
            do_sample=False,
            num_beams=1,
            temperature=1.0,
            top_p=1.0,
            top_k=50,
            pad_token_id=self.processor.pad_token_id,
            eos_token_id=sorted(self.end_ids) or None,
            suppress_tokens=[self.model.config.image_token_id],
        )
        self.model.generate(
            **collate(prompts, self.processor, next(self.model.parameters()).device),
            generation_config=config,
            logits_processor=LogitsProcessorList([Sampler([row.decoding for row in rows])]),
            stopping_criteria=StoppingCriteriaList([_Watch(rows)]),
        )
        for row in rows:
            row.end("cancelled")  # does nothing to rows that have ended


class _Row:
    """One answer in the making."""

    def __init__(
        self,
        index: int,
        prompt_tokens: int,
        decoding: Decoding,
        room: int,
        end_ids: set[int],
        stream: TextStream,
        cancelled: Callable[[], bool] | None,
    ) -> None:
        self.index, self.decoding, self.room = index, decoding, room
        self.finish: Finish | None = None
        self._prompt_tokens, self._end_ids = prompt_tokens, end_ids
        self._stream, self._cancelled = stream, cancelled
        self._ids: list[int] = []

    def push(self, token_id: int) -> None:
        """Take the next token, and end where it is the last."""
        if self.finish is not None:
            return
        self._ids.append(token_id)
        if token_id in self._end_ids:
            self.end("stop")
            return
        self._stream.push(token_id)
        if self._stream.stopped:
            self.end("stop")
        elif len(self._ids) >= self.room:
            self.end("length" if self.room == self.decoding.max_new_tokens else "context")
        elif self._cancelled is not None and self._cancelled():
            self.end("cancelled")

    def end(self, finish: Finish) -> None:
        if self.finish is None:
            self.finish = finish
            self._stream.finish()

    def answer(self) -> Answer:
        assert self.finish is not None
        return Answer(self._stream.text, tuple(self._ids), self.finish, self._prompt_tokens)


class _Watch(StoppingCriteria):
    """Hands each row its newest token and says which rows have ended."""

    def __init__(self, rows: Sequence[_Row]) -> None:
        self._rows = rows

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:  # type: ignore[override]
        """input_ids (B, new tokens so far) -> ended (B,)."""
        for row, token_id in zip(self._rows, input_ids[:, -1].tolist(), strict=True):
            row.push(token_id)
        return torch.tensor([row.finish is not None for row in self._rows], device=input_ids.device)


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
