"""A lapilli model as lmms-eval calls models: `lmms-eval --model lapilli --model_args pretrained=DIR`.

Questions are answered by the shared engine, so that many grow at a time and pictures that are asked about again are
encoded once. Interface: lmms-eval 0.7 (`lmms_eval.api.model.lmms`); what its own models do where the interface leaves
it open is followed: `loglikelihood` gives a loss.
"""

from __future__ import annotations

import logging
import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby
from typing import Any, cast

import numpy as np
import PIL.Image
import torch
from lmms_eval.api.instance import GenerationResult, Instance, TokenCounts
from lmms_eval.api.model import lmms

from lapilli.base.errors import DataError, ModelError, unknown
from lapilli.base.progress import Progress
from lapilli.data.sample import IGNORE, Message, Sample, Text
from lapilli.generate.assistant import load
from lapilli.generate.conversation import read_chat
from lapilli.generate.decoding import Decoding
from lapilli.generate.processor import Prepared, Prompt

log = logging.getLogger(__name__)

_ARGUMENTS = ("pretrained", "base", "template", "dtype", "device", "batch_size")
_USED = ("until", "max_new_tokens", "temperature", "top_p", "top_k", "num_beams", "do_sample")
_MAX_NEW_TOKENS = 1024
"""Where a task does not say: what lmms-eval's own models for LLaVA take."""


class Lapilli(lmms):
    """Any folder that `lapilli.load` reads.

    `pretrained`: the folder; `base`: the model an adapter was trained on; `template`: instead of the folder's own;
    `dtype`: `float32`, `bfloat16` ... (default: float32 on CPU, else bfloat16); `device` and `batch_size` (answers that
    grow at a time) also as lmms-eval's own options. Raises ModelError for an unknown argument or an unusable folder.
    """

    is_simple = True

    def __init__(
        self,
        pretrained: str = "",
        base: str | None = None,
        template: str | None = None,
        dtype: str | None = None,
        device: str | None = None,
        batch_size: int | str | None = None,
        max_batch_size: int | None = None,
        **others: Any,
    ) -> None:
        super().__init__()
        if others:
            raise ModelError(f"--model_args: {unknown('argument', next(iter(others)), _ARGUMENTS)}")
        if not pretrained:
            raise ModelError("--model_args: name the model folder, pretrained=DIR")
        if not str(batch_size or 1).isdigit():
            raise ModelError(f"batch_size: a whole number, not {batch_size}")
        self.batch_size = int(batch_size or 1)
        kind = None if dtype is None else getattr(torch, dtype, None)
        if dtype is not None and not isinstance(kind, torch.dtype):
            raise ModelError(f"dtype: {unknown('dtype', dtype, ('float32', 'bfloat16', 'float16'))}")
        self.assistant = load(pretrained, base, _device(device), kind, template)
        self._ignored: Counter[str] = Counter()

    @property
    def device(self) -> torch.device:
        """Where the model is; lmms-eval gathers counts there."""
        return next(self.assistant.model.parameters()).device

    def generate_until(self, requests: Sequence[Instance]) -> list[GenerationResult]:
        """Answer every request, in order; greedy unless the task sets a temperature.

        A task's `until` strings end an answer and are not part of it. Settings that are not followed are named in the
        log. Raises DataError for pictures that can't be used, ModelError for a prompt longer than the context.
        """
        answers: dict[int, GenerationResult] = {}
        with Progress("answers", len(requests)) as progress:
            for place, answer in self.assistant.engine.stream(self._asked(requests), batch_size=self.batch_size):
                counts = TokenCounts(input_tokens=answer.prompt_tokens, output_tokens=len(answer.token_ids))
                answers[place] = GenerationResult(answer.text, counts)
                self.cache_hook.add_partial("generate_until", requests[place].arguments[:2], answer.text)
                progress.advance()
        for name, count in self._ignored.items():
            log.warning("generation_kwargs: %s is not followed (%d requests)", name, count)
        self._ignored.clear()
        return [answers[place] for place in range(len(requests))]

    def loglikelihood(self, requests: Sequence[Instance]) -> list[GenerationResult]:
        """Per request (loss, whether the model alone would say just this), in lmms-eval's wrapper.

        The loss is the mean over the continuation's tokens, its end included, of the negative log-probability: what
        training would compute if the image token could not be said, and what lmms-eval's tasks take the smallest of
        (its interface speaks of a log-probability, its own models return a loss). Version 0.7 turns pairs into text
        unless they are wrapped.
        """
        made: list[GenerationResult] = []
        with Progress("choices", len(requests)) as progress:
            for _, group in groupby(requests, key=_question):
                choices = list(group)
                made += [GenerationResult(cast(Any, pair)) for pair in self._scored(choices)]
                progress.advance(len(choices))
        return made

    def generate_until_multi_round(self, requests: Sequence[Instance]) -> list[str]:
        """Not offered: raises ModelError."""
        raise ModelError("lapilli answers lmms-eval's tasks of one round only (generate_until, loglikelihood)")

    def _asked(self, requests: Sequence[Instance]) -> Iterator[tuple[int, Prompt, Decoding]]:
        for place, request in enumerate(requests):
            context, settings, visual, *where = request.arguments
            pictures = _pictures(visual, self._document(*where), where)
            yield place, self.assistant.processor.prompt(context, pictures), self._decoding(settings)

    def _document(self, number: int, task: str, split: str) -> Any:
        return self.task_dict[task][split][number]

    def _decoding(self, settings: Mapping[str, Any]) -> Decoding:
        self._ignored.update(name for name in settings if name not in _USED)
        until = settings.get("until") or ()
        drawn = settings.get("do_sample", True)
        beams = int(settings.get("num_beams") or 1)
        temperature = float(settings.get("temperature") or 0.0) if drawn else 0.0
        return Decoding(
            max_new_tokens=int(settings.get("max_new_tokens") or _MAX_NEW_TOKENS),
            temperature=temperature,
            top_p=settings.get("top_p") if temperature else None,
            top_k=settings.get("top_k") if temperature else None,
            num_beams=beams,
            stop=tuple([until] if isinstance(until, str) else until),
        )

    def _scored(self, choices: Sequence[Instance]) -> list[tuple[float, bool]]:
        """(loss, whether it is what greedy decoding says) of each choice of one question, its pictures encoded once."""
        if len(choices[0].arguments) < 6:
            raise ModelError("acc_mutual_info asks for choices without a question; lapilli does not score these")
        context, _, visual, *where = choices[0].arguments
        document = self._document(*where)
        prepared = [self.assistant.processor.picture(picture) for picture in _pictures(visual, document, where)]
        targets = [choice.arguments[1] for choice in choices]
        texts = [target if isinstance(target, str) else str(target(document)) for target in targets]
        pairs = [self._continued(context, prepared, text) for text in texts]
        made: dict[int, tuple[float, bool]] = {}
        # Choices nearly always follow the same tokens; where a tokenizer joins across the border they do not.
        for start in {prompt.input_ids.tobytes(): prompt for prompt, _ in pairs}.values():
            own = [i for i, (prompt, _) in enumerate(pairs) if np.array_equal(prompt.input_ids, start.input_ids)]
            scores = self.assistant.engine.score(start, [pairs[i][1] for i in own])
            longest = max(len(pairs[i][1]) for i in own)
            said = self.assistant.engine.generate([start], Decoding(max_new_tokens=longest))[0].token_ids
            for i, found in zip(own, scores, strict=True):
                made[i] = -float(np.mean(found)), list(said[: len(found)]) == pairs[i][1]
        return [made[i] for i in range(len(pairs))]

    def _continued(self, context: str, pictures: Sequence[Prepared], text: str) -> tuple[Prompt, list[int]]:
        """The prompt and the tokens of an answer, tokenised together as in training."""
        asked = self.assistant.processor.prompt(context, pictures)
        messages, _ = read_chat(context, cast(Any, pictures))
        answered = Sample("choice", (*messages, Message("assistant", (Text(text.strip()),))))
        example = self.assistant.encoder().encode(answered, [picture.size for picture in pictures])
        if example is None:
            raise DataError(f"a choice can't be scored: {text!r:.80}")
        ids, learnt = np.asarray(example.input_ids), np.flatnonzero(np.asarray(example.labels) != IGNORE)
        first, last = int(learnt[0]), int(learnt[-1])
        start = Prompt(ids[:first], asked.tiles, asked.sizes, asked.image_tokens, asked.keys)
        return start, ids[first : last + 1].tolist()


def _question(request: Instance) -> tuple[Any, ...]:
    """What the choices of one question share: their text and their document."""
    return request.arguments[0], *request.arguments[3:]


def _pictures(visual: Any, document: Any, where: Sequence[Any]) -> list[PIL.Image.Image]:
    """A document's pictures. Raises DataError for films and sounds, which lapilli does not take."""
    found = visual(document) if visual is not None else None
    given = [] if found is None else list(found) if isinstance(found, list | tuple) else [found]
    for one in given:
        if not isinstance(one, PIL.Image.Image):
            number, task, split = where
            raise DataError(
                f"{task}, {split}, document {number}: lapilli takes pictures, not {type(one).__name__} ({one!r:.60})"
            )
    return [picture.convert("RGB") for picture in given]


def _device(named: str | None) -> str:
    """The device that lmms-eval names, each process's own GPU where it names none or just `cuda`."""
    if named in (None, "", "cuda") and torch.cuda.is_available():
        return f"cuda:{os.environ.get('LOCAL_RANK', '0')}"
    return named or "cpu"
