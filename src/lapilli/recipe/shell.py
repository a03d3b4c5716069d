"""Training commands in shell scripts, as LLaVA and its relatives are started.

Nothing is run: lines are joined, comments left out, and what the script itself sets is filled in. Variables that it
does not set stay as they are, and are named.
"""

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass

from lapilli.base.errors import RecipeError

_SEPARATORS = frozenset({"&&", "||", ";", "|", "&"})
_LAUNCHERS = frozenset({"gaudi_spawn.py", "xla_spawn.py", "torch.distributed.run", "torch.distributed.launch"})
_ASSIGNMENT = re.compile(r"[A-Za-z_]\w*=.*", re.DOTALL)
_VARIABLE = re.compile(r"\$(?:(\w+)|\{(\w+)\})")


@dataclass(frozen=True)
class Command:
    """One command that trains. `where` says file and line; `launcher` is what stands before `program`.

    `environment` is what the command or its script sets for it, `unset` names variables that nothing sets.
    """

    where: str
    environment: dict[str, str]
    launcher: tuple[str, ...]
    program: str
    arguments: tuple[str, ...]
    unset: tuple[str, ...]


def read_commands(text: str, name: str) -> list[Command]:
    """Return the training commands of a script, or of one command line, in order.

    A command trains if it runs a Python program and names a model or data to learn from. Raises RecipeError for text
    that a shell would not take.
    """
    found: list[Command] = []
    variables: dict[str, str] = {}
    exported: dict[str, str] = {}
    for number, words in _lines(text, name):
        for part in _parts(words):
            own: dict[str, str] = {}
            rest = part[1:] if part[0] == "export" else part
            while rest and _ASSIGNMENT.fullmatch(rest[0]):
                key, _, value = rest[0].partition("=")
                own[key] = _fill(value, variables)
                rest = rest[1:]
            if not rest:
                variables.update(own)
                if part[0] == "export":
                    exported.update(own)
                continue
            command = _command(rest, variables, f"{name}: line {number}", exported | own)
            if command is not None:
                found.append(command)
    return found


def _lines(text: str, name: str) -> Iterator[tuple[int, list[str]]]:
    """The words of each line, with the number of the line that it begins on; lines that go on are joined."""
    joined, began = "", 0
    for number, line in enumerate([*text.splitlines(), ""], 1):
        began = began if joined else number
        stripped = line.rstrip()
        if stripped.endswith("\\") and not stripped.lstrip().startswith("#"):
            joined += stripped[:-1] + " "
            continue
        try:
            words = shlex.split(joined + line, comments=True)
        except ValueError as error:
            raise RecipeError(f"{name}: line {began}: a shell would not take this: {error}") from error
        joined = ""
        if words:
            yield began, words


def _parts(words: list[str]) -> Iterator[list[str]]:
    """The commands of a line, without what they write to."""
    part: list[str] = []
    for word in words:
        if word in _SEPARATORS:
            if part:
                yield part
            part = []
        elif word.startswith((">", "1>", "2>")):
            break
        else:
            part.append(word)
    if part:
        yield part


def _command(words: list[str], variables: dict[str, str], where: str, environment: dict[str, str]) -> Command | None:
    for i, word in enumerate(words):
        module = i > 0 and words[i - 1] == "-m"
        if not (word.endswith(".py") or module) or word.rpartition("/")[2] in _LAUNCHERS:
            continue
        arguments = tuple(_fill(argument, variables) for argument in words[i + 1 :])
        if not any(re.match(r"--(model[_-]name|data[_-]path)", argument) for argument in arguments):
            return None
        unset = sorted({a or b for argument in arguments for a, b in _VARIABLE.findall(argument)})
        launcher = tuple(_fill(one, variables) for one in words[:i])
        return Command(where, environment, launcher, word, arguments, tuple(unset))
    return None


def _fill(word: str, variables: dict[str, str]) -> str:
    return _VARIABLE.sub(lambda match: variables.get(match[1] or match[2], match[0]), word)
