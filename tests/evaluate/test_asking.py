"""How questions reach the engine: grouped, prepared once, and second rounds behind first answers."""

import numpy as np
from tests.support.llava import restore

import lapilli
from lapilli.data.sample import Image
from lapilli.evaluate.asking import by_pictures, continued
from lapilli.evaluate.task import Question
from lapilli.generate.decoding import Answer


def test_questions_about_the_same_pictures_stand_together():
    def question(name, *pictures):
        return Question(id=name, text="", images=pictures)

    a, b, inside = Image(path="a"), Image(path="b"), Image(data=b"bytes")
    asked = [
        question("1", a), question("2", b), question("3"), question("4", a), question("5", a, b), question("6"),
        question("7", inside), question("8", b), question("9", Image(data=b"bytes")),
    ]  # fmt: skip
    groups = [[q.id for q in group] for group in by_pictures(asked)]
    assert groups == [["1", "4"], ["2", "8"], ["3"], ["5"], ["6"], ["7", "9"]]
    many = by_pictures([question(str(i), a) for i in range(600)])
    assert [len(group) for group in many] == [256, 256, 88]


def test_a_second_round_has_the_tokens_of_one_text(tmp_path):
    """As the original, which tokenises prompt, reasoning and what follows as one text; Llama's tokenizer minds."""
    assistant = lapilli.load(restore("tiny-llava-v1.5", tmp_path))
    prompt = assistant.processor.prompt("What is it?")
    said, more = "It is a cat.", " ###\nANSWER:"

    def ids(text):
        return assistant.tokenizer(text, add_special_tokens=False)["input_ids"]

    assert ids(said + more) != ids(said) + ids(more)  # else this shows nothing
    for tail in ([], [assistant.tokenizer.eos_token_id], ids("\nUSER")):  # cut short, ended, ended by a stop string
        answer = Answer(said, (*ids(said), *tail), "stop", prompt.length)
        made = continued(assistant, prompt, answer, more)
        assert made.input_ids.tolist() == [*prompt.input_ids.tolist(), *ids(said + more)]
        assert made.input_ids.dtype == np.int64
