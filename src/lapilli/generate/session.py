"""A conversation with an assistant, as a terminal or a page holds it: what was said, and what is about to be asked.

The history holds the words of answers and nothing else: no end marks, which the original's chat hands back to the
model doubled, and no questions that got no answer.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import PIL.Image

from lapilli.base.atomic import atomic_write
from lapilli.base.errors import DataError
from lapilli.data.read.llava import read
from lapilli.data.sample import IMAGE_PLACEHOLDER, Image
from lapilli.generate.assistant import Assistant
from lapilli.generate.conversation import open_picture
from lapilli.generate.decoding import Answer, Decoding
from lapilli.generate.export import Said, as_html, as_markdown


@dataclass(frozen=True)
class _Shown:
    """A picture, and its file's full path or the address it came from; only a file can be named in a saved record."""

    name: str
    picture: PIL.Image.Image
    is_file: bool = True


@dataclass(frozen=True)
class _Exchange:
    """`question` with `<image>` at each picture."""

    question: str
    answer: str
    pictures: tuple[_Shown, ...]


@dataclass
class Session:
    """One conversation. Pictures that are added belong to the next question."""

    assistant: Assistant
    system: str | None = None
    decoding: Decoding = field(default_factory=Decoding)
    _said: list[_Exchange] = field(default_factory=list)
    _waiting: list[_Shown] = field(default_factory=list)
    _repeats: int = 0

    @property
    def exchanges(self) -> int:
        """Questions answered so far."""
        return len(self._said)

    @property
    def waiting(self) -> list[str]:
        """Pictures that the next question brings: their files' names, or their addresses."""
        return [Path(one.name).name if one.is_file else one.name for one in self._waiting]

    def add_image(self, file: Path | str, data: bytes | None = None) -> tuple[int, int]:
        """Open a picture for the next question and return its (width, height); with `data`, `file` is its address.

        Raises DataError if it can't be used.
        """
        picture = open_picture(file if data is None else data, self.assistant.processor.limits)
        name = str(Path(file).resolve()) if data is None else str(file)
        self._waiting.append(_Shown(name, picture, data is None))
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
        shown = [*(one for said in self._said for one in said.pictures), *self._waiting]
        decoding = self.decoding
        if decoding.seed is not None:
            decoding = replace(decoding, seed=(decoding.seed + self._repeats) % 2**63)
        pictures = [one.picture for one in shown]
        answer = self.assistant.answer(messages, pictures, decoding, stream=stream, cancelled=cancelled)
        if answer.text:
            self._said.append(_Exchange(question, answer.text, tuple(self._waiting)))
            self._waiting = []
        return answer

    def undo(self) -> str:
        """Take the last question and its answer back, and return the question; its pictures wait again.

        Raises DataError if nothing was said.
        """
        if not self._said:
            raise DataError("no question was answered yet")
        last = self._said.pop()
        self._waiting = [*last.pictures, *self._waiting]
        return last.question

    def again(self, stream: Callable[[str], None] | None = None, cancelled: Callable[[], bool] | None = None) -> Answer:
        """Ask the last question again, a seed's draws anew; the old answer stays if there is no other one.

        Raises DataError if nothing was said.
        """
        said, waiting = list(self._said), list(self._waiting)
        self._waiting = []
        question = self.undo()
        self._repeats += 1
        before = len(self._said)
        try:
            return self.ask(question, stream, cancelled)
        finally:
            if len(self._said) == before:
                self._said = said
            self._waiting = waiting

    def reset(self) -> None:
        """Forget what was said, and every picture."""
        self._said, self._waiting = [], []

    def history(self) -> list[tuple[str, str, list[str]]]:
        """(question, answer, names of its pictures) of each exchange."""
        return [(one.question, one.answer, [shown.name for shown in one.pictures]) for one in self._said]

    def open(self, file: Path | str) -> None:
        """Go on with a conversation that `save` wrote, instead of this one.

        Raises DataError, and changes nothing, if the file or one of its pictures can't be read.
        """
        file = Path(file)
        samples = list(read(file))
        if len(samples) != 1:
            raise DataError(f"{file}: holds {len(samples)} conversations; one can be gone on with")
        messages = list(samples[0].messages)
        system = messages.pop(0).text if messages and messages[0].role == "system" else None
        if [m.role for m in messages] != ["user", "assistant"] * (len(messages) // 2):
            raise DataError(f"{file}: questions and answers must alternate, and an answer come last")
        said: list[_Exchange] = []
        for asked, answered in zip(messages[::2], messages[1::2], strict=True):
            shown = tuple(self._opened(part, file) for part in asked.parts if isinstance(part, Image))
            said.append(_Exchange(asked.text, answered.text, shown))
        self.system, self._said, self._waiting = system, said, []

    def _opened(self, image: Image, file: Path) -> _Shown:
        """A picture of a saved conversation: a file's, or one that stands in the record, as the page's do."""
        limits = self.assistant.processor.limits
        if image.data is not None:
            return _Shown(f"picture in {file.name}", open_picture(image.data, limits), is_file=False)
        path = file.parent / str(image.path)
        return _Shown(str(path.resolve()), open_picture(path, limits))

    def record(self, name: str) -> dict[str, Any]:
        """The conversation as a record of LLaVA's data format; pictures by their full path, or their address."""
        turns: list[dict[str, str]] = [{"from": "system", "value": self.system}] if self.system else []
        for said in self._said:
            turns += [{"from": "human", "value": said.question}, {"from": "gpt", "value": said.answer}]
        files = [shown.name for said in self._said for shown in said.pictures]
        image: dict[str, Any] = {"image": files[0] if len(files) == 1 else files} if files else {}
        return {"id": name, **image, "conversations": turns}

    def save(self, file: Path | str) -> None:
        """Write the conversation: as HTML or Markdown if the file's name ends so, else as LLaVA JSON of one record.

        HTML holds the pictures; beside the others, those that are no files yet are written as PNG.
        Raises DataError if nothing was said, the file exists or can't be written.
        """
        file = Path(file)
        if not self._said:
            raise DataError("nothing to save yet: no question was answered")
        if file.exists():
            raise DataError(f"{file}: exists already; choose another name")
        try:
            if file.suffix.lower() not in (".html", ".htm"):
                self._keep_pictures(file)
            atomic_write(file, self._written(file))
        except OSError as error:
            raise DataError(f"{file}: can't write it ({error.strerror})") from error

    def _written(self, file: Path) -> str:
        talk = [Said(s.question, s.answer, [(one.name, one.picture) for one in s.pictures]) for s in self._said]
        match file.suffix.lower():
            case ".html" | ".htm":
                return as_html(file.stem, self.system, talk)
            case ".md" | ".markdown":
                return as_markdown(file.stem, self.system, talk)
        return json.dumps([self.record(file.stem)], indent=2, ensure_ascii=False) + "\n"

    def _keep_pictures(self, file: Path) -> None:
        number = 0
        for place, said in enumerate(self._said):
            shown = list(said.pictures)
            for i, one in enumerate(shown):
                if not one.is_file:
                    number += 1
                    kept = file.with_name(f"{file.stem}-{number}.png").resolve()
                    one.picture.save(kept)
                    shown[i] = _Shown(str(kept), one.picture)
            self._said[place] = replace(said, pictures=tuple(shown))

    def _messages(self) -> list[dict[str, str]]:
        messages = [{"role": "system", "content": self.system}] if self.system else []
        for said in self._said:
            messages += [{"role": "user", "content": said.question}, {"role": "assistant", "content": said.answer}]
        return messages
