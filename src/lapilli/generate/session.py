"""A conversation with an assistant, as a terminal or a page holds it: what was said, and what is about to be asked.

The history holds the words of answers and nothing else: no end marks, which the original's chat hands back to the
model doubled, and no questions that got no answer.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import PIL.Image

from lapilli.base.atomic import atomic_write
from lapilli.base.errors import DataError
from lapilli.data.sample import IMAGE_PLACEHOLDER
from lapilli.generate.assistant import Assistant
from lapilli.generate.conversation import open_picture
from lapilli.generate.decoding import Answer, Decoding


@dataclass(frozen=True)
class _Exchange:
    """`question` with `<image>` at each picture; `pictures` opened, and their files."""

    question: str
    answer: str
    pictures: tuple[PIL.Image.Image, ...]
    files: tuple[Path, ...]


@dataclass
class Session:
    """One conversation. Pictures that are added belong to the next question."""

    assistant: Assistant
    system: str | None = None
    decoding: Decoding = field(default_factory=Decoding)
    _said: list[_Exchange] = field(default_factory=list)
    _waiting: list[tuple[Path, PIL.Image.Image]] = field(default_factory=list)

    @property
    def exchanges(self) -> int:
        """Questions answered so far."""
        return len(self._said)

    @property
    def waiting(self) -> list[Path]:
        """Pictures that the next question brings."""
        return [file for file, _ in self._waiting]

    def add_image(self, file: Path | str) -> tuple[int, int]:
        """Open a picture for the next question and return its (width, height). Raises DataError if it can't be used."""
        picture = open_picture(file, self.assistant.processor.limits)
        self._waiting.append((Path(file).resolve(), picture))
        return picture.size

    def ask(
        self,
        question: str,
        stream: Callable[[str], None] | None = None,
        cancelled: Callable[[], bool] | None = None,
    ) -> Answer:
        """Ask, with the pictures that wait: at `<image>` in the question, else in front of it, a line break after each.

        An answer that was stopped is kept as far as it went; without a word of an answer, nothing is kept and the
        pictures wait on. Raises DataError or ModelError, and keeps nothing, if the question can't be asked.
        """
        if self._waiting and IMAGE_PLACEHOLDER not in question:
            question = (IMAGE_PLACEHOLDER + "\n") * len(self._waiting) + question
        places = question.count(IMAGE_PLACEHOLDER)
        if places != len(self._waiting):
            raise DataError(
                f"the question has {places} {IMAGE_PLACEHOLDER}, but {len(self._waiting)} new pictures wait; "
                f"write {IMAGE_PLACEHOLDER} once for each, or leave it out to have them in front"
            )
        messages = [*self._messages(), {"role": "user", "content": question}]
        pictures = [p for said in self._said for p in said.pictures] + [p for _, p in self._waiting]
        answer = self.assistant.answer(messages, pictures, self.decoding, stream=stream, cancelled=cancelled)
        if answer.text:
            files, opened = zip(*self._waiting, strict=True) if self._waiting else ((), ())
            self._said.append(_Exchange(question, answer.text, opened, files))
            self._waiting = []
        return answer

    def reset(self) -> None:
        """Forget what was said, and every picture."""
        self._said, self._waiting = [], []

    def record(self, name: str) -> dict[str, Any]:
        """The conversation as a record of LLaVA's data format; pictures by their full path."""
        turns: list[dict[str, str]] = [{"from": "system", "value": self.system}] if self.system else []
        for said in self._said:
            turns += [{"from": "human", "value": said.question}, {"from": "gpt", "value": said.answer}]
        files = [str(file) for said in self._said for file in said.files]
        image: dict[str, Any] = {"image": files[0] if len(files) == 1 else files} if files else {}
        return {"id": name, **image, "conversations": turns}

    def save(self, file: Path | str) -> None:
        """Write the conversation as a LLaVA JSON file of one record.

        Raises DataError if nothing was said, the file exists or can't be written.
        """
        file = Path(file)
        if not self._said:
            raise DataError("nothing to save yet: no question was answered")
        if file.exists():
            raise DataError(f"{file}: exists already; choose another name")
        try:
            atomic_write(file, json.dumps([self.record(file.stem)], indent=2, ensure_ascii=False) + "\n")
        except OSError as error:
            raise DataError(f"{file}: can't write it ({error.strerror})") from error

    def _messages(self) -> list[dict[str, str]]:
        messages = [{"role": "system", "content": self.system}] if self.system else []
        for said in self._said:
            messages += [{"role": "user", "content": said.question}, {"role": "assistant", "content": said.answer}]
        return messages
