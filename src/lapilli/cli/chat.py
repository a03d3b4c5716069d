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
/save FILE    write the conversation: FILE.html or FILE.md to be read, else LLaVA JSON, which /open takes
/open FILE    go on with a conversation that was saved
/help         this list
/quit         leave, as Ctrl-D does; Ctrl-C stops an answer"""

_COMMANDS = tuple(line.split()[0] for line in HELP.splitlines())
_NEED_FILE = ("/image", "/save", "/open")
_MAX_BYTES = 100_000_000
_NUMBERS = {"temperature": float, "top_p": float, "max_new_tokens": int, "seed": int}


@app.command()
def chat(
    model: Annotated[
        str | None, typer.Argument(help="Model folder, run folder, or adapter folder with --base.", show_default=False)
    ] = None,
    image: Annotated[
        list[str] | None,
        typer.Option(help="Picture for the first question, a file or address; may be repeated.", metavar="FILE"),
    ] = None,
    question: Annotated[
        list[str] | None,
        typer.Option(
            "--question",
            "--message",
            "--query",
            help="Ask this, print the answer alone and exit; - reads it from standard input. Repeated: one after the "
            "other, as a conversation.",
            metavar="TEXT",
        ),
    ] = None,
    base: Annotated[
        str | None, typer.Option("--base", "--model-base", help="Model an adapter was trained on.", metavar="DIR")
    ] = None,
    template: Annotated[
        str | None, typer.Option("--template", "--conv-mode", help="Conversation template instead of the model's own.")
    ] = None,
    system: Annotated[str | None, typer.Option(help="System text instead of the template's own.")] = None,
    temperature: Annotated[float, typer.Option(help="0: always the likeliest token.")] = 0.0,
    top_p: Annotated[
        float | None,
        typer.Option("--top-p", "--top_p", help="Draw among the likeliest tokens that add up to this."),
    ] = None,
    num_beams: Annotated[
        int, typer.Option("--num-beams", "--num_beams", help="Search for the likeliest of so many answers.")
    ] = 1,
    max_new_tokens: Annotated[int, typer.Option("--max-new-tokens", "--max_new_tokens", help="Longest answer.")] = 512,
    seed: Annotated[int | None, typer.Option(help="Makes draws repeatable.")] = None,
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:1 ...; auto takes a GPU where there is one.")] = "auto",
    load_8bit: Annotated[
        bool, typer.Option("--load-8bit", help="Hold the language model's layers in 8 bits (bitsandbytes).")
    ] = False,
    load_4bit: Annotated[bool, typer.Option("--load-4bit", help="Hold them in 4 bits, NF4.")] = False,
    debug: Annotated[
        bool, typer.Option("--debug", help="Say of each answer how many tokens it took, and its end.")
    ] = False,
    model_path: Annotated[str | None, typer.Option("--model-path", hidden=True)] = None,
    image_file: Annotated[str | None, typer.Option("--image-file", hidden=True)] = None,
    sep: Annotated[str, typer.Option("--sep", hidden=True)] = ",",
) -> None:
    """Talk with a model about pictures. Without --question, a conversation; /help lists its commands.

    The flags of LLaVA's run_llava and of its terminal chat are taken too.
    """
    bits = held(load_8bit, load_4bit)
    folder = _only(model, model_path)
    files = [*(image or []), *_split(image_file, sep)]
    missing = next((file for file in files if not (_is_address(file) or Path(file).is_file())), None)
    if missing is not None:  # said before the wait for torch and the model
        raise DataError(f"{missing}: no such file")
    questions = _read(question or [])

    import torch

    from lapilli.generate.assistant import load
    from lapilli.generate.decoding import Decoding
    from lapilli.generate.session import Session

    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    decoding = Decoding(max_new_tokens, temperature, top_p, seed=seed, num_beams=num_beams)
    assistant = load(folder, base, device=device, template=template, quantise=bits)
    session = Session(assistant, system, decoding)
    for file in files:
        _add_image(session, file)
    for one in questions:
        _end(session.ask(one, _write), debug)
    if questions:
        return
    _tell(f"{folder} on {device}, template {assistant.template.name}; /help lists the commands")
    if session.waiting:
        _tell(f"pictures for the first question: {', '.join(session.waiting)}")
    _converse(session, debug)


def _only(model: str | None, model_path: str | None) -> str:
    """The model, given in the one way or the other."""
    given = [one for one in (model, model_path) if one]
    if len(given) != 1:
        raise typer.BadParameter("give one model folder: lapilli chat MODEL, or --model-path MODEL")
    return given[0]


def _split(image_file: str | None, sep: str) -> list[str]:
    """The original's list of pictures in one argument; a file of that very name is one picture."""
    if image_file is None or Path(image_file).is_file() or not sep:
        return [image_file] if image_file else []
    return [one.strip() for one in image_file.split(sep) if one.strip()]


def _read(questions: list[str]) -> list[str]:
    """The questions as they are asked: `-` is what stands on standard input, and the original's mark becomes ours."""
    if questions.count("-") > 1:
        raise DataError("--question -: standard input holds one question")
    read = [sys.stdin.read().strip() if one == "-" else one for one in questions]
    if not all(one.strip() for one in read):
        raise DataError("--question: a question is empty")
    return [one.replace("<image-placeholder>", "<image>") for one in read]


def _converse(session: "Session", debug: bool = False) -> None:
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
                if _command(session, line, debug):
                    return
            elif line:
                with _interrupts() as pressed:
                    answer = session.ask(line, _write, pressed)
                _end(answer, debug)
        except LapilliError as error:
            _tell(f"error: {error}")
        except KeyboardInterrupt:
            _tell("\nstopped; the question is not part of the conversation")


def _command(session: "Session", line: str, debug: bool) -> bool:
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
        _end(answer, debug)
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


def _end(answer: "Answer", debug: bool = False) -> None:
    """Close the line of an answer, and say what is to be said about its end."""
    typer.echo()
    if debug:
        _tell(f"tokens: {answer.prompt_tokens} read, {len(answer.token_ids)} written; end: {answer.finish}")
    if answer.note:
        _tell(f"note: {answer.note}")
    elif not answer.text:
        _tell("note: the model gave no answer")
