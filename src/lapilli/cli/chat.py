"""`lapilli chat`: talk with a model about pictures, in the terminal.

Answers go to standard output and everything else to standard error, so that a script gets the answer alone.
"""

import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lapilli.base.errors import DataError, LapilliError, nearest
from lapilli.cli.held import held

if TYPE_CHECKING:
    from lapilli.generate.decoding import Answer
    from lapilli.generate.session import Session

app = typer.Typer(add_completion=False, rich_markup_mode=None)

HELP = """\
/image FILE   give a picture (a file, or an http address) to the next question; <image> in it says where (else in front)
/again        ask the last question again; with a temperature, for another answer
/undo         take the last question and its answer back
/history      what was said
/set A B      temperature, top_p, max_new_tokens or seed, from now on
/system TEXT  another system text; none at all without TEXT
/reset        forget what was said, and every picture
/save FILE    write the conversation as LLaVA JSON, which `lapilli data show` reads
/open FILE    go on with a conversation that was saved
/help         this list
/quit         leave, as Ctrl-D does; Ctrl-C stops an answer"""

_COMMANDS = tuple(line.split()[0] for line in HELP.splitlines())
_NEED_FILE = ("/image", "/save", "/open")
_MAX_BYTES = 100_000_000
_NUMBERS = {"temperature": float, "top_p": float, "max_new_tokens": int, "seed": int}


@app.command()
def chat(
    model: Annotated[str, typer.Argument(help="Model folder, run folder, or adapter folder with --base.")],
    image: Annotated[
        list[str] | None,
        typer.Option(help="Picture for the first question, a file or address; may be repeated.", metavar="FILE"),
    ] = None,
    message: Annotated[str | None, typer.Option(help="Ask this, print the answer and exit.", metavar="TEXT")] = None,
    base: Annotated[str | None, typer.Option(help="Model an adapter was trained on.", metavar="DIR")] = None,
    template: Annotated[str | None, typer.Option(help="Conversation template instead of the model's own.")] = None,
    system: Annotated[str | None, typer.Option(help="System text instead of the template's own.")] = None,
    temperature: Annotated[float, typer.Option(help="0: always the likeliest token.")] = 0.0,
    top_p: Annotated[float | None, typer.Option(help="Draw among the likeliest tokens that add up to this.")] = None,
    max_new_tokens: Annotated[int, typer.Option(help="Longest answer.")] = 512,
    seed: Annotated[int | None, typer.Option(help="Makes draws repeatable.")] = None,
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:1 ...; auto takes a GPU where there is one.")] = "auto",
    load_8bit: Annotated[
        bool, typer.Option("--load-8bit", help="Hold the language model's layers in 8 bits (bitsandbytes).")
    ] = False,
    load_4bit: Annotated[bool, typer.Option("--load-4bit", help="Hold them in 4 bits, NF4.")] = False,
) -> None:
    """Talk with a model about pictures. Without --message, a conversation; /help lists its commands."""
    bits = held(load_8bit, load_4bit)
    missing = next((file for file in image or [] if not (_is_address(file) or Path(file).is_file())), None)
    if missing is not None:  # said before the wait for torch and the model
        raise DataError(f"{missing}: no such file")

    import torch

    from lapilli.generate.assistant import load
    from lapilli.generate.decoding import Decoding
    from lapilli.generate.session import Session

    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    decoding = Decoding(max_new_tokens, temperature, top_p, seed=seed)
    assistant = load(model, base, device=device, template=template, quantise=bits)
    session = Session(assistant, system, decoding)
    for file in image or []:
        _add_image(session, file)
    if message is not None:
        answer = session.ask(message, _write)
        _end(answer)
        return
    _tell(f"{model} on {device}, template {assistant.template.name}; /help lists the commands")
    if session.waiting:
        _tell(f"pictures for the first question: {', '.join(session.waiting)}")
    _converse(session)


def _converse(session: "Session") -> None:
    """Read lines until the user leaves; nothing that goes wrong on the way ends the conversation."""
    with suppress(ImportError):  # line editing, where the platform has it
        import readline  # noqa: F401
    while True:
        try:
            line = input("> " if sys.stdin.isatty() else "").strip()
        except EOFError:
            return
        except KeyboardInterrupt:
            _tell("\n/quit or Ctrl-D leaves")
            continue
        try:
            if line.startswith("/"):
                if _command(session, line):
                    return
            elif line:
                with _interrupts() as pressed:
                    answer = session.ask(line, _write, pressed)
                _end(answer)
        except LapilliError as error:
            _tell(f"error: {error}")
        except KeyboardInterrupt:
            _tell("\nstopped; the question is not part of the conversation")


def _command(session: "Session", line: str) -> bool:
    """Carry out a line that begins with a slash; true if it is the last."""
    name, _, rest = line.partition(" ")
    given = rest.strip().strip("'\"")
    if name == "/quit":
        return True
    if name in _NEED_FILE and not given:
        _tell(f"error: {name} needs a file")
    elif name == "/image":
        width, height = _add_image(session, given)
        _tell(f"{given}: {width} x {height}, for the next question")
    elif name == "/again":
        if session.decoding.temperature == 0:
            _tell("note: at temperature 0 the answer is always the same; /set temperature 0.7")
        with _interrupts() as pressed:
            answer = session.again(_write, pressed)
        _end(answer)
    elif name == "/undo":
        _tell(f"taken back: {session.undo()}")
    elif name == "/history":
        for question, answer, pictures in session.history():
            _tell(f"> {question}" + "".join(f"\n  [{picture}]" for picture in pictures) + f"\n{answer}")
    elif name == "/set":
        _set(session, given)
    elif name == "/system":
        session.system = given or None
        _tell(f"system text: {given}" if given else "the template's own system text")
    elif name == "/save":
        session.save(Path(given).expanduser())
        _tell(f"wrote {given}")
    elif name == "/open":
        session.open(Path(given).expanduser())
        _tell(f"{given}: {session.exchanges} questions and answers; go on")
    elif name == "/reset":
        session.reset()
        _tell("a new conversation, without pictures")
    elif name == "/help":
        _tell(HELP)
    else:
        _tell(f"error: no command {name}{nearest(name, _COMMANDS)}; see /help")
    return False


def _set(session: "Session", given: str) -> None:
    """Change one setting of the answers to come."""
    name, _, value = given.partition(" ")
    if name not in _NUMBERS:
        raise DataError(f"/set {name}: give {', '.join(_NUMBERS)} and a number")
    try:
        number = _NUMBERS[name](value)
    except ValueError as error:
        raise DataError(f"/set {name}: {value or 'nothing'} is not a number") from error
    session.decoding = replace(session.decoding, **{name: number})
    _tell(f"{name} {number}")


def _is_address(text: str) -> bool:
    return text.lower().startswith(("http://", "https://"))


def _add_image(session: "Session", given: str) -> tuple[int, int]:
    """A picture from a file, or from the address that the user typed."""
    if not _is_address(given):
        return session.add_image(Path(given).expanduser())
    from lapilli.serve.remote import RemotePictures

    limits = session.assistant.processor.limits
    # Whoever sits here may reach what this machine reaches: the guards are against strangers.
    remote = RemotePictures(limits.max_bytes if limits else _MAX_BYTES, 60.0, ports=range(1, 65536), allowed=_anywhere)
    return session.add_image(given, remote.fetch(given, given, remote.until()))


def _anywhere(_address: Any) -> bool:
    return True


@contextmanager
def _interrupts() -> Iterator[Callable[[], bool]]:
    """Inside, the first Ctrl-C only makes the yielded function true; the second one interrupts as ever."""
    pressed = False

    def note(_signal: int, _frame: Any) -> None:
        nonlocal pressed
        if pressed:
            raise KeyboardInterrupt
        pressed = True

    before = signal.signal(signal.SIGINT, note)
    try:
        yield lambda: pressed
    finally:
        signal.signal(signal.SIGINT, before)


def _write(piece: str) -> None:
    typer.echo(piece, nl=False)
    sys.stdout.flush()


def _tell(line: str) -> None:
    typer.echo(line, err=True)


def _end(answer: "Answer") -> None:
    """Close the line of an answer, and say what is to be said about its end."""
    typer.echo()
    if answer.note:
        _tell(f"note: {answer.note}")
    elif not answer.text:
        _tell("note: the model gave no answer")
