"""From tokens, one at a time, to text that may be shown.

A token need not be a whole character, a stop string need not be a whole token, and what a model writes around its
answer (the space after `ASSISTANT:`) is not part of it. So text is held back until nothing that follows can change it;
what is shown piece by piece adds up to exactly the final text.
"""

from collections.abc import Callable, Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase

_BROKEN = "\ufffd"
"""What decoders write for bytes that are not a character, or not one yet."""


class Vocabulary:
    """What of a tokenizer a `TextStream` needs; made once, since asking the tokenizer is slow."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer: Any = tokenizer
        added = tokenizer.added_tokens_decoder
        self.special = {i for i, token in added.items() if token.special} | set(tokenizer.all_special_ids)

    def decode(self, ids: Sequence[int]) -> str:
        return self._tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)


class HeldText:
    """A growing text of which `on_text` is given each new piece, never a part of a stop string.

    `stopped` becomes true at the first stop string; `text` is what there is so far, without it and without blanks at
    its ends.
    """

    def __init__(self, stop: Sequence[str] = (), on_text: Callable[[str], None] | None = None) -> None:
        self.stopped = False
        self._stop = tuple(s for s in stop if s)
        self._on_text = on_text
        self._raw = ""
        self._shown = 0

    @property
    def text(self) -> str:
        return self._raw[: self._end()].strip() if self.stopped else self._raw.strip()

    def add(self, piece: str) -> None:
        """Take more text; after a stop string, none."""
        if self.stopped:
            return
        self._raw += piece
        self.stopped = self._end() < len(self._raw)
        self._show(self._end() if self.stopped else len(self._raw) - self._possible_stop())

    def finish(self) -> None:
        """Nothing follows: what was held back is text after all."""
        self._show(len(self._raw) if not self.stopped else self._end())

    def _end(self) -> int:
        """Where the first stop string begins; the length of the text if there is none."""
        found = [at for s in self._stop if (at := self._raw.find(s)) >= 0]
        return min(found, default=len(self._raw))

    def _possible_stop(self) -> int:
        """Length of the longest end of the text that may be the beginning of a stop string."""
        longest = 0
        for stop in self._stop:
            for size in range(min(len(stop) - 1, len(self._raw)), longest, -1):
                if self._raw.endswith(stop[:size]):
                    longest = size
                    break
        return longest

    def _show(self, end: int) -> None:
        """Give out the text up to `end`, but blanks only once something follows them."""
        end = len(self._raw[:end].rstrip())
        begin = max(self._shown, len(self._raw) - len(self._raw.lstrip()))
        if end > begin:
            if self._on_text is not None:
                self._on_text(self._raw[begin:end])
            self._shown = end


class TextStream(HeldText):
    """Text of one growing answer, token by token: never a broken character. Special tokens leave no text."""

    def __init__(
        self, vocabulary: Vocabulary, stop: Sequence[str] = (), on_text: Callable[[str], None] | None = None
    ) -> None:
        super().__init__(stop, on_text)
        self._vocabulary = vocabulary
        self._ids: list[int] = []
        # Tokens before `_told` have given their text; decoding begins at `_context`, a little before, because how a
        # token is spelt can depend on the one before it.
        self._context = self._told = 0

    def push(self, token_id: int) -> None:
        """Take the next token."""
        if self.stopped or token_id in self._vocabulary.special:
            return
        self._ids.append(token_id)
        before, after = self._decoded()
        if after.endswith(_BROKEN):
            return  # perhaps the first bytes of a character
        self._take(after[len(before) :])

    def finish(self) -> None:
        """No token follows: what was held back is text after all."""
        if not self.stopped:
            before, after = self._decoded()
            self._take(after[len(before) :])
        super().finish()

    def _decoded(self) -> tuple[str, str]:
        decode = self._vocabulary.decode
        return decode(self._ids[self._context : self._told]), decode(self._ids[self._context :])

    def _take(self, piece: str) -> None:
        if piece:  # decoding from a token that leaves no text would take the next one for the beginning of a text
            self._context = self._told
        self._told = len(self._ids)
        self.add(piece)


THINK, THOUGHT = "<think>", "</think>"


def without_thinking(text: str) -> tuple[str, str]:
    """What a model thought aloud and what it answered: the text up to the last `</think>`, and the rest.

    A thought that was never finished is no answer. Text without these marks is an answer as it is.
    """
    thought, mark, answer = text.rpartition(THOUGHT)
    if mark:
        return thought.removeprefix(THINK).strip(), answer.strip()
    if text.startswith(THINK):
        return text.removeprefix(THINK).strip(), ""
    return "", text
