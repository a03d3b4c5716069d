"""The engine's thread: what it brings, what it survives, and how it ends."""

import threading
import time

import pytest

from lapilli.generate.decoding import Answer, Decoding
from lapilli.generate.engine import Engine
from lapilli.serve.worker import Lost, Piece, Wanted, Worker


class Heard:
    """What a Wanted was told."""

    def __init__(self):
        self.events, self.ended = [], threading.Event()

    def take(self, event):
        self.events.append(event)
        if not isinstance(event, Piece):
            self.ended.set()

    @property
    def last(self):
        assert self.ended.wait(20)
        return self.events[-1]

    @property
    def text(self):
        return "".join(e.text for e in self.events if isinstance(e, Piece))


def post(made):
    for wanted, event in made:
        wanted.take(event)


@pytest.fixture
def start():
    workers = []

    def begin(engine, slots=4):
        worker = Worker("test", engine, slots)
        workers.append(worker)
        worker.start(post)
        return worker

    yield begin
    for worker in workers:
        worker.stop()
        assert not worker.alive


def ask(worker, prompt, whole=False, **decoding):
    heard = Heard()
    wanted = Wanted(prompt, Decoding(**decoding), heard.take, whole)
    worker.want([wanted])
    return wanted, heard


def test_pieces_add_up(start, tiny):
    engine = Engine(tiny)
    prompts = [engine.processor.prompt(f"Question {i}?") for i in range(9)]
    expected = engine.generate(prompts, Decoding(9))  # before the worker begins: from then on the model is its own
    worker = start(engine)
    heard = [ask(worker, p, max_new_tokens=9)[1] for p in prompts]
    assert [h.last for h in heard] == expected
    assert [h.text for h in heard] == [a.text for a in expected]


def test_text_is_gathered_where_many_grow(start, parrot, monkeypatch):
    """The first words leave at once and the rest in few pieces; alone, an answer leaves word by word."""
    monkeypatch.setattr("lapilli.serve.worker._GATHER_SECONDS", 30.0)
    monkeypatch.setattr("lapilli.serve.worker._LONGEST_GATHER_SECONDS", 30.0)
    engine = Engine(parrot)
    worker = start(engine)
    prompt = engine.processor.prompt("?")
    alone = ask(worker, prompt)[1]
    assert alone.last.text == alone.text == "a red dog 음식"
    assert len(alone.events) > 4
    together = [ask(worker, prompt)[1] for _ in range(3)]
    assert [h.last.text for h in together] == [h.text for h in together] == ["a red dog 음식"] * 3
    # Whoever begins first or ends last may be alone for a while.
    assert sum(len(h.events) for h in together) < 3 * len(alone.events) - 3


def test_whole_answers_bring_one_piece(start, parrot):
    engine = Engine(parrot)
    heard = ask(start(engine), engine.processor.prompt("?"), whole=True)[1]
    assert heard.last.text == "a red dog 음식"
    assert len([e for e in heard.events if isinstance(e, Piece)]) == 1


def test_padded_batches(start, tiny, monkeypatch):
    """A model without slots is served too, and gives the same answers."""
    engine = Engine(tiny)
    prompts = [engine.processor.prompt(f"{'very ' * i}well?") for i in range(5)]
    expected = engine.generate(prompts, Decoding(9, logprobs=1))
    monkeypatch.setattr(engine.model.language_model.generation_config, "repetition_penalty", 1.0001)
    padded = Engine(tiny)
    assert padded.padded_because
    worker = start(padded, slots=2)
    heard = [ask(worker, p, max_new_tokens=9, logprobs=1)[1] for p in prompts]
    assert [h.last.token_ids for h in heard] == [a.token_ids for a in expected]
    assert [h.text for h in heard] == [a.text for a in expected]


def test_leaving(start, models):
    import lapilli

    engine = Engine(lapilli.load(models / "endless"))
    worker = start(engine, slots=1)
    prompt = engine.processor.prompt("?")
    growing, first = ask(worker, prompt, max_new_tokens=20000)
    waiting, second = ask(worker, prompt, max_new_tokens=20000)
    while not first.events:
        time.sleep(0.005)
    waiting.leave()
    assert second.last.finish == "cancelled"
    assert second.last.token_ids == ()
    assert worker.active == 1
    begun = time.monotonic()
    growing.leave()
    assert first.last.finish == "cancelled"
    assert time.monotonic() - begun < 5  # of minutes that the rest would take
    assert worker.active == 0


def test_a_step_that_fails(start, parrot, monkeypatch, caplog):
    engine = Engine(parrot)
    worker = start(engine)
    prompt = engine.processor.prompt("?")
    assert isinstance(ask(worker, prompt)[1].last, Answer)
    embed = type(engine.model).embed

    def broken(*_args, **_kwargs):
        raise RuntimeError("out of memory")

    monkeypatch.setattr(type(engine.model), "embed", broken)
    assert isinstance(ask(worker, prompt)[1].last, Lost)
    monkeypatch.setattr(type(engine.model), "embed", embed)
    assert ask(worker, prompt)[1].last.text == "a red dog 음식"
    assert worker.failures == 1
    assert "out of memory" in caplog.text


def test_the_end_leaves_nobody_waiting(models):
    import lapilli

    engine = Engine(lapilli.load(models / "endless"))
    worker = Worker("test", engine, 1)
    worker.start(post)
    prompt = engine.processor.prompt("?")
    heard = [ask(worker, prompt, max_new_tokens=20000)[1] for _ in range(3)]
    worker.stop()
    assert all(isinstance(h.last, Lost) for h in heard)
    assert not worker.alive
