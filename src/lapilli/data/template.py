"""Templates: from a conversation to text whose every character is known to be supervised or not.

A `Template` is data: what stands around the system text, a question and an answer. It is stored whole in a model
folder, so that training, evaluation, chat and the exported Jinja template render the same text for ever after.
Supervision comes from the spans made here, never from counting tokens. Nothing here imports torch.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Literal

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError, model_validator

from lapilli.base.errors import DataError, RecipeError, nearest, unknown
from lapilli.data.sample import IMAGE_PLACEHOLDER, Image, Message, Sample, Text
from lapilli.data.templates import TABLE

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

IM_START, IM_END = "<im_start>", "<im_end>"
TOKENIZER = "tokenizer"
"""Name of the template that uses the tokenizer's own `chat_template`."""


@dataclass(frozen=True, slots=True)
class Span:
    """A piece of rendered text; `supervised` text is what the model learns to write.

    `weight` (above 0) is how much its tokens count in the loss where it is supervised.
    """

    text: str
    supervised: bool = False
    weight: float = 1.0

    @classmethod
    def of(cls, text: str, weight: float) -> Span:
        """A span that is supervised if `weight` is above 0."""
        return cls(text, True, float(weight)) if weight > 0 else cls(text)


Piece = Span | Image


class Marks(BaseModel):
    """What stands around the parts of a conversation. Supervised: `answer_lead`, the answer, `answer_end`."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    system_prefix: str = ""
    system_suffix: str = ""
    """Both are left out, with the text between them, where there is no system text."""
    first_user_prefix: str | None = None
    """Before the first question, where it differs from `user_prefix`."""
    user_prefix: str = ""
    user_suffix: str = ""
    answer_prefix: str = ""
    """The prompt ends with this; the model goes on from here."""
    answer_lead: str = ""
    """What the model writes before the answer's first word, such as the space after `ASSISTANT:`."""
    answer_end: str = ""
    """The mark that ends an answer."""
    answer_tail: str = ""
    """Text after the end mark that the model does not have to write."""


class Template(Marks):
    """How a conversation becomes text. Immutable; one field per thing that templates differ in."""

    name: str
    system: str = ""
    """System text of a conversation that brings none."""
    system_place: Literal["before", "in_first_user"] = "before"
    """`in_first_user`: after the first question's prefix, as Llama 2 has it."""
    image_prefix: str = ""
    image_suffix: str = ""
    """Text around each picture. A picture that is written as literal text is left as it is written."""
    user_text: Literal["keep", "drop"] = "keep"
    """`drop`: of a question only its pictures remain, bare, and there is one exchange (LLaVA's `plain`)."""
    opening_answer: Literal["keep", "drop"] = "keep"
    """What happens to an answer before the first question. LLaVA drops it wherever its template has a mask branch."""
    examples: tuple[tuple[str, str], ...] = ()
    """Questions and answers shown before the conversation, in prompts and wherever `training` is not set."""
    stop: tuple[str, ...] = ()
    """Generation ends before any of these."""
    training: Marks | None = None
    """Marks of the training text where the original trained on another text than it prompts with; without examples."""
    chat_template: str | None = None
    """A Jinja template to use instead of the marks, as a tokenizer carries it. Of these only `answer_prefix` counts:
    all that stands between a question and the answer to it."""
    special_tokens: dict[str, str] = {}
    """What `chat_template` may refer to, such as `bos_token`."""
    end_marks: tuple[str, ...] = ()
    """With `chat_template`: tokens that end an answer and are supervised where they follow it."""

    @model_validator(mode="after")
    def _possible(self) -> Template:
        if self.examples and self.system_place == "in_first_user":
            raise ValueError("examples and system_place: in_first_user exclude each other")
        if self.name != TOKENIZER and self.chat_template is None and not (self.answer_end or self.training):
            raise ValueError("answer_end is missing: without an end mark the model never learns to stop")
        return self

    def training_spans(self, sample: Sample) -> list[Piece]:
        """Text and pictures of one conversation as it is trained, in order; the answers and their ends are supervised.

        Raises DataError for a conversation that the template can't hold.
        """
        check_turns(sample.messages, sample.where)
        if self._own_jinja:
            from lapilli.data.chat_template import training_spans

            return training_spans(self, sample)
        if self.training is not None:
            return self._render(sample.messages, self.training, (), sample.where)
        return self._render(sample.messages, self, self.examples, sample.where)

    def prompt_spans(self, messages: Sequence[Message], generation_prompt: bool = True) -> list[Piece]:
        """Text and pictures of a prompt; with `generation_prompt` it ends where the model's answer begins."""
        if self._own_jinja:
            from lapilli.data.chat_template import prompt_spans

            return prompt_spans(self, messages, generation_prompt)
        pieces = self._render(messages, self, self.examples, "prompt")
        if generation_prompt:
            pieces.append(Span(self.answer_prefix))
        return _joined(Span(p.text) if isinstance(p, Span) else p for p in pieces)

    def prompt(self, messages: Sequence[Message], generation_prompt: bool = True) -> str:
        """The prompt as one string, each picture as `<image>`."""
        spans = self.prompt_spans(messages, generation_prompt)
        return "".join(p.text if isinstance(p, Span) else IMAGE_PLACEHOLDER for p in spans)

    def jinja(self, image_token: str = IMAGE_PLACEHOLDER) -> str:
        """This template as a `chat_template` for Hugging Face tokenizers and processors.

        It takes messages whose content is a string or a list of `{"type": "image"}` and `{"type": "text", "text": ...}`
        and renders what `prompt` renders, each picture as `image_token`.
        """
        from lapilli.data.jinja import flattening, turns

        if self._own_jinja:
            return flattening(self, image_token)
        return turns(self, image_token)

    def with_image_marks(self) -> Template:
        """This template with `<im_start>` and `<im_end>` directly around each picture."""
        if self.user_text == "drop":
            return self  # as in the original, where they go with the rest of the question
        return self.model_copy(
            update={"image_prefix": self.image_prefix + IM_START, "image_suffix": IM_END + self.image_suffix}
        )

    def bind(self, tokenizer: PreTrainedTokenizerBase) -> Template:
        """The `tokenizer` template filled with this tokenizer's own `chat_template`; any other one is returned as is.

        Raises ModelError if the tokenizer has none.
        """
        if self.name != TOKENIZER or self.chat_template is not None:
            return self
        from lapilli.data.chat_template import bind

        return bind(self, tokenizer)

    def separate_pictures(self, sample: Sample) -> Sample:
        """LLaVA's `sep_image_conv_front` of June 2023: the first question's pictures become a turn of their own."""
        at = 1 if sample.messages and sample.messages[0].role == "system" else 0
        first = sample.messages[at]
        pictures = tuple(p for p in first.parts if isinstance(p, Image))
        if not pictures:
            return sample
        words = [p for p in first.parts if isinstance(p, Text)]
        if words:
            words[0] = replace(words[0], text=words[0].text.lstrip())
            words[-1] = replace(words[-1], text=words[-1].text.rstrip())
        parts = (*pictures, Text(self.user_suffix + self.user_prefix), *words)
        messages = (*sample.messages[:at], replace(first, parts=parts), *sample.messages[at + 1 :])
        return replace(sample, messages=messages)

    def notes(self, sample: Sample) -> tuple[str, ...]:
        """What the training text leaves out of this conversation, one reason each; empty if nothing."""
        turns = [m for m in sample.messages if m.role != "system"]
        notes = []
        if self.opening_answer == "drop" and turns and turns[0].role == "assistant":
            notes.append("answer before the first question dropped")
        if self.user_text == "drop" and any(p.text for m in turns if m.role == "user" for p in _texts(m)):
            notes.append("question text dropped")
        if self.user_text == "drop" and len(turns) != len(sample.messages):
            notes.append("system text dropped")
        if turns and turns[-1].role == "user":
            notes.append("last question has no answer")
        return tuple(notes)

    @property
    def _own_jinja(self) -> bool:
        return self.name == TOKENIZER or self.chat_template is not None

    def _render(
        self, messages: Sequence[Message], marks: Marks, examples: Iterable[tuple[str, str]], where: str
    ) -> list[Piece]:
        system, turns = _split_system(messages)
        turns = self._kept_turns(turns, where)
        text = self.system if system is None else system.text
        block = marks.system_prefix + text + marks.system_suffix if text and self.user_text == "keep" else ""
        pieces: list[Piece] = []
        if self.system_place == "before":
            pieces.append(Span(block))
            block = ""
        for question, answer in examples:
            shown = Message("assistant", (Text(answer),))
            pieces += [Span(marks.user_prefix + question + marks.user_suffix), *self._answer(marks, shown)]
        first = True
        for message in turns:
            if message.role == "assistant":
                pieces += self._answer(marks, message)
                continue
            prefix = marks.first_user_prefix if first and marks.first_user_prefix is not None else marks.user_prefix
            pieces += [Span(prefix + block), *self._content(message), Span(marks.user_suffix)]
            first, block = False, ""
        return _joined(pieces)

    def _kept_turns(self, turns: Sequence[Message], where: str) -> Sequence[Message]:
        if self.opening_answer == "drop" and turns and turns[0].role == "assistant":
            if any(isinstance(p, Image) for p in turns[0].parts):
                raise DataError(
                    f"{where}: template {self.name} drops an answer before the first question, and this one has a "
                    "picture; move the picture to the first question"
                )
            return turns[1:]
        if self.user_text == "drop" and [m.role for m in turns] not in (["user"], ["user", "assistant"]):
            raise DataError(
                f"{where}: template {self.name} holds one question and one answer, not {len(turns)} turns; "
                "use another template"
            )
        return turns

    def _content(self, message: Message) -> list[Piece]:
        pieces: list[Piece] = []
        for part in message.parts:
            if isinstance(part, Text):
                if self.user_text == "keep" or message.role == "assistant":
                    pieces.append(Span.of(part.text, message.part_weight(part)))
            else:
                weight = message.weight if message.role == "assistant" else 0
                pieces += [Span.of(self.image_prefix, weight), part, Span.of(self.image_suffix, weight)]
        return pieces

    def _answer(self, marks: Marks, message: Message) -> list[Piece]:
        """An answer with what stands around it; its lead counts as its first words do, its end mark as its last."""
        weights = [message.part_weight(p) for p in _texts(message)] or [message.weight]
        inner = [
            Span.of(marks.answer_lead, weights[0]),
            *self._content(message),
            Span.of(marks.answer_end, weights[-1]),
        ]
        return [Span(marks.answer_prefix), *inner, Span(marks.answer_tail)]


TEMPLATES = MappingProxyType(
    {name: Template(name=name, **fields) for name, fields in TABLE.items()} | {TOKENIZER: Template(name=TOKENIZER)}
)
"""Every shipped template by name."""


def get_template(name_or_path: str) -> Template:
    """Return a shipped template, or the one in a user's YAML file (any path that ends in .yaml or .yml).

    The file holds the fields of `Template`; `name` may be left out, and `base: NAME` starts from a shipped one.
    Raises RecipeError naming the nearest valid name or key.
    """
    if name_or_path in TEMPLATES:
        return TEMPLATES[name_or_path]
    path = Path(name_or_path)
    if path.suffix in (".yaml", ".yml"):
        return _read_template(path)
    raise RecipeError(f"{unknown('template', name_or_path, TEMPLATES)}, or the path of a .yaml file")


def check_turns(messages: Sequence[Message], where: str) -> None:
    """Raise DataError unless a system message, if any, comes first and questions and answers alternate."""
    if not messages:
        raise DataError(f"{where}: the conversation is empty; leave the record out")
    for i, message in enumerate(messages):
        if message.role == "system":
            if i:
                raise DataError(f"{where}: turn {i + 1} is a system message; it may only be the first")
        elif i and messages[i - 1].role == message.role:
            raise DataError(
                f"{where}: turns {i} and {i + 1} are both from the {message.role}; questions and answers must alternate"
            )
        if message.role == "assistant" and _blank(message):
            raise DataError(f"{where}: turn {i + 1}, an answer, is empty; write one or leave the exchange out")
    if all(m.role == "system" for m in messages):
        raise DataError(f"{where}: the conversation has a system message only; leave the record out")


def _read_template(path: Path) -> Template:
    try:
        fields = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise RecipeError(f"{path}: can't read this template ({error.strerror})") from error
    except UnicodeDecodeError as error:
        raise RecipeError(f"{path}: can't read this template ({error})") from error
    except yaml.YAMLError as error:
        raise RecipeError(f"{path}: not YAML: {error}") from error
    if not isinstance(fields, dict):
        raise RecipeError(f"{path}: a template file is a mapping of fields such as user_prefix and answer_end")
    base = fields.pop("base", None)
    start = get_template(base).model_dump(exclude_unset=True) if base is not None else {}
    try:
        return Template.model_validate(start | {"name": path.stem} | fields)
    except ValidationError as error:
        raise RecipeError("; ".join(_problem(path, e) for e in error.errors())) from error


def _problem(path: Path, error: object) -> str:
    assert isinstance(error, dict)
    key = ".".join(str(part) for part in error["loc"])
    if error["type"] == "extra_forbidden":
        return f"{path}: {key}: unknown key{nearest(str(error['loc'][-1]), [*Template.model_fields, 'base'])}"
    return f"{path}: {key + ': ' if key else ''}{error['msg']}"


def _split_system(messages: Sequence[Message]) -> tuple[Message | None, Sequence[Message]]:
    if messages and messages[0].role == "system":
        return messages[0], messages[1:]
    return None, messages


def _texts(message: Message) -> list[Text]:
    return [p for p in message.parts if isinstance(p, Text)]


def _blank(message: Message) -> bool:
    return not any(isinstance(p, Image) or p.text.strip() for p in message.parts)


def _joined(pieces: Iterable[Piece]) -> list[Piece]:
    """The same pieces without empty spans, neighbours of one kind made one."""
    out: list[Piece] = []
    alike: list[Span] = []
    """Neighbours of one kind, not yet in `out`."""
    for piece in pieces:
        if isinstance(piece, Span):
            if not piece.text:
                continue
            if not alike or (piece.supervised == alike[0].supervised and piece.weight == alike[0].weight):
                alike.append(piece)
                continue
            out.append(_one(alike))
            alike = [piece]
        else:
            if alike:
                out.append(_one(alike))
                alike = []
            out.append(piece)
    if alike:
        out.append(_one(alike))
    return out


def _one(alike: Sequence[Span]) -> Span:
    first = alike[0]
    return first if len(alike) == 1 else Span("".join([s.text for s in alike]), first.supervised, first.weight)
