"""`lapilli chat`: talk with a model about pictures, in the terminal.

Answers go to standard output and everything else to standard error, so that a script gets the answer alone.
"""

import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
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
/image FILE   give a picture to the next question; in the question, <image> says where it stands (else in front)
/reset        forget what was said, and every picture
/save FILE    write the conversation as LLaVA JSON, which `lapilli data show` reads
/help         this list
/quit         leave, as Ctrl-D does; Ctrl-C stops an answer"""


@app.command()
def chat(
    model: Annotated[str, typer.Argument(help="Model folder, run folder, or adapter folder with --base.")],
    image: Annotated[
        list[str] | None, typer.Option(help="Picture for the first question; may be repeated.", metavar="FILE")
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
    missing = next((file for file in image or [] if not Path(file).is_file()), None)
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
        session.add_image(file)
    if message is not None:
        answer = session.ask(message, _write)
        _end(answer)
        return
    _tell(f"{model} on {device}, template {assistant.template.name}; /help lists the commands")
    if session.waiting:
        _tell(f"pictures for the first question: {', '.join(p.name for p in session.waiting)}")
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
    file = rest.strip().strip("'\"")
    if name == "/quit":
        return True
    if name in ("/image", "/save") and not file:
        _tell(f"error: {name} needs a file")
    elif name == "/image":
        width, height = session.add_image(Path(file).expanduser())
        _tell(f"{file}: {width} x {height}, for the next question")
    elif name == "/save":
        session.save(Path(file).expanduser())
        _tell(f"wrote {file}")
    elif name == "/reset":
        session.reset()
        _tell("a new conversation, without pictures")
    elif name == "/help":
        _tell(HELP)
    else:
        _tell(f"error: no command {name}{nearest(name, ('/image', '/reset', '/save', '/help', '/quit'))}; see /help")
    return False


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
