"""A tokenizer's own Jinja template as a template of ours: which characters of its rendering are the answers.

The conversation is rendered once, as a whole, since such templates may treat a turn differently by what stands around
it. Answers come from the template's own `{% generation %}` marks; without them each answer must be found verbatim, once
and in order, else the template is refused. To find them, the same conversation is rendered with a placeholder for each
text; what stands between the placeholders must then stand between the texts.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from lapilli.base.errors import DataError, ModelError
from lapilli.data.sample import Image, Message, Sample, Text
from lapilli.data.template import Piece, Span, Template

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Private-use characters: no template trims or looks for them, and text that holds them is refused.
_PICTURE = "\ue000picture\ue001"
_SLOT = re.compile("\ue002([0-9]+)\ue003")
_PRIVATE = re.compile("[\ue000-\ue003]")
_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")

Chat = list[dict[str, str]]
Range = tuple[int, int]
Weighted = tuple[int, int, float]
"""A range and how much its tokens count in the loss."""


def bind(template: Template, tokenizer: PreTrainedTokenizerBase) -> Template:
    """The template filled with the tokenizer's Jinja text, special tokens, end mark and stop strings.

    Raises ModelError if the tokenizer has no chat template.
    """
    source = tokenizer.chat_template
    if isinstance(source, dict):
        source = source.get("default")
    if not isinstance(source, str):
        raise ModelError("template tokenizer: this tokenizer has no chat_template of its own; name another template")
    special = {key: token for key, token in tokenizer.special_tokens_map.items() if isinstance(token, str)}
    bound = template.model_copy(update={"chat_template": source, "special_tokens": special})
    asked = _rendered(bound, _slots(["user"]), True, "template tokenizer")[0]
    answered = _rendered(bound, _slots(["user", "assistant"]), False, "template tokenizer")[0]
    marks = _end_mark(answered, tokenizer)
    return bound.model_copy(update={"answer_prefix": _SLOT.split(asked)[-1], "end_marks": marks, "stop": marks})


def training_spans(template: Template, sample: Sample) -> list[Piece]:
    """Text and pictures of the whole conversation; raises DataError where the answers can't be told from the rest."""
    chat = _chat(template, sample.messages, sample.where)
    text, marked = _rendered(template, chat, False, sample.where)
    answers = marked if _GENERATION.search(template.chat_template or "") else _found(template, chat, text, sample.where)
    turns = [m for m in sample.messages if m.role == "assistant"]
    if len(answers) != len(turns):
        raise DataError(
            f"{sample.where}: the tokenizer's chat template marks {len(answers)} answers where the record has "
            f"{len(turns)}; name another template"
        )
    if any(isinstance(p, Text) and p.weight is not None for m in sample.messages for p in m.parts):
        return _pieces(text, _weighted_parts(template, chat, text, answers, sample), sample.images)
    learnt = [(*span, turn.weight) for span, turn in zip(answers, turns, strict=True) if turn.weight > 0]
    return _pieces(text, learnt, sample.images)


def prompt_spans(template: Template, messages: Sequence[Message], generation_prompt: bool) -> list[Piece]:
    """Text and pictures of a prompt."""
    text, _ = _rendered(template, _chat(template, messages, "prompt"), generation_prompt, "prompt")
    return _pieces(text, [], [p for m in messages for p in m.parts if isinstance(p, Image)])


def _weighted_parts(
    template: Template, chat: Chat, text: str, answers: Sequence[Range], sample: Sample
) -> list[Weighted]:
    """The trained parts of every turn, where the turns give their parts weights of their own.

    An answer's lead counts as its first words do, what ends it as its last. Raises DataError for a turn whose words
    are not found verbatim, once, between the answers around it.
    """
    left, position = list(answers), 0
    learnt: list[Weighted] = []
    for turn, message in zip(chat, sample.messages, strict=True):
        answer = left.pop(0) if message.role == "assistant" else None
        begin, end = answer or (position, left[0][0] if left else len(text))
        position = end if answer else position
        weights = [message.part_weight(p) for p in message.parts if isinstance(p, Text)]
        if not any(weights):
            continue
        places = _places(template, message, turn["content"], text[begin:end], sample.where)
        if answer and places:
            places[0] = (0, *places[0][1:])
            places[-1] = (places[-1][0], end - begin, places[-1][2])
        learnt += [(begin + a, begin + b, weight) for a, b, weight in places if weight > 0]
    return learnt


def _places(template: Template, message: Message, content: str, region: str, where: str) -> list[Weighted]:
    """Where each part's words stand in the rendering `region` of a turn, with their weights."""
    form = next((f for f in (content, content.strip(), content.rstrip(), content.lstrip()) if region.count(f) == 1), "")
    if not form:
        raise DataError(
            f"{where}: the parts of a turn have weights of their own, but its text can't be found verbatim and once in "
            "what the tokenizer's chat template makes of it; name another template"
        )
    first, last = region.index(form), region.index(form) + len(form)
    at = first - content.index(form)
    picture = len(template.image_prefix + _PICTURE + template.image_suffix)
    places = []
    for part in message.parts:
        words = len(part.text) if isinstance(part, Text) else picture
        if isinstance(part, Text):
            begin, end = max(at, first), min(at + words, last)
            places.append((begin, max(begin, end), message.part_weight(part)))
        at += words
    return places


def _chat(template: Template, messages: Sequence[Message], where: str) -> Chat:
    picture = template.image_prefix + _PICTURE + template.image_suffix
    chat = []
    for message in messages:
        if any(isinstance(p, Text) and _PRIVATE.search(p.text) for p in message.parts):
            raise DataError(f"{where}: the text holds characters U+E000 to U+E003, which lapilli keeps for itself")
        content = "".join(p.text if isinstance(p, Text) else picture for p in message.parts)
        chat.append({"role": message.role, "content": content})
    return chat


def _slots(roles: Sequence[str]) -> Chat:
    return [{"role": role, "content": f"\ue002{i}\ue003"} for i, role in enumerate(roles)]


def _rendered(template: Template, chat: Chat, generation_prompt: bool, where: str) -> tuple[str, list[Range]]:
    """The whole conversation as text, and the ranges inside `{% generation %}` where the template marks them."""
    import jinja2
    from transformers.utils.chat_template_utils import render_jinja_template

    if template.chat_template is None:
        raise ModelError("template tokenizer: not filled yet; call Template.bind(tokenizer) first")
    options: dict[str, Any] = dict(template.special_tokens)
    try:
        rendering: Any = render_jinja_template(
            [chat],
            chat_template=template.chat_template,
            add_generation_prompt=generation_prompt,
            return_assistant_tokens_mask=_GENERATION.search(template.chat_template) is not None,
            **options,
        )
    except jinja2.TemplateError as error:
        raise DataError(f"{where}: the tokenizer's chat template refuses this conversation: {error.message}") from error
    (text,), ranges = rendering
    return text, [(start, end) for start, end in ranges[0]] if ranges else []


def _found(template: Template, chat: Chat, text: str, where: str) -> list[Range]:
    """Where each answer, with its end mark, stands in the one full rendering."""
    refusal = (
        f"{where}: the answers can't be found verbatim, once and in order in what the tokenizer's chat template makes "
        "of this conversation; name another template"
    )
    between = _SLOT.split(_rendered(template, _slots([m["role"] for m in chat]), False, where)[0])
    order = [int(i) for i in between[1::2]]
    answers = [i for i, m in enumerate(chat) if m["role"] == "assistant"]
    if sorted(order) != list(range(len(chat))) or [i for i in order if i in answers] != answers:
        raise DataError(refusal)
    if not text.startswith(between[0]):
        raise DataError(refusal)
    position, found = len(between[0]), []
    for i, before, after in zip(order, between[0::2], between[2::2], strict=False):
        end = _end_of(chat[i]["content"], after, text, position, last=i == order[-1])
        if end is None:
            raise DataError(refusal)
        if i in answers:
            found.append((position - len(_lead(before, template)), end + len(_mark(text[end:], template))))
        position = end + len(after)
    return found


def _end_of(content: str, after: str, text: str, position: int, last: bool) -> int | None:
    """Where `content`, as it is or with its blank ends trimmed, ends if it stands here and is followed by `after`."""
    for form in (content, content.strip(), content.rstrip(), content.lstrip()):
        end = position + len(form)
        if text.startswith(form + after, position) and (not last or end + len(after) == len(text)):
            return end
    return None


def _lead(before: str, template: Template) -> str:
    """Blanks before an answer that the prompt does not end with, so that the model has to write them."""
    at = before.rfind(template.answer_prefix) if template.answer_prefix else -1
    lead = before[at + len(template.answer_prefix) :] if at >= 0 else ""
    return lead if lead.isspace() else ""


def _mark(rest: str, template: Template) -> str:
    """The end mark that directly follows an answer, blanks before it included; empty if none does."""
    for mark in template.end_marks:
        blanks = len(rest) - len(rest.lstrip())
        if rest.startswith(mark, blanks):
            return rest[: blanks + len(mark)]
    return ""


def _end_mark(answered: str, tokenizer: PreTrainedTokenizerBase) -> tuple[str, ...]:
    """What ends an answer: the special token that follows the last one, and the tokenizer's end of text."""
    rest = _SLOT.split(answered)[-1].lstrip()
    tokens = [t.content for t in tokenizer.added_tokens_decoder.values() if t.special and t.content]
    marks = sorted((t for t in tokens if rest.startswith(t)), key=len, reverse=True)[:1]
    if isinstance(tokenizer.eos_token, str) and tokenizer.eos_token not in marks:
        marks.append(tokenizer.eos_token)
    return tuple(marks)


def _pieces(text: str, learnt: Sequence[Weighted], pictures: Sequence[Image]) -> list[Piece]:
    """The rendering cut at pictures and where supervision begins and ends."""
    edges = sorted({0, len(text), *(edge for span in learnt for edge in span[:2])})
    left = list(pictures)
    pieces: list[Piece] = []
    for start, end in pairwise(edges):
        weight = max((w for s, e, w in learnt if s <= start and end <= e), default=0)
        for i, run in enumerate(text[start:end].split(_PICTURE)):
            if i:
                pieces.append(left.pop(0))
            if run:
                pieces.append(Span.of(run, weight))
    if left:
        raise DataError("the tokenizer's chat template leaves out pictures of this conversation; name another template")
    return pieces
