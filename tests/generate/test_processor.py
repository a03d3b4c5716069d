import PIL.Image
import pytest
import torch
from tests.support.tiny import build_tiny

import lapilli
from lapilli.base.errors import DataError
from lapilli.data.sample import Image, Message, Sample, Text

TEXT = "USER: <image>\nWhat is it? ASSISTANT:"


def test_the_model_takes_what_the_processor_gives(tiny, picture):
    inputs = tiny.processor(text=TEXT, images=[picture], return_tensors="pt")
    tokens = tiny.layout.tokens(93, 57)
    assert (inputs["input_ids"] == tiny.model.config.image_token_id).sum() == tokens
    with torch.no_grad():
        logits = tiny.model(**inputs).logits
    assert logits.shape[:2] == inputs["input_ids"].shape
    again = tiny.processor(text=TEXT, images=PIL.Image.open(picture))
    assert all(torch.equal(inputs[k], again[k]) for k in inputs)


def test_a_prompt_is_the_beginning_of_the_training_text(tiny, picture):
    question, answer = Message("user", (Image("a"), Text("\nWhat is it?"))), Message("assistant", (Text("a dog"),))
    for messages in ((question, answer), (question, answer, Message("user", (Text("Why?"),)), answer)):
        trained = tiny.encoder().encode(Sample("0", messages), [(93, 57)])
        chat = [{"role": m.role, "content": m.text} for m in messages[:-1]]
        prompt = tiny.processor.prompt(chat, [picture])
        assert trained.input_ids[: prompt.length].tolist() == prompt.input_ids.tolist()
        rest = [t for t, label in zip(trained.input_ids, trained.labels, strict=True) if label != -100]
        assert trained.input_ids[prompt.length :].tolist() == rest[-(trained.length - prompt.length) :]


def test_a_batch_is_padded_on_the_left_and_masked(tiny, picture):
    texts = [TEXT, "USER: Hello ASSISTANT:", "USER: <image> and <image>? ASSISTANT:"]
    square = PIL.Image.new("RGB", (40, 40), (200, 10, 10))
    batch = tiny.processor(text=texts, images=[picture, square, picture])
    assert batch["pixel_values"].shape[0] == 3
    assert batch["image_sizes"].tolist() == [[93, 57], [40, 40], [93, 57]]
    nested = tiny.processor(text=texts, images=[[picture], [], [square, picture]])
    assert all(torch.equal(batch[k], nested[k]) for k in batch)
    with torch.no_grad():
        together = tiny.model(**batch).logits[:, -1]
        for row, (text, own) in enumerate(zip(texts, ([picture], None, [square, picture]), strict=True)):
            alone = tiny.processor(text=text, images=own)
            length = alone["input_ids"].shape[1]
            assert batch["attention_mask"][row].tolist() == [0] * (batch["input_ids"].shape[1] - length) + [1] * length
            assert torch.allclose(tiny.model(**alone).logits[0, -1], together[row], atol=1e-4)


def test_places_and_pictures_that_disagree_are_refused(tiny, picture):
    with pytest.raises(DataError, match="1 <image> but 0 pictures"):
        tiny.processor(text=TEXT)
    with pytest.raises(DataError, match="0 <image> but 1 pictures"):
        tiny.processor(text="hello", images=[picture])
    with pytest.raises(DataError, match="text 1: 0 <image> but 1 pictures"):
        tiny.processor(text=["hello", TEXT], images=[[picture], []])
    with pytest.raises(DataError, match="1 lists of pictures for 2 texts"):
        tiny.processor(text=[TEXT, TEXT], images=[[picture]])


def test_a_prompt_without_a_token_is_refused(parrot):
    with pytest.raises(DataError, match="no token"):
        parrot.processor.rendered("")


def test_another_image_token_and_marks_around_pictures(models, picture):
    folder = build_tiny(models / "marked", image_token="<pic>", im_start_end=True)
    marked = lapilli.load(folder)
    tokens = marked.layout.tokens(93, 57)
    ids = marked.tokenizer.convert_tokens_to_ids
    prompt = marked.processor.prompt("What is it?", [picture]).input_ids.tolist()
    at = prompt.index(ids("<pic>"))
    assert prompt[at - 1 : at + tokens + 1] == [ids("<im_start>"), *[ids("<pic>")] * tokens, ids("<im_end>")]
    texts = [f"USER: <im_start>{mark}<im_end>\nWhat is it? ASSISTANT:" for mark in ("<pic>", "<image>")]
    rows = marked.processor(text=texts, images=[picture, picture])["input_ids"]
    assert torch.equal(rows[0], rows[1])
    assert prompt[at - 1 :] == rows[0].tolist()[rows[0].tolist().index(ids("<im_start>")) :]
