"""`lapilli chat` as a user has it: one question from a script, and a conversation at a terminal."""

import contextlib
import io
import json
import os
import pty
import select
import signal
import subprocess
import sys
import time

import pytest
from tests.support.tiny import build_parrot, make_picture

from lapilli.cli.main import main
from lapilli.data.read.llava import read

COMMAND = [sys.executable, "-m", "lapilli.cli", "chat"]


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("chat")
    build_parrot(root / "model", " a red dog 음식")
    build_parrot(root / "endless", " one blue bird", endless=True, positions=100_000)
    make_picture(root / "a picture.jpg")
    make_picture(root / "b.png", 40, 50)
    (root / "notes.txt").write_text("no picture")
    return root


def chat(root, *arguments, stdin=""):
    return subprocess.run(
        [*COMMAND, *arguments], cwd=root, input=stdin, capture_output=True, text=True, check=False, timeout=120
    )


class Terminal:
    """A process at a terminal of its own, so that Ctrl-C is the terminal's."""

    def __init__(self, root, *arguments):
        self.seen = ""
        self._mark = 0
        self.pid, self._terminal = pty.fork()
        if self.pid == 0:
            os.chdir(root)
            signal.signal(signal.SIGINT, signal.SIG_DFL)  # whoever started the tests may have it ignored
            os.execvpe(COMMAND[0], [*COMMAND, *arguments], os.environ | {"TERM": "dumb"})

    def expect(self, text, seconds=90):
        """Wait until `text` is written, after what was expected before."""
        until = time.monotonic() + seconds
        while self.seen.find(text, self._mark) < 0:
            left = until - time.monotonic()
            assert left > 0, f"no {text!r} in {self.seen[self._mark :]!r}"
            if select.select([self._terminal], [], [], left)[0]:
                try:
                    piece = os.read(self._terminal, 4096)
                except OSError as error:
                    raise AssertionError(f"ended without {text!r}: {self.seen!r}") from error
                self.seen += piece.decode(errors="replace")
        self._mark = self.seen.find(text, self._mark) + len(text)

    def type(self, text):
        os.write(self._terminal, text.encode())

    def interrupt(self, text):
        """Press Ctrl-C until `text` is written: between writing its prompt and waiting, readline misses a signal."""
        for _ in range(20):
            self.type("\x03")
            with contextlib.suppress(AssertionError):
                self.expect(text, 5)
                return
        self.expect(text, 0.1)

    def status(self, seconds=60):
        """Wait for the end and return the exit status."""
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            if select.select([self._terminal], [], [], 0.1)[0]:
                with contextlib.suppress(OSError):  # the other side is closed
                    os.read(self._terminal, 4096)
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self.pid = None
                return os.waitstatus_to_exitcode(status)
        raise AssertionError(f"still running: {self.seen!r}")

    def __enter__(self):
        return self

    def __exit__(self, *_):
        if self.pid is not None:
            os.kill(self.pid, signal.SIGKILL)
            os.waitpid(self.pid, 0)
        os.close(self._terminal)


def test_one_question_gives_the_answer_alone(root):
    done = chat(root, "model", "--image", "a picture.jpg", "--image", "b.png", "--message", "What is it?")
    assert (done.returncode, done.stdout, done.stderr) == (0, "a red dog 음식\n", "")


def here(root, monkeypatch, *arguments):
    """The same in this process, which has paid for importing PyTorch already; returns the exit status."""
    monkeypatch.chdir(root)
    monkeypatch.setattr(sys, "argv", ["lapilli", *arguments])
    try:
        main()
    except SystemExit as left:
        return left.code
    return 0


def test_options_reach_the_model(root, monkeypatch, capsys):
    decoding = ["--temperature", "0.01", "--top-p", "0.9", "--seed", "1", "--max-new-tokens", "3"]
    assert here(root, monkeypatch, "chat", "endless", "--message", "Hi", "--system", "Be brief.", *decoding) == 0
    out, err = capsys.readouterr()
    assert out == "one blue\n"
    assert "cut after 3 tokens" in err


def test_the_original_flags_are_taken(root, monkeypatch, capsys):
    """Those of run_llava, with its list of pictures in one argument, and of the original's terminal chat."""
    asked = [
        "--query",
        "<image-placeholder> or <image-placeholder>?",
        "--image-file",
        "a picture.jpg;b.png",
        "--sep",
        ";",
    ]
    old = ["--conv-mode", "vicuna_v1", "--top_p", "0.9", "--num_beams", "1", "--max_new_tokens", "9", "--debug"]
    assert here(root, monkeypatch, "chat", "--model-path", "model", *asked, *old) == 0
    out, err = capsys.readouterr()
    assert out == "a red dog 음식\n"
    assert err.startswith("tokens: ")
    assert "end: stop" in err
    one = ["--image-file", "a picture.jpg", "--query", "What?", "--temperature", "0.2", "--num-beams", "1"]
    assert here(root, monkeypatch, "chat", "--model-path", "model", *one) == 0
    assert capsys.readouterr().out == "a red dog 음식\n"


def test_several_questions_and_one_from_standard_input(root, monkeypatch, capsys):
    monkeypatch.setattr("sys.stdin", io.StringIO("What is\nit?\n"))
    asked = ["--image", "b.png", "--question", "-", "--question", "And why?", "--num-beams", "2"]
    assert here(root, monkeypatch, "chat", "model", *asked) == 0
    out, err = capsys.readouterr()
    assert (out, err) == ("a red dog 음식\n" * 2, "")


def test_a_wrong_command_line_is_status_2(root, monkeypatch, capsys):
    for arguments in ([], ["model", "--model-path", "model"]):
        assert here(root, monkeypatch, "chat", *arguments) == 2
        assert "give one model folder" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["model", "--question", " "], "a question is empty"),
        (["model", "--question", "-", "--question", "-"], "holds one question"),
        (["model", "--image-file", "b.png,none.jpg", "--query", "a"], "none.jpg: no such file"),
        (["model", "--image", "none.jpg", "--message", "a"], "none.jpg: no such file"),
        (["model", "--image", "notes.txt", "--message", "a"], "notes.txt"),
        (["nowhere", "--message", "a"], "nowhere: no such folder"),
        (["model", "--template", "vicuna_v2", "--message", "a"], 'unknown template "vicuna_v2" (did you mean'),
        (["model", "--temperature", "-1", "--message", "a"], "temperature must be"),
        (["model", "--base", "model", "--message", "a"], "takes no base"),
        (["model", "--device", "warp", "--message", "a"], "device warp"),
    ],
)
def test_mistakes_are_one_clear_line(root, monkeypatch, capsys, arguments, said):
    assert here(root, monkeypatch, "chat", *arguments) == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("error: ")
    assert said in err
    assert len(err.splitlines()) == 1


@pytest.mark.slow
def test_a_conversation_from_a_pipe_gives_answers_alone(root):
    script = "Hi\n/image b.png\n\n<image>?\n/imag b.png\n/image none.png\n<image>?\n/quit\nnever asked\n"
    done = chat(root, "model", stdin=script)
    assert (done.returncode, done.stdout) == (0, "a red dog 음식\n" * 2)
    assert 'no command /imag (did you mean "/image"?)' in done.stderr
    assert "none.png: no such file" in done.stderr
    assert "1 <image>, but 0 new pictures" in done.stderr


@pytest.mark.slow
def test_commands_that_change_what_was_said(root):
    script = "Hi\n/set temperature x\n/set warmth 1\n/set max_new_tokens 2\n/again\n/system Be brief.\n/history\n"
    script += "/undo\n/undo\n/image http://127.0.0.1:9/a.jpg\n/save talk.json\n/open none.json\n"
    done = chat(root, "model", stdin=script)
    assert (done.returncode, done.stdout) == (0, "a red dog 음식\na re\n")
    said = ("x is not a number", "/set warmth: give temperature", "the answer is always the same", "> Hi\na re",
            "taken back: Hi", "no question was answered yet", "could not be fetched", "nothing to save",
            "none.json")  # fmt: skip
    assert [one for one in said if one not in done.stderr] == []


@pytest.mark.slow
def test_a_conversation_at_a_terminal(root, monkeypatch, capsys):
    with Terminal(root, "model", "--image", "a picture.jpg") as screen:
        screen.expect("pictures for the first question: a picture.jpg")
        screen.expect("> ")
        screen.interrupt("/quit or Ctrl-D leaves")
        screen.type("/help\r")
        screen.expect("/save FILE")
        screen.expect("> ")
        screen.type("What is it?\r")
        screen.expect("a red dog 음식")
        screen.type("/image b.png\r")
        screen.expect("b.png: 40 x 50, for the next question")
        screen.type("And this?\r")
        screen.expect("a red dog 음식")
        screen.type("/save saved.json\r")
        screen.expect("wrote saved.json")
        screen.type("/save saved.json\r")
        screen.expect("exists already")
        screen.type("/reset\r")
        screen.expect("a new conversation")
        screen.type("/save other.json\r")
        screen.expect("nothing to save")
        screen.expect("> ")  # before the prompt the terminal itself, not readline, would take the key
        screen.type("\x04")
        assert screen.status() == 0

    (sample,) = read(root / "saved.json")
    assert [m.text for m in sample.messages][::2] == ["<image>\nWhat is it?", "<image>\nAnd this?"]
    paths = json.loads((root / "saved.json").read_text())[0]["image"]
    assert paths == [str((root / name).resolve()) for name in ("a picture.jpg", "b.png")]
    assert here(root, monkeypatch, "data", "show", "saved.json", "--images", str(root), "--model", "model") == 0
    shown = capsys.readouterr().out
    assert shown.count("a red dog 음식") == 2
    assert "a picture.jpg" in shown


@pytest.mark.slow
def test_ctrl_c_stops_the_answer_and_not_the_program(root):
    with Terminal(root, "endless", "--max-new-tokens", "90000") as screen:
        screen.expect("> ")
        screen.type("Hi\r")
        screen.expect("one blue bird")
        screen.type("\x03")
        screen.expect("note: the answer was stopped")
        screen.expect("> ")
        screen.type("/save stopped.json\r")
        screen.expect("wrote stopped.json")
        screen.type("/quit\r")
        assert screen.status() == 0
    (sample,) = read(root / "stopped.json")
    assert sample.messages[1].text.startswith("one blue bird")
