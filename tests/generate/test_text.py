import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.support.parts import make_tokenizer
from tests.support.tiny import PARTS

from lapilli.data.tokenizer import load_tokenizer
from lapilli.generate.text import TextStream, Vocabulary

TOKENIZERS = {"byte-level": make_tokenizer(), "byte-fallback": load_tokenizer(PARTS / "llama-base")}
VOCABULARIES = {name: Vocabulary(t) for name, t in TOKENIZERS.items()}


def run(name, ids, stop=()):
    """The stream after all ids, the pieces it gave out, and how many ids it took."""
    pieces: list[str] = []
    stream = TextStream(VOCABULARIES[name], stop, pieces.append)
    taken = 0
    for i in ids:
        stream.push(i)
        taken += 1
        if stream.stopped:
            break
    stream.finish()
    return stream, pieces, taken


def ids_of(name, text):
    return TOKENIZERS[name](text, add_special_tokens=False)["input_ids"]


@pytest.mark.parametrize("name", TOKENIZERS)
@settings(max_examples=150, deadline=None)
@given(text=st.text(alphabet="ab .\n#é음식😀🇰🇷", max_size=30))
def test_pieces_add_up_to_the_text_and_are_never_broken(name, text):
    stream, pieces, _ = run(name, ids_of(name, text))
    assert stream.text == text.strip()
    assert "".join(pieces) == stream.text
    assert not any("\ufffd" in piece for piece in pieces)


@pytest.mark.parametrize("name", TOKENIZERS)
@settings(max_examples=150, deadline=None)
@given(text=st.text(alphabet="ab#\n 음", max_size=30), stop=st.lists(st.sampled_from(["###", "#a", "b\n", "음a"])))
def test_a_stop_string_ends_the_text_and_is_never_shown(name, text, stop):
    stream, pieces, taken = run(name, ids_of(name, text), stop)
    at = [text.find(s) for s in stop if s in text]
    assert stream.stopped == bool(at)
    # Cut at the stop string that begins first, of those that were there when the stream stopped.
    assert stream.text == (text[: min(at)] if at else text).strip()
    assert "".join(pieces) == stream.text
    if not at:
        assert taken == len(ids_of(name, text))


@pytest.mark.parametrize("name", TOKENIZERS)
@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_any_ids_give_what_the_tokenizer_decodes(name, data):
    """Random models say bytes that are no characters."""
    size = len(TOKENIZERS[name])
    ids = data.draw(st.lists(st.integers(0, size + 5), max_size=20))
    stream, pieces, _ = run(name, ids)
    assert "".join(pieces) == stream.text
    whole = TOKENIZERS[name].decode(ids, skip_special_tokens=True).strip()
    # One byte that is no character spoils all bytes around it in a byte-fallback decoder; ours were shown by then.
    assert stream.text == whole or "\ufffd" in whole


def test_characters_of_several_tokens_come_whole():
    ids = ids_of("byte-fallback", "a 😀 b")
    assert len(ids) > 5
    _, pieces, _ = run("byte-fallback", ids)
    assert "".join(pieces) == "a 😀 b"
    assert any("😀" in p for p in pieces)


def test_a_stop_string_over_several_tokens_is_held_back():
    ids = ids_of("byte-level", "a red dog")
    stream, pieces, _ = run("byte-level", ids, ("d do",))
    assert (stream.text, pieces) == ("a re", ["a", " re"])


def test_what_might_have_been_a_stop_string_is_shown_in_the_end():
    stream, pieces, _ = run("byte-level", ids_of("byte-level", "so #"), ("###",))
    assert not stream.stopped
    assert stream.text == "so #" == "".join(pieces)
